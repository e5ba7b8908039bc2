# SPDX-License-Identifier: Apache-2.0
"""The boot profile that a worker records: opened while it may still open files.

What was read is added every few seconds, so that a worker that is killed loses little of it, and
merged at the end with what the file had held before. A successor goes on where the dead one ended.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

from fvdd.log import fields
from fvdengine.errors import UnusableProfile
from fvdengine.profile import (
    ENTRIES_MAX,
    Extent,
    append_open_profile,
    merge_profiles,
    read_open_profile,
    write_open_profile,
)

NOTE_SECONDS = 5.0

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Recording:
    """An open profile; without a path it is none, and nothing happens."""

    path: str = ""
    fd: int = -1
    before: list[Extent] = field(default_factory=list)
    goes_on: bool = False
    noted: int = 0
    ended: threading.Event = field(default_factory=threading.Event)
    thread: threading.Thread | None = None

    @classmethod
    def open(cls, path: str, *, goes_on: bool = False) -> Self:
        """Open or make the file; UnusableProfile, where it is something else. goes_on: what it
        holds is the beginning of this very recording."""
        if not path:
            return cls()
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise UnusableProfile(path=path, reason=error.strerror or str(error)) from error
        try:
            before = read_open_profile(fd, path)
            end = os.fstat(fd).st_size
            if before and os.pread(fd, 1, end - 1) != b"\n":  # a crash was in the middle of a line
                write_open_profile(fd, before)
            return cls(path, fd, before, goes_on)
        except BaseException:
            os.close(fd)
            raise

    def start(self, first_reads: Callable[[], list[Extent]]) -> None:
        """Add what is read to the file from now on, now and then."""
        if self.fd >= 0:
            self.thread = threading.Thread(
                target=self._note_all, args=(first_reads,), name="profile", daemon=True
            )
            self.thread.start()

    def _note_all(self, first_reads: Callable[[], list[Extent]]) -> None:
        while not self.ended.wait(NOTE_SECONDS):
            try:
                self.note(first_reads())
            except (OSError, ValueError):  # a full disk is told at the end
                return

    def note(self, reads: list[Extent]) -> None:
        """Add what was read since the last time, but for the last: it may still grow longer."""
        fresh = reads[self.noted : min(len(reads) - 1, ENTRIES_MAX - len(self.before))]
        if self.fd >= 0 and fresh:
            append_open_profile(self.fd, fresh)
            self.noted += len(fresh)

    def finish(self, reads: list[Extent]) -> None:
        """Write what was read; a profile that cannot be written is worth a warning, no more."""
        if self.fd < 0:
            return
        self._stop()
        runs = [self.before + reads] if self.goes_on else [self.before, reads]
        try:
            write_open_profile(self.fd, merge_profiles(runs))
        except OSError as error:
            values = fields(path=self.path, reason=error)
            _log.warning("the boot profile could not be written", extra=values)
        self.close()

    def _stop(self) -> None:
        self.ended.set()
        if self.thread is not None:
            self.thread.join()

    def close(self) -> None:
        self._stop()
        if self.fd >= 0:
            with contextlib.suppress(OSError):
                os.close(self.fd)
            self.fd = -1
