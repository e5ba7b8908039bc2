# SPDX-License-Identifier: Apache-2.0
"""Foreground beside prefetch: the rows that tests/bench/remote.py measures over a shaped link."""

from __future__ import annotations

import json
import os
import statistics
import sys
from typing import Any

from fvdtest import tree
from fvdtest.bench.figures import Row
from fvdtest.bench.limits import against_limit
from fvdtest.bench.programs import run
from fvdtest.bench.stand import Stand, StandError

PROGRAM = tree.ROOT / "tests/bench/remote.py"
LINK = "1000:1"  # Mbit/s, ms
POLICY = "polite"
READ_MAX, FSYNC_MAX = 1.25, 1.5  # the 99th percentile beside prefetch over that without


def measured(quick: bool, *more: str) -> dict[str, Any]:
    """What the program tells of one link; it makes network namespaces."""
    if os.geteuid() != 0:
        raise StandError("only root can make a network namespace with a shaped link")
    seconds, turns = ("2", "1") if quick else ("10", "5")
    told = run(["unshare", "-n", sys.executable, "-P", str(PROGRAM), "--links", LINK,
                "--policies", POLICY, "--seconds", seconds, "--turns", turns, *more])  # fmt: skip
    found: dict[str, Any] = json.loads(told.splitlines()[-1])
    return found


def turns_of(found: dict[str, Any]) -> list[int]:
    return [turn for turn in range(len(found)) if f"{POLICY}{turn}" in found]


def prefetch_fg(stand: Stand, quick: bool) -> list[Row]:
    """Random reads, an open loop at a fifth of the link."""
    found = measured(quick)
    ratios = [found[f"{POLICY}{at}"]["p99"] / found[f"alone{at}"]["p99"]
              for at in turns_of(found)]  # fmt: skip
    return [against_limit("prefetch-fg", statistics.median(ratios), READ_MAX, "x")]


def prefetch_fsync(stand: Stand, quick: bool) -> list[Row]:
    """Writes of 4 KiB with a flush after each, on a clone that lies on the stand's disk."""
    found = measured(quick, "--fsync", str(stand.directory))
    ratios = [found[f"{POLICY}{at}"]["ratio"] for at in turns_of(found)]
    return [against_limit("prefetch-fsync", statistics.median(ratios), FSYNC_MAX, "x")]
