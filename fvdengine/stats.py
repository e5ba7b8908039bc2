# SPDX-License-Identifier: Apache-2.0
"""Read the statistics page of a device: counters, gauges and histograms by name.

The page describes itself, so a reader needs no list of names. Each engine thread writes a block
of its own without locks; a counter is the sum over the blocks and may be read at any time, also
while the engine runs and after it died.
"""

import os
import struct
from dataclasses import dataclass, field

from fvdengine.errors import InvalidStats, from_os_error

MAGIC = b"FVDSTAT1"
PAGE_VERSION = 1
ENTRIES_OFFSET = 4096
HISTOGRAM_BUCKETS = 48

_HEADER = struct.Struct("<8s4I2Q")
_ENTRY = struct.Struct("<52s3I")
_COUNTER, _GAUGE, _HISTOGRAM = range(3)
_U64 = (1 << 64) - 1
_LIMIT = 1 << 16  # entries, blocks and slots: far above any real page


@dataclass(frozen=True, slots=True)
class Histogram:
    """Durations: bucket k counts those of 2^k up to 2^(k+1) ns, bucket 0 also 0 and 1 ns."""

    buckets: list[int]
    sum_ns: int

    @property
    def count(self) -> int:
        return sum(self.buckets)


@dataclass(frozen=True, slots=True)
class Stats:
    """One reading of a page."""

    counters: dict[str, int] = field(default_factory=dict)
    gauges: dict[str, int] = field(default_factory=dict)
    histograms: dict[str, Histogram] = field(default_factory=dict)


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
    return b"".join(parts)


def _parse(page: bytes, path: str) -> Stats:
    if len(page) < ENTRIES_OFFSET or page[:8] != MAGIC:
        raise InvalidStats(path=path, reason="the magic is missing")
    _, version, slot_count, block_count, entry_count, offset, stride = _HEADER.unpack_from(page)
    if version != PAGE_VERSION:
        raise InvalidStats(path=path, reason=f"it has version {version}, known is {PAGE_VERSION}")
    entries_end = ENTRIES_OFFSET + entry_count * _ENTRY.size
    if (
        max(slot_count, block_count, entry_count) > _LIMIT
        or not block_count
        or stride < slot_count * 8
        or offset < entries_end
        or offset + (block_count - 1) * stride + slot_count * 8 > len(page)
    ):
        raise InvalidStats(path=path, reason="its parts do not fit into the file")
    blocks = [
        struct.unpack_from(f"<{slot_count}Q", page, offset + index * stride)
        for index in range(block_count)
    ]
    stats = Stats()
    for index in range(entry_count):
        raw, kind, first, count = _ENTRY.unpack_from(page, ENTRIES_OFFSET + index * _ENTRY.size)
        name = raw.partition(b"\0")[0].decode("ascii", errors="replace")
        if not count or first + count > slot_count:
            raise InvalidStats(path=path, reason=f"entry {name} lies outside the blocks")
        _add(stats, name, kind, [block[first : first + count] for block in blocks])
    return stats


def _add(stats: Stats, name: str, kind: int, slots: list[tuple[int, ...]]) -> None:
    """Enter one value; kinds of newer pages are passed over."""
    if kind == _COUNTER:
        stats.counters[name] = sum(block[0] for block in slots) & _U64
    elif kind == _GAUGE:
        value = slots[0][0]
        stats.gauges[name] = value - (1 << 64) if value >> 63 else value
    elif kind == _HISTOGRAM:
        sums = [sum(values) & _U64 for values in zip(*slots, strict=True)]
        stats.histograms[name] = Histogram(sums[:-1], sums[-1])
