# SPDX-License-Identifier: Apache-2.0
"""A load on a file system that remembers what was acknowledged."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from fvdtest.guest import wait_until

STEP = 5
WAIT_SECONDS = 60.0


class Writer(threading.Thread):
    """Writes numbered files, each synced, while the with block runs; an error is raised at its end.

    `slowest` is the longest time that one file took, in seconds: what a user saw of a pause.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(name="writer")
        self.folder = folder
        self.written: dict[str, bytes] = {}
        self.slowest = 0.0
        self._error: OSError | None = None
        self._ending = threading.Event()

    def run(self) -> None:
        try:
            number = 0
            while not self._ending.is_set():
                begin = time.monotonic()
                self._write(f"{number:06}", os.urandom(50_000))
                self.slowest = max(self.slowest, time.monotonic() - begin)
                number += 1
        except OSError as error:
            self._error = error

    def _write(self, name: str, data: bytes) -> None:
        with (self.folder / name).open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        self.written[name] = hashlib.sha256(data).digest()

    def wait_for_more(self) -> None:
        """Return when some files more are written."""
        count = len(self.written)
        wait_until(
            lambda: self._error is not None or len(self.written) > count + STEP,
            WAIT_SECONDS,
            "writes",
        )
        if self._error is not None:
            raise self._error

    def check(self, folder: Path) -> None:
        """Every file is there with the content that was acknowledged."""
        found = {
            name: hashlib.sha256((folder / name).read_bytes()).digest() for name in self.written
        }
        assert found == self.written

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ending.set()
        self.join(WAIT_SECONDS)
        assert not self.is_alive(), "the writer is stuck"
        if error is None and self._error is not None:
            raise self._error
