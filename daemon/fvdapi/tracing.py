# SPDX-License-Identifier: Apache-2.0
"""The stream of a trace: how a worker sends what a device did, and how it is read.

A line of JSON says what is traced. Frames follow, little-endian: u32 bytes of events, u32 zero, u64
events lost so far, then the events, 64 bytes each (fvdcore/trace.pxd). A frame without events is a
sign of life; one whose byte count is END is the last. A stream that ends without it was cut off.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

from fvdapi.errors import ApiError

VERSION: Final = 1
EVENT: Final = struct.Struct("<5Q2IiIII")
FRAME: Final = struct.Struct("<IIQ")
END: Final = 0xFFFFFFFF
LINE_MAX: Final = 65536
FRAME_MAX: Final = 1 << 24

REQUEST, BASE, COMMIT, CHECKPOINT, FLUSH, PREFETCH, COPY = range(7)
OPERATIONS: Final = ("read", "write", "flush", "discard", "write_zeroes", "block_status")
REASONS: Final = ("demand", "cow", "prefetch")
SOURCES: Final = ((1, "image"), (2, "base"), (4, "zero"))
# Blocks of the stats page, from this number on: the threads that count there.
ROLES: Final = ((0, "control"), (1, "keeper"), (2, "prefetch"), (3, "crew"), (163, "connection"))


class TraceEvent(NamedTuple):
    """One thing that was done; times in ns of CLOCK_MONOTONIC, places in bytes of the disk."""

    sequence: int
    begin: int
    end: int
    offset: int
    length: int
    kind: int
    what: int
    result: int
    thread: int
    role: int
    source: int


class TraceReader:
    """Reads a stream from its chunks; `about` is its first line."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)
        self._have = b""
        self.lost = 0
        self.is_whole = False
        self.about = self._read_about()

    def frames(self) -> Iterator[list[TraceEvent]]:
        """The events as they come, an empty list now and then; afterwards `lost` and `is_whole`
        say what is missing."""
        while (head := self._take(FRAME.size)) is not None:
            size, _, self.lost = FRAME.unpack(head)
            if size == END:
                self.is_whole = True
                return
            if size % EVENT.size or size > FRAME_MAX:
                raise _senseless(f"a frame of {size} bytes")
            events = self._take(size)
            if events is None:
                return
            yield list(map(TraceEvent._make, EVENT.iter_unpack(events)))

    def _read_about(self) -> dict[str, object]:
        while b"\n" not in self._have:
            chunk = next(self._chunks, None)
            if chunk is None or len(self._have) > LINE_MAX:
                raise _senseless("no first line")
            self._have += chunk
        line, _, self._have = self._have.partition(b"\n")
        try:
            about = json.loads(line)
        except ValueError:
            about = None
        if not isinstance(about, dict) or about.get("fvd_trace") != VERSION:
            raise _senseless("another first line")
        return about

    def _take(self, size: int) -> bytes | None:
        """So many bytes; None when the stream ends before."""
        parts = [self._have]
        length = len(self._have)
        while length < size:
            chunk = next(self._chunks, None)
            if chunk is None:
                return None
            parts.append(chunk)
            length += len(chunk)
        whole = b"".join(parts)
        self._have = whole[size:]
        return whole[:size]


def role_name(role: int) -> str:
    """What kind of thread counts in this block of the stats page."""
    first, name = max((entry for entry in ROLES if entry[0] <= role), default=ROLES[0])
    return f"{name} {role - first}" if name in ("crew", "connection") else name


def _senseless(what: str) -> ApiError:
    return ApiError(
        "daemon_protocol",
        f"the trace makes no sense: {what}",
        hint="fvdctl and the worker may be of different versions: fvdctl upgrade NAME",
    )
