# SPDX-License-Identifier: Apache-2.0
"""Directories of devices whose record is of no use: what can be said of them, and what helps.

Nothing is done to one unasked. Its live state says which image and which attachment it belongs to,
under a sum of its own, and the kernel keeps the same identifier: so `fvdctl recover` can make the
record anew and adopt the device like any other. What else its attach was told is lost with the
record; it is run as fvdd.toml says.
"""

from __future__ import annotations

import uuid
from pathlib import Path

from fvdapi.errors import ApiError
from fvdapi.models import AttachRequest, DeviceStatus, Timeouts, is_device_name
from fvdd.config import Config
from fvdd.devices.adoption import ASIDE, worker_pids
from fvdd.devices.record import RECORD_FILE, DeviceRecord, load_record
from fvdd.devices.rendering import render_orphan
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
        timeouts=_timeouts(config),
        attached_at=0.0,
        worker_pid=next(iter(worker_pids(directory)), None),
    )
    return render_orphan(name, record, reason, live_image(directory) or "")


def is_empty_leftover(directory: Path) -> bool:
    """Whether nobody lives in a directory and it holds nothing that could be lost."""
    if live_presence(directory) is not LivePresence.ABSENT or worker_pids(directory):
        return False
    return {entry.name for entry in directory.iterdir()} <= {f"{RECORD_FILE}.new", STATS_NAME}


def rebuilt_record(directory: Path, config: Config) -> DeviceRecord:
    """A record as far as the live state tells; ApiError where that is of no use either."""
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
        timeouts=_timeouts(config),
        attached_at=directory.stat().st_mtime,
        size_bytes=header.virtual_size,
        image_uuid=str(uuid.UUID(bytes=header.image_uuid)),
        image_id=(0, header.st_rdev) if header.st_rdev else (header.st_dev, header.st_ino),
    )


def orphan_remedy(directory: Path) -> str:
    """What a user can do about it; what it names can be pasted."""
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


def _state_aside(directory: Path) -> Path | None:
    return next(directory.glob(f"{ASIDE}*"), None)


def _timeouts(config: Config) -> Timeouts:
    times = config.timeouts
    return Timeouts(
        resend_timeout=times.resend_timeout,
        base_timeout=times.base_timeout,
        kernel_timeout=times.kernel_timeout,
        dead_timeout=times.dead_timeout,
    )
