# SPDX-License-Identifier: Apache-2.0
"""The state directory of `serve --state`: who may use it, and what is left in it.

The directory holds the live state of one image (fvdengine.live says what that is). It belongs to
one server at a time, by a lock that ends with the process however that ends; so whoever takes the
lock knows that what he finds was left by a dead server.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path
from typing import ClassVar, Final

from fvdengine.errors import EngineError, from_os_error
from fvdengine.live import LIVE_NAME, STATS_NAME, LivePresence, live_presence

LOCK_FILE: Final = "lock"
MODE: Final = 0o700


class StateDirectoryBusy(EngineError):
    """Another server lives in the directory."""

    code: ClassVar[str] = "state_directory_busy"
    template: ClassVar[str] = "the state directory {directory} is in use by {holder}"
    hint_template: ClassVar[str] = "Stop that server, or choose another --state directory."


class StateDirectoryUnfit(EngineError):
    """The directory is somebody's, or something else's."""

    code: ClassVar[str] = "state_directory_unfit"
    template: ClassVar[str] = "{directory} cannot be a state directory: {reason}"
    hint_template: ClassVar[str] = "Name an empty or a new directory with --state."


class StateDirectory:
    """A directory that is ours until close, or until this process ends."""

    def __init__(self, path: str) -> None:
        """Make the directory if need be and lock it; raises EngineError."""
        self.path = Path(path).absolute()
        try:
            self.path.mkdir(mode=MODE, parents=True, exist_ok=True)
            self._check()
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            self._lock_fd = os.open(self.path / LOCK_FILE, flags, 0o600)
        except OSError as error:
            raise from_os_error(error, str(self.path), "use") from error
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = self._holder()
            os.close(self._lock_fd)
            raise StateDirectoryBusy(directory=str(self.path), holder=holder) from error
        os.ftruncate(self._lock_fd, 0)
        os.pwrite(self._lock_fd, f"{os.getpid()}\n".encode(), 0)

    def _check(self) -> None:
        """Refuse a directory in which we would overwrite, or others could swap, files."""
        status = self.path.stat()
        names = set(os.listdir(self.path))
        reason = ""
        if status.st_uid != os.geteuid():
            reason = "it belongs to another user"
        elif status.st_mode & 0o022:
            reason = "others may write into it"
        elif names and not names & {LOCK_FILE, LIVE_NAME}:
            reason = "it holds other files"
        elif any((self.path / name).is_symlink() for name in (LOCK_FILE, LIVE_NAME, STATS_NAME)):
            reason = "its files are symbolic links"
        if reason:
            raise StateDirectoryUnfit(directory=str(self.path), reason=reason)

    @property
    def has_live_state(self) -> bool:
        """Whether a server that did not end cleanly left its state here."""
        return live_presence(self.path) is not LivePresence.ABSENT

    def close(self) -> None:
        """Give the directory up."""
        os.close(self._lock_fd)

    def _holder(self) -> str:
        pid = os.pread(self._lock_fd, 32, 0).decode(errors="replace").strip()
        if not pid.isdigit():
            return "another process"
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").split(b"\0")
            return f"process {pid} ({' '.join(os.fsdecode(word) for word in words)[:80]})"
        return f"process {pid}"
