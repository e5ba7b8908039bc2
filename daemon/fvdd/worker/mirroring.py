# SPDX-License-Identifier: Apache-2.0
"""A worker's copy of the disk that it serves, in the steps that fvdd asks for.

    begin (with the file)   nothing is under way
    copy                    beside the requests
    end                     nothing is under way; "done", or too much is left, and copy goes on
    drop                    at any time, also by itself when nobody is connected any more
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from typing import Final

from fvdd.worker.channel import Message
from fvdd.worker.copying import Disk, Mirror, MirrorDropped
from fvdd.worker.failure import Failure
from fvdd.worker.tracing import begin_trace
from fvdengine.errors import from_os_error

STEPS: Final = ("begin", "copy", "end", "drop")

Blocking = Callable[[Callable[[], bool]], Awaitable[bool]]


class MirrorRole:
    """The one copy that a worker may be making; `blocking` runs a call beside the event loop."""

    def __init__(self, blocking: Blocking) -> None:
        self._blocking = blocking
        self._mirror: Mirror | None = None
        self._target = -1
        self._name = ""
        # Nothing is closed below a step that is under way.
        self._step = asyncio.Lock()

    async def step(self, disk: Disk, step: str, name: str, descriptors: list[int]) -> Message:
        """Do one step; a copy that fails is dropped. `name`: of the file, for errors."""
        if step == "begin":
            await self.drop()  # of an fvdd that has ended
            return await self._begin(disk, name, descriptors)
        mirror = self._mirror
        if mirror is None:
            raise Failure("bad_request", "no copy is being made")
        if step == "drop":
            await self.drop()
            return {"written": mirror.written}
        steps = {"copy": mirror.copy, "end": mirror.end}
        if step not in steps:
            raise Failure("bad_request", f"mirror knows the steps {', '.join(STEPS)}")
        try:
            async with self._step:
                is_done = await self._blocking(steps[step])
        except BaseException as error:
            await self.drop()
            raise _told(error, self._name) from error
        if step == "end" and is_done:
            await self.drop()
        return {"written": mirror.written, "done": is_done}

    async def _begin(self, disk: Disk, name: str, descriptors: list[int]) -> Message:
        if len(descriptors) != 1:
            raise Failure("bad_request", "this op needs one descriptor")
        target = os.dup(descriptors[0])
        mirror = Mirror(disk, target)
        try:
            async with self._step:
                await self._blocking(lambda: begin_trace(mirror.begin))
        except BaseException as error:
            os.close(target)
            raise _told(error, name) from error
        self._mirror, self._target, self._name = mirror, target, name
        return {"written": 0}

    async def drop(self) -> None:
        """End the copy, and whatever step is under way; harmless when there is none."""
        mirror, self._mirror = self._mirror, None
        if mirror is not None:
            mirror.drop()
            async with self._step:
                os.close(self._target)


def _told(error: BaseException, name: str) -> BaseException:
    """What the user is told: only the file is written by system calls of this process."""
    if isinstance(error, OSError):
        return from_os_error(error, name, "write to")
    if isinstance(error, MirrorDropped):
        return Failure("cancelled", "the copy was given up")
    return error
