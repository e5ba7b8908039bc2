# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of the suite: ratios of runs made in the same round, medians, verdicts.

Absolute figures mean nothing on a shared machine, so every statement is a median of ratios, each of
two runs that were made one after the other in one round.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Run:
    """One run of a job against one server. value: the more the better (requests or bytes a second);
    cpu_us: the server's processor time a request, 0 where nothing tells."""

    job: str
    server: str
    round: int
    value: float
    cpu_us: float
    requests: int
    load: float
    extra: float = 0.0  # what else the job measures: the 99th percentile in us, for example


@dataclass(frozen=True)
class Row:
    """One server of ours against one peer in one job; ratios are ours over theirs."""

    job: str
    ours: str
    peer: str
    value: float
    peer_value: float
    ratio: float
    low: float
    high: float
    cpu_us: float
    cpu_ratio: float
    pairs: int
    wanted: float | None = None  # ratio at least
    wanted_cpu: float | None = None  # cpu_ratio at most
    unit: str = ""
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the targets are reached; None where there is none."""
        if self.wanted is None and self.wanted_cpu is None:
            return None
        fast = self.wanted is None or self.ratio >= self.wanted
        lean = self.wanted_cpu is None or self.cpu_ratio <= self.wanted_cpu
        return fast and lean

    def as_dict(self) -> dict[str, object]:
        return {**asdict(self), "met": self.met}


def ratio_of(a: float, b: float) -> float:
    """a over b; 0 where there is nothing to divide by."""
    return a / b if b else 0.0


def of_server(runs: Iterable[Run], job: str, server: str) -> dict[int, Run]:
    """The runs of one server by round."""
    return {run.round: run for run in runs if run.job == job and run.server == server}


def compare(runs: Sequence[Run], job: str, ours: str, peer: str) -> Row | None:
    """Medians over the rounds that both took part in; None where there is no such round."""
    mine, theirs = of_server(runs, job, ours), of_server(runs, job, peer)
    rounds = sorted(mine.keys() & theirs.keys())
    if not rounds:
        return None
    ratios = [ratio_of(mine[at].value, theirs[at].value) for at in rounds]
    cpu = [ratio_of(mine[at].cpu_us, theirs[at].cpu_us) for at in rounds]
    return Row(
        job, ours, peer,
        value=statistics.median(mine[at].value for at in rounds),
        peer_value=statistics.median(theirs[at].value for at in rounds),
        ratio=statistics.median(ratios), low=min(ratios), high=max(ratios),
        cpu_us=statistics.median(mine[at].cpu_us for at in rounds),
        cpu_ratio=statistics.median(cpu), pairs=len(rounds),
    )  # fmt: skip


def fastest(rows: Sequence[Row], peers: Sequence[str]) -> Row | None:
    """The row against that peer of those named that leaves us the least ahead."""
    named = [row for row in rows if row.peer in peers]
    return min(named, key=lambda row: row.ratio) if named else None


def leanest(rows: Sequence[Row], peers: Sequence[str]) -> Row | None:
    """The row against that peer whose processor time a request is the hardest to beat."""
    named = [row for row in rows if row.peer in peers]
    return max(named, key=lambda row: row.cpu_ratio) if named else None


def order_of(servers: Sequence[str], round_: int) -> list[str]:
    """Who runs when: every second round backwards, so that nobody always comes after the same."""
    return list(servers) if round_ % 2 == 0 else list(reversed(servers))
