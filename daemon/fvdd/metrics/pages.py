# SPDX-License-Identifier: Apache-2.0
"""The metrics of statistics pages: what engines counted, and what follows from it.

A scrape reads shared memory and asks nobody, so it disturbs no worker and works while one is being
replaced. Nothing is remembered from scrape to scrape: a device that is not among those given has
no series. Standard library alone, because workers use it as well.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from operator import itemgetter
from typing import Final

from fvdd.metrics.exposition import Exposition, Labels, histogram_template, template
from fvdd.metrics.names import COUNTERS, GAUGES, HISTOGRAMS, PREFETCH_STATES, Source
from fvdengine.stats import HISTOGRAM_BUCKETS, Stats

Pages = Sequence[tuple[str, Stats]]


def write_pages(out: Exposition, pages: Pages, now_ns: int, wall: float) -> None:
    """All families of all pages; `now_ns` of the monotonic clock and `wall` are one moment."""
    for source in COUNTERS:
        _write_scalars(out, source, "counter", [(name, page.counters) for name, page in pages])
    for source in GAUGES:
        _write_scalars(out, source, "gauge", [(name, page.gauges) for name, page in pages])
    for source in HISTOGRAMS:
        _write_histograms(out, source, pages)
    _write_pending(out, pages)
    _write_prefetch(out, pages, now_ns, wall)
    _write_base(out, pages, now_ns, wall)
    out.family("fvd_io_oldest_inflight_seconds", "gauge", "Age of the oldest request.")
    for name, page in pages:
        age = seconds_since(page, "busy_since", now_ns)
        out.sample("fvd_io_oldest_inflight_seconds", _device(name), age or 0.0)


def seconds_since(page: Stats, entry: str, now_ns: int) -> float | None:
    """How long ago something was; None when it never was."""
    then = page.times.get(entry)
    return None if then is None else max(0, now_ns - then) / 1e9


def prefetch_state(page: Stats) -> str:
    """The state of prefetch, by name."""
    number = page.gauges.get("prefetch_state", 0)
    return PREFETCH_STATES[number] if 0 <= number < len(PREFETCH_STATES) else "failed"


def prefetch_eta(page: Stats) -> float | None:
    """Seconds until everything is local at the present rate; None while nobody can tell."""
    rate, left = page.gauges.get("prefetch_rate", 0), page.gauges.get("base_bytes_left", 0)
    if left == 0:
        return 0.0
    return left / rate if rate and prefetch_state(page) == "running" else None


@functools.lru_cache(maxsize=1 << 16)
def _device(name: str) -> Labels:
    return (("device", name),)


def _series(source: Source, device: str) -> list[tuple[Labels, tuple[str, ...]]]:
    """The series of one family and device: labels, and the entries that are added up."""
    found: dict[tuple[str, ...], list[str]] = {}
    for entry, values in source.entries.items():
        found.setdefault(values, []).append(entry)
    return [
        ((*_device(device), *zip(source.labels, values, strict=True)), tuple(entries))
        for values, entries in found.items()
    ]


@functools.lru_cache(maxsize=1 << 16)
def _scalars(name: str, source_name: str, device: str, known: tuple[str, ...]) -> str:
    """The template of a counter or gauge; `known` are the entries that the page has."""
    series = _series(_BY_NAME[source_name], device)
    return template((name, labels) for labels, (entry,) in series if entry in known)


@functools.lru_cache(maxsize=1 << 10)
def _all_of(entries: tuple[str, ...]) -> Callable[[Mapping[str, int]], tuple[int, ...]]:
    """Takes the values of these entries."""
    if len(entries) > 1:
        return itemgetter(*entries)
    (entry,) = entries
    return lambda values: (values[entry],)


@functools.lru_cache(maxsize=1 << 16)
def _histograms(source_name: str, device: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """The templates of a histogram, each with its entries."""
    source = _BY_NAME[source_name]
    return tuple(
        (histogram_template(source_name, labels, source.bounds()), entries)
        for labels, entries in _series(source, device)
    )


_NO_BUCKETS: Final = (0,) * HISTOGRAM_BUCKETS
_BY_NAME: Final = {source.name: source for source in (*COUNTERS, *GAUGES, *HISTOGRAMS)}


def _write_scalars(
    out: Exposition, source: Source, kind: str, pages: Sequence[tuple[str, Mapping[str, int]]]
) -> None:
    out.family(source.name, kind, source.help)
    name = f"{source.name}_total" if kind == "counter" else source.name
    entries = tuple(source.entries)
    take = _all_of(entries)
    for device, values in pages:
        # Most families are such that every page has, and nothing is subtracted.
        if not source.minus:
            try:
                found = take(values)
            except KeyError:
                found = (-1,)
            if min(found) >= 0:
                out.lines(_scalars(name, source.name, device, entries) % found)
                continue
        known = tuple(entry for entry in entries if entry in values)
        # What is taken between two additions of the engine may be short of itself, but not shown.
        numbers = (
            max(0, values[entry] - values.get(source.minus[entry], 0))
            if entry in source.minus
            else max(0, values[entry])
            for entry in known
        )
        out.lines(_scalars(name, source.name, device, known) % tuple(numbers))


def _write_histograms(out: Exposition, source: Source, pages: Pages) -> None:
    out.family(source.name, "histogram", source.help)
    for device, page in pages:
        for lines, entries in _histograms(source.name, device):
            known = [page.histograms[entry] for entry in entries if entry in page.histograms]
            if not known:
                continue
            buckets = known[0].buckets
            for other in known[1:]:
                buckets = tuple(map(int.__add__, buckets, other.buckets))
            if buckets == _NO_BUCKETS:
                out.lines(_untouched(lines))
                continue
            counts = tuple(accumulate(source.fold(buckets)))
            total = repr(sum(one.sum_ns for one in known) / 1e9)
            out.lines(lines % (*counts, total, counts[-1]))


@functools.lru_cache(maxsize=1 << 16)
def _untouched(lines: str) -> str:
    """A histogram's lines while it counted nothing: most devices never do most things."""
    counts = lines.count("%s") - 2
    return lines % (*([0] * counts), "0.0", 0)


