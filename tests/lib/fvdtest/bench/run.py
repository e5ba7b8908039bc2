# SPDX-License-Identifier: Apache-2.0
"""Runs of one job, server after server, round after round."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from fvdtest.bench import clients, figures, machine
from fvdtest.bench.clients import Measured
from fvdtest.bench.figures import Row, Run
from fvdtest.bench.jobs import MIB, Job, of_quick
from fvdtest.bench.kinds import KINDS, Kind
from fvdtest.bench.stand import Server, Stand

CHAIN_DEPTH = 10
# What an allocating job may write in a second, with room: it is cut short where the disk is full.
BYTES_PER_SECOND_MAX = 1 << 30
Say = Callable[[str], None]


@dataclass(frozen=True)
class Effort:
    """How much a job is run. seconds: of a run; None: as the job wants it."""

    rounds: int = 5
    seconds: float | None = None
    quick: bool = False

    def size(self, job: Job) -> int:
        return job.small if self.quick else job.size

    def duration(self, job: Job, free_bytes: int) -> float:
        """Seconds of one run; less where the disk might not take what is written."""
        timed = "--time_based" in job.options
        wanted = self.seconds if timed and self.seconds is not None else job.seconds
        if job.fresh and timed:
            wanted = min(wanted, max(1.0, free_bytes / 2 / BYTES_PER_SECOND_MAX))
        return wanted

    def servers(self, job: Job) -> tuple[str, ...]:
        """Ours and theirs that take part."""
        names = (*job.ours, *job.peers)
        return of_quick(job, names) if self.quick else names


def make_image(stand: Stand, kind: Kind, job: Job, size: int) -> Path:
    """The image that a job wants of a kind of server."""
    if job.state == "local":
        return stand.local(kind, size)
    if job.state == "empty":
        return stand.empty(kind, size)
    base = stand.random_file(size)
    if job.state == "clone":
        return stand.clone(kind, base)
    return stand.chain(kind, base, CHAIN_DEPTH)


def settle(image: Path) -> None:
    """Let nothing that the run before wrote be written back during this one."""
    descriptor = os.open(image, os.O_RDONLY)
    try:
        os.fdatasync(descriptor)
    finally:
        os.close(descriptor)


def measure(job: Job, server: Server, size: int, seconds: float, round_: int, name: str) -> Run:
    """One run against a server that is up."""
    load = machine.load_now()
    before = machine.cpu_seconds(server.pid)
    if job.copies:
        seen = clients.nbdcopy(server.socket_path, size, job.options)
    else:
        options = (*job.options, f"--size={size}")
        seen = clients.fio(server.socket_path, options, seconds, job.pinned)
    used = machine.cpu_seconds(server.pid) - before
    return to_run(job, name, round_, seen, used, load)


def to_run(
    job: Job, name: str, round_: int, seen: Measured, cpu_seconds: float, load: float
) -> Run:
    """What was seen as the job wants it told."""
    value = seen.bytes_per_second if job.unit == "B/s" else seen.requests_per_second
    if job.by_latency:
        # The more the better, as everywhere: so the inverse.
        value = 1e6 / seen.p999_us if seen.p999_us else 0.0
    return Run(
        job.name, name, round_, value, cpu_seconds / seen.requests * 1e6, seen.requests, load,
        seen.p99_us,
    )  # fmt: skip


def run_kept(stand: Stand, job: Job, effort: Effort, names: Sequence[str], say: Say) -> list[Run]:
    """All servers stay up, each with its image; idle ones use nothing."""
    size = effort.size(job)
    seconds = effort.duration(job, stand.free_bytes())
    runs: list[Run] = []
    with ExitStack() as stack:
        up: dict[str, tuple[Server, Path]] = {}
        for name in names:
            image = make_image(stand, KINDS[name], job, size)
            room = size + 16 * MIB if job.state == "local" else size
            running = stand.running(KINDS[name], image, room, pinned=job.pinned)
            up[name] = (stack.enter_context(running), image)
        for round_ in range(effort.rounds):
            for name in figures.order_of(names, round_):
                server, image = up[name]
                settle(image)
                runs.append(measure(job, server, size, seconds, round_, name))
            say(f"{job.name}: round {round_ + 1} of {effort.rounds}")
    if job.state == "chain":
        for _, image in up.values():
            stand.discard(image)
    return runs


def run_fresh(stand: Stand, job: Job, effort: Effort, names: Sequence[str], say: Say) -> list[Run]:
    """Every run has an image of its own, which is thrown away."""
    size = effort.size(job)
    runs: list[Run] = []
    for round_ in range(effort.rounds):
        for name in figures.order_of(names, round_):
            kind = KINDS[name]
            seconds = effort.duration(job, stand.free_bytes())
            image = make_image(stand, kind, job, size)
            with stand.running(kind, image, size, throwaway=True, pinned=job.pinned) as server:
                runs.append(measure(job, server, size, seconds, round_, name))
            stand.discard(image)
        say(f"{job.name}: round {round_ + 1} of {effort.rounds}")
    return runs


def run_job(stand: Stand, job: Job, effort: Effort, say: Say) -> list[Run]:
    """All rounds of a job."""
    names = effort.servers(job)
    if job.trace:
        job = replace(job, options=(*job.options, f"--read_iolog={stand.unpacked(job.trace)}"))
    run = run_fresh if job.fresh else run_kept
    return run(stand, job, effort, names, say)


def rows_of(job: Job, runs: Sequence[Run]) -> list[Row]:
    """Each server of ours against each peer, with the targets where they belong."""
    rows: list[Row] = []
    for ours in job.ours:
        found = [figures.compare(runs, job.name, ours, peer) for peer in job.peers]
        mine = [replace(row, unit=job.unit) for row in found if row is not None]
        for target in job.targets:
            hardest = figures.fastest if target.speed is not None else figures.leanest
            worst = hardest(mine, target.against)
            if worst is None or ours not in held(job):
                continue
            at = mine.index(worst)
            mine[at] = replace(worst, wanted=target.speed, wanted_cpu=target.cpu)
        rows += mine
    return rows


def held(job: Job) -> tuple[str, ...]:
    """Those of ours that must reach the targets: a raw layout without a base proves nothing."""
    return tuple(name for name in job.ours if name not in ("fvd-raw", "fvd-data"))
