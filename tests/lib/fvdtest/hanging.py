# SPDX-License-Identifier: Apache-2.0
"""Storage that hangs for whoever looks at it from this process, until it is let go.

What fvdd asks of files in a folder waits, as a system call in the kernel does on a suspended device
or a network file system whose server is gone. Workers are processes of their own and see nothing.
"""

from __future__ import annotations

import functools
import os
import threading
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    import pytest

CALLS = ("stat", "lstat", "open", "readlink", "statvfs", "listdir", "unlink", "rename", "link")
SECONDS = 60


class Hanging:
    """Hangs inside of the `with`; `waiting`: the threads that were caught by it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self._prefix = os.fsencode(folder) + b"/"
        self._answers = threading.Event()
        self._answers.set()
        self.waiting: set[str] = set()
        for name in CALLS:
            monkeypatch.setattr(os, name, functools.partial(self._call, getattr(os, name)))

    def _call(self, real: Any, path: Any, *arguments: Any, **options: Any) -> Any:
        is_path = isinstance(path, str | bytes | os.PathLike)
        if is_path and os.fsencode(path).startswith(self._prefix) and not self._answers.is_set():
            self.waiting.add(threading.current_thread().name)
            self._answers.wait(SECONDS)
        return real(path, *arguments, **options)

    def __enter__(self) -> Self:
        self._answers.clear()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._answers.set()
