# SPDX-License-Identifier: Apache-2.0
"""What is printed, saved and compared with what was saved before."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fvdtest.bench.figures import Row, Run

FORMAT = 1


class SavedError(Exception):
    """A file is no saved run of this suite; the message names it."""


def number(value: float, unit: str) -> str:
    """A measured value, short."""
    if unit == "B/s":
        return f"{value / 1e9:.2f} GB/s"
    if unit == "us":
        return f"{1e6 / value:.0f} us" if value else "-"
    if unit == "requests/s":
        return f"{value / 1000:.1f} k/s"
    return f"{value:.3g} {unit}".strip()


def verdict(row: Row) -> str:
    if row.met is None:
        return ""
    return "reached" if row.met else "MISSED"


def wanted(row: Row) -> str:
    """The targets of a row in words."""
    words = []
    if row.wanted is not None:
        words.append(f">= {row.wanted:g}")
    if row.wanted_cpu is not None:
        words.append(f"cpu <= {row.wanted_cpu:g}")
    return ", ".join(words)


def cells(row: Row) -> list[str]:
    cpu = f"{row.cpu_ratio:.2f}" if row.cpu_ratio else "-"
    spread = f"{row.low:.2f}-{row.high:.2f}"
    return [
        row.job, row.ours, row.peer, number(row.value, row.unit), f"{row.ratio:.2f}", spread,
        cpu, wanted(row), verdict(row),
    ]  # fmt: skip


HEAD = ["job", "ours", "against", "ours does", "ratio", "spread", "cpu ratio", "wanted", ""]


def table(rows: Sequence[Row]) -> str:
    """All rows in columns."""
    lines = [HEAD, *(cells(row) for row in rows)]
    widths = [max(len(line[at]) for line in lines) for at in range(len(HEAD))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def markdown(rows: Sequence[Row]) -> str:
    """The rows with targets, for a page."""
    head = [HEAD, ["---"] * len(HEAD)]
    body = [cells(row) for row in rows if row.met is not None]
    return "\n".join("| " + " | ".join(line) + " |" for line in [*head, *body])


def save(
    path: Path, about: dict[str, object], runs: Sequence[Run], rows: Sequence[Row],
    left_out: Sequence[str] = (),
) -> None:  # fmt: skip
    """Machine, versions, every run, and the ratios."""
    told = {
        "format": FORMAT,
        **about,
        "runs": [asdict(run) for run in runs],
        "ratios": [row.as_dict() for row in rows],
        "left_out": list(left_out),
    }
    path.write_text(json.dumps(told, indent=1) + "\n")


def load(path: Path) -> dict[tuple[str, str, str], float]:
    """The ratios of a saved run by (job, ours, peer)."""
    try:
        told: Any = json.loads(path.read_text())
        if told["format"] != FORMAT:
            raise SavedError(f"{path} was saved in format {told['format']}, not {FORMAT}")
        return {
            (row["job"], row["ours"], row["peer"]): float(row["ratio"]) for row in told["ratios"]
        }
    except OSError as error:
        raise SavedError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, LookupError, TypeError) as error:
        raise SavedError(f"{path} is no saved run of this suite") from error


def changes(
    rows: Sequence[Row], saved: dict[tuple[str, str, str], float], tolerance: float
) -> tuple[list[str], bool]:
    """What differs from a saved run by more than a share of `tolerance`, a line each, and whether
    something became worse."""
    lines: list[str] = []
    is_worse = False
    for row in rows:
        before = saved.get((row.job, row.ours, row.peer))
        if not before:
            continue
        change = row.ratio / before
        if 1 - tolerance <= change <= 1 / (1 - tolerance):
            continue
        worse = change < 1
        is_worse = is_worse or worse
        word = "WORSE" if worse else "better"
        lines.append(f"{row.job} {row.ours} / {row.peer}: {before:.2f} -> {row.ratio:.2f} {word}")
    return lines, is_worse
