# SPDX-License-Identifier: Apache-2.0
"""Find the zeros of a base, so that a new image has them as local blocks from the start.

A hole that a file reports is not read; what is left is read a piece at a time and compared with
zeros. Blocks count as a whole, and only runs of zero blocks that are long enough: each run saves
reads of the base and storage, and costs nothing but its bits.
"""

from collections.abc import Iterator, Sequence

from fvdengine import geometry
from fvdengine.chain import Layer
from fvdengine.content import Content, load_content
from fvdengine.geometry import Layout
from fvdengine.records import set_bits
from fvdengine.units import MIB

_PIECE = 4 * MIB


def holes_of_base(
    layers: Sequence[Layer], layout: Layout, shortest: int
) -> tuple[bytes, tuple[tuple[int, int], ...]]:
    """Return the bitmap of a new image over `layers`, and the (offset, length) of its holes.

    Only runs of zero blocks of at least `shortest` bytes count. The base ends in zeros, so its
    last block may be partial.
    """
    size, end = layout.block_size, layout.base_img_size
    bitmap = bytearray(layout.bitmap_size)
    holes: list[tuple[int, int]] = []
    for start, stop in _zero_runs(load_content(layers), size, end):
        if stop - start < shortest:
            continue
        holes.append((start, stop - start))
        set_bits(bitmap, range(start // size, geometry.block_count(stop, size)))
    return bytes(bitmap), tuple(holes)


def _zero_runs(content: Content, size: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of the longest runs of zero blocks, the last one cut at `end`."""
    start = -1
    for first, stop, is_zero in _stretches(content, size, end):
        if is_zero and start < 0:
            start = first
        if not is_zero and start >= 0:
            yield start, first
            start = -1
        if stop == end and start >= 0:
            yield start, end


def _stretches(content: Content, size: int, end: int) -> Iterator[tuple[int, int, bool]]:
    """Yield (start, end, is_zero) of stretches of whole blocks that cover the base."""
    done = 0
    for piece in content.pieces(0, end):
        if not piece.is_data:
            # What a hole has of its first and last block alone is not a whole block.
            first = geometry.block_count(max(piece.start, done), size) * size
            last = end if piece.end == end else piece.end // size * size
            if first < last:
                yield from _read_stretches(content, size, done, min(first, end))
                yield first, last, True
                done = last
    yield from _read_stretches(content, size, done, end)


def _read_stretches(
    content: Content, size: int, start: int, end: int
) -> Iterator[tuple[int, int, bool]]:
    """Read [start, end) and yield its blocks, equal neighbours within a piece together."""
    zeros = bytes(size)
    step = max(size, _PIECE // size * size)
    for at in range(start, end, step):
        data = content.read(at, min(step, end - at))
        if not data.strip(b"\0"):
            yield at, at + len(data), True
            continue
        view = memoryview(data)
        for offset in range(0, len(data), size):
            block = view[offset : offset + size]
            yield at + offset, at + offset + len(block), block == zeros[: len(block)]
