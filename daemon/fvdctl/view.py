# SPDX-License-Identifier: Apache-2.0
"""What `fvdctl top` shows, as lines of text: figures between two looks, no terminal in sight."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fvdapi.activity import Activity, ActivityList, DeviceMap, duration_quantile
from fvdapi.models import DeviceState, PrefetchState
from fvdctl.output import printable, size_text

SORTS = ("name", "read", "write", "latency", "local")
LEGEND = "# local  + partly  . in the base  - zeros  ? not known"
HELP_ALL = "q quit  up/down choose  enter one device  s sort  p pause or start prefetch"
HELP_ONE = "q quit  backspace all devices  p pause or start prefetch"
MINUTE, HOUR = 60, 3600
# Errors of who asks, not of the device.
WRONG_REQUESTS = ("_einval", "_eperm")


@dataclass(frozen=True)
class Figures:
    """One device between two looks. Rates in units a second; None where nothing happened."""

    read: float
    write: float
    requests: float
    base: float
    commits: float
    hit: float | None
    read_p99: float | None
    write_p99: float | None
    flush_p99: float | None
    base_p99: float | None
    errors: int
    local: float


def figures(now: Activity, before: Activity | None, seconds: float) -> Figures:
    """Rates since `before`; without it (a first look) there are none, but totals stand."""
    old = before if before is not None else now
    apart = seconds if before is not None and seconds > 0 else 1.0

    def rate(*names: str) -> float:
        return max(0, now.total(*names) - old.total(*names)) / apart

    def p99(what: str) -> float | None:
        since = old.durations.get(what, ()) if before is not None else ()
        return duration_quantile(0.99, now.durations.get(what, ()), since)

    # Requests, not bytes: of the base whole blocks are read.
    asked, of_base = now.reads - old.reads, now.reads_of_base - old.reads_of_base
    total = now.local_bytes + now.remaining_bytes
    return Figures(
        read=rate("io_bytes_read"),
        write=rate("io_bytes_write"),
        requests=max(0, now.total_of("io_requests_") - old.total_of("io_requests_")) / apart,
        base=max(0, now.total_of("base_bytes_") - old.total_of("base_bytes_")) / apart,
        commits=rate("journal_commits"),
        hit=1 - of_base / asked if asked > 0 and 0 <= of_base <= asked else None,
        read_p99=p99("read"),
        write_p99=p99("write"),
        flush_p99=p99("flush"),
        base_p99=p99("base"),
        errors=sum(
            n
            for key, n in now.counters.items()
            if key.startswith("io_errors_") and not key.endswith(WRONG_REQUESTS)
        ),
        local=now.local_bytes / total if total else 1.0,
    )


@dataclass(frozen=True)
class Picture:
    """Two looks at all devices; `before` is None at first."""

    now: ActivityList
    before: ActivityList | None = None

    def figures(self) -> dict[str, Figures]:
        old = {one.name: one for one in self.before.devices} if self.before else {}
        apart = self.now.clock - self.before.clock if self.before else 0.0
        return {one.name: figures(one, old.get(one.name), apart) for one in self.now.devices}


def sorted_devices(
    devices: Sequence[Activity], found: Mapping[str, Figures], sort: str
) -> list[Activity]:
    """By name, or the busiest, slowest, least local first."""
    keys = {
        "read": lambda one: -found[one.name].read,
        "write": lambda one: -found[one.name].write,
        "latency": lambda one: -(found[one.name].read_p99 or 0.0),
        "local": lambda one: found[one.name].local,
    }
    by_name = sorted(devices, key=lambda one: one.name)
    return sorted(by_name, key=keys[sort]) if sort in keys else by_name


def all_lines(picture: Picture, sort: str, chosen: str, width: int, height: int) -> list[str]:
    """The view of all devices; what does not fit is left out, and said so."""
    found = picture.figures()
    devices = sorted_devices(picture.now.devices, found, sort)
    read, written = (sum(getattr(f, what) for f in found.values()) for what in ("read", "write"))
    lines = [
        f"fvd {picture.now.version}  {len(devices)} devices  read {size_text(int(read))}/s  "
        f"written {size_text(int(written))}/s  by {sort}",
        "",
        f"  {'NAME':<12} {'STATE':<8} {'READ/s':>7} {'WRITE/s':>7} {'READ99':>6} {'WRITE99':>7} "
        f"{'HIT':>4} {'LOCAL':>6} {'PREFETCH':>8} {'JRNL':>4}",
    ]
    room = max(1, height - len(lines) - 2)
    at = next((n for n, one in enumerate(devices) if one.name == chosen), 0)
    first = max(0, min(at - room // 2, len(devices) - room))
    lines.extend(
        _row(one, found[one.name], one.name == chosen) for one in devices[first : first + room]
    )
    hidden = len(devices) - room
    lines += [f"  and {hidden} more"] if hidden > 0 else [""]
    return fitted([*lines, HELP_ALL], width, height)


def _row(one: Activity, f: Figures, is_chosen: bool) -> str:
    acute = [trouble.word for trouble in one.troubles if trouble.word]
    is_attached = one.state is DeviceState.ATTACHED
    state = acute[0] if acute and is_attached else one.state.value
    fill = _share(one.journal_used_bytes, one.journal_size_bytes)
    return (
        f"{'>' if is_chosen else ' '} {printable(one.name)[:12]:<12} {printable(state)[:8]:<8} "
        f"{size_text(int(f.read)):>7} {size_text(int(f.write)):>7} {time_text(f.read_p99):>6} "
        f"{time_text(f.write_p99):>7} {percent(f.hit):>4} {percent(f.local, places=1):>6} "
        f"{prefetch_word(one):>8} {fill:>4}"
    )


def one_lines(
    picture: Picture, name: str, strip: DeviceMap | None, width: int, height: int
) -> list[str]:
    """The view of one device, with its map."""
    one = next((one for one in picture.now.devices if one.name == name), None)
    if one is None:
        return fitted([f"{printable(name)} is not attached any more", "", HELP_ONE], width, height)
    lines = device_lines(one, picture.figures()[name], strip, width)
    return fitted([*lines, HELP_ONE], width, height)


def device_lines(one: Activity, f: Figures, strip: DeviceMap | None, width: int) -> list[str]:
    """All about one device."""
    state = one.state.value + (f": {one.reason}" if one.reason else "")
    local = f"{size_text(one.local_bytes)} of {size_text(one.size_bytes)} ({percent(f.local, 1)})"
    eta = f", done in {span_text(one.prefetch_eta)}" if one.prefetch_eta else ""
    speed = f", {size_text(one.prefetch_rate)}/s" if one.prefetch is PrefetchState.RUNNING else ""
    waits = " for the base" if one.prefetch is PrefetchState.WAITING and not one.base_up else ""
    rows = [
        ("state", f"{state}, {one.connections_alive} of {one.connections} connections"),
        ("image", one.image or "-"),
        ("base", (one.base or "none") + ("" if one.base_up else "  DOES NOT ANSWER")),
        ("local", local),
        ("prefetch", f"{one.prefetch.value}{waits}{speed}{eta}"),
        ("read", f"{size_text(int(f.read))}/s, 99 of 100 within {time_text(f.read_p99)}"),
        ("written", f"{size_text(int(f.write))}/s, 99 of 100 within {time_text(f.write_p99)}"),
        ("flushes", f"99 of 100 within {time_text(f.flush_p99)}, {f.commits:.1f} commits/s"),
        ("base reads", f"{size_text(int(f.base))}/s, 99 of 100 within {time_text(f.base_p99)}"),
        ("hit ratio", percent(f.hit, 1)),
        ("copied", f"{size_text(one.total('cor_bytes'))} by reading, "
                   f"{size_text(one.total('prefetch_bytes'))} by prefetch, "
                   f"{size_text(one.total_of('cor_skipped_bytes_'))} skipped"),
        ("journal", f"{_share(one.journal_used_bytes, one.journal_size_bytes)} full, "
                    f"{size_text(one.pending_bytes)} not durable yet"),
        ("requests", f"{f.requests:.0f}/s, {one.in_flight} in flight, "
                     f"oldest {time_text(one.oldest_seconds)}"),
        ("errors", f"{f.errors}, worker restarted {one.restarts} times"),
    ]  # fmt: skip
    lines = [f"{printable(one.name)}  {one.device or '-'}", ""]
    lines += [f"{term:<11} {printable(value)}" for term, value in rows]
    for trouble in one.troubles:
        text = printable(f"{trouble.topic}: {trouble.text}")
        lines += textwrap.wrap(
            text, max(width, 30), initial_indent="TROUBLE     ", subsequent_indent=" " * 12
        )
    if strip is not None:
        lines += ["", f"[{strip.strip()}]", f" {LEGEND}"]
    return lines


def fitted(lines: Sequence[str], width: int, height: int) -> list[str]:
    """No line longer than the screen, no more lines than it has; the last line stays."""
    kept = [line[:width] for line in lines]
    if len(kept) > height:
        kept = [*kept[: height - 1], kept[-1]] if height > 0 else []
    return kept


def prefetch_word(one: Activity) -> str:
    """How long prefetch takes yet, or its state."""
    if one.prefetch is PrefetchState.RUNNING and one.prefetch_eta is not None:
        return span_text(one.prefetch_eta)
    if one.state is not DeviceState.ATTACHED:
        return "-"
    return one.prefetch.value[:8]


def time_text(seconds: float | None) -> str:
    """A duration in at most six characters."""
    if seconds is None:
        return "-"
    for limit, factor, unit in ((1e-3, 1e6, "us"), (1.0, 1e3, "ms"), (MINUTE, 1, "s")):
        if seconds < limit:
            return (
                f"{seconds * factor:.3g}{unit}"
                if seconds * factor < 100
                else (f"{seconds * factor:.0f}{unit}")
            )
    return span_text(seconds)


def span_text(seconds: float) -> str:
    """A longer duration, roughly."""
    if seconds < MINUTE:
        return f"{seconds:.0f}s"
    if seconds < HOUR:
        return f"{seconds / MINUTE:.0f}m"
    return f"{seconds / HOUR:.0f}h"


def percent(share: float | None, places: int = 0) -> str:
    """A share, never rounded up to 100."""
    if share is None:
        return "-"
    if share >= 1.0:
        return "100%"
    scale = 10**places
    return f"{int(share * 100 * scale) / scale:.{places}f}%"


def _share(part: int, whole: int) -> str:
    return percent(part / whole) if whole else "-"
