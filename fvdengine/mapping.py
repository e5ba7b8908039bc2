# SPDX-License-Identifier: Apache-2.0
"""Where every byte of an image comes from: its own data, zeros, or a base.

Extents are streamed in order and cover the virtual disk without gaps. Holes of the files are
looked up (SEEK_HOLE), so an extent of data is one that has storage. Bases are followed down to
the layer that holds the data, as `qemu-img map` does.
"""

import enum
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

from fvdengine.content import Piece, load_content
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
        content = load_content(plan.layers)
        pieces = content.pieces(0, plan.header.virtual_disk_size)
        yield from _merged(_extent(piece) for piece in pieces)


def _extent(piece: Piece) -> Extent:
    kinds = (ExtentKind.ZERO, ExtentKind.DATA, ExtentKind.BASE_ZERO, ExtentKind.BASE)
    kind = kinds[2 * bool(piece.depth) + piece.is_data]
    return Extent(piece.start, piece.length, kind, piece.depth, piece.path, piece.offset)


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