def _write_pending(out: Exposition, pages: Pages) -> None:
    name = "fvd_journal_pending_bytes"
    out.family(name, "gauge", "Bytes of blocks whose state is not durable yet.")
    for device, page in pages:
        pending = max(0, page.gauges.get("pending_blocks", 0))
        out.sample(name, _device(device), pending * page.gauges.get("block_bytes", 0))


def _write_prefetch(out: Exposition, pages: Pages, now_ns: int, wall: float) -> None:
    name = "fvd_prefetch_state"
    out.family(name, "gauge", "1 for the state that prefetch is in.")
    for device, page in pages:
        state = prefetch_state(page)
        for word in PREFETCH_STATES:
            out.sample(name, (*_device(device), ("state", word)), int(word == state))
    name = "fvd_prefetch_eta_seconds"
    out.family(name, "gauge", "Time until all is local at this rate; NaN while nobody can tell.")
    for device, page in pages:
        eta = prefetch_eta(page)
        out.sample(name, _device(device), float("nan") if eta is None else eta)
    name = "fvd_prefetch_paused_seconds"
    out.family(name, "counter", "Time that prefetch was paused, this pause included.")
    for device, page in pages:
        paused = page.counters.get("prefetch_paused_ns", 0) / 1e9
        paused += seconds_since(page, "prefetch_paused_since", now_ns) or 0.0
        out.sample(f"{name}_total", _device(device), paused)
    name = "fvd_prefetch_completed_timestamp_seconds"
    out.family(name, "gauge", "When this attachment's prefetch made the last block local.")
    _write_when(out, name, "prefetch_done", pages, now_ns, wall)


def _write_base(out: Exposition, pages: Pages, now_ns: int, wall: float) -> None:
    name = "fvd_base_up"
    out.family(name, "gauge", "Whether the base's last answer was a good one.")
    for device, page in pages:
        if page.gauges.get("base_bytes_left", 0) or page.times.get("base_ok"):
            good = page.times.get("base_ok", 0) >= page.times.get("base_error", 0)
            out.sample(name, _device(device), int(good))
    name = "fvd_base_last_success_timestamp_seconds"
    out.family(name, "gauge", "When the base last gave what it was asked for.")
    _write_when(out, name, "base_ok", pages, now_ns, wall)


def _write_when(
    out: Exposition, name: str, entry: str, pages: Pages, now_ns: int, wall: float
) -> None:
    for device, page in pages:
        ago = seconds_since(page, entry, now_ns)
        if ago is not None:
            out.sample(name, _device(device), round(wall - ago, 3))
