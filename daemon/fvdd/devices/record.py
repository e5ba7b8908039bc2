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
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from fvdapi.models import AttachRequest, Timeouts

log = logging.getLogger("fvdd.devices")

RECORD_FILE: Final = "device.json"
RECORD_BYTES_MAX: Final = 1 << 20
RECORD_VERSION: Final = 1


class DeviceRecord(BaseModel):
    """The content of the file."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    version: int = RECORD_VERSION
    name: str
    attachment: str
    request: AttachRequest
    timeouts: Timeouts
    attached_at: float
    index: int | None = None
    device: str | None = None
    size_bytes: int = 0
    flags: int = 0
    worker_pid: int | None = None
    image_uuid: str | None = None
    # Which file the image is, whatever it is called by now: (device, inode).
    image_id: tuple[int, int] | None = None
    # "detached" from the moment on when the kernel is told to let go.
    wanted: Literal["attached", "detached"] = "attached"
    # What the background copy was last told by hand, for successors of the worker.
    prefetch: Literal["start", "pause"] | None = None
    # What was asked for, while a backup has it otherwise.
    kept: AttachRequest | None = None

    @property
    def backend(self) -> str:
        """The identifier that the kernel keeps for the device."""
        return f"fvd:{self.name}:{self.attachment}"


def store_record(directory: Path, record: DeviceRecord) -> None:
    """Replace the record: a new file, renamed, then the directory synced."""
    path = directory / RECORD_FILE
    temporary = directory / f"{RECORD_FILE}.new"
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(record.model_dump_json(indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def load_record(directory: Path) -> DeviceRecord:
    """Read the record; ValueError says in one sentence why it cannot be used."""
    path = directory / RECORD_FILE
    try:
        record = DeviceRecord.model_validate_json(_read_plain_file(path))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from error
    except ValidationError as error:
        raise ValueError(f"{path} is damaged or of another version") from error
    if record.version != RECORD_VERSION:
        raise ValueError(f"{path} has version {record.version}, this fvdd knows {RECORD_VERSION}")
    return record


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
