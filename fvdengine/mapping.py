# SPDX-License-Identifier: Apache-2.0
"""Where every byte of an image comes from: its own data, zeros, or a base.

Extents are streamed in order and cover the virtual disk without gaps. Holes of the files are
looked up (SEEK_HOLE), so an extent of data is one that has storage. Bases are followed down to
the layer that holds the data, as `qemu-img map` does.
"""

import enum
import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

from fvdengine import metadata
from fvdengine.chain import Layer
from fvdengine.metadata import bit_runs, load_metadata
from fvdengine.opening import OpenOptions, open_plan


class ExtentKind(enum.Enum):
    """What a read of the extent returns."""

    DATA = "data"  # local, with storage
    ZERO = "zero"  # local and never written
    BASE = "base"
    BASE_ZERO = "base-zero"  # in the base, which has a hole there or ends within the sector


@dataclass(frozen=True, slots=True)
class Extent:
    """A stretch of the virtual disk. `depth` 0 is the image; `offset` is in the file `path`."""

    start: int
    length: int
    kind: ExtentKind
    depth: int
    path: str | None = None
    offset: int | None = None

    @property
    def end(self) -> int:
        return self.start + self.length

    def as_dict(self) -> dict[str, object]:
        """Return the keys that `qemu-img map --output=json` has, and the kind."""
        found: dict[str, object] = {
            "start": self.start,
            "length": self.length,
            "depth": self.depth,
            "present": self.kind is not ExtentKind.ZERO,
            "zero": self.kind in (ExtentKind.ZERO, ExtentKind.BASE_ZERO),
            "data": self.kind in (ExtentKind.DATA, ExtentKind.BASE),
            "compressed": False,
            "kind": self.kind.value,
        }
        if self.offset is not None:
            found["offset"] = self.offset
            found["filename"] = self.path
        return found


def map_image(
    path: str | os.PathLike[str], options: OpenOptions | None = None
) -> Iterator[Extent]:
    """Yield the extents of the image, merged; the image stays locked until the end."""
    options = replace(options or OpenOptions(), read_only=True)
    with open_plan(path, options) as plan:
        bitmaps = [
            load_metadata(layer.fd, layer.header, layer.path).bitmap
            if layer.header is not None and layer.header.needs_base
            else bytearray()
            for layer in plan.layers
        ]
        walk = _Walk(plan.layers, bitmaps)
        yield from _merged(walk.extents(0, 0, plan.header.virtual_disk_size))


@dataclass(frozen=True, slots=True)
class _Walk:
    layers: list[Layer]
    bitmaps: list[bytearray]

    def extents(self, depth: int, start: int, end: int) -> Iterator[Extent]:
        """Yield what layer `depth` shows in [start, end), zeros past its end included."""
        limit = min(end, max(start, self.layers[depth].length))
        if self.layers[depth].header is None:
            yield from self._stored(depth, start, limit, 0)
        else:
            yield from self._image(depth, start, limit)
        if limit < end:
            kind = ExtentKind.BASE_ZERO if depth else ExtentKind.ZERO
            yield Extent(limit, end - limit, kind, depth)

    def _image(self, depth: int, start: int, end: int) -> Iterator[Extent]:
        header = self.layers[depth].header
        assert header is not None
        covered = start
        if header.needs_base:
            size = header.block_size
            covered = min(end, max(start, header.base_img_size))
            blocks = metadata.block_count(header)
            last = min(blocks, -(-covered // size))
            for first, stop, is_local in bit_runs(self.bitmaps[depth], start // size, last):
                low, high = max(first * size, start), min(stop * size, covered)
                if is_local:
                    yield from self._stored(depth, low, high, header.data_offset)
                else:
                    yield from self.extents(depth + 1, low, high)
        yield from self._stored(depth, covered, end, header.data_offset)

    def _stored(self, depth: int, start: int, end: int, shift: int) -> Iterator[Extent]:
        """Yield the storage of [start, end), which lies `shift` bytes further in the file."""
        layer = self.layers[depth]
        has, lacks = (
            (ExtentKind.BASE, ExtentKind.BASE_ZERO) if depth else (ExtentKind.DATA, ExtentKind.ZERO)
        )
        for offset, length, is_data in file_extents(layer.fd, start + shift, end + shift):
            if is_data:
                yield Extent(offset - shift, length, has, depth, layer.path, offset)
            else:
                yield Extent(offset - shift, length, lacks, depth)


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


def _merged(extents: Iterator[Extent]) -> Iterator[Extent]:
    current: Extent | None = None
    for extent in extents:
        if not extent.length:
            continue
        if current is not None and _continues(current, extent):
            current = replace(current, length=current.length + extent.length)
            continue
        if current is not None:
            yield current
        current = extent
    if current is not None:
        yield current


def _continues(before: Extent, after: Extent) -> bool:
    if (before.kind, before.depth, before.path) != (after.kind, after.depth, after.path):
        return False
    return before.offset is None or before.offset + before.length == after.offset
