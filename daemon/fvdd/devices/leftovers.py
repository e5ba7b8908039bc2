# SPDX-License-Identifier: Apache-2.0
"""Files that operations left which were broken off: what each is, and whether it may just go.

Backups leave names beside an image, snapshots the new image, and whoever dies while it replaces a
file of the state directory leaves the one that was to take its place. Nothing here is needed by
anybody, but for what a backup left that *is* needed (remedy_of_leftover). Only names that nobody
but fvd gives are removed, and only when that is asked for.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fvdd.devices.new_file import PART, remove_part
from fvdd.devices.record import RECORD_FILE
from fvdengine import overlay
from fvdengine.errors import EngineError
from fvdengine.live import LIVE_NAME, STATS_NAME
from fvdengine.overlay import FRESH, SUFFIX
from fvdengine.paths import shell_word

CONTROL_SOCKET: Final = "control.sock"
# Live state that waits for the end of a recovery on a moved image has a name of its own.
_KNOWN: Final = re.compile(
    rf"{re.escape(RECORD_FILE)}|{LIVE_NAME}(\.of-.*)?|{STATS_NAME}|{re.escape(CONTROL_SOCKET)}"
)
_OURS: Final = re.compile(
    rf"{re.escape(RECORD_FILE)}\.new|{LIVE_NAME}\.new|({LIVE_NAME}|{STATS_NAME})\.reserved"
    rf"|{re.escape(CONTROL_SOCKET)}\.[0-9a-f]{{8}}"
)
# What is younger may belong to something that is under way.
STALE_SECONDS: Final = 60.0


def make_another(name: str) -> str:
    """How what a backup left is mostly undone."""
    return f"make another one, which puts both together: fvdctl backup {name} FILE"


def remedy_of_leftover(name: str, image: str, base: str) -> str:
    """How what a backup left is undone, its base `base`. Looks at the storage."""
    again = make_another(name)
    if os.path.realpath(image) + SUFFIX == os.path.realpath(base):
        return again
    wanted = base.removesuffix(SUFFIX)
    first = f"{wanted} is another file: move it elsewhere; " if os.path.lexists(wanted) else ""
    return (
        f"{image} needs {base}: keep it; {first}give the image the name back that goes with it: "
        f"mv {shell_word(image)} {shell_word(wanted)}; then {again}"
    )


def is_of_no_use(name: str) -> bool:
    """Whether a file of that name in a device's directory is of no use without the others."""
    return name == CONTROL_SOCKET or _OURS.fullmatch(name) is not None


@dataclass(frozen=True, slots=True)
class Leftover:
    """A file, the sentence that says what it is, and whether `doctor --reclaim` removes it."""

    path: str
    text: str
    is_ours: bool

    @property
    def remedy(self) -> str:
        if self.is_ours:
            return "nothing needs it; it is removed with: fvdctl doctor --reclaim"
        return f"if you have no use for it: rm {shell_word(self.path)}"


def find_leftovers(
    directory: Path, image: str, begun: str | None, part: str | None = None
) -> list[Leftover]:
    """What lies in the `directory` of a device and beside its `image`; `begun`: the image that a
    snapshot was about to make; `part`: what a backup wrote to. No operation is under way."""
    found = [*_in_directory(directory), *_beside(os.path.realpath(image))]
    if part is not None and os.path.isfile(part):
        text = f"{part} was begun by a backup of {image} that was broken off"
        found.append(Leftover(part, text, is_ours=True))
    text = _begun_text(begun, image) if begun is not None else ""
    if begun is not None and text:
        found.append(Leftover(begun, text, is_ours=False))
    return found


def remove_leftover(leftover: Leftover) -> bool:
    """Remove one that is ours; whether it is gone."""
    if leftover.is_ours and leftover.path.endswith(PART):
        return remove_part(leftover.path)
    if leftover.is_ours:
        with contextlib.suppress(OSError):
            os.unlink(leftover.path)
            return True
    return False


def _in_directory(directory: Path) -> Iterator[Leftover]:
    now = time.time()
    with contextlib.suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            if _KNOWN.fullmatch(entry.name):
                continue
            with contextlib.suppress(OSError):
                if now - entry.stat(follow_symlinks=False).st_mtime < STALE_SECONDS:
                    continue
            if _OURS.fullmatch(entry.name):
                text = f"{entry.path} was to replace a file when the process that wrote it died"
                yield Leftover(entry.path, text, is_ours=True)
            else:
                yield Leftover(entry.path, f"{entry.path} is no file of fvdd's", is_ours=False)


def _beside(image: str) -> Iterator[Leftover]:
    base = image + SUFFIX
    fresh = base + FRESH
    if os.path.lexists(fresh):
        text = f"{fresh} was made by a backup of {image} that was broken off before it was in use"
        yield Leftover(fresh, text, is_ours=os.path.isfile(fresh))
    with contextlib.suppress(OSError, EngineError):
        if overlay.is_begun(image, base):
            text = f"{base} is a second name of {image}, given by a backup that was broken off"
            yield Leftover(base, text, is_ours=True)
        elif os.path.lexists(base) and not overlay.is_over(image, base):
            text = f"{base} has a name that backups of {image} need: none can be made"
            yield Leftover(base, text, is_ours=False)


def _begun_text(begun: str, image: str) -> str:
    """What stands where a snapshot was about to make an image; nothing if that is none of ours."""
    try:
        header = overlay.header_of(begun)
        named = os.path.join(os.path.dirname(begun), header.base_img)
        if not header.base_img or not os.path.samefile(named, image):
            return ""
    except EngineError:
        if not os.path.lexists(begun):
            return ""
        return (
            f"{begun} is no image: a snapshot that was broken off may have begun one there, unless "
            "it is a file of somebody's own"
        )
    except OSError:
        return ""
    return f"{begun} was made by a snapshot that was broken off before the device was on it"
