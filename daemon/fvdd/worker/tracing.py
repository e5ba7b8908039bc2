# SPDX-License-Identifier: Apache-2.0
"""Take a trace: empty the engine's ring into a pipe until the time is over or nobody reads.

The stream is described in fvdapi/tracing.py. A reader that is slow holds up nothing but this
thread: what the ring cannot hold meanwhile is lost and counted.
"""

from __future__ import annotations

import errno
import json
import os
import select
import struct
import time
from collections.abc import Callable
from typing import Final, Protocol

from fvdd.worker.failure import Failure

TURN_SECONDS: Final = 0.02
SECONDS_MAX: Final = 3600
STALLED_SECONDS: Final = 10.0
EVENT_BYTES: Final = 64
FRAME: Final = struct.Struct("<IIQ")
END: Final = 0xFFFFFFFF


class Traced(Protocol):
    """What a trace needs of the engine."""

    def trace_take(self) -> tuple[bytes, int]: ...
    def trace_stop(self) -> None: ...


class ReaderGone(Exception):
    """Nobody wants the trace any more."""


def begin_trace(begin: Callable[[], None]) -> bool:
    """Let `begin` start the engine's trace; Failure: there is one already."""
    try:
        begin()
    except Exception as error:
        if getattr(error, "errno", None) != errno.EBUSY:
            raise
        raise Failure(
            "trace_busy", "a trace of this device is being taken", "wait for its end"
        ) from error
    return True


def run_trace(device: Traced, pipe: int, seconds: float, about: dict[str, object]) -> None:
    """Write the trace of a device whose trace was started; the pipe is closed at the end."""
    os.set_blocking(pipe, False)
    deadline = time.monotonic() + seconds
    head = {
        "fvd_trace": 1,
        **about,
        "pid": os.getpid(),
        "monotonic_ns": time.monotonic_ns(),
        "time": time.time(),
    }
    try:
        _write(pipe, json.dumps(head).encode() + b"\n")
        while time.monotonic() < deadline:
            _write(pipe, _frame(*device.trace_take()))
            # Readable means that the other end is closed.
            if _wait(pipe, 0, TURN_SECONDS):
                return
        device.trace_stop()
        while (taken := device.trace_take())[0]:
            _write(pipe, _frame(*taken))
        _write(pipe, FRAME.pack(END, 0, taken[1]))
    except ReaderGone:
        return
    except ValueError:
        return  # the image was closed meanwhile: the stream ends without its last frame
    finally:
        _stop(device)
        os.close(pipe)


def _stop(device: Traced) -> None:
    try:
        device.trace_stop()
    except ValueError:
        return  # a closed device traces nothing


def _frame(events: bytes, lost: int) -> bytes:
    return FRAME.pack(len(events), 0, lost) + events


def _write(pipe: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        try:
            left = left[os.write(pipe, left) :]
        except BlockingIOError:
            if not _wait(pipe, select.POLLOUT, STALLED_SECONDS):
                raise ReaderGone from None
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise ReaderGone from None
            raise


def _wait(pipe: int, events: int, seconds: float) -> bool:
    """Wait for these events, or for the reader's end; False: neither came."""
    poll = select.poll()
    poll.register(pipe, events)
    return bool(poll.poll(seconds * 1000))
