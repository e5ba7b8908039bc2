# SPDX-License-Identifier: Apache-2.0
"""The size of a kernel device that is in use: it grows, and its partitions are looked for again."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Final

from fvdd.attach.attachment import AttachError
from fvdd.attach.threads import run_blocking

if TYPE_CHECKING:
    from fvdd.attach.nbd_netlink import NbdNetlink

# The kernel may wait for requests, and these for a base that does not answer; they end by its time.
RESIZE_LIMIT_SECONDS: Final = 600.0
SCAN_LIMIT_SECONDS: Final = 10.0


async def grow(netlink: NbdNetlink, index: int, backend: str, size: int) -> None:
    """Tell the driver the new size of a device; a uevent tells everybody else."""
    from fvdd.attach.nbd_netlink import NetlinkRefused

    try:
        await netlink.resize(index, backend, size, RESIZE_LIMIT_SECONDS)
    except NetlinkRefused as error:
        raise AttachError(
            "kernel_refused",
            f"the kernel did not give /dev/nbd{index} its new size ({error})",
            "the kernel's log says why (dmesg)",
        ) from error
    except TimeoutError as error:
        raise AttachError(
            "timed_out",
            f"the kernel waits for requests of /dev/nbd{index} before it takes the new size",
            "the base is slow or gone: fvdctl status shows it; the size follows by itself",
        ) from error


async def scan_again(device: str) -> None:
    """Open and close the node: the driver has marked it for a scan at its next opening, and now is
    a better time for that than any later one. Partitions that are in use stay as they are."""

    def scan() -> None:
        os.close(os.open(device, os.O_RDONLY | os.O_CLOEXEC))

    with contextlib.suppress(OSError, TimeoutError):
        await run_blocking(scan, timeout=SCAN_LIMIT_SECONDS)
