# SPDX-License-Identifier: Apache-2.0
"""The map of an image as a picture: rows of equal stretches of the disk, coloured by kind."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterable
from html import escape

from fvdctl.output import is_file_of_ours, printable, size_text
from fvdengine.errors import InvalidOption, from_os_error
from fvdengine.mapping import Extent, ExtentKind

COLUMNS, ROWS_MAX = 128, 64
CELL_WIDTH, CELL_HEIGHT, MARGIN = 6, 10, 40
COLORS = {
    ExtentKind.DATA: ("#2a7", "local"),
    ExtentKind.ZERO: ("#acf", "zeros"),
    ExtentKind.BASE: ("#bbb", "in the base"),
    ExtentKind.BASE_ZERO: ("#dde", "zeros of the base"),
}
STEP = 4096
_BEGIN = b"<svg "


def write_svg(path: str, image: str, extents: Iterable[Extent]) -> None:
    """Write the picture; nothing is written when the map cannot be made.

    Only another picture is replaced: a slip of the finger must not cost an image. Raise
    InvalidOption for any other file, and what keeps it from being written.
    """
    text = svg_of(image, list(extents))
    if os.path.lexists(path) and not is_file_of_ours(path, _BEGIN):
        raise InvalidOption(
            option="--svg", reason=f"{path} exists and is no picture", hint="Choose another name."
        )
    beside = f"{path}.{secrets.token_hex(4)}.new"
    try:
        with open(beside, "x", encoding="utf-8") as file:
            file.write(text)
        os.rename(beside, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            raise InvalidOption(
                option="--svg", reason=f"{path} cannot be written: there is no such folder",
                hint="Name a file in a folder that is there.",
            ) from error  # fmt: skip
        if isinstance(error, OSError):
            raise from_os_error(error, path, "write") from error
        raise


def svg_of(image: str, extents: list[Extent]) -> str:
    """The picture. Each extent is drawn where it lies; small ones are at least a hair wide."""
    size = extents[-1].end if extents else 0
    rows = max(1, min(ROWS_MAX, -(-size // (COLUMNS * STEP))))
    per_row = max(1, -(-size // rows))
    width = COLUMNS * CELL_WIDTH
    height = rows * CELL_HEIGHT
    total = dict.fromkeys(ExtentKind, 0)
    shapes: list[str] = []
    for extent in extents:
        total[extent.kind] += extent.length
        shapes.extend(_shapes(extent, per_row, width))
    title = escape(printable(f"{os.path.basename(image)}: {size_text(size)}"))
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" font-size="12" '
            f'viewBox="0 0 {width + 2 * MARGIN} {height + 2 * MARGIN}">',
            f"<title>{title}</title>",
            f'<text x="{MARGIN}" y="{MARGIN - 12}">{title}</text>',
            f'<g transform="translate({MARGIN} {MARGIN})" shape-rendering="crispEdges">',
            *shapes,
            "</g>",
            *_legend(total, height + MARGIN + 20),
            "</svg>\n",
        )
    )


def _shapes(extent: Extent, per_row: int, width: int) -> Iterable[str]:
    """A rectangle for each row that the extent touches."""
    color = COLORS[extent.kind][0]
    at = extent.start
    while at < extent.end:
        row = at // per_row
        end = min(extent.end, (row + 1) * per_row)
        left = (at - row * per_row) * width / per_row
        wide = max((end - at) * width / per_row, 0.3)
        yield (
            f'<rect x="{left:.2f}" y="{row * CELL_HEIGHT}" width="{wide:.2f}" '
            f'height="{CELL_HEIGHT - 1}" fill="{color}"/>'
        )
        at = end


def _legend(total: dict[ExtentKind, int], y: int) -> Iterable[str]:
    x = MARGIN
    for kind, (color, word) in COLORS.items():
        yield f'<rect x="{x}" y="{y - 10}" width="10" height="10" fill="{color}"/>'
        yield f'<text x="{x + 14}" y="{y}">{word} {size_text(total[kind])}</text>'
        x += 190
