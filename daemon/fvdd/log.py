# SPDX-License-Identifier: Apache-2.0
"""Log lines as key=value on stderr, with repeats held back.

One line an event: time, level, logger, message, then the fields given as `extra=fields(...)`.
A warning or error that comes again and again about the same thing (a base that is down, a worker
that keeps dying) is written at most REPEAT_MAX times in REPEAT_WINDOW_SECONDS; the next one after
that says how many were left out. What was asked and done (level info) is always written. Under
systemd the journal adds the time, so it is not written twice.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Final, TextIO

REPEAT_MAX: Final = 10
REPEAT_WINDOW_SECONDS: Final = 10.0
REPEAT_KEYS_MAX: Final = 1000

_FIELDS: Final = "fvd_fields"


_about: dict[str, object] = {}


def about(**values: object) -> None:
    """What every line of this process is about from now on, in fields of its own."""
    _about.update(values)


def fields(**values: object) -> dict[str, Mapping[str, object]]:
    """The `extra` argument of a logging call: `log.info("attached", extra=fields(name=n))`."""
    return {_FIELDS: values}


def fields_of(record: logging.LogRecord) -> Mapping[str, object]:
    """What was given as `extra=fields(...)`."""
    found = getattr(record, _FIELDS, None)
    return found if isinstance(found, Mapping) else {}


def quote(value: object) -> str:
    """One value of a key=value line: quoted only where a reader would stumble."""
    text = str(value)
    if text and all(c.isalnum() or c in "/._-+:@,%" for c in text):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in escaped) + '"'


class KeyValueFormatter(logging.Formatter):
    """level=info logger=fvdd.devices message=attached name=web device=/dev/nbd0"""

    def __init__(self, *, with_time: bool) -> None:
        super().__init__()
        self._with_time = with_time

    def format(self, record: logging.LogRecord) -> str:
        parts: list[str] = []
        if self._with_time:
            stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            parts.append(f"time={stamp}.{int(record.msecs):03d}Z")
        parts.append(f"level={record.levelname.lower()}")
        parts.append(f"logger={record.name}")
        parts.append(f"message={quote(record.getMessage())}")
        values = {**_about, **fields_of(record)}
        parts.extend(f"{key}={quote(value)}" for key, value in values.items())
        line = " ".join(parts)
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


class RepeatFilter(logging.Filter):
    """Holds back the same complaint about the same device beyond REPEAT_MAX a window."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._seen: dict[tuple[str, int, str, str], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        now = self._clock()
        about = getattr(record, _FIELDS, None)
        name = str(about.get("name", "")) if isinstance(about, Mapping) else ""
        key = (record.name, record.levelno, str(record.msg), name)
        begin, count = self._seen.get(key, (now, 0))
        if now - begin >= REPEAT_WINDOW_SECONDS:
            if count > REPEAT_MAX:
                record.msg = f"{record.msg} (and {count - REPEAT_MAX} times more before)"
            begin, count = now, 0
        if len(self._seen) >= REPEAT_KEYS_MAX:
            self._seen.clear()
        self._seen[key] = (begin, count + 1)
        return count < REPEAT_MAX


def setup(level: str, stream: TextIO | None = None) -> None:
    """Send everything that this process logs to stderr (or `stream`)."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(KeyValueFormatter(with_time="JOURNAL_STREAM" not in os.environ))
    handler.setLevel(level.upper())
    handler.addFilter(RepeatFilter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # The API logs its own calls, with the caller's credentials.
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    logging.getLogger("uvicorn.access").disabled = True
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    logging.getLogger("pyroute2").setLevel(logging.WARNING)
