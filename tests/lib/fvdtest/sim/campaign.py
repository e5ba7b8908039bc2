# SPDX-License-Identifier: Apache-2.0
"""Many runs at once: processes that make them, what they found, and the seeds that once failed."""

import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from fvdtest.sim import engine

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[3]
SEEDS = ROOT / "tests/sim/seeds.txt"
BATCH = 50
LARGE_BATCH = 500  # where all seeds are run anyway: to begin a process takes longer than a run
FIRST_BATCH = 10
SILENCE_S = 120


@dataclass(slots=True)
class Outcome:
    """What a campaign did."""

    runs: int = 0
    seconds: float = 0.0
    totals: Counter[str] = field(default_factory=Counter)
    seen: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[str, int, str]] = field(default_factory=list)
    digests: dict[int, int] = field(default_factory=dict)

    def summary(self) -> str:
        """One line for a person."""
        t = self.totals
        return (
            f"{self.runs} runs, {t['requests']} requests, {t['ios']} writes and flushes, "
            f"{t['clones']} crash clones, {t['verified']} seen by fvdctl's check, "
            f"{t['fault'] + t['base_fault']} faults, "
            f"{len(self.failures)} failures, {self.seconds:.0f} s"
        )


class Worker:
    """A process with a share of the seeds; it is started again behind a seed that killed it."""

    def __init__(
        self, scenario: str, seeds: range, cpu: int, size: tuple[int, ...],
        environment: Mapping[str, str],
    ) -> None:  # fmt: skip
        self.scenario = scenario
        self.seeds = seeds
        self.cpu = cpu
        self.size = size
        self.environment = environment
        self.current: int | None = None
        self.process: subprocess.Popen[str] | None = None
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by stop()
        self.heard = time.monotonic()

    def start(self) -> IO[str]:
        """Begin with the first of the seeds that are left; what the process prints."""
        self.errors.seek(0)
        self.errors.truncate()
        argv = [
            sys.executable, "-P", HERE / "work.py", self.scenario, self.seeds.start,
            len(self.seeds), self.seeds.step, self.cpu, *self.size,
        ]  # fmt: skip
        self.heard = time.monotonic()
        self.process = subprocess.Popen(
            [str(word) for word in argv], stdout=subprocess.PIPE, stderr=self.errors, text=True,
            env={**os.environ, **self.environment},
        )  # fmt: skip
        assert self.process.stdout is not None
        return self.process.stdout

    def take(self, line: str, outcome: Outcome) -> None:
        """One line of the process."""
        self.heard = time.monotonic()
        word, _, rest = line.partition(" ")
        if word == "begin":
            self.current = int(rest)
            self.seeds = range(self.current + self.seeds.step, self.seeds.stop, self.seeds.step)
            return
        result = json.loads(rest)
        self.current = None
        outcome.runs += 1
        outcome.digests[result["seed"]] = result["digest"]
        for name, count in result["figures"].items():
            outcome.totals[name] += count
            outcome.seen[name] += bool(count)
        if result["failure"]:
            outcome.failures.append((self.scenario, result["seed"], result["failure"]))

    def ended(self, outcome: Outcome) -> None:
        """The process is gone; a seed that was being run has failed."""
        assert self.process is not None
        status = self.process.wait()
        self.errors.seek(0)
        said = self.errors.read().strip()
        if self.current is not None:
            why = said or f"the process ended with status {status}"
            outcome.failures.append((self.scenario, self.current, why))
            outcome.runs += 1
            self.current = None
        elif status:
            raise RuntimeError(f"the simulator does not start (status {status}): {said}")
        self.process = None

    def stop(self) -> None:
        """End the process, whatever it does."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            if self.process.stdout is not None:
                self.process.stdout.close()
            self.process = None
        self.errors.close()


def shares(seeds: range, parts: int) -> Iterator[range]:
    """Split seeds evenly."""
    for part in range(parts):
        share = seeds[part::parts]
        if len(share):
            yield share


def listen(workers: list[Worker], outcome: Outcome, deadline: float) -> None:
    """Take the workers' lines until all have ended or the time is over."""
    with selectors.DefaultSelector() as selector:
        for worker in workers:
            selector.register(worker.start(), selectors.EVENT_READ, worker)
        while selector.get_map() and time.monotonic() < deadline:
            for key, _ in selector.select(1.0):
                worker = key.data
                line = worker.process.stdout.readline()
                if line:
                    worker.take(line, outcome)
                    continue
                selector.unregister(key.fileobj)
                worker.process.stdout.close()
                worker.ended(outcome)
                if len(worker.seeds):
                    selector.register(worker.start(), selectors.EVENT_READ, worker)
            for worker in workers:
                if worker.process and time.monotonic() - worker.heard > SILENCE_S:
                    worker.process.kill()  # it ends with its seed as the failure


def campaign(
    scenario: str, seeds: range, *, requests: int = 300, clones: int = 20,
    seconds: float = 1e9, environment: Mapping[str, str] | None = None, stop_early: bool = False,
    check_all: bool = False,
) -> Outcome:  # fmt: skip
    """Make the runs of all seeds on all processors, or as many as the time allows.

    check_all: fvdctl's check looks at each state that the simulator looks at, not at a share.
    """
    outcome = Outcome()
    environment = environment or engine.environment()
    begin = time.monotonic()
    cpus = sorted(os.sched_getaffinity(0))
    at = 0
    while at < len(seeds):
        # Where one failure is enough, it comes soon.
        batch = LARGE_BATCH if not stop_early else BATCH if at else FIRST_BATCH
        part = seeds[at : at + batch * len(cpus)]
        at += len(part)
        workers = [
            Worker(scenario, share, cpu, (requests, clones, int(check_all)), environment)
            for share, cpu in zip(shares(part, len(cpus)), cpus, strict=False)
        ]
        try:
            listen(workers, outcome, begin + seconds)
        finally:
            for worker in workers:
                worker.stop()
        if time.monotonic() - begin >= seconds or (stop_early and outcome.failures):
            break
    outcome.totals["requests"] = outcome.totals["inline"] + outcome.totals["crew"]
    outcome.seconds = time.monotonic() - begin
    return outcome


def kept_seeds() -> list[tuple[str, int]]:
    """What failed once: (scenario, seed)."""
    found = []
    for line in SEEDS.read_text().splitlines():
        words = line.partition("#")[0].split()
        if words:
            found.append((words[0], int(words[1])))
    return found


def keep(scenario: str, seed: int, why: str) -> None:
    """Remember a seed that failed, once."""
    if (scenario, seed) in kept_seeds():
        return
    with SEEDS.open("a") as file:
        reason = why.splitlines()[-1][:120]
        file.write(f"{scenario} {seed}  # {reason}\n")
