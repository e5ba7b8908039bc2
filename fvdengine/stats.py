# SPDX-License-Identifier: Apache-2.0
"""Read the statistics page of a device: counters, gauges, times and histograms by name.

The page describes itself, so a reader needs no list of names. Each engine thread writes a block
of its own without locks; a counter is the sum over the blocks and may be read at any time, also
while the engine runs and after it died. Reading disturbs nobody: it is a copy of shared memory.
"""

from __future__ import annotations

import functools
import operator
import os
import struct
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fvdengine.errors import InvalidStats, from_os_error

MAGIC = b"FVDSTAT1"
PAGE_VERSION = 1
ENTRIES_OFFSET = 4096
HISTOGRAM_BUCKETS = 48

_HEADER = struct.Struct("<8s4I2Q")
_ENTRY = struct.Struct("<52s3I")
_COUNTER, _GAUGE, _HISTOGRAM, _OLDEST, _NEWEST = range(5)
_U64 = (1 << 64) - 1
_ADDENDS = 256
_LIMIT = 1 << 16  # entries, blocks and slots: far above any real page
_BYTES_MAX = 1 << 26


@dataclass(slots=True)
class Histogram:
    """Durations: bucket k counts those of 2^k up to 2^(k+1) ns, bucket 0 also 0 and 1 ns."""

    buckets: tuple[int, ...]
    sum_ns: int

    @property
    def count(self) -> int:
        return sum(self.buckets)


