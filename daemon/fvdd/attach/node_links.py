# SPDX-License-Identifier: Apache-2.0
"""/dev/fvd/NAME and NAME-partN where no udev makes them: links with stable names to the nodes.

Convenience only: what cannot be made is logged and never a reason to fail.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Sequence
from typing import Final

log = logging.getLogger("fvdd.attach")

FOLDER: Final = "/dev/fvd"
UDEV_CONTROL: Final = "/run/udev/control"


def name_of(backend: str) -> str:
    """The device's name in a backend identifier, which is fvd:NAME:ATTACHMENT."""
    return backend.split(":")[1]


def make(name: str, kernel_name: str, partitions: Sequence[str], folder: str = FOLDER) -> None:
    """Make the links of a device, unless udev does."""
    if os.path.exists(UDEV_CONTROL):
        return
    wanted = {name: kernel_name}
    for partition in partitions:
        wanted[f"{name}-part{partition.removeprefix(kernel_name + 'p')}"] = partition
    try:
        os.makedirs(folder, exist_ok=True)
        for link, target in wanted.items():
            new = os.path.join(folder, f".{link}.new")  # no device's name begins with a dot
            with contextlib.suppress(FileNotFoundError):
                os.unlink(new)
            os.symlink(f"../{target}", new)
            os.replace(new, os.path.join(folder, link))
    except OSError as error:
        log.warning("no links in %s: %s", folder, error)


def remove(name: str, kernel_name: str, folder: str = FOLDER) -> None:
    """Remove the links of a device that still lead to it."""
    if os.path.exists(UDEV_CONTROL):
        return
    pattern = re.compile(re.escape(name) + r"(-part[0-9]+)?")
    target = re.compile(r"\.\./" + re.escape(kernel_name) + r"(p[0-9]+)?")
    with contextlib.suppress(OSError):
        for link in os.listdir(folder):
            path = os.path.join(folder, link)
            if pattern.fullmatch(link) and target.fullmatch(os.readlink(path)):
                os.unlink(path)
