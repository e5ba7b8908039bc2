# SPDX-License-Identifier: Apache-2.0
"""A process that makes runs of the simulator, one line before and one after each.

A deadlock or a broken invariant of the engine ends the process; the campaign, which reads the
lines, then knows the seed.

`python -P work.py SCENARIO FIRST COUNT STEP CPU REQUESTS CLONES CHECK_ALL`.
"""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import fvdcore  # noqa: E402
from fvdtest.sim import run, scenario  # noqa: E402


def main(arguments: list[str]) -> None:
    """Make the runs FIRST, FIRST + STEP, ... of a scenario."""
    name = arguments[0]
    first, count, step, cpu, requests, clones, check_all = map(int, arguments[1:])
    # One thread of the simulator runs at a time: on one processor a switch costs a third.
    os.sched_setaffinity(0, {cpu})
    run.stepped()
    wanted = os.environ.get("FVD_CANARY")
    if wanted and not str(fvdcore.__file__).startswith(wanted):
        raise SystemExit(f"fvdcore is {fvdcore.__file__}, not the planted one of {wanted}")
    for seed in range(first, first + count * step, step):
        print(f"begin {seed}", flush=True)
        result = run.run(scenario.draw(name, seed, requests, clones), bool(check_all))
        print(f"end {json.dumps(asdict(result))}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
