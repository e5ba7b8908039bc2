# SPDX-License-Identifier: Apache-2.0
"""What the verbs for images do when theirs is in use: ask whoever has it open."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from fvdapi.client import Client
from fvdapi.errors import ApiError
from fvdapi.models import DeviceStatus, ResizeRequest, UpdateRequest
from fvdctl.serving import ask_server, is_served
from fvdengine.mapping import Extent, ExtentKind

_OF_BASE = (ExtentKind.BASE, ExtentKind.BASE_ZERO)
_NO_DAEMON = ("daemon_not_running", "daemon_no_permission")


def resize(
    word: str, size: str, socket: str | None, *, shrink: bool, force: bool
) -> dict[str, Any] | None:
    """Grow what `word` means by whoever has it open; None: nobody does whom we could ask."""
    status = find_device(word, socket)
    if status is None and os.path.exists(word):
        return _resize_served(word, size, shrink=shrink, force=force)
    if status is None:
        return None
    refuse_offline_options(status.name, shrink=shrink, force=force)
    with Client(socket) as client:
        answer = client.resize(status.name, ResizeRequest(size=size))
    return answer.model_dump(mode="json")


def update(
    word: str, fields: dict[str, str], socket: str | None, *, unsafe: bool
) -> dict[str, Any] | None:
    """Change fields of the header of what `word` means; None: nobody has it open whom we could
    ask."""
    status = find_device(word, socket)
    if status is not None:
        refuse_offline_options(status.name, unsafe=unsafe)
        with Client(socket) as client:
            answer = client.update(status.name, UpdateRequest(fields=fields))
        return answer.model_dump(mode="json")
    if not os.path.exists(word) or not is_served(word):
        return None
    refuse_offline_options(word, unsafe=unsafe)
    said = ask_server(word, "update", fields=fields)
    if said is None:
        return None
    return {
        "name": said["name"],
        "device": None,
        "changes": {key: {"old": old, "new": new} for key, (old, new) in said["changes"].items()},
        "next_open": said["next_open"],
    }


def extents(word: str, socket: str | None) -> Iterator[Extent] | None:
    """Where the parts of the disk of an attached device are; None where `word` means none. What
    places they have in files only their worker knows."""
    status = find_device(word, socket)
    return None if status is None else _extents(status.name, socket)


def _extents(name: str, socket: str | None) -> Iterator[Extent]:
    current: Extent | None = None
    with Client(socket) as client:
        for start, length, word in client.extents(name):
            kind = ExtentKind(word)
            if current is not None and current.kind is kind:
                current = replace(current, length=current.length + length)
                continue
            if current is not None:
                yield current
            current = Extent(start, length, kind, int(kind in _OF_BASE))
    if current is not None:
        yield current


def _resize_served(path: str, size: str, *, shrink: bool, force: bool) -> dict[str, Any] | None:
    if not is_served(path):
        return None
    refuse_offline_options(path, shrink=shrink, force=force)
    answer = ask_server(path, "resize", size=size)
    if answer is None:
        return None
    return {
        "name": answer["name"],
        "device": None,
        "old_size_bytes": answer["old_size"],
        "size_bytes": answer["size"],
    }


def find_device(word: str, socket: str | None) -> DeviceStatus | None:
    """The device that is called `word`, or has the image of that path; None where there is none or
    no fvdd that could be asked."""
    try:
        with Client(socket) as client:
            return client.find(word)
    except ApiError as error:
        if error.code in _NO_DAEMON:
            return None
        if error.code != "device_not_found":
            raise
        # A device of another NBD server may be what an image is stored on.
        if "/" in word or os.path.lexists(word):
            return None
        raise ApiError(
            error.code,
            f"there is neither a device nor a file called '{word}'",
            hint="fvdctl list shows the devices; an image is named by its path",
        ) from error


def refuse_offline_options(name: str, **given: bool) -> None:
    """ApiError when options were given that make sense only for an image that nobody uses."""
    for option, is_given in given.items():
        if is_given:
            word = "--" + option.replace("_", "-")
            raise ApiError(
                "invalid_request",
                f"{word} is only for images that nobody uses, and {name} is in use",
                hint=f"leave {word} out, or detach {name} first",
            )
