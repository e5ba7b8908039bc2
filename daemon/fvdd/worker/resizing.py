# SPDX-License-Identifier: Apache-2.0
"""Grow the disk of an image that is open and in use."""

from __future__ import annotations

import errno
from typing import Final

from fvdd.worker.channel import Message
from fvdd.worker.failure import Failure
from fvdd.worker.opened import OpenedImage
from fvdengine import uris
from fvdengine.errors import InvalidSize
from fvdengine.resize import check_size, wanted_size
from fvdengine.units import round_up

NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def resize(image: OpenedImage, text: str, sector: int) -> Message:
    """Give the disk the size that `text` ([+]SIZE) means; the sizes before and after, in bytes.

    The size that it has already is no mistake: so what was broken off can be said again. `sector`:
    what the size must be a multiple of. Blocks; raises Failure and InvalidSize, and then the disk
    is as it was.
    """
    device = image.device
    old = device.size
    size = wanted_size(text, old)
    if device.read_only:
        raise Failure(
            "read_only", "the image is open for reading only and cannot grow",
            "attach or serve it for writing",
        )  # fmt: skip
    if size % sector:
        raise InvalidSize(
            text=f"{size} bytes", reason=f"it is not a multiple of the sector size {sector}",
            hint=f"The next larger size that fits is {round_up(size, sector)} bytes.",
        )  # fmt: skip
    if size < old:
        raise Failure(
            "invalid_size",
            f"the new size, {size} bytes, is smaller than the present one, {old} bytes",
            "a disk shrinks only while nobody uses it: fvdctl resize IMAGE SIZE --shrink",
        )
    if size > old:
        check_size(image.plan.header, size)
        _grow(image, size)
    return {"old_size": old, "size": device.size}


def _grow(image: OpenedImage, size: int) -> None:
    try:
        image.device.resize(size)
    except Exception as error:
        if getattr(error, "errno", None) in NO_ROOM:
            hint = "make room where the image, its data file and the live state lie"
            data = image.plan.layers[0].data
            if data is not None and data.fd < 0 and not image.plan.header.is_compact:
                hint = (
                    f"enlarge the export {uris.parse_uri(data.path).shown}, then close the image "
                    "and open it again: the length is asked only then"
                )
            raise Failure(
                "no_space", f"there is no room for a disk of {size} bytes ({error})",
                f"{hint}; the disk has its former size",
            ) from error  # fmt: skip
        raise
