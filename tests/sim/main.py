#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The command behind `dev.py sim`: one run, the kept seeds, or a campaign of fresh ones."""

import argparse
import os
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))

from fvdtest.sim import campaign, canary, engine, run, scenario  # noqa: E402

OPERATIONS = ("read", "write", "flush", "trim", "write_zeroes", "status")
DISK = ("read", "write", "flush", "zero", "resize", "status")


def explain(kind: int, a: int, b: int) -> str:
    """One event of a trace."""
    low = kind & 0xFF
    if low < len(DISK):
        return f"  disk {DISK[low]} at sector {a // 512}, {b // 512} sectors"
    if low == 8:
        return f"answer to slot {a}, errno {b}"
    if low == 9:
        return f"answered inline, sector {a}, errno {b}"
    if 16 <= low < 16 + len(DISK):
        return f"  FAULT: {DISK[low - 16]} number {a} fails with errno {b}"
    return f"{OPERATIONS[kind >> 16]} flags {(kind >> 8) & 0xFF}, sectors {a} + {b}"


def one(name: str, seed: int, requests: int, clones: int, check_all: bool) -> int:
    """Make one run and tell all about it."""
    drawn = scenario.draw(name, seed, requests, clones)
    print(drawn.geometry)
    print(drawn.config)
    for session in drawn.sessions:
        print(session)
    result = run.run(drawn, check_all)
    for at, thread, kind, a, b in result.trace:
        print(f"{at / 1e6:14.6f} ms  thread {thread:2}  {explain(kind, a, b)}")
    print({name: count for name, count in result.figures.items() if count})
    print(f"digest {result.digest:016x}")
    if result.failure:
        print(f"FAILED: {result.failure}")
    return 1 if result.failure else 0


def many(names: list[str], first: int, a: argparse.Namespace) -> int:
    """Fresh seeds of each scenario in turn until the time is over; failures are kept."""
    failed = False
    for name in names:
        done = campaign.campaign(
            name, range(first, first + 1_000_000), requests=a.requests, clones=a.clones,
            seconds=a.minutes * 60 / len(names), check_all=a.check_all,
        )  # fmt: skip
        print(f"{name}: {done.summary()}", flush=True)
        for found, seed, why in done.failures:
            failed = True
            campaign.keep(found, seed, why)
            print(f"  {why.splitlines()[-1]}")
            print(f"  again: .venv/bin/python tests/dev.py sim --scenario {found} --seed {seed}")
    return 1 if failed else 0


def told(name: str, outcome: campaign.Outcome) -> str:
    """How a planted bug was caught."""
    _, seed, why = outcome.failures[0]
    how = f"{outcome.seconds:.0f} s: {why.splitlines()[-1]}"
    if canary.by_name(name).test:
        return f"its test, {how}"
    again = f".venv/bin/python tests/dev.py sim --canary {name} --seed {seed}"
    return f"seed {seed}, {how}\n  again: {again}"


def canaries(name: str) -> int:
    """Hunt one planted bug, or all of them."""
    escaped = 0
    for one_name in canary.names() if name == "all" else [name]:
        try:
            outcome = canary.hunt(canary.by_name(one_name))
        except canary.CanaryError as error:
            escaped += 1
            print(f"{one_name}: {str(error)[:400]}", flush=True)
            continue
        if outcome.failures:
            print(f"{one_name}: caught by {told(one_name, outcome)}", flush=True)
        else:
            escaped += 1
            print(f"{one_name}: ESCAPED {outcome.summary()}", flush=True)
    return 1 if escaped else 0


def main() -> int:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="dev.py sim", description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, help="make this one run; its last steps if it fails")
    parser.add_argument("--scenario", choices=scenario.SCENARIOS, help="default: all in turn")
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--clones", type=int, default=20)
    parser.add_argument("--first", type=int, help="first seed of a campaign; default: drawn")
    parser.add_argument("--check-all", action="store_true",
                        help="fvdctl's check looks at all crash clones, not some")  # fmt: skip
    parser.add_argument("--canary",
                        help="look for a planted bug, or all; with --seed: that run with it")
    a = parser.parse_args()
    if a.seed is not None:
        try:
            planted = canary.by_name(a.canary) if a.canary else None
        except canary.CanaryError as error:
            parser.error(str(error))
        if planted and planted.test:
            parser.error(f"{planted.name} is looked for by a test: {planted.test}")
        if not os.environ.get("FVD_STEPPED"):
            environment = canary.environment(planted) if planted else engine.environment()
            os.execve(sys.executable, [sys.executable, "-P", *sys.argv], os.environ | environment)
        name = a.scenario or (planted.scenario if planted else "mixed")
        return one(name, a.seed, a.requests, a.clones, a.check_all)
    if a.canary:
        return canaries(a.canary)
    first = a.first if a.first is not None else random.SystemRandom().randrange(1 << 40)
    names = [a.scenario] if a.scenario else list(scenario.SCENARIOS)
    return many(names, first, a)


if __name__ == "__main__":
    sys.exit(main())
