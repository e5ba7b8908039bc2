# SPDX-License-Identifier: Apache-2.0
"""What a process that serves a block device asks of the kernel for itself.

The device's own write-back may wait for this process, so it must not wait for the device in turn:
IO_FLUSHER keeps its memory allocations from starting write-back, and locked memory spares it page
faults under pressure. It should also be the last to be killed when memory runs out. All of it
needs privileges; what is not permitted is left out, and one log line says what was had.
"""

from __future__ import annotations

import ctypes
import logging
import resource
import signal
from pathlib import Path
from typing import Final

from fvdd.log import fields
from fvdd.worker.command_line import mark_for_shutdown

PR_SET_PDEATHSIG: Final = 1
PR_SET_NAME: Final = 15
PR_SET_IO_FLUSHER: Final = 57
MCL_CURRENT: Final = 1
MCL_FUTURE: Final = 2
MCL_ONFAULT: Final = 4
OOM_SCORE_ADJ: Final = -900

_log = logging.getLogger(__name__)


def end_with_parent() -> None:
    """Let the kernel kill this process, even a stopped one, when its parent thread ends."""
    libc, zero = ctypes.CDLL(None), ctypes.c_ulong(0)
    libc.prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), zero, zero, zero)


def prepare_process(name: str, *, outlives_shutdown: bool = False) -> None:
    """Name this process and take the privileges that it can have."""
    if outlives_shutdown:
        mark_for_shutdown()
    libc = ctypes.CDLL(None, use_errno=True)
    zero = ctypes.c_ulong(0)
    libc.prctl(PR_SET_NAME, name.encode()[:15], zero, zero, zero)
    io_flusher = libc.prctl(PR_SET_IO_FLUSHER, ctypes.c_ulong(1), zero, zero, zero) == 0
    _log.info(
        "process prepared",
        extra=fields(
            io_flusher=io_flusher,
            oom_score_adj=_lower_oom_score(),
            memory_locked=_lock_memory(libc),
        ),
    )


def _lower_oom_score() -> bool:
    try:
        Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE_ADJ))
    except OSError:
        return False
    return True


def _lock_memory(libc: ctypes.CDLL) -> bool:
    """Lock pages as they are touched, but only where no limit can make a later mapping fail."""
    try:
        unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        resource.setrlimit(resource.RLIMIT_MEMLOCK, unlimited)
    except (OSError, ValueError):
        return False
    return bool(libc.mlockall(MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT) == 0)
