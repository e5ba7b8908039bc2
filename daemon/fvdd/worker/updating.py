# SPDX-License-Identifier: Apache-2.0
"""Change how an image is run while it is open: all fields that are given, or none."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Final

from fvdd.worker.channel import Message
from fvdd.worker.failure import Failure
from fvdd.worker.opened import OpenedImage
from fvdengine.errors import InvalidOption
from fvdengine.header import Header
from fvdengine.update import changes, plan_update

# Which file an image's bytes are in, or what storage promised, is settled when it is opened; the
# command is never run, so it can wait.
NOT_IN_USE: Final = (
    "base_img", "base_img_fmt", "data_file", "data_file_fmt", "need_zero_init", "add_storage_cmd",
)  # fmt: skip
# What is decided once, when an image is opened.
NEXT_OPEN: Final = ("prefetch_start_delay", "num_prefetch_slots", "bytes_per_prefetch")


def update(image: OpenedImage, assignments: Mapping[str, str]) -> Message:
    """Make all `assignments`: the fields that have another value now, with both values, and those
    of them that take effect when the image is opened next. Blocks; raises Failure, InvalidOption.
    """
    if image.device.read_only:
        raise Failure(
            "read_only", "the image is open for reading only and cannot be changed",
            "attach or serve it for writing",
        )  # fmt: skip
    for key in assignments:
        if key in NOT_IN_USE:
            raise InvalidOption(
                option=key, reason="cannot change while the image is in use",
                hint="Detach the device, or stop the server, and say it again; nothing was "
                "changed.",
            )  # fmt: skip
    with image.updating:
        old = image.header
        new = plan_update(old, assignments)
        found = changes(old, new)
        if found:
            _store(image, old, new, list(found))
            image.header = new
    late = [name for name in found if name in NEXT_OPEN]
    if image.is_copy_on_read_fixed and "copy_on_read" in found:
        late.append("copy_on_read")
    return {"changes": {name: list(values) for name, values in found.items()}, "next_open": late}


def _store(image: OpenedImage, old: Header, new: Header, names: list[str]) -> None:
    fixed = image.is_copy_on_read_fixed
    try:
        image.device.update(
            {name: getattr(new, name) for name in names}, keep_copy_on_read=fixed
        )
    except Exception:
        # Those that were stored before it failed go back, as far as the disk still takes writes.
        with contextlib.suppress(Exception):
            image.device.update(
                {name: getattr(old, name) for name in names}, keep_copy_on_read=fixed
            )
        raise
