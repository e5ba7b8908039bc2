# SPDX-License-Identifier: Apache-2.0
"""Who runs first: fvdd, and what it starts until that serves a device.

A device is silent until its next worker serves, and whoever waits for it may leave no processor to
those who would help. What is done for the device from then on is work for others: it counts as
theirs does.
"""

from __future__ import annotations

import contextlib
import os
from typing import Final

HURRIED: Final = -10
USUAL: Final = 0


def hurry() -> None:
    """Let this process and those that it starts run before others, where that is permitted."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, HURRIED)


def hurry_no_more() -> None:
    """Let all threads of this process, and those that they start, run as others do."""
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):  # it has ended
            os.setpriority(os.PRIO_PROCESS, int(thread), USUAL)
