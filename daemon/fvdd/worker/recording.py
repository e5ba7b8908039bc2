# SPDX-License-Identifier: Apache-2.0
"""The boot profile that a worker records: opened while it may still open files, written at the end.

A file that holds a profile already gets both, merged.
"""

from __future__ import annotations

import contextlib
import logging
import os
from dataclasses import dataclass, field
from typing import Self

from fvdd.log import fields
from fvdengine.errors import UnusableProfile
from fvdengine.profile import Extent, merge_profiles, read_open_profile, write_open_profile

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Recording:
    """An open profile; without a path it is none, and nothing happens."""

    path: str = ""
    fd: int = -1
    before: list[Extent] = field(default_factory=list)

    @classmethod
    def open(cls, path: str) -> Self:
        """Open or make the file; UnusableProfile, where it is something else."""
        if not path:
            return cls()
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise UnusableProfile(path=path, reason=error.strerror or str(error)) from error
        try:
            return cls(path, fd, read_open_profile(fd, path))
        except BaseException:
            os.close(fd)
            raise

    def finish(self, reads: list[Extent]) -> None:
        """Write what was read; a profile that cannot be written is worth a warning, no more."""
        if self.fd < 0:
            return
        try:
            write_open_profile(self.fd, merge_profiles([self.before, reads]))
        except OSError as error:
            values = fields(path=self.path, reason=error)
            _log.warning("the boot profile could not be written", extra=values)
        self.close()

    def close(self) -> None:
        if self.fd >= 0:
            with contextlib.suppress(OSError):
                os.close(self.fd)
            self.fd = -1
