# SPDX-License-Identifier: Apache-2.0
"""Blocking calls off the loop: results, errors, and late results that nobody waits for."""

import asyncio
import queue
import threading

import pytest

from fvdd.attach.threads import run_blocking


def test_result_and_error_come_back():
    def fail():
        raise OSError(5, "no")

    async def main():
        assert await run_blocking(lambda: 7) == 7
        with pytest.raises(OSError, match="no"):
            await run_blocking(fail)

    asyncio.run(main())


def test_loop_is_free_meanwhile():
    async def main():
        gate = threading.Event()
        task = asyncio.create_task(run_blocking(gate.wait))
        await asyncio.sleep(0)
        assert not task.done()
        gate.set()
        assert await asyncio.wait_for(task, 10)

    asyncio.run(main())


def test_late_result_is_discarded_beside_the_loop():
    """To let go of it may wait for what it came late from."""

    async def main():
        gate, dropped = threading.Event(), queue.Queue()

        def call():
            gate.wait()
            return 42

        def drop(result):
            dropped.put((result, threading.current_thread() is threading.main_thread()))

        with pytest.raises(TimeoutError):
            await run_blocking(call, timeout=0.01, discard=drop)
        gate.set()
        assert await asyncio.to_thread(dropped.get, timeout=10) == (42, False)

    asyncio.run(main())


def test_result_that_comes_as_the_waiting_is_given_up_is_discarded():
    async def main():
        gate, done, dropped = threading.Event(), threading.Event(), queue.Queue()

        def call():
            gate.wait()
            return 42

        def drop(result):
            dropped.put((result, threading.current_thread() is threading.main_thread()))

        task = asyncio.create_task(run_blocking(call, discard=drop))
        await asyncio.sleep(0)
        loop = asyncio.get_running_loop()
        # What the thread delivers is called before the task, which is cancelled in that moment.
        thread = next(one for one in threading.enumerate() if one.name == "fvdd-blocking")
        gate.set()
        thread.join(10)
        loop.call_soon(task.cancel)
        loop.call_soon(done.set)
        with pytest.raises(asyncio.CancelledError):
            await task
        assert done.is_set()
        assert await asyncio.to_thread(dropped.get, timeout=10) == (42, False)

    asyncio.run(main())
