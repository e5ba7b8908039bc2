# SPDX-License-Identifier: Apache-2.0
"""Servers of ours and of others, the same jobs in turn: ratios, not absolute figures."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

from fvdtest.bench import chart, clients, machine, report
from fvdtest.bench import run as runs_of
from fvdtest.bench.figures import Row, Run
from fvdtest.bench.jobs import BY_NAME, JOBS, Job
from fvdtest.bench.probes import PROBES
from fvdtest.bench.stand import Stand, StandError
from fvdtest.tree import ROOT

QUICK_SECONDS = 0.8
QUICK_BUDGET_SECONDS = 140.0
EXIT_WORSE = 3


def between(kind: Callable[[str], float], low: float, high: float) -> Callable[[str], float]:
    """A parser of numbers above low and below high."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
        if not low < value < high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low:g} and {high:g}")
        return value

    return parse


def arguments(words: list[str]) -> argparse.Namespace:
    """Parse the command line; argparse ends the program where it is wrong."""
    parser = argparse.ArgumentParser(prog="dev.py bench", description=__doc__)
    parser.add_argument("jobs", nargs="*", metavar="JOB", help="only these; --list names all")
    parser.add_argument("--quick", action="store_true", help="in three minutes: fewer and smaller")
    parser.add_argument("--rounds", type=between(int, 0, 1000), help="pairs of runs [5; quick: 3]")
    parser.add_argument("--seconds", type=between(float, 0, 3600), help="length of a run")
    parser.add_argument("--json", type=Path, metavar="FILE", default=ROOT / "build/bench.json")
    parser.add_argument("--chart", type=Path, metavar="FILE", default=ROOT / "build/bench.svg")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="say what differs from it")
    parser.add_argument(
        "--tolerance", type=between(float, 0, 1), default=0.15, help="of --compare [0.15]"
    )
    parser.add_argument("--dir", type=Path, default=ROOT / "build", help="where images are made")
    parser.add_argument("--list", action="store_true", help="name the jobs and end")
    told = parser.parse_args(words)
    unknown = [name for name in told.jobs if name not in BY_NAME and name not in PROBES]
    if unknown:
        parser.error(f"there is no job {unknown[0]}; --list names all")
    return told


def chosen(told: argparse.Namespace) -> list[Job]:
    if told.jobs:
        return [BY_NAME[name] for name in told.jobs if name in BY_NAME]
    return [job for job in JOBS if job.quick or not told.quick]


def chosen_probes(told: argparse.Namespace) -> list[str]:
    """Those that no client command makes."""
    if told.jobs:
        return [name for name in told.jobs if name in PROBES]
    return [name for name, probe in PROBES.items() if probe.in_quick or not told.quick]


def say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


def make_runs(told: argparse.Namespace) -> tuple[list[Run], list[Row], list[str]]:
    """All jobs in turn: runs, rows and what was left out."""
    effort = runs_of.Effort(
        rounds=told.rounds or (3 if told.quick else 5),
        seconds=told.seconds or (QUICK_SECONDS if told.quick else None),
        quick=told.quick,
    )
    limited = told.quick and not told.jobs
    end = time.monotonic() + QUICK_BUDGET_SECONDS if limited else float("inf")
    runs: list[Run] = []
    rows: list[Row] = []
    left_out: list[str] = []
    with Stand(told.dir) as stand:
        for job in chosen(told):
            if time.monotonic() > end:
                left_out.append(f"{job.name}: no time left")
                continue
            try:
                made = runs_of.run_job(stand, job, effort, say)
            except (StandError, clients.ClientError) as error:
                left_out.append(f"{job.name}: {error}")
                continue
            runs += made
            rows += runs_of.rows_of(job, made)
        for name in chosen_probes(told):
            say(name)
            try:
                rows += PROBES[name].rows(stand, told.quick)
            except StandError as error:
                left_out.append(f"{name}: {error}")
    return runs, rows, left_out


def main(words: list[str]) -> int:
    """0: all was run (whether or not targets are reached); 1: something could not be run; 3: worse
    than the run that it was compared with."""
    told = arguments(words)
    if told.list:
        print("\n".join(f"{job.name:18} {job.what}" for job in JOBS))
        print("\n".join(f"{name:18} {probe.what}" for name, probe in PROBES.items()))
        return 0
    try:
        saved = report.load(told.compare) if told.compare else {}
    except report.SavedError as error:
        say(str(error))
        return 2
    about = machine.describe()
    runs, rows, left_out = make_runs(told)
    report.save(told.json, about, runs, rows, left_out)
    told.chart.write_text(chart.draw(rows, f"fvd {about['commit']} against other servers"))
    print(report.table(rows))
    for line in left_out:
        say(f"left out: {line}")
    say(f"saved as {told.json} and {told.chart}; load at the beginning {about['load']:.1f}")
    failed = any(not line.endswith("no time left") for line in left_out)
    if saved:
        lines, worse = report.changes(rows, saved, told.tolerance)
        print("\n".join(["", "against the saved run:", *(lines or ["nothing differs"])]))
        if worse:
            return EXIT_WORSE
    return 1 if failed else 0

