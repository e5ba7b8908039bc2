# SPDX-License-Identifier: Apache-2.0
"""A trace as the JSON that Perfetto and Chrome's about:tracing show.

Requests are asynchronous spans, from arrival to answer: many live at once. What a thread does for
them, or by itself, lies on the thread's own line: reads of the base, commits, flushes, checkpoints,
copies. Times are microseconds of CLOCK_MONOTONIC, exact to the nanosecond.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Iterable, Mapping
from typing import Any, Final, TextIO

from fvdapi.tracing import (
    BASE,
    CHECKPOINT,
    COMMIT,
    COPY,
    FLUSH,
    OPERATIONS,
    PREFETCH,
    REASONS,
    REQUEST,
    SOURCES,
    TraceEvent,
    role_name,
)

# What every file of ours begins with.
BEGIN: Final = '{"displayTimeUnit": "ns", "traceEvents": [\n'
# kind -> category, name
THREAD_SPANS: Final = {
    COMMIT: ("journal", "commit"),
    CHECKPOINT: ("journal", "checkpoint"),
    FLUSH: ("journal", "flush of the image"),
    COPY: ("copy", "copy-on-read"),
}
PLACED: Final = (REQUEST, BASE, PREFETCH, COPY)


class ChromeTrace:
    """Writes a trace to a text file as it comes; `finish` makes the file whole."""

    def __init__(self, file: TextIO, name: str, about: Mapping[str, object]) -> None:
        self._file = file
        self._pid = _number(about.get("pid"))
        self._about = {**about, "device": name}
        self._threads: set[int] = set()
        self.events = 0
        self.requests = 0
        file.write(BEGIN)
        self._write(_metadata("process_name", self._pid, 0, f"fvd {name}"), first=True)
        file.flush()

    def add(self, events: Iterable[TraceEvent]) -> None:
        for event in events:
            self.events += 1
            if event.thread not in self._threads:
                self._threads.add(event.thread)
                role = role_name(event.role)
                self._write(_metadata("thread_name", self._pid, event.thread, role))
            if event.kind == REQUEST:
                self.requests += 1
                self._request(event)
            else:
                self._span(event)

    def flush(self) -> None:
        """What was added is in the file, which is not whole yet."""
        self._file.flush()

    def finish(self, *, lost: int, is_whole: bool) -> None:
        """End the file; it says what is missing from it."""
        other = {**self._about, "lost_events": lost, "cut_off": not is_whole}
        other["events"], other["requests"] = self.events, self.requests
        self._file.write(f'],\n"otherData": {json.dumps(other)}}}\n')
        self._file.flush()

    def _request(self, event: TraceEvent) -> None:
        common = {
            "cat": "request",
            "name": _named(OPERATIONS, event.what),
            "id": hex(event.sequence),
            "pid": self._pid,
            "tid": event.thread,
        }
        arguments = _arguments(event)
        source = "+".join(name for bit, name in SOURCES if event.source & bit)
        if source:
            arguments["source"] = source
        self._write({**common, "ph": "b", "ts": event.begin, "args": arguments})
        self._write({**common, "ph": "e", "ts": event.end})

    def _span(self, event: TraceEvent) -> None:
        if event.kind == BASE:
            category, name = "base", f"base read: {_named(REASONS, event.what)}"
        elif event.kind == PREFETCH:
            category, name = "prefetch", "prefetch: hole" if event.what else "prefetch: store"
        else:
            category, name = THREAD_SPANS.get(event.kind, ("other", f"kind {event.kind}"))
        self._write(
            {
                "cat": category,
                "name": name,
                "ph": "X",
                "pid": self._pid,
                "tid": event.thread,
                "ts": event.begin,
                "dur": max(0, event.end - event.begin),
                "args": _arguments(event),
            }
        )

    def _write(self, made: dict[str, Any], *, first: bool = False) -> None:
        # Floating point would lose the nanoseconds of a host that has been up for long.
        times = "".join(
            f', "{key}": {made[key] // 1000}.{made.pop(key) % 1000:03d}'
            for key in ("ts", "dur")
            if key in made
        )
        self._file.write(("" if first else ",\n") + json.dumps(made)[:-1] + times + "}")


def _arguments(event: TraceEvent) -> dict[str, object]:
    found: dict[str, object] = {}
    if event.kind in PLACED:
        found |= {"offset": event.offset, "length": event.length}
    if event.result:
        found["error"] = errno.errorcode.get(-event.result, str(-event.result))
    return found


def _metadata(kind: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": name}}


def _named(names: tuple[str, ...], number: int) -> str:
    return names[number] if number < len(names) else f"number {number}"


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0
