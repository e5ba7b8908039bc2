# SPDX-License-Identifier: Apache-2.0
"""All devices of this fvdd, by name; and those that an earlier fvdd left behind.

The state directory is the registry's memory: DIR/devices/NAME holds a device's live state and its
record. One fvdd at a time may use it, which a lock on DIR/fvdd.lock enforces. What is found there
at the start belongs to somebody: it is listed as orphaned, with the reason, and never touched.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from fvdapi.errors import ApiError
from fvdapi.models import (
    AttachRequest,
    DeviceState,
    DeviceStatus,
    Timeouts,
    is_device_name,
    name_from_image,
)
from fvdd.attach.attachment import AttachError
from fvdd.config import Config
from fvdd.devices.device import Device, Services
from fvdd.devices.record import DeviceRecord, load_record
from fvdd.devices.rendering import render_orphan
from fvdd.log import fields

log = logging.getLogger("fvdd.devices")

LOCK_FILE: Final = "fvdd.lock"
DEVICES_FOLDER: Final = "devices"
_NAME_TRIES: Final = 1000


class StateDirectory:
    """The locked state directory of this fvdd."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.devices = self.path / DEVICES_FOLDER
        self._lock_fd = -1

    def acquire(self) -> None:
        """Make the directory and lock it; ApiError names the fvdd that has it."""
        try:
            self.path.mkdir(mode=0o755, parents=True, exist_ok=True)
            self.devices.mkdir(mode=0o700, exist_ok=True)
            fd = os.open(self.path / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ApiError(
                "invalid_config",
                f"the state directory {self.path} cannot be used ({error.strerror})",
                hint="run fvdd as root, or choose another directory with --state-dir",
            ) from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            other = os.pread(fd, 32, 0).decode(errors="replace").strip()
            os.close(fd)
            raise ApiError(
                "daemon_running",
                f"another fvdd (process {other or 'unknown'}) uses the state directory {self.path}",
                hint="stop it first, or give this one its own --state-dir and --socket",
            ) from error
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        self._lock_fd = fd

    def release(self) -> None:
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1


class Registry:
    """Attach, find, list and detach devices."""

    def __init__(self, services: Services, state: StateDirectory) -> None:
        self._services = services
        self._state = state
        self._devices: dict[str, Device] = {}
        self._orphans: dict[str, DeviceStatus] = {}
        self._stopping = False
        # Told how long each successful attach and detach took.
        self.on_duration: Callable[[str, float], None] = lambda action, seconds: None

    @property
    def config(self) -> Config:
        return self._services.config

    @property
    def devices(self) -> Sequence[Device]:
        return tuple(self._devices.values())

    @property
    def orphans(self) -> Sequence[DeviceStatus]:
        return tuple(self._orphans.values())

    def find_orphans(self) -> None:
        """List what an earlier fvdd left in the state directory; touch nothing."""
        for directory in sorted(self._state.devices.iterdir()):
            if not directory.is_dir():
                continue
            status = describe_orphan(directory, self.config)
            self._orphans[directory.name] = status
            log.warning("orphaned device", extra=fields(name=directory.name, reason=status.reason))

    async def attach(self, request: AttachRequest) -> DeviceStatus:
        """Make a device of an image; returns when it is as ready as the request asks."""
        if self._stopping:
            raise ApiError("daemon_stopping", "fvdd is about to stop")
        if len(self._devices) >= self.config.limits.devices_max:
            raise ApiError(
                "too_many_devices",
                f"{len(self._devices)} devices are attached, which is the configured limit",
                hint="raise limits.devices_max in fvdd.toml",
            )
        try:
            await self._services.transport.require()
        except AttachError as error:
            raise ApiError(error.code, error.message, hint=error.hint) from error
        self._refuse_known_image(request.image)
        device = self._new_device(request)
        self._devices[device.name] = device
        begin = time.monotonic()
        try:
            await device.attach()
            self.on_duration("attach", time.monotonic() - begin)
        finally:
            if device.state is DeviceState.CLOSED and self._devices.get(device.name) is device:
                del self._devices[device.name]
        return await device.status()

    async def detach(self, name: str) -> DeviceStatus:
        """Take a device down cleanly; its last status."""
        device = self.device(name)
        status = await device.status()
        begin = time.monotonic()
        try:
            await device.detach()
            self.on_duration("detach", time.monotonic() - begin)
        finally:
            # Only this device: another may have the name by now.
            if device.state is DeviceState.CLOSED and self._devices.get(name) is device:
                del self._devices[name]
        return status

    async def prefetch(self, name: str, action: str) -> DeviceStatus:
        device = self.device(name)
        await device.prefetch(action)
        return await device.status()

    async def status(self, name: str) -> DeviceStatus:
        orphan = self._orphans.get(name)
        if orphan is not None and name not in self._devices:
            return orphan
        return await self.device(name).status()

    async def statuses(self) -> list[DeviceStatus]:
        """All devices, in the order of their names; workers are asked side by side."""
        known = await asyncio.gather(*(device.status() for device in self.devices))
        return sorted([*known, *self._orphans.values()], key=lambda status: status.name)

    def device(self, name: str) -> Device:
        """The device called `name`; ApiError when there is none that can be worked with."""
        device = self._devices.get(name)
        if device is not None:
            return device
        orphan = self._orphans.get(name)
        if orphan is not None:
            raise ApiError(
                "device_orphaned",
                f"device {name} belongs to no running fvdd: {orphan.reason}",
                hint=_orphan_remedy(self._state.devices / name, orphan),
            )
        raise ApiError(
            "device_not_found",
            f"there is no device called '{name}'",
            hint="fvdctl list shows what is attached",
        )

    async def close(self) -> None:
        """fvdd ends: leave every device running under its worker."""
        self._stopping = True
        for device in self.devices:
            await device.leave()

    def _refuse_known_image(self, image: str) -> None:
        """Name the device that has the image; the lock would only name this process."""
        target = _identity(image)
        for device in self._devices.values():
            request = device.record.request
            if _identity(request.image) == target and target is not None and not request.read_only:
                node = device.record.device
                raise ApiError(
                    "image_in_use",
                    f"{image} is attached already as {device.name}"
                    + (f" ({node})" if node is not None else ""),
                    hint=f"fvdctl detach {device.name}",
                )

    def _new_device(self, request: AttachRequest) -> Device:
        name = request.name or self._free_name(name_from_image(request.image))
        if not is_device_name(name):
            raise ApiError("invalid_name", f"'{name}' cannot be the name of a device")
        if name in self._devices or name in self._orphans:
            raise ApiError(
                "device_exists",
                f"there is a device called '{name}' already",
                hint="choose another --name, or detach that one",
            )
        times = self.config.timeouts.for_connections(request.connections)
        record = DeviceRecord(
            name=name,
            attachment=str(uuid.uuid4()),
            request=request,
            timeouts=Timeouts(
                resend_timeout=times.resend_timeout,
                base_timeout=times.base_timeout,
                kernel_timeout=times.kernel_timeout,
                dead_timeout=times.dead_timeout,
            ),
            attached_at=time.time(),
        )
        return Device(self._services, record, self._state.devices / name)

    def _free_name(self, wanted: str) -> str:
        """The wanted name, or the first free of NAME-2, NAME-3, ..."""
        for number in range(1, _NAME_TRIES):
            name = wanted if number == 1 else f"{wanted[:58]}-{number}"
            taken = name in self._devices or name in self._orphans
            if not taken and not (self._state.devices / name).exists():
                return name
        raise ApiError("invalid_name", f"no free name like '{wanted}'", hint="give one by --name")


def describe_orphan(directory: Path, config: Config) -> DeviceStatus:
    """What can be said about a directory that this fvdd did not make."""
    name = directory.name
    try:
        record = load_record(directory)
    except ValueError as error:
        record = DeviceRecord(
            name=name if is_device_name(name) else "unknown",
            attachment="",
            request=AttachRequest(image="/"),
            timeouts=_times(config),
            attached_at=0.0,
        )
        return render_orphan(name, record, f"an earlier fvdd left it, and {error}")
    if _is_worker(record.worker_pid):
        reason = (
            f"an earlier fvdd left it; its worker (process {record.worker_pid}) still serves "
            f"{record.device or 'it'}"
        )
    else:
        record = record.model_copy(update={"worker_pid": None})
        reason = "an earlier fvdd left it and its worker is dead; its live state is kept"
    return render_orphan(name, record, reason)


def _orphan_remedy(directory: Path, orphan: DeviceStatus) -> str:
    if orphan.worker_pid is not None:
        return (
            f"nothing is lost: {orphan.device or 'the device'} goes on working; this version "
            "cannot adopt it, so it ends with the next boot"
        )
    return (
        f"close the image clean with 'fvdctl serve {orphan.image} --state {directory} "
        f"--socket {directory}/nbd.sock' and Ctrl-C, then remove {directory}"
    )


def _times(config: Config) -> Timeouts:
    times = config.timeouts
    return Timeouts(
        resend_timeout=times.resend_timeout,
        base_timeout=times.base_timeout,
        kernel_timeout=times.kernel_timeout,
        dead_timeout=times.dead_timeout,
    )


def _is_worker(pid: int | None) -> bool:
    """Whether the process is there and is a worker (numbers are used again)."""
    if pid is None:
        return False
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return b"fvdd.worker" in command


def _identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino
