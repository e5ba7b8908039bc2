# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a device, in words: one account for `status`, `top` and the status page.

It comes from the statistics page, so it is told while the worker hangs or is dead; what failed last
comes from the worker's events, and is not known of the time before fvdd was started.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import logging
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fvdapi.models import DeviceState, Trouble
from fvdengine import stats
from fvdengine.errors import EngineError
from fvdengine.live import STATS_NAME
from fvdengine.stats import Stats
from fvdengine.units import format_size

if TYPE_CHECKING:
    from fvdd.devices.device import Device

# For so long a request that failed is trouble of now; later it is counted only.
RECENT_SECONDS: Final = 600.0
HANGING_SECONDS: Final = 30.0
# A worker that lives answers at once, even on a host that is short of everything.
SILENT_SECONDS: Final = 3.0
_OPS: Final = ("read", "write", "flush", "discard", "write_zeroes")
# What went wrong inside; a request that is wrong itself says nothing about the device.
_KINDS: Final = ("eio", "enospc", "base", "other")
_RUNNING, _FAILED = 2, 5
_MINUTE, _HOUR = 60, 3600

log = logging.getLogger("fvdd.devices")


def page_of(device: Device) -> Stats | None:
    """What the device's engine has counted; None while it has no page, or a damaged one."""
    path = device.directory / STATS_NAME
    try:
        return stats.read_stats(path)
    except (EngineError, OSError) as error:
        if device.state is DeviceState.ATTACHED and path.exists():
            log.warning("no statistics: %s", error, extra={"fvd_fields": {"name": device.name}})
        return None


def fault_in(directory: Path) -> int:
    """The errno at which the image of a device has stopped; 0 where it has not, or nobody knows."""
    with contextlib.suppress(EngineError, OSError):
        return stats.read_stats(directory / STATS_NAME).gauges.get("fault_errno", 0)
    return 0


def fault_meaning(fault: int) -> str:
    """What the errno says at which an image has stopped."""
    if fault == errno.ENODATA:
        return "its file, or its data file, was made shorter by another program"
    return os.strerror(fault)


def troubles(device: Device, page: Stats | None) -> tuple[Trouble, ...]:
    """What is wrong, the worst first; `page` was read just now."""
    found = list(state_troubles(device.state, device.reason, device.silent_seconds, device.name))
    found += list(page_troubles(page or Stats(), time.monotonic_ns(), device.failures, device.name))
    lost = device.counters.writeback_errors
    if lost:
        text = f"{lost} write-back errors: data that programs had written were lost"
        found.append(Trouble(topic="write-back", text=text))
    return tuple(found)


def state_troubles(
    state: DeviceState, reason: str | None, silent: float, name: str
) -> Iterator[Trouble]:
    """Those that fvdd knows of itself; `silent`: seconds without an answer of the worker."""
    why = f": {reason}" if reason else ""
    if state is DeviceState.FAILED:
        text = f"nobody serves it{why}. Remove the cause, then: fvdctl recover {name}"
        yield Trouble(topic="device", text=text, word="FAILED")
    elif state is DeviceState.RECOVERING:
        text = f"its worker is being replaced, and requests wait{why}"
        yield Trouble(topic="device", text=text, word="STALLED")
    elif silent > SILENT_SECONDS:
        text = f"it has not answered for {_span(silent)}, and is replaced if it goes on"
        yield Trouble(topic="worker", text=text, word="HANGS")


def page_troubles(
    page: Stats, now_ns: int, failures: Mapping[str, Mapping[str, object]], name: str
) -> Iterator[Trouble]:
    """Those that the page shows; `failures` are the last events "failed", of "request" and
    "base"."""
    gauges = page.gauges
    fault, parked = gauges.get("fault_errno", 0), gauges.get("io_parked", 0)
    if fault:
        text = (
            f"the image has stopped: {fault_meaning(fault)}; every write and flush fails until the "
            f"cause is removed and fvdctl recover {name} --discard-unflushed was told"
        )
        yield Trouble(topic="fault", text=text, word="FAULT")
    if parked > 0:
        text = f"FULL: {parked} writes wait for space"
        yield Trouble(topic="storage", text=text, word="FULL")
    is_down = base_is_down(page)
    if is_down:
        yield Trouble(topic="base", text=_base_text(page, now_ns, failures), word="NO BASE")
    yield from _prefetch(gauges.get("prefetch_state", 0), fault, is_down=is_down)
    yield from _errors(page, now_ns, failures)
    busy = _age(page, "busy_since", now_ns) or 0.0
    if busy > HANGING_SECONDS:
        text = f"the oldest request has been worked on for {_span(busy)}"
        yield Trouble(topic="request", text=text, word="HANGS")
    if page.counters.get("unclean_opens", 0):
        text = "the image had not been closed clean: what was not flushed by then may be missing"
        yield Trouble(topic="unclean", text=text)


def base_is_down(page: Stats) -> bool:
    """Whether the base is needed, and its last answer was no good one."""
    is_needed = page.gauges.get("base_bytes_left", 0) > 0
    return is_needed and page.times.get("base_error", 0) > page.times.get("base_ok", 0)


def prefetch_waits_for_base(page: Stats) -> bool:
    """Whether prefetch would go on, if only the base answered."""
    return page.gauges.get("prefetch_state", 0) == _RUNNING and base_is_down(page)


def _base_text(
    page: Stats, now_ns: int, failures: Mapping[str, Mapping[str, object]]
) -> str:
    good, bad = _age(page, "base_ok", now_ns), _age(page, "base_error", now_ns) or 0.0
    since = "since it was attached" if good is None else f"since {_when(good)}, {_span(good)} ago"
    last = f"the last error {_span(bad)} ago"
    if failed := failures.get("base"):
        last += (
            f", of {format_size(_number(failed, 'length'))} at {_number(failed, 'offset')}: "
            f"{failed.get('meaning')}"
        )
    # It need not be away: it may be one place of it that cannot be read.
    how = "the next read that it answers ends this"
    return f"the last read of the base failed: no good answer {since}, {how}; {last}"


def _prefetch(state: int, fault: int, *, is_down: bool) -> Iterator[Trouble]:
    if state == _FAILED and fault:
        yield Trouble(topic="prefetch", text="failed: the image has stopped")
    elif state == _FAILED:
        text = "failed: the storage of the image is full; it is tried again every half minute"
        yield Trouble(topic="prefetch", text=text, word="FULL")
    elif state == _RUNNING and is_down:
        yield Trouble(topic="prefetch", text="waits for the base, and tries again by itself")


def _errors(
    page: Stats, now_ns: int, failures: Mapping[str, Mapping[str, object]]
) -> Iterator[Trouble]:
    counts = {
        f"{op} {kind}": number
        for op in _OPS
        for kind in _KINDS
        if (number := page.counters.get(f"io_errors_{op}_{kind}", 0))
    }
    if not counts:
        return
    age = _age(page, "io_error", now_ns)
    kinds = ", ".join(f"{number} {kind}" for kind, number in counts.items())
    text = f"{sum(counts.values())} requests failed ({kinds})"
    if age is not None:
        text += f", the last one {_span(age)} ago"
    if last := failures.get("request"):
        text += (
            f": {last.get('operation')} of {format_size(_number(last, 'length'))} at "
            f"{_number(last, 'offset')}: {last.get('meaning')}, {last.get('file')}"
        )
    is_recent = age is not None and age < RECENT_SECONDS
    yield Trouble(topic="errors", text=text, word="ERRORS" if is_recent else "")


def _number(event: Mapping[str, object], key: str) -> int:
    value = event.get(key)
    return value if isinstance(value, int) else 0


def _age(page: Stats, entry: str, now_ns: int) -> float | None:
    then = page.times.get(entry)
    return None if then is None else max(0, now_ns - then) / 1e9


def _when(age: float) -> str:
    return datetime.datetime.fromtimestamp(time.time() - age).astimezone().isoformat(" ", "seconds")


def _span(seconds: float) -> str:
    whole = round(seconds)
    if whole < _MINUTE:
        return f"{whole}s"
    if whole < _HOUR:
        return f"{whole // _MINUTE}m{whole % _MINUTE:02d}s"
    return f"{whole // _HOUR}h{whole % _HOUR // _MINUTE:02d}m"
