# SPDX-License-Identifier: Apache-2.0
"""System calls that may block for long, off the daemon's loop.

Opening or syncing a block device waits for the worker that serves it. Such a call gets a daemon
thread of its own: a pool could fill up with stuck ones, and would keep the process from ending.
"""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")


async def run_blocking(
    call: Callable[[], _T],
    *,
    timeout: float | None = None,
    discard: Callable[[_T], object] | None = None,
) -> _T:
    """Run `call` on its own thread; TimeoutError when it takes longer than `timeout`.

    A call that nobody waits for any more goes on; its late result is given to `discard`, on a
    thread as well.
    """
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[_T] = loop.create_future()

    def deliver(result: _T | None, error: BaseException | None) -> None:
        if outcome.done():
            if error is None and discard is not None:
                _start(functools.partial(discard, result))  # type: ignore[arg-type]
        elif error is not None:
            outcome.set_exception(error)
        else:
            outcome.set_result(result)  # type: ignore[arg-type]

    def body() -> None:
        result: _T | None = None
        error: BaseException | None = None
        try:
            result = call()
        except BaseException as caught:  # noqa: BLE001 (it is re-raised by the awaiting task)
            error = caught
        try:
            loop.call_soon_threadsafe(deliver, result, error)
        except RuntimeError:  # the loop is closed: the process is about to end
            if error is None and discard is not None:
                discard(result)  # type: ignore[arg-type]

    _start(body)
    try:
        async with asyncio.timeout(timeout):
            return await outcome
    except (asyncio.CancelledError, TimeoutError):
        # The result may have come in the very moment in which the waiting was given up.
        is_there = outcome.done() and not outcome.cancelled() and outcome.exception() is None
        if is_there and discard is not None:
            _start(functools.partial(discard, outcome.result()))
        raise


def _start(body: Callable[[], object]) -> None:
    threading.Thread(target=body, name="fvdd-blocking", daemon=True).start()
