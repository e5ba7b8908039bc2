# SPDX-License-Identifier: Apache-2.0
"""An operation of fvdd that is held at a step, so that something can happen there."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from fvdd.worker.client import WorkerProcess

if TYPE_CHECKING:
    import pytest

    from fvdtest.daemon import Daemon, Done

SECONDS = 60


class Held:
    """Lets something happen before a worker is asked for `op`: by default while a backup copies."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, op: str = "copy_out") -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()
        exchange = WorkerProcess.exchange

        async def slow(
            process: WorkerProcess, said: str, fds: Sequence[int] = (), **arguments: Any
        ) -> Any:
            if said == op:
                self.begun.set()
                while not self.go_on.is_set():
                    await exchange(process, "ping", timeout=10)
            return await exchange(process, said, fds, **arguments)

        monkeypatch.setattr(WorkerProcess, "exchange", slow)

    def __enter__(self) -> Self:
        assert self.begun.wait(SECONDS)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.go_on.set()


def in_background(
    daemon: Daemon, *words: object
) -> Callable[[], Done]:
    """Begin a command; what is returned waits for its end."""
    done: list[Done] = []
    thread = threading.Thread(target=lambda: done.append(daemon.ctl(*words, check=False)))
    thread.start()

    def result() -> Done:
        thread.join(SECONDS)
        return done[0]

    return result
