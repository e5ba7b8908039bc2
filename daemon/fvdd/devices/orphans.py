# SPDX-License-Identifier: Apache-2.0
"""Directories of devices whose record is of no use: what can be said of them, and what helps.

Nothing is done to one unasked. Its live state says which image and which attachment it belongs to,
under a sum of its own, and the kernel keeps the same identifier: so `fvdctl recover` can make the
record anew and adopt the device like any other. What else its attach was told is lost with the
record; it is run as fvdd.toml says, and as whoever recovers it says.

A directory that somebody has renamed belongs to the device of its attachment all the same: nothing
is done to that under another name.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import uuid
from collections.abc import Sequence
from pathlib import Path

from fvdapi.errors import ApiError
from fvdapi.models import AttachRequest, DeviceStatus, is_device_name
from fvdd.attach.unix_socket import short_path
from fvdd.config import Config
from fvdd.devices.adoption import ASIDE, CONTROL_SOCKET, worker_pids
from fvdd.devices.leftovers import is_of_no_use
from fvdd.devices.record import DeviceRecord, load_record
from fvdd.devices.rendering import render_orphan
from fvdd.devices.session import timeouts_for
from fvdengine.live import (
    LIVE_NAME,
    STATS_NAME,
    LivePresence,
    live_header_in,
    live_image,
    live_presence,
)
from fvdengine.paths import shell_word

NOBODYS = str(uuid.UUID(int=0))


def own_record(directory: Path) -> DeviceRecord:
    """The record of the device that a directory is named after; ValueError says why it is none."""
    record = load_record(directory)
    if record.name != directory.name or not is_device_name(directory.name):
        raise ValueError(f"{directory} holds the record of '{record.name}'")
    return record


def attachment_in(directory: Path) -> str | None:
    """The attachment that a directory belongs to, by its live state or else by its record."""
    header = live_header_in(directory)
    if header is not None:
        return str(uuid.UUID(bytes=header.attachment_uuid))
    with contextlib.suppress(ValueError):
        return str(uuid.UUID(load_record(directory).attachment))
    return None


def owner_of(directory: Path, backends: Sequence[str]) -> str | None:
    """The device that a directory belongs to although it has another name: the kernel, which has
    the devices `backends`, knows that one by the attachment."""
    own = attachment_in(directory)
    for backend in backends:
        _, name, attachment = backend.split(":", 2)
        if attachment == own and name != directory.name:
            return name
    return None


def describe_orphan(directory: Path, config: Config) -> DeviceStatus:
    """What can be said about a directory whose record is of no use."""
    name = directory.name
    try:
        own_record(directory)
        reason = "its record has become readable"
    except ValueError as error:
        reason = str(error)
    record = DeviceRecord(
        name=name if is_device_name(name) else "unknown",
        attachment=NOBODYS,
        request=AttachRequest(image="/"),
        timeouts=timeouts_for(config, 1),
        attached_at=0.0,
        worker_pid=next(iter(worker_pids(directory)), None),
    )
    return render_orphan(name, record, reason, live_image(directory) or "")


def is_empty_leftover(directory: Path) -> bool:
    """Whether nobody lives in a directory and it holds nothing that could be lost."""
    if live_presence(directory) is not LivePresence.ABSENT or worker_pids(directory):
        return False
    if _is_answered(directory / CONTROL_SOCKET):
        return False
    names = {entry.name for entry in directory.iterdir()}
    return all(name == STATS_NAME or is_of_no_use(name) for name in names)


def _is_answered(path: Path) -> bool:
    """Whether somebody listens there, whatever his command line says."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe, short_path(path) as name:
        probe.setblocking(False)
        return probe.connect_ex(name) in (0, errno.EAGAIN)


