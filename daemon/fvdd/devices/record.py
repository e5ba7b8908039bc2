# SPDX-License-Identifier: Apache-2.0
"""What is written about a device beside its live state, so that a later fvdd can find it.

One JSON file in the device's directory, replaced atomically. It holds what the kernel and the
worker were told; it is written before the kernel has the device and again when the kernel has
chosen a number.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, ValidationError

from fvdapi.models import AttachRequest, Timeouts

RECORD_FILE: Final = "device.json"
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
        record = DeviceRecord.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from error
    except ValidationError as error:
        raise ValueError(f"{path} is damaged or of another version") from error
    if record.version != RECORD_VERSION:
        raise ValueError(f"{path} has version {record.version}, this fvdd knows {RECORD_VERSION}")
    return record


def remove_directory(directory: Path) -> None:
    """Remove the directory of a device that is closed clean; it holds plain files only."""
    with contextlib.suppress(FileNotFoundError):
        for entry in directory.iterdir():
            entry.unlink(missing_ok=True)
        directory.rmdir()
