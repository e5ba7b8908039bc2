# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Layer 5. EngineFault: what the engine reports to Python."""
import os


class EngineFault(Exception):
    """An engine call failed.

    errno is the real cause (an errno value), where names the operation, offset is in bytes or -1.
    """

    def __init__(self, errno: int, where: str, offset: int = -1, reason: str = "") -> None:
        self.errno = errno
        self.where = where
        self.offset = offset
        self.reason = reason
        place = f" at byte {offset}" if offset >= 0 else ""
        super().__init__(f"{where}{place}: {reason or os.strerror(errno)}")


cdef object fault(int rc, str where, object offset):
    return EngineFault(-rc, where, offset)
