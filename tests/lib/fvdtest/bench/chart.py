# SPDX-License-Identifier: Apache-2.0
"""The ratios as a picture: a bar for each row with a target, a mark where the target is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from fvdtest.bench.figures import Row

WIDTH, LABEL, ROW_HEIGHT, TOP = 900, 330, 24, 60
LOWEST, HIGHEST = 0.25, 32.0
TICKS = (0.25, 0.5, 1, 2, 4, 8, 16, 32)
REACHED, MISSED, LINE = "#3a7d44", "#c8553d", "#222222"


def x_of(ratio: float) -> float:
    """Where a ratio lies; the scale is logarithmic, and ends where the picture does."""
    inside = min(max(ratio, LOWEST), HIGHEST)
    span = math.log2(HIGHEST / LOWEST)
    return LABEL + (WIDTH - LABEL - 60) * math.log2(inside / LOWEST) / span


def text(x: float, y: float, words: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def bar(row: Row, y: float) -> str:
    """One row: label, bar from 1, whisker of the spread, mark of the target, figure."""
    one, end = x_of(1.0), x_of(row.ratio)
    colour = REACHED if row.met else MISSED
    middle = y + ROW_HEIGHT / 2
    parts = [
        text(LABEL - 10, middle + 4, f"{row.job}  {row.ours} / {row.peer}", "end"),
        f'<rect x="{min(one, end):.1f}" y="{y + 4:.1f}" width="{abs(end - one):.1f}" '
        f'height="{ROW_HEIGHT - 8}" fill="{colour}"/>',
        f'<line x1="{x_of(row.low):.1f}" x2="{x_of(row.high):.1f}" y1="{middle:.1f}" '
        f'y2="{middle:.1f}" stroke="{LINE}"/>',
    ]
    if row.wanted is not None:
        at = x_of(row.wanted)
        parts.append(
            f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{y + 1:.1f}" y2="{y + ROW_HEIGHT - 1:.1f}" '
            f'stroke="{LINE}" stroke-width="3"/>'
        )
    parts.append(text(max(end, x_of(row.high), one) + 6, middle + 4, f"{row.ratio:.2f}"))
    return "\n".join(parts)


def draw(rows: Sequence[Row], title: str) -> str:
    """An SVG document."""
    shown = [row for row in rows if row.met is not None and row.wanted is not None]
    height = TOP + ROW_HEIGHT * len(shown) + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        text(10, 20, title),
        text(10, 38, "our rate over the peer's, median; black: the target; thin: the spread"),
    ]
    for tick in TICKS:
        x = x_of(tick)
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 4}" y2="{height - 20}" stroke="#cccccc"/>'
        )
        parts.append(text(x, height - 6, f"{tick:g}", "middle"))
    parts += [bar(row, TOP + at * ROW_HEIGHT) for at, row in enumerate(shown)]
    return "\n".join([*parts, "</svg>", ""])