@dataclass(frozen=True, slots=True)
class Stats:
    """One reading of a page.

    `times` are those of the monotonic clock in ns; what never happened is not among them.
    """

    counters: dict[str, int] = field(default_factory=dict)
    gauges: dict[str, int] = field(default_factory=dict)
    histograms: dict[str, Histogram] = field(default_factory=dict)
    times: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where the blocks lie, and the slots of each kind of entry."""

    slots: int
    blocks: int
    offset: int
    stride: int
    head: bytes
    counters: _Some
    gauges: _Some
    histograms: tuple[tuple[str, int, int], ...]  # name, first and last slot
    oldest: _Some
    newest: _Some
    shape: struct.Struct
    nothing: bytes


class _Some:
    """Some entries of one slot each, taken together: only what lies between them is decoded."""

    def __init__(self, slots: Mapping[str, int], code: str) -> None:
        self.names = tuple(slots)
        places = tuple(slots.values())
        first, last = min(places, default=0), max(places, default=0)
        self._shape = struct.Struct(f"<{last - first + 1}{code}")
        self._offset = first * 8
        self._all = operator.itemgetter(*places) if len(places) > 1 else None
        self._near = tuple(place - first for place in places)
        self._take = operator.itemgetter(*self._near) if len(places) > 1 else None

    def of_block(self, page: bytearray, at: int) -> tuple[int, ...]:
        """The values in the block at this place."""
        values = self._shape.unpack_from(page, at + self._offset)
        return self._take(values) if self._take else tuple(values[near] for near in self._near)

    def of_slots(self, slots: tuple[int, ...]) -> tuple[int, ...]:
        """The values among those of all slots."""
        first = self._offset // 8
        return self._all(slots) if self._all else tuple(slots[first + at] for at in self._near)


def read_stats(source: str | os.PathLike[str] | int) -> Stats:
    """Return what the page at `source`, a path or an open descriptor, holds right now."""
    if isinstance(source, int):
        return _read(source, f"descriptor {source}")
    path = os.fspath(source)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise from_os_error(error, path, "read") from error
    try:
        return _read(fd, path)
    finally:
        os.close(fd)


# A thread reads one page after the other into the same memory: half a megabyte anew for each would
# cost more than all the rest.
_kept = threading.local()


def _read(fd: int, path: str) -> Stats:
    length = os.fstat(fd).st_size
    buffer = getattr(_kept, "buffer", None)
    if buffer is None or len(buffer) != length:
        if length > _BYTES_MAX:
            raise InvalidStats(path=path, reason="its parts do not fit into the file")
        buffer = _kept.buffer = bytearray(length)
    view, done = memoryview(buffer), 0
    while done < length and (count := os.preadv(fd, [view[done:]], done)):
        done += count
    view.release()
    return _parse(buffer if done == length else buffer[:done], path)


def _parse(page: bytearray, path: str) -> Stats:
    if len(page) < ENTRIES_OFFSET or page[:8] != MAGIC:
        raise InvalidStats(path=path, reason="the magic is missing")
    _, version, slots, _, entries, offset, _ = _HEADER.unpack_from(page)
    if version != PAGE_VERSION:
        raise InvalidStats(path=path, reason=f"it has version {version}, known is {PAGE_VERSION}")
    if max(slots, entries) > _LIMIT or offset < ENTRIES_OFFSET + entries * _ENTRY.size:
        raise InvalidStats(path=path, reason="its parts do not fit into the file")
    # The pages of one version have one head, and nearly all are of one version.
    layout = getattr(_kept, "layout", None)
    if layout is None or not page.startswith(layout.head):
        layout = _layout(bytes(page[: ENTRIES_OFFSET + entries * _ENTRY.size]))
    if isinstance(layout, str):
        raise InvalidStats(path=path, reason=layout)
    _kept.layout = layout
    if layout.offset + (layout.blocks - 1) * layout.stride + layout.slots * 8 > len(page):
        raise InvalidStats(path=path, reason="its parts do not fit into the file")
    return _values(layout, page)


@functools.lru_cache(maxsize=8)
def _layout(head: bytes) -> _Layout | str:
    """The layout that the head of a page describes, or what is wrong with it."""
    _, _, slots, blocks, entry_count, offset, stride = _HEADER.unpack_from(head)
    if blocks > _LIMIT or not blocks or stride < slots * 8:
        return "its parts do not fit into the file"
    by_kind: dict[int, dict[str, tuple[int, int]]] = {kind: {} for kind in range(_NEWEST + 1)}
    for index in range(entry_count):
        raw, kind, first, count = _ENTRY.unpack_from(head, ENTRIES_OFFSET + index * _ENTRY.size)
        name = raw.partition(b"\0")[0].decode("ascii", errors="replace")
        if not count or first + count > slots:
            return f"entry {name} lies outside the blocks"
        by_kind.setdefault(kind, {})[name] = (first, count)
    counters, gauges, oldest, newest = (
        _Some({name: first for name, (first, _) in by_kind[kind].items()}, code)
        for kind, code in ((_COUNTER, "Q"), (_GAUGE, "q"), (_OLDEST, "Q"), (_NEWEST, "Q"))
    )
    histograms = by_kind[_HISTOGRAM].items()
    return _Layout(
        slots, blocks, offset, stride, head, counters, gauges,
        tuple((name, first, first + count - 1) for name, (first, count) in histograms),
        oldest, newest, struct.Struct(f"<{slots}Q"), bytes(slots * 8),
    )  # fmt: skip


def _values(layout: _Layout, page: bytearray) -> Stats:
    """Sum the blocks. Those of threads that never ran are zero, and most are."""
    starts = range(layout.offset, layout.offset + layout.blocks * layout.stride, layout.stride)
    nothing, size = layout.nothing, len(layout.nothing)
    # Compared in place: no copy of a block that is not in use.
    used = [at for at in starts if not page.startswith(nothing, at)]
    sums = _sums([page[at : at + size] for at in used], layout)
    counters, gauges = layout.counters, layout.gauges
    stats = Stats(
        counters=dict(zip(counters.names, counters.of_slots(sums), strict=True)),
        gauges=dict(zip(gauges.names, gauges.of_block(page, layout.offset), strict=True)),
        histograms={
            name: Histogram(sums[first:last], sums[last]) for name, first, last in layout.histograms
        },
    )
    for some, choose in ((layout.oldest, min), (layout.newest, max)):
        each = zip(*(some.of_block(page, at) for at in used), strict=True)
        for name, values in zip(some.names, each, strict=False):
            if any(values):
                stats.times[name] = choose(value for value in values if value)
    return stats


def _sums(blocks: Sequence[bytearray], layout: _Layout) -> tuple[int, ...]:
    """Slot by slot the sum modulo 2^64.

    As long as no sum can run over into the slot beside it, blocks are added as one long number
    each: one addition instead of some hundred.
    """
    total = union = 0
    for block in blocks:
        number = int.from_bytes(block, "little")
        total += number
        union |= number
    shape = layout.shape
    if len(blocks) < _ADDENDS and not union & _high_bits(layout.slots):
        return shape.unpack(total.to_bytes(shape.size, "little"))
    each = (shape.unpack(block) for block in blocks)
    return tuple(sum(values) & _U64 for values in zip(*each, strict=True))


@functools.lru_cache(maxsize=8)
def _high_bits(slots: int) -> int:
    """The bits of all slots that must be 0 for fewer than _ADDENDS blocks to be added at once."""
    limit = (1 << 64) // _ADDENDS
    return int.from_bytes(struct.pack("<Q", _U64 ^ (limit - 1)) * slots, "little")
