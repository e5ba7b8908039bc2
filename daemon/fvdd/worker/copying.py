# SPDX-License-Identifier: Apache-2.0
"""Copies of whole disks, made by a worker that serves nobody: out to a file, or from an overlay.

Both block, for as long as there is something to copy. The files come as descriptors: by then this
process may open none for writing any more.
"""

from __future__ import annotations

import os
from typing import Final, Protocol

from fvdengine.chain import read_header
from fvdengine.metadata import Run, Source
from fvdengine.overlay import local_runs

PIECE: Final = 1 << 20
ZERO_PIECE: Final = 1 << 30
# Zeros are left out of the copy in whole pages of the usual file systems.
GRAIN: Final = 64 << 10


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


def copy_out(disk: Disk, fd: int) -> int:
    """Write the disk into the empty file `fd`, with holes for its zeros; the bytes written. Durable
    on return."""
    os.ftruncate(fd, disk.size)
    written = _copy_data(disk, fd)
    os.fsync(fd)
    return written


def _copy_data(disk: Disk, fd: int) -> int:
    written = offset = 0
    while offset < disk.size:
        for length, kind in disk.block_status(offset, min(ZERO_PIECE, disk.size - offset)):
            end = offset + length
            while kind in ("data", "base") and offset < end:
                data = disk.read(offset, min(PIECE, end - offset))
                written += _write_data(fd, offset, data)
                offset += len(data)
            offset = end
    return written


def _write_data(fd: int, offset: int, data: bytes) -> int:
    written = 0
    for at in range(0, len(data), GRAIN):
        grain = memoryview(data)[at : at + GRAIN]
        if any(grain):
            done = 0
            while done < len(grain):
                done += os.pwrite(fd, grain[done:], offset + at + done)
            written += len(grain)
    return written


def fold(disk: Disk, fd: int, name: str) -> int:
    """Put what the image `fd`, called `name`, holds itself into `disk`, its base; the bytes
    written. Durable on return."""
    header = read_header(fd, name)
    if header.virtual_disk_size > disk.size:  # it has grown
        disk.resize(header.virtual_disk_size)
    written = sum(_fold_run(disk, fd, run) for run in local_runs(fd, name, header))
    disk.flush()
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
