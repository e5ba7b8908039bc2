# SPDX-License-Identifier: Apache-2.0
"""What is written about a device beside its live state, so that a later fvdd can find it.

One JSON file in the device's directory, replaced atomically. It holds what the kernel and the
worker were told; it is written before the kernel has the device and again when the kernel has
chosen a number.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from fvdapi.models import DEVICE_PATTERN, AttachRequest, Timeouts, sendable

log = logging.getLogger("fvdd.devices")

RECORD_FILE: Final = "device.json"
RECORD_BYTES_MAX: Final = 1 << 20
RECORD_VERSION: Final = 1
SECONDS_MAX: Final = 1 << 31

# What the kernel's numbers can be: a record that was damaged must not lead elsewhere.
Count = Annotated[int, Field(ge=0, lt=1 << 64)]
Minor = Annotated[int, Field(ge=0, lt=1 << 20)]
Uuid = Annotated[str, Field(pattern=r"^[0-9a-fA-F]{8}(-?[0-9a-fA-F]{4}){3}-?[0-9a-fA-F]{12}$")]
# Seconds that a calendar still has a date for.
Moment = Annotated[float, Field(ge=0, lt=200_000_000_000, allow_inf_nan=False)]


class DeviceRecord(BaseModel):
    """The content of the file."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    version: int = RECORD_VERSION
    name: str
    attachment: Uuid
    request: AttachRequest
    timeouts: Timeouts
    attached_at: Moment
    index: Minor | None = None
    device: Annotated[str, Field(pattern=DEVICE_PATTERN)] | None = None
    size_bytes: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    flags: Annotated[int, Field(ge=0, lt=1 << 16)] = 0
    worker_pid: Count | None = None
    image_uuid: Uuid | None = None
    # Which file the image is, whatever it is called by now: (device, inode).
    image_id: tuple[Count, Count] | None = None
    # Of its last opening for writing, which was ours: with another one it is not opened again.
    # More than one while it is being replaced, none where that is not known.
    sessions: tuple[str, ...] = ()
    # "detached" from the moment on when the kernel is told to let go.
    wanted: Literal["attached", "detached"] = "attached"
    # What the background copy was last told by hand, for successors of the worker.
    prefetch: Literal["start", "pause"] | None = None
    # The image that a snapshot is about to make; fvdctl doctor names it if that is broken off.
    begun: str | None = None
    # The file that a backup is written to where it has a name meanwhile, likewise.
    part: str | None = None
    # Made anew from the live state: what its attach was told is lost.
    rebuilt: bool = False
    # What was asked for, while a backup has it otherwise.
    kept: AttachRequest | None = None
    # In the file only: paths that are no text, as they are there -> their bytes in hex.
    raw: dict[str, Annotated[str, Field(pattern=r"^([0-9a-f]{2})+$")]] = {}

    @field_validator("request", "kept", mode="before")
    @classmethod
    def _without_unknown(cls, value: object) -> object:
        """What a later fvdd has added: whatever matters to an earlier one has another version."""
        if not isinstance(value, dict):
            return value
        return {key: item for key, item in value.items() if key in AttachRequest.model_fields}

    @property
    def backend(self) -> str:
        """The identifier that the kernel keeps for the device."""
        return f"fvd:{self.name}:{self.attachment}"


def store_record(directory: Path, record: DeviceRecord) -> None:
    """Replace the record: a new file, renamed, then the directory synced."""
    path = directory / RECORD_FILE
    temporary = directory / f"{RECORD_FILE}.new"
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(_writable(record).model_dump_json(indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _writable(record: DeviceRecord) -> DeviceRecord:
    """The record as the file can hold it: the name of a file may be no text."""
    raw: dict[str, str] = {}

    def note(path: str) -> str:
        shown = sendable(path)
        if shown != path:
            raw[shown] = os.fsencode(path).hex()
        return shown

    return _with_paths(record, note).model_copy(update={"raw": raw})


def _readable(record: DeviceRecord) -> DeviceRecord:
    """The record as it was before it was written."""
    names = {shown: os.fsdecode(bytes.fromhex(told)) for shown, told in record.raw.items()}
    return _with_paths(record, lambda path: names.get(path, path)).model_copy(update={"raw": {}})


def _with_paths(record: DeviceRecord, change: Callable[[str], str]) -> DeviceRecord:
    """The record with the paths changed that fvdd may have found by itself."""
    changes: dict[str, object] = {}
    for name in ("request", "kept"):
        request = getattr(record, name)
        if request is not None:
            dirs = tuple(map(change, request.allow_dirs))
            paths = {"image": change(request.image), "allow_dirs": dirs}
            changes[name] = request.model_copy(update=paths)
    for name in ("begun", "part"):
        path = getattr(record, name)
        if path is not None:
            changes[name] = change(path)
    return record.model_copy(update=changes)


def load_record(directory: Path) -> DeviceRecord:
    """Read the record; ValueError says in one sentence why it cannot be used."""
    path = directory / RECORD_FILE
    try:
        record = DeviceRecord.model_validate_json(_read_plain_file(path))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from error
    except ValidationError as error:
        raise ValueError(f"{path} is damaged or of another version") from error
    times = record.timeouts
    if not all(0 <= seconds < SECONDS_MAX for seconds in times.model_dump().values()):
        raise ValueError(f"{path} is damaged: it has times that cannot be")
    if record.version != RECORD_VERSION:
        raise ValueError(f"{path} has version {record.version}, this fvdd knows {RECORD_VERSION}")
    return _readable(record)


def _read_plain_file(path: Path) -> bytes:
    """Read a file of ours; whatever else has its name must not make us wait."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ValueError(f"{path} is not a plain file")
        return os.read(fd, RECORD_BYTES_MAX)
    finally:
        os.close(fd)


def remove_directory(directory: Path) -> None:
    """Remove the directory of a device that is closed clean; it holds plain files only."""
    try:
        for entry in directory.iterdir():
            entry.unlink(missing_ok=True)
        directory.rmdir()
    except FileNotFoundError:
        return
    except OSError as error:
        # Somebody put something there; nothing in it matters to the device any more.
        log.warning("%s cannot be removed: %s", directory, error)
