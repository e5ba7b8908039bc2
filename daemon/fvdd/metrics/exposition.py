# SPDX-License-Identifier: Apache-2.0
"""Writing samples as text, for Prometheus and for OpenMetrics.

prometheus_client makes an object of every sample and takes about 9 us for a line; sixty-four
devices have thirty thousand lines. Here the lines of a device are made once, and then filled in.
The two formats differ in the head of a counter's family and in the last line alone. Nothing but
the standard library is needed, because a worker serves metrics too (`fvdctl serve --metrics`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Final

# Series whose prefixes are kept. Devices come and go, so the number has a bound.
PREFIXES_MAX: Final = 1 << 17

Labels = tuple[tuple[str, str], ...]


class Exposition:
    """Collects the lines of one scrape."""

    def __init__(self, *, openmetrics: bool = False) -> None:
        self._openmetrics = openmetrics
        self._lines: list[str] = []

    def family(self, name: str, kind: str, text: str) -> None:
        """Begin a family; `name` without the ending of counters, `kind` as in a TYPE line."""
        shown = f"{name}_total" if kind == "counter" and not self._openmetrics else name
        self._lines.append(f"# HELP {shown} {_escape_help(text)}\n# TYPE {shown} {kind}\n")

    def sample(self, name: str, labels: Labels, value: float) -> None:
        """One line; `name` in full."""
        self._lines.append(f"{series_prefix(name, labels)}{number_text(value)}\n")

    def lines(self, made: str) -> None:
        """Whole lines of the present family, for instance a filled-in `template`."""
        self._lines.append(made)

    def text(self) -> str:
        """The families so far."""
        return "".join(self._lines)


def number_text(value: float) -> str:
    """A number as both formats spell it."""
    if isinstance(value, int):
        return str(value)
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return repr(value)


def exposition_of(parts: Iterable[str], *, openmetrics: bool) -> bytes:
    """Whole texts of families, put together as one answer."""
    text = "".join(part.removesuffix("# EOF\n") for part in parts)
    # Names of files may be no text: they must not cost all others their scrape.
    return (text + ("# EOF\n" if openmetrics else "")).encode(errors="replace")


def template(series: Iterable[tuple[str, Labels]]) -> str:
    """Lines with a %s for each number; filling them in is one operation for all."""
    return "".join(f"{series_prefix(*one).replace('%', '%%')}%s\n" for one in series)


def histogram_template(name: str, labels: Labels, bounds: Sequence[str]) -> str:
    """The template of a histogram: its cumulative buckets, sum, count."""
    buckets = ((f"{name}_bucket", (*labels, ("le", bound))) for bound in bounds)
    return template((*buckets, (f"{name}_sum", labels), (f"{name}_count", labels)))


@functools.lru_cache(maxsize=PREFIXES_MAX)
def series_prefix(name: str, labels: Labels) -> str:
    """A line of this series but for the number."""
    inside = ",".join(f'{key}="{_escape(value)}"' for key, value in labels)
    return f"{name}{{{inside}}} " if inside else f"{name} "


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def _escape_help(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n")
