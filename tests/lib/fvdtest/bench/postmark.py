# SPDX-License-Identifier: Apache-2.0
"""PostMark's transactions on a file system of a kernel's device, ours beside qemu-nbd's.

Inside User Mode Linux system calls cost a multiple of what they cost elsewhere, so the ratio says
how many each needs rather than how fast it is; rates mean nothing."""

from __future__ import annotations

import json
import os
import statistics
import sys

from fvdtest import tree
from fvdtest.bench.figures import Row
from fvdtest.bench.programs import run
from fvdtest.bench.stand import Stand, StandError

MACHINE = tree.ROOT / "tests/uml/run.py"
GUEST = tree.ROOT / "tests/bench/postmark.py"
NEW_KERNEL = "~/.cache/fvd/uml/linux"
PEER_NODES = 8  # qemu-nbd takes the last of them, fvdd the first
WANTED = 1.5
MEMORY = "384M"  # less than the files take
LIMIT_SECONDS = 900


def row_of(found: dict[str, list[float]]) -> Row:
    """Ours over theirs, of runs of one round each."""
    ratios = [ours / theirs for ours, theirs in zip(found["fvd"], found["qcow2"], strict=True)]
    return Row(
        "postmark", "fvd-compact", "qcow2", statistics.median(found["fvd"]),
        statistics.median(found["qcow2"]), statistics.median(ratios), min(ratios), max(ratios),
        0.0, 0.0, len(ratios), wanted=WANTED, unit="transactions/s",
    )  # fmt: skip


def postmark(stand: Stand, quick: bool) -> list[Row]:
    """On the newer kernel where `make uml-kernel` has built it."""
    kernel = "new" if os.access(os.path.expanduser(NEW_KERNEL), os.X_OK) else "debian"
    size = ("500", "500", "1") if quick else ("2000", "4000", "5")
    words = [sys.executable, "-P", str(MACHINE), "--kernel", kernel, "--store", "3G",
             "--mem", MEMORY,
             "--timeout", str(LIMIT_SECONDS), "--quiet", "--arg", f"nbd.nbds_max={PEER_NODES}",
             # qemu-nbd keeps the device open while it is mounted.
             "--arg", "bdev_allow_write_mounted=1",
             "--", sys.executable, "-P", str(GUEST), "--files", size[0], "--transactions",
             size[1], "--rounds", size[2],
             "--peer-device", f"/dev/nbd{PEER_NODES - 1}"]  # fmt: skip
    told = run(words).splitlines()
    if not told or not told[-1].startswith("{"):
        raise StandError("\n".join(["the machine told no result", *told[-5:]]))
    return [row_of(json.loads(told[-1]))]
