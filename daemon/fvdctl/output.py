# SPDX-License-Identifier: Apache-2.0
"""What all verbs print with: JSON, tables, sizes, progress bars, and the type of size options.

stdout carries the answer and nothing else; notes, warnings and progress go to stderr.
"""

import contextlib
import json
import math
import os
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, cast

import click

from fvdengine.errors import InvalidOption
from fvdengine.units import format_size, parse_size

if TYPE_CHECKING:
    IntParam = click.ParamType[int]
else:
    IntParam = click.ParamType  # generic only in newer versions of click

Advance = Callable[[float], None]

PREFETCH_OFF = -1


def is_file_of_ours(path: str, begin: bytes) -> bool:
    """Whether it is a regular file, no link to one, that begins so: it may be replaced. All else
    was not made by us, and a slip of the finger must not cost an image."""
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            return False
        with open(path, "rb") as file:
            return file.read(len(begin)) == begin
    except OSError:
        return False


class SizeParam(IntParam):
    """A size with k, M, G or T (powers of 1024); the value is in bytes."""

    name = "size"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        return value if isinstance(value, int) else parse_size(str(value))


class DelayParam(IntParam):
    """Seconds, or "off", which is -1 as in the header."""

    name = "S|off"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        if isinstance(value, int):
            return value
        text = str(value).strip().lower()
        if text == "off":
            return PREFETCH_OFF
        if not text.isascii() or not text.isdigit():
            option = param.opts[0] if param is not None else "the delay"
            raise InvalidOption(
                option=option, reason=f"is {value!r}, not a number of seconds or off"
            )
        return int(text)


class SecondsParam(click.FloatRange):
    """Seconds within bounds; "nan" and "inf", which Python takes for numbers, are none."""

    name = "seconds"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        found = float(super().convert(cast(float, value), param, ctx))
        if not math.isfinite(found):
            self.fail(f"{value!r} is not a number of seconds.", param, ctx)
        return found


SIZE = SizeParam()
DELAY = DelayParam()


def at_most(limit: int) -> Callable[[click.Context, click.Parameter, int | None], int | None]:
    """A check that a size is no larger than that, for `callback=` of an option."""

    def check(_ctx: click.Context, _option: click.Parameter, value: int | None) -> int | None:
        if value is not None and value > limit:
            raise click.BadParameter(f"at most {size_text(limit)} is possible")
        return value

    return check


def emit_json(value: object) -> None:
    """Print one JSON value, indented."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=True))


def emit_json_list(values: Iterable[object]) -> None:
    """Print a JSON list, one element a line, while it is being produced."""
    separator = "["
    for value in values:
        click.echo(separator + json.dumps(value, ensure_ascii=True), nl=False)
        separator = ",\n "
    click.echo("[]" if separator == "[" else "]")


def size_text(size: int | None) -> str:
    """Return a size for people, "-" for one that is not known."""
    return "-" if size is None else format_size(size)


def printable(text: str) -> str:
    """Return `text` without characters that a terminal would act on: names are untrusted."""
    return "".join(c if c.isprintable() else "?" for c in text)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print rows under headings; columns whose values are all numbers or sizes stand right."""
    cells = [[printable(str(cell)) for cell in row] for row in rows]
    widths = [
        max(len(heading), *(len(row[index]) for row in cells)) if cells else len(heading)
        for index, heading in enumerate(columns)
    ]
    right = [
        bool(cells) and all(row[index][:1].isdigit() for row in cells)
        for index in range(len(columns))
    ]
    for line in ([str(heading) for heading in columns], *cells):
        parts = [
            cell.rjust(width) if is_right else cell.ljust(width)
            for cell, width, is_right in zip(line, widths, right, strict=True)
        ]
        click.echo("  ".join(parts).rstrip())


def pairs(rows: Iterable[tuple[str, object]]) -> None:
    """Print names and values, aligned."""
    lines = [(name, printable(str(value))) for name, value in rows]
    width = max((len(name) for name, _ in lines), default=0)
    for name, value in lines:
        click.echo(f"{name.ljust(width)}  {value}".rstrip())


def warn(warnings: Iterable[str], *, quiet: bool = False) -> None:
    """Print warnings to stderr."""
    if not quiet:
        for text in warnings:
            click.echo(f"fvdctl: warning: {printable(text)}", err=True)


@contextlib.contextmanager
def progress(label: str, total: float, *, quiet: bool = False) -> Iterator[Advance]:
    """Show a progress bar on stderr, if that is a terminal; give the function that moves it on.

    That function takes the amount done so far, not the step.
    """
    if quiet or not sys.stderr.isatty():
        yield lambda _done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(), console=Console(stderr=True), transient=True,
    )  # fmt: skip
    with bar:
        task = bar.add_task(label, total=total)
        yield lambda done: bar.update(task, completed=done)
