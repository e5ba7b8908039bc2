# SPDX-License-Identifier: Apache-2.0
"""Copies of whole disks: out to a file or from an overlay, made by a worker that serves nobody, or
beside the requests of a disk in use, by the worker that serves it.

All block, for as long as there is something to copy. The files come as descriptors: by then this
process may open none for writing any more.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable
from typing import Final, Protocol

from fvdengine.chain import read_sound_header
from fvdengine.errors import NoSpace, from_os_error
from fvdengine.metadata import Run, Source
from fvdengine.overlay import local_runs

PIECE: Final = 1 << 20
ZERO_PIECE: Final = 1 << 30
# Zeros are left out of the copy in whole pages of the usual file systems.
GRAIN: Final = 64 << 10
# A copy beside requests: how finely changes are noted, how often it goes after them, and how little
# may be left for the pause.
GRAINS_MAX: Final = 1 << 20
ROUNDS_MAX: Final = 16
REST_BYTES: Final = 8 << 20
# More than this is not copied in a pause: a guest waits for it.
PAUSE_BYTES_MAX: Final = 64 << 20
NOTE_EVERY: Final = 16
# Of a trace's event (fvdcore/trace.pxd): offset, length, kind, what was asked.
EVENT: Final = struct.Struct("<24xQQII16x")
REQUEST: Final = 0
CHANGES: Final = (1, 3, 4)  # write, discard, write zeroes


class Disk(Protocol):
    """The part of the engine that is copied from or to."""

    @property
    def size(self) -> int: ...
    def read(self, offset: int, length: int) -> bytes: ...
    def write(self, offset: int, data: bytes) -> None: ...
    def write_zeroes(self, offset: int, length: int) -> None: ...
    def block_status(self, offset: int, length: int) -> list[tuple[int, str]]: ...
    def flush(self) -> None: ...
    def resize(self, size: int) -> None: ...
    def trace_start(self) -> None: ...
    def trace_take(self) -> tuple[bytes, int]: ...
    def trace_stop(self) -> None: ...


def copy_out(disk: Disk, fd: int, name: str) -> int:
    """Write the disk into the empty file `fd`, called `name`, with holes for its zeros; the bytes
    written. Durable on return."""
    try:
        os.ftruncate(fd, disk.size)
        written = _copy_data(disk, fd, lambda: None)
        os.fsync(fd)
    except OSError as error:
        raise from_os_error(error, name, "write to") from error
    return written


def _copy_data(disk: Disk, fd: int, turn: Callable[[], None]) -> int:
    """Copy all but zeros; `turn` is called now and then."""
    written = offset = 0
    while offset < disk.size:
        for length, kind in disk.block_status(offset, min(ZERO_PIECE, disk.size - offset)):
            end = offset + length
            while kind in ("data", "base") and offset < end:
                data = disk.read(offset, min(PIECE, end - offset))
                written += _write_data(fd, offset, data)
                offset += len(data)
                turn()
            offset = end
    return written


def _write_data(fd: int, offset: int, data: bytes) -> int:
    written = 0
    for at in range(0, len(data), GRAIN):
        grain = memoryview(data)[at : at + GRAIN]
        if any(grain):
            _write_all(fd, grain, offset + at)
            written += len(grain)
    return written


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)


class MirrorDropped(Exception):
    """Nobody wants the copy any more."""


class Mirror:
    """A copy of a disk that is written meanwhile; it is the disk's state at its end.

    A trace says what was changed since it was copied. It notes a request when that is done and
    before it is answered, but only requests that arrive while it is on: so both `begin` and `end`
    are for moments in which no request is under way.
    """

    def __init__(self, disk: Disk, fd: int) -> None:
        """`fd`: an empty file, which stays the caller's."""
        self._disk, self._fd = disk, fd
        self._size = 0
        self._lost = 0
        self._grain = GRAIN
        while disk.size > self._grain * GRAINS_MAX:
            self._grain *= 2
        self._changed = bytearray()
        self._is_copied = self._is_dropped = False
        self.written = 0

    def begin(self) -> None:
        """OSError; EngineFault(EBUSY): somebody else takes a trace."""
        self._fit()
        self._disk.trace_start()

    def copy(self) -> bool:
        """Copy everything, then what was changed meanwhile, until little is left; whether it is
        little. Called again it goes on from there. MirrorDropped."""
        if not self._is_copied:
            self.written += _copy_data(self._disk, self._fd, self._turn)
            self._is_copied = True
        for _ in range(ROUNDS_MAX):
            self._turn()
            if self._is_little(REST_BYTES):
                return True
            self._go_over(self._turn)
        return False

    def end(self) -> bool:
        """Copy the rest; False, and nothing is done, where that would take long."""
        self._note()
        if not self._is_little(PAUSE_BYTES_MAX):
            return False
        self._go_over(lambda: None)  # nobody changes anything
        return True

    def drop(self) -> None:
        """End the trace, and also a copy() that is under way in another thread."""
        self._is_dropped = True
        self._disk.trace_stop()

    def _is_little(self, limit: int) -> bool:
        return self._changed.count(1) * self._grain <= max(limit, self._grain)

    def _turn(self) -> None:
        if self._is_dropped:
            raise MirrorDropped
        self._note()

    def _fit(self) -> None:
        """Follow a disk that has grown; what is new in it is zeros until a request says else."""
        if self._disk.size != self._size:
            self._size = self._disk.size
            os.ftruncate(self._fd, self._size)
            self._changed.extend(bytes(-(-self._size // self._grain) - len(self._changed)))

    def _note(self) -> None:
        """Take what the trace has."""
        self._fit()
        while True:
            events, lost = self._disk.trace_take()
            for offset, length, kind, what in EVENT.iter_unpack(events):
                if kind == REQUEST and what in CHANGES and length:
                    self._mark(offset, length)
            if not events:
                break
        if lost != self._lost:
            self._lost = lost
            self._mark(0, self._size)

    def _mark(self, offset: int, length: int) -> None:
        first, last = offset // self._grain, (offset + length - 1) // self._grain
        # A request that was refused may lie beyond the end.
        end = min(last + 1, len(self._changed))
        if first < end:
            self._changed[first:end] = b"\1" * (end - first)

    def _go_over(self, turn: Callable[[], None]) -> None:
        """Copy what is marked; a mark goes before its data are read. `turn`: called now and then,
        since what does not fit into the trace is lost."""
        at = self._changed.find(1)
        while at >= 0:
            self._changed[at] = 0
            begin, end = at * self._grain, min((at + 1) * self._grain, self._size)
            for offset in range(begin, end, PIECE):
                data = self._disk.read(offset, min(PIECE, end - offset))
                _write_all(self._fd, memoryview(data), offset)
                self.written += len(data)
            if at % NOTE_EVERY == 0:
                turn()
            at = self._changed.find(1, at + 1)


def fold(disk: Disk, fd: int, name: str) -> int:
    """Put what the image `fd`, called `name`, holds itself into `disk`, its base; the bytes
    written. Durable on return."""
    header = read_sound_header(fd, name)
    try:
        if header.virtual_disk_size > disk.size:  # it has grown
            disk.resize(header.virtual_disk_size)
        written = sum(_fold_run(disk, fd, run) for run in local_runs(fd, name, header))
        disk.flush()
    except Exception as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace(path=name, hint="Free some space there.") from error
        raise
    return written


def _fold_run(disk: Disk, fd: int, run: Run) -> int:
    written, offset = 0, run.start
    while offset < run.end:
        if run.source is Source.ZERO:
            data, length = b"", min(ZERO_PIECE, run.end - offset)
        else:
            data = os.pread(fd, min(PIECE, run.end - offset), run.offset + offset - run.start)
            # A file may end before its last local zeros.
            length = len(data) or min(ZERO_PIECE, run.end - offset)
        if any(data):
            disk.write(offset, data)
            written += length
        else:
            disk.write_zeroes(offset, length)
        offset += length
    return written
