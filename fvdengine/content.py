# SPDX-License-Identifier: Apache-2.0
"""What a chain of open layers contains: which byte lies in which file, and the bytes themselves.

Computed from the files alone, without the compiled engine: `map` shows it, the search for holes
asks it, and the tests hold the engine against it.
"""

import errno
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fvdengine.chain import Layer
from fvdengine.errors import from_os_error
from fvdengine.metadata import Metadata, Run, Source, load_metadata, runs
from fvdengine.paths import file_length
from fvdengine.units import MIB

# Tells a reader of a disk that an NBD server has the data: there is nothing here to read.
ELSEWHERE = -1


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of the disk as layer `depth` has it.

    `is_data` says that the file `path` has storage for it at `offset`; else it reads as zeros.
    """

    start: int
    length: int
    depth: int
    is_data: bool
    path: str | None = None
    offset: int | None = None

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclass(frozen=True, slots=True)
class Content:
    """The content of the disk that the first of `layers` shows."""

    layers: Sequence[Layer]
    loaded: Sequence[Metadata | None]

    def pieces(self, start: int, end: int) -> Iterator[Piece]:
        """Yield where the bytes of [start, end) lie, in order and without gaps."""
        return self._of_layer(0, start, end)

    def read(self, start: int, length: int) -> bytes:
        """Return `length` bytes of the disk at `start`."""
        parts: list[bytes] = []
        for piece in self.pieces(start, start + length):
            if piece.is_data:
                assert piece.offset is not None
                fd, path = self.layers[piece.depth].storage
                parts.append(_read(fd, path, piece.offset, piece.length))
            else:
                parts.append(bytes(piece.length))
        return b"".join(parts)

    def _of_layer(self, depth: int, start: int, end: int) -> Iterator[Piece]:
        """Yield what layer `depth` shows, zeros behind its end included."""
        layer = self.layers[depth]
        limit = min(end, max(start, layer.length))
        if layer.header is None:
            yield from self._stored(depth, Run(start, limit - start, Source.DATA, start))
        else:
            loaded = self.loaded[depth]
            assert loaded is not None
            for run in runs(loaded, layer.header, start, limit):
                if run.source is Source.BASE:
                    yield from self._of_layer(depth + 1, run.start, run.end)
                elif run.source is Source.ZERO:
                    yield Piece(run.start, run.length, depth, False)
                else:
                    yield from self._stored(depth, run)
        if limit < end:
            yield Piece(limit, end - limit, depth, False)

    def _stored(self, depth: int, run: Run) -> Iterator[Piece]:
        """Yield the storage of a run, holes of the file as zeros."""
        fd, path = self.layers[depth].storage
        shift = run.offset - run.start
        for offset, length, is_data in file_extents(fd, run.offset, run.offset + run.length):
            if is_data:
                yield Piece(offset - shift, length, depth, True, path, offset)
            else:
                yield Piece(offset - shift, length, depth, False)


def load_content(layers: Sequence[Layer]) -> Content:
    """Read the metadata of the layers; raise InvalidJournal, InvalidTable."""
    return Content(layers, [_load(layer) for layer in layers])


def _load(layer: Layer) -> Metadata | None:
    if layer.header is None:
        return None
    fd = layer.storage[0]
    length = None if fd == ELSEWHERE else file_length(fd)
    return load_metadata(layer.fd, layer.header, layer.path, length)


def file_extents(fd: int, start: int, end: int) -> Iterator[tuple[int, int, bool]]:
    """Yield (offset, length, is_data) of [start, end); all is data where holes are not known."""
    offset = start
    while offset < end:
        try:
            data = os.lseek(fd, offset, os.SEEK_DATA)
            hole = os.lseek(fd, data, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole up to the end of the file
                yield offset, end - offset, False
            else:
                yield offset, end - offset, True
            return
        if data > offset:
            yield offset, min(data, end) - offset, False
        if data < end:
            yield data, min(hole, end) - data, True
        offset = hole


def _read(fd: int, path: str, offset: int, length: int) -> bytes:
    """Return bytes of a file, zeros behind its end."""
    parts: list[bytes] = []
    end = offset + length
    while offset < end:
        try:
            part = os.pread(fd, min(end - offset, 4 * MIB), offset)
        except OSError as error:
            raise from_os_error(error, path, "read") from error
        if not part:
            parts.append(bytes(end - offset))
            break
        parts.append(part)
        offset += len(part)
    return b"".join(parts)