def rebuilt_record(directory: Path, config: Config, backends: Sequence[str] = ()) -> DeviceRecord:
    """A record as far as the live state tells; ApiError where that is of no use either, or where
    the kernel has the device under another name."""
    owner = owner_of(directory, backends)
    if owner is not None:
        raise ApiError(
            "device_orphaned",
            f"{directory} is not of a device {directory.name}: its state is that of {owner}",
            hint=orphan_remedy(directory, backends),
        )
    header = live_header_in(directory)
    aside = _state_aside(directory)  # adopting takes the record's word for which state counts
    if header is None or aside is not None or not is_device_name(directory.name):
        lost = "neither its record nor its live state can be read"
        if aside is not None:
            lost = "its record, which says which live state counts, is lost"
        raise ApiError(
            "device_orphaned",
            f"device {directory.name} cannot be recovered: {lost}",
            hint=orphan_remedy(directory),
        )
    return DeviceRecord(
        name=directory.name,
        attachment=str(uuid.UUID(bytes=header.attachment_uuid)),
        request=AttachRequest(image=header.path),
        timeouts=timeouts_for(config, 1),
        attached_at=directory.stat().st_mtime,
        size_bytes=header.virtual_size,
        image_uuid=str(uuid.UUID(bytes=header.image_uuid)),
        image_id=(0, header.st_rdev) if header.st_rdev else (header.st_dev, header.st_ino),
        rebuilt=True,
    )


def orphan_remedy(directory: Path, backends: Sequence[str] = ()) -> str:
    """What a user can do about it; what it names can be pasted. The kernel has `backends`."""
    owner = owner_of(directory, backends)
    if owner is not None:
        return _renamed_remedy(directory, owner)
    try:
        own_record(directory)
        return "restart fvdd, which adopts it then: systemctl restart fvdd"
    except ValueError:
        pids = worker_pids(directory)
    aside = _state_aside(directory)
    if aside is not None:
        kept, live = shell_word(str(aside)), shell_word(str(directory / LIVE_NAME))
        end = f"kill {pids[0]}, " if pids else ""
        return (
            "its record was lost while a recovery on a moved image was under way; if that had not "
            f"succeeded, {aside} has what was acknowledged before: {end}mv {kept} {live}; if it "
            f"had: rm {kept}; then fvdctl recover {shell_word(directory.name)}"
        )
    presence, name, folder = live_presence(directory), shell_word(directory.name), str(directory)
    back = "with the settings of fvdd.toml, since those of its attach are lost"
    if pids:
        served = f"nothing is lost: process {pids[0]} goes on serving the device"
        if presence is not LivePresence.FOUND or not is_device_name(directory.name):
            return f"{served}; it ends with the next boot"
        return f"{served}; fvdctl recover {name} takes it over, {back}"
    if presence is LivePresence.ABSENT:
        return (
            "nobody needs it any more (should the kernel still have a device of it, fvdctl doctor "
            f"--reclaim gives that back afterwards): remove {shell_word(folder)}"
        )
    if presence is LivePresence.FOUND and is_device_name(directory.name):
        return f"bring it back, {back}: fvdctl recover {name}"
    return (
        "its live state cannot be read, and what was not flushed is lost: remove "
        f"{shell_word(folder)}, give the kernel's device back with fvdctl doctor --reclaim, and "
        "close the image with fvdctl serve IMAGE --state NEW_DIRECTORY --discard-live-state "
        "--socket FILE and Ctrl-C"
    )


def _renamed_remedy(directory: Path, owner: str) -> str:
    place, folder = directory.with_name(owner), shell_word(str(directory))
    if attachment_in(place) == attachment_in(directory):
        return f"it is a copy of {place}, which nobody needs: remove {folder}"
    first = f"move {shell_word(str(place))} away, then: " if os.path.lexists(place) else ""
    return (
        f"give the directory of {owner} its name back, and restart fvdd, which adopts it then: "
        f"{first}mv {folder} {shell_word(str(place))} && systemctl restart fvdd"
    )


def _state_aside(directory: Path) -> Path | None:
    return next(directory.glob(f"{ASIDE}*"), None)
