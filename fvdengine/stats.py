# SPDX-License-Identifier: Apache-2.0
"""Read the statistics page of a device: counters, gauges, times and histograms by name.

The page describes itself, so a reader needs no list of names. Each engine thread writes a block
of its own without locks; a counter is the sum over the blocks and may be read at any time, also
while the engine runs and after it died. Reading disturbs nobody: it is a copy of shared memory.
"""

import functools
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

from fvdengine.errors import InvalidStats, from_os_error

MAGIC = b"FVDSTAT1"
PAGE_VERSION = 1
ENTRIES_OFFSET = 4096
HISTOGRAM_BUCKETS = 48

_HEADER = struct.Struct("<8s4I2Q")
_ENTRY = struct.Struct("<52s3I")
_COUNTER, _GAUGE, _HISTOGRAM, _OLDEST, _NEWEST = range(5)
_SIGNED = struct.Struct("<q")
_UNSIGNED = struct.Struct("<Q")
_U64 = (1 << 64) - 1
_ADDENDS = 256
_LIMIT = 1 << 16  # entries, blocks and slots: far above any real page


@dataclass(frozen=True, slots=True)
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
    """Where the blocks lie, and (name, kind, first slot, slots) of each entry."""

    slots: int
    blocks: int
    offset: int
    stride: int
    entries: tuple[tuple[str, int, int, int], ...]


def read_stats(source: str | os.PathLike[str] | int) -> Stats:
    """Return what the page at `source`, a path or an open descriptor, holds right now."""
    if isinstance(source, int):
        return _parse(_read_all(source), f"descriptor {source}")
    path = os.fspath(source)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise from_os_error(error, path, "read") from error
    try:
        return _parse(_read_all(fd), path)
    finally:
        os.close(fd)


def _read_all(fd: int) -> bytes:
    length = os.fstat(fd).st_size
    parts: list[bytes] = []
    offset = 0
    while offset < length and (part := os.pread(fd, length - offset, offset)):
        parts.append(part)
        offset += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _parse(page: bytes, path: str) -> Stats:
    if len(page) < ENTRIES_OFFSET or page[:8] != MAGIC:
        raise InvalidStats(path=path, reason="the magic is missing")
    _, version, slots, _, entries, offset, _ = _HEADER.unpack_from(page)
    if version != PAGE_VERSION:
        raise InvalidStats(path=path, reason=f"it has version {version}, known is {PAGE_VERSION}")
    if max(slots, entries) > _LIMIT or offset < ENTRIES_OFFSET + entries * _ENTRY.size:
        raise InvalidStats(path=path, reason="its parts do not fit into the file")
    layout = _layout(page[: ENTRIES_OFFSET + entries * _ENTRY.size])
    if isinstance(layout, str):
        raise InvalidStats(path=path, reason=layout)
    if layout.offset + (layout.blocks - 1) * layout.stride + layout.slots * 8 > len(page):
        raise InvalidStats(path=path, reason="its parts do not fit into the file")
    return _values(layout, page)


@functools.lru_cache(maxsize=8)
def _layout(head: bytes) -> _Layout | str:
    """The layout that the head of a page describes, or what is wrong with it.

    The pages of one version have one head, so most readings find it made already.
    """
    _, _, slots, blocks, entry_count, offset, stride = _HEADER.unpack_from(head)
    if blocks > _LIMIT or not blocks or stride < slots * 8:
        return "its parts do not fit into the file"
    entries = []
    for index in range(entry_count):
        raw, kind, first, count = _ENTRY.unpack_from(head, ENTRIES_OFFSET + index * _ENTRY.size)
        name = raw.partition(b"\0")[0].decode("ascii", errors="replace")
        if not count or first + count > slots:
            return f"entry {name} lies outside the blocks"
        entries.append((name, kind, first, count))
    return _Layout(slots, blocks, offset, stride, tuple(entries))


def _values(layout: _Layout, page: bytes) -> Stats:
    """Sum the blocks. Those of threads that never ran are zero, and most are."""
    size = layout.slots * 8
    nothing = bytes(size)
    used = []
    for at in range(layout.blocks):
        start = layout.offset + at * layout.stride
        block = page[start : start + size]
        if at == 0 or block != nothing:
            used.append(block)
    sums = _sums(used, layout.slots)
    stats = Stats()
    for name, kind, slot, count in layout.entries:
        if kind == _COUNTER:
            stats.counters[name] = sums[slot]
        elif kind == _HISTOGRAM:
            last = slot + count - 1
            stats.histograms[name] = Histogram(sums[slot:last], sums[last])
        elif kind == _GAUGE:
            (stats.gauges[name],) = _SIGNED.unpack_from(used[0], slot * 8)
        elif kind in (_OLDEST, _NEWEST):
            each = [value for block in used if (value := _UNSIGNED.unpack_from(block, slot * 8)[0])]
            if each:
                stats.times[name] = min(each) if kind == _OLDEST else max(each)
    return stats


def _sums(blocks: Sequence[bytes], slots: int) -> tuple[int, ...]:
    """Slot by slot the sum modulo 2^64.

    As long as no sum can run over into the slot beside it, blocks are added as one long number
    each: one addition instead of some hundred.
    """
    total = union = 0
    for block in blocks:
        number = int.from_bytes(block, "little")
        total += number
        union |= number
    shape = struct.Struct(f"<{slots}Q")
    if len(blocks) < _ADDENDS and not union & _high_bits(slots):
        return shape.unpack(total.to_bytes(shape.size, "little"))
    each = (shape.unpack(block) for block in blocks)
    return tuple(sum(values) & _U64 for values in zip(*each, strict=True))


@functools.lru_cache(maxsize=8)
def _high_bits(slots: int) -> int:
    """The bits of all slots that must be 0 for fewer than _ADDENDS blocks to be added at once."""
    limit = (1 << 64) // _ADDENDS
    return int.from_bytes(struct.pack("<Q", _U64 ^ (limit - 1)) * slots, "little")
