# SPDX-License-Identifier: Apache-2.0
"""Longer storage for a compact image on a block device: a program of the host's makes it.

The engine says how many bytes it lacks; the program named in the local configuration is run with
them and the device's path, without a shell, while everything but the changes that wait goes on.
Nothing that stands in an image is ever run. The one word that counts there, where the
configuration allows it, is `builtin:lvextend`: it chooses a command of ours.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import stat
from typing import Final, Protocol

from fvdd.log import fields

BUILTIN_LVEXTEND: Final = "builtin:lvextend"
PROGRAM_SECONDS: Final = 60.0
OUTPUT_MAX: Final = 2000
# It looks for volumes on every disk there is, and would wait for an answer of the very device that
# waits for it; so it is kept off nbd devices. A global_filter of the host counts as well.
LVEXTEND: Final = ("lvextend", "--config", 'devices/filter=["r|^/dev/nbd|"]', "-L")

_log = logging.getLogger(__name__)


class Growable(Protocol):
    """What is told how it went: a fvdcore.Device."""

    def storage_grown(self, ok: bool) -> None: ...


def choose_program(configured: str, stored: str, *, allow_builtin: bool) -> str:
    """The program in force: the configured one, or the image's wish where that is our own word."""
    if configured:
        return configured
    return BUILTIN_LVEXTEND if allow_builtin and stored == BUILTIN_LVEXTEND else ""


def command(program: str, more: int, path: str) -> list[str]:
    """The words to run so that the device at `path` gets `more` bytes."""
    if program == BUILTIN_LVEXTEND:
        return [*LVEXTEND, f"+{more}b", path]
    return [program, str(more), path]


async def run_program(
    program: str, more: int, path: str, seconds: float = PROGRAM_SECONDS
) -> bool:
    """Run the program to its end, which must come within `seconds`; whether it succeeded."""
    words = command(program, more, path)
    # A file, not a pipe: what the program leaves running could hold a pipe open for ever.
    output = os.memfd_create("output", os.MFD_CLOEXEC)
    try:
        return await _run(words, output, seconds)
    except OSError as error:
        _log.error("the grow program cannot be run", extra=fields(words=words, reason=error))
        return False
    finally:
        os.close(output)


async def _run(words: list[str], output: int, seconds: float) -> bool:
    process = await asyncio.create_subprocess_exec(
        *words, stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output,
        start_new_session=True,
    )  # fmt: skip
    try:
        async with asyncio.timeout(seconds):
            status: int | None = await process.wait()
    except TimeoutError:
        status = None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    said = os.pread(output, OUTPUT_MAX, 0).decode(errors="replace").strip()
    level = logging.INFO if status == 0 else logging.ERROR
    ended = "killed, it took too long" if status is None else status
    _log.log(level, "grow program", extra=fields(words=words, status=ended, output=said))
    return status == 0


class Grower:
    """Answers the engine's wish for more space, one program at a time."""

    def __init__(self, device: Growable, program: str, path: str) -> None:
        self._device = device
        self._program = program
        self._path = path
        self._tasks: set[asyncio.Task[None]] = set()

    def take_event(self, event: dict[str, object]) -> None:
        """Look at an event of the engine; run the program when it asks for space."""
        more = event.get("bytes")
        if event["event"] == "grow" and isinstance(more, int):
            task = asyncio.ensure_future(self._grow(more))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _grow(self, more: int) -> None:
        done = await run_program(self._program, more, self._path)
        # Closed meanwhile: nobody waits any more.
        with contextlib.suppress(ValueError):
            await asyncio.to_thread(self._device.storage_grown, done)


def is_block_device(fd: int) -> bool:
    """Whether storage at `fd` can only be made longer from outside."""
    return fd >= 0 and stat.S_ISBLK(os.fstat(fd).st_mode)
