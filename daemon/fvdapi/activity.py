# SPDX-License-Identifier: Apache-2.0
"""What devices are doing: the answers that live views are made of, and rates between two of them.

An answer holds totals; whoever watches asks again and subtracts. Units: bytes, seconds; durations
in buckets by powers of two of nanoseconds (bucket k: 2^k up to 2^(k+1)).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from fvdapi.models import Answer, DeviceState, PrefetchState, Trouble

CELLS_MAX = 512


class Activity(Answer):
    """One device at one moment; from its statistics page, so no worker is asked."""

    name: str
    device: str | None
    image: str
    base: str = ""
    state: DeviceState
    reason: str | None = None
    connections: int = 0
    connections_alive: int = 0
    size_bytes: int = 0
    local_bytes: int = 0
    remaining_bytes: int = 0
    prefetch: PrefetchState = PrefetchState.DISABLED
    prefetch_rate: int = 0
    prefetch_eta: float | None = None
    journal_used_bytes: int = 0
    journal_size_bytes: int = 0
    pending_bytes: int = 0
    in_flight: int = 0
    oldest_seconds: float = 0.0
    fault_errno: int = 0
    base_up: bool = True
    troubles: tuple[Trouble, ...] = ()
    restarts: int = 0
    stalled_seconds: float = 0.0
    # Totals by the names of the statistics page; those that are 0 are left out.
    counters: dict[str, int] = Field(default_factory=dict)
    # Of the reads in `durations`, those that needed the base.
    reads_of_base: int = 0
    # read, write, flush, commit, base -> counts by bucket, without the zeros at the end.
    durations: dict[str, list[int]] = Field(default_factory=dict)

    def total(self, *names: str) -> int:
        """The sum of these counters."""
        return sum(self.counters.get(name, 0) for name in names)

    @property
    def reads(self) -> int:
        """How many reads there were, wherever their data came from."""
        return sum(self.durations.get("read", ()))

    def total_of(self, prefix: str) -> int:
        """The sum of the counters whose names begin so."""
        return sum(n for name, n in self.counters.items() if name.startswith(prefix))


class ActivityList(Answer):
    """All devices; `clock` is of fvdd's monotonic clock, for rates."""

    clock: float
    version: str = ""
    devices: tuple[Activity, ...]


class DeviceMap(Answer):
    """Where the parts of a disk are: of each of equal cells, how many samples were found where.

    A cell whose samples are all 0 was not looked at, for want of time.
    """

    name: str
    size_bytes: int
    local: Annotated[tuple[int, ...], Field(max_length=CELLS_MAX)]
    base: Annotated[tuple[int, ...], Field(max_length=CELLS_MAX)]
    zero: Annotated[tuple[int, ...], Field(max_length=CELLS_MAX)]

    def strip(self) -> str:
        """A character for each cell: # local, + partly, . in the base, - zeros, ? not known."""
        return "".join(map(_mark, self.local, self.base, self.zero))


class Extents(Answer):
    """A part of a disk, extent by extent: length, and "data", "zero", "base" or "base-zero";
    `next` is the offset behind them, None at the end of the disk."""

    size: int
    extents: tuple[tuple[int, str], ...]
    next: int | None


def _mark(local: int, base: int, zero: int) -> str:
    if base and (local or zero):
        return "+"
    if base:
        return "."
    if local:
        return "#"
    return "-" if zero else "?"


def duration_quantile(
    q: float, now: Sequence[int], before: Sequence[int] = ()
) -> float | None:
    """The upper bound in seconds of the bucket that the quantile lies in; None of nothing."""
    padded = [*before, *[0] * (len(now) - len(before))]
    counts = [max(0, a - b) for a, b in zip(now, padded, strict=False)]
    wanted = q * sum(counts)
    if wanted == 0:
        return None
    seen = 0
    for bucket, count in enumerate(counts):
        seen += count
        if seen >= wanted:
            return float(2 ** (bucket + 1) / 1e9)
    return None
