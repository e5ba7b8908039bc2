# SPDX-License-Identifier: Apache-2.0
"""An image whose file system is back under another device number: a disk that was logged in to
again, another loop device, file systems whose numbers are given anew with each mount.

The same inode of another device may be the same file, or that of a copy of the file system as it
was earlier (a snapshot of its volume). An image that was closed clean says which: what it held at
the end of a session is what every file with that session, closed, holds. While it was open there
is no telling: what the page cache had for it went with the old mount, and live state that speaks
of this would turn lost writes into zeros. So that is given up only by whoever says so.
"""

from __future__ import annotations

import enum
import uuid
from collections.abc import Collection

from fvdapi.errors import ApiError
from fvdengine.chain import read_header
from fvdengine.overlay import session_in
from fvdengine.paths import shell_word

FileId = tuple[int, int]


class Kept(enum.Enum):
    """What a file that may be the image is, by what it holds."""

    WHOLE = "all that it held"
    UNCLEAN = "it was not closed"
    OTHER = "another image, or another state of it"


def is_elsewhere(wanted: FileId | None, found: FileId) -> bool:
    """Whether both are the same inode of different devices; block devices have none."""
    if wanted is None or wanted[0] == 0 or found[0] == 0:
        return False
    return wanted[1] == found[1] and wanted[0] != found[0]


def state_of(fd: int, path: str, image_uuid: str | None, sessions: Collection[str]) -> Kept:
    """What the file `fd` is: the image of that identity whose last session is one of `sessions`?
    EngineError where it is no image."""
    header = read_header(fd, path)
    extension = header.trusted_extension
    if extension is None or image_uuid is None:
        return Kept.OTHER
    if uuid.UUID(image_uuid).bytes != extension.image_uuid or session_in(header) not in sessions:
        return Kept.OTHER
    return Kept.WHOLE if header.is_clean else Kept.UNCLEAN


def not_kept(name: str, path: str, state: Kept) -> ApiError:
    """Why the file is not taken for what the device had open, and what helps."""
    command = f"fvdctl recover {name} --image {shell_word(path)} --discard-unflushed"
    text = f"the file system of {path} was mounted anew, under another device number"
    if state is Kept.UNCLEAN:
        return ApiError(
            "device_state",
            f"{text}, while the image was open: what was not flushed may be lost; {command} goes "
            "on with what it holds, as after a power cut",
        )
    return ApiError(
        "device_state",
        f"{text}, and the file there is not in the state in which the device had it",
        hint="give the image that is its name back, then: fvdctl recover " + name,
    )
