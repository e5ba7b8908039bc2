# SPDX-License-Identifier: Apache-2.0
"""What happens to devices, as a stream for those who want to hear of it at once.

Events are the log's own records about devices, so both always tell the same: every change of
state, what workers report, and troubles. The last ones are kept for who comes later. A listener
that does not keep up loses the oldest; he never holds up the daemon.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
from collections import deque
from collections.abc import AsyncIterator
from operator import itemgetter
from typing import Final

from fvdapi.models import sendable
from fvdd.log import fields_of

# Of each kind of event, so that a base that is down does not drive changes of state out.
KEPT_MAX: Final = 500
KINDS_MAX: Final = 100
WAITING_MAX: Final = 1000
KEEPALIVE_SECONDS: Final = 15.0
SOURCE: Final = "fvdd.devices"

Event = dict[str, object]


class EventHub(logging.Handler):
    """Hears the log of devices and passes it on. Used from one event loop, fed from any thread."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._kept: dict[str, deque[tuple[int, Event]]] = {}
        self._count = itertools.count()
        self._listeners: dict[asyncio.Queue[Event | None], asyncio.AbstractEventLoop] = {}
        source = logging.getLogger(SOURCE)
        source.setLevel(logging.INFO)  # whatever is written of it
        source.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        values = {key: sendable(str(value)) for key, value in fields_of(record).items()}
        event: Event = {
            "time": record.created,
            "level": record.levelname.lower(),
            "name": values.pop("name", ""),
            "message": sendable(record.getMessage()),
            "values": values,
        }
        # The kind is the text as it was written in the program, without what was filled in.
        kind = record.msg if isinstance(record.msg, str) else ""
        if kind not in self._kept and len(self._kept) >= KINDS_MAX:
            kind = ""
        kept = self._kept.setdefault(kind, deque(maxlen=KEPT_MAX))
        kept.append((next(self._count), event))
        self._pass_on(event)

    @property
    def past(self) -> list[Event]:
        """What is kept, in the order in which it happened."""
        self.acquire()
        try:
            numbered = [entry for kept in self._kept.values() for entry in kept]
        finally:
            self.release()
        return [event for _, event in sorted(numbered, key=itemgetter(0))]

    def listen(self) -> asyncio.Queue[Event | None]:
        """A queue of events from now on; None is the end."""
        queue: asyncio.Queue[Event | None] = asyncio.Queue()
        self._listeners[queue] = asyncio.get_running_loop()
        return queue

    @property
    def has_listener(self) -> bool:
        """Whether somebody waits for events."""
        return bool(self._listeners)

    def forget(self, queue: asyncio.Queue[Event | None]) -> None:
        self._listeners.pop(queue, None)

    def close(self) -> None:
        """End all streams."""
        logging.getLogger(SOURCE).removeHandler(self)
        self._pass_on(None)
        super().close()

    def _pass_on(self, event: Event | None) -> None:
        for queue, loop in list(self._listeners.items()):
            with contextlib.suppress(RuntimeError):  # a loop that has ended hears nothing
                loop.call_soon_threadsafe(_put, queue, event)


def _put(queue: asyncio.Queue[Event | None], event: Event | None) -> None:
    if queue.qsize() >= WAITING_MAX:
        queue.get_nowait()
    queue.put_nowait(event)


async def stream(hub: EventHub, *, past: bool) -> AsyncIterator[str]:
    """The events as text of server-sent events, with a sign of life now and then."""
    queue = hub.listen()
    try:
        yield ": fvd events\n\n"
        for event in hub.past if past else ():
            yield f"data: {json.dumps(event)}\n\n"
        while True:
            try:
                async with asyncio.timeout(KEEPALIVE_SECONDS):
                    event_now = await queue.get()
            except TimeoutError:
                yield ": still here\n\n"
                continue
            if event_now is None:
                return
            yield f"data: {json.dumps(event_now)}\n\n"
    finally:
        hub.forget(queue)
