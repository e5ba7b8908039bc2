# SPDX-License-Identifier: Apache-2.0
"""All devices of this fvdd, by name; and those that an earlier fvdd left behind.

The state directory is the registry's memory: DIR/devices/NAME holds a device's live state and its
record. One fvdd at a time may use it, which a lock on DIR/fvdd.lock enforces. What is found there
at the start is adopted (see fvdd.devices.adoption), all devices side by side. Only a directory
whose record cannot be read stays as it is: listed as orphaned, with the reason and the remedy.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import logging
import os
import stat
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from fvdapi.errors import ApiError
from fvdapi.models import (
    AttachRequest,
    BackupAnswer,
    DetachAnswer,
    DeviceState,
    DeviceStatus,
    FieldChange,
    PrefetchRequest,
    RecoverRequest,
    ResizeAnswer,
    SnapshotAnswer,
    UpdateAnswer,
    UpgradeAnswer,
    is_device_name,
    is_partition_name,
    name_from_image,
)
from fvdd.attach.attachment import AttachError, Leak
from fvdd.config import Config
from fvdd.devices.device import Device
from fvdd.devices.orphans import (
    attachment_in,
    describe_orphan,
    is_empty_leftover,
    orphan_remedy,
    own_record,
    rebuilt_record,
)
from fvdd.devices.prefetching import rate_fields
from fvdd.devices.record import DeviceRecord, remove_directory
from fvdd.devices.reviving import terms
from fvdd.devices.session import Services, gather_quietly, timeouts_for, to_api_error
from fvdd.devices.whereabouts import file_id, look
from fvdd.log import fields
from fvdengine.errors import EngineError
from fvdengine.overlay import check_not_held
from fvdengine.paths import shell_word

log = logging.getLogger("fvdd.devices")

LOCK_FILE: Final = "fvdd.lock"
DEVICES_FOLDER: Final = "devices"
_NAME_TRIES: Final = 1000
_REMEDIES: Final = {
    errno.EROFS: "remount it for writing (mount -o remount,rw)",
    errno.ENOSPC: "free some space there or enlarge the tmpfs (mount -o remount,size=...)",
}


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
            _refuse_others(self.path)
            self.devices.mkdir(mode=0o700, exist_ok=True)
            _refuse_others(self.devices)
            fd = os.open(self.path / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ApiError(
                "invalid_config",
                f"the state directory {self.path} cannot be used ({error.strerror})",
                hint=_REMEDIES.get(error.errno or 0, "run fvdd as root")
                + ", or choose another directory with --state-dir",
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
        with contextlib.suppress(OSError):  # it is only for people, and the directory may be full
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        self._lock_fd = fd

    def release(self) -> None:
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1


def _refuse_others(path: Path) -> None:
    """ApiError where others could put records and sockets of theirs in the place of ours."""
    status, own = path.stat(), os.geteuid()
    if status.st_uid != own:
        reason, remedy = f"belongs to user {status.st_uid}, not to {own}", f"chown {own}"
    elif status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        reason, remedy = "may be written to by others", "chmod go-w"
    else:
        return
    raise ApiError(
        "invalid_config",
        f"the state directory {path} {reason}: what is in it cannot be relied on",
        hint=f"look who has written there, then: {remedy} {shell_word(str(path))}; or choose "
        "another directory with --state-dir",
    )


_OUT_OF_SIGHT: Final = "fvdd runs in a PID namespace and cannot see whether another fvdd has it"


async def _check_not_held(image: str) -> None:
    try:
        await look(image, lambda: check_not_held(image))
    except EngineError as error:
        raise to_api_error(error) from error


class Registry:
    """Attach, find, list and detach devices."""

    def __init__(self, services: Services, state: StateDirectory) -> None:
        self.reclaimed_count = 0  # leaked devices that were given back
        self._services = services
        self._state = state
        self._devices: dict[str, Device] = {}
        self._orphans: dict[str, Path] = {}
        self._adopting: dict[str, asyncio.Task[None]] = {}
        # The files of devices that are being attached.
        self._opening: dict[str, tuple[int, int] | None] = {}
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
    def sees_every_process(self) -> bool:
        """Whether nobody on this host is hidden from fvdd, as those outside a container are."""
        return self._services.transport.sees_every_process()

    @property
    def orphans(self) -> Sequence[DeviceStatus]:
        """What could not be adopted, as it is now."""
        for name, directory in list(self._orphans.items()):
            if not directory.exists():  # somebody followed the remedy
                del self._orphans[name]
        return tuple(describe_orphan(path, self.config) for path in self._orphans.values())

    def adopt_all(self) -> None:
        """Begin to take over what an earlier fvdd left in the state directory."""
        for directory in sorted(self._state.devices.iterdir()):
            if directory.is_dir():
                self._adopt(directory)

    async def reclaim(self) -> tuple[list[Leak], list[Leak]]:
        """Give leaked kernel devices back: those that were, and those that something holds, or
        that something out of sight may hold."""
        await asyncio.gather(*self._adopting.values(), return_exceptions=True)
        reclaimed, left = [], []
        for leak in await self.leaks():
            if not leak.obstacle:
                try:
                    await self._services.transport.reclaim(leak)
                    reclaimed.append(leak)
                    self.reclaimed_count += 1
                    log.warning(
                        "reclaimed a leaked device",
                        extra=fields(device=leak.device, backend=leak.backend),
                    )
                    continue
                except AttachError as error:
                    leak = replace(leak, obstacle=error.message)
            left.append(leak)
            log.warning("leaked device", extra=fields(device=leak.device, obstacle=leak.obstacle))
        return reclaimed, left

    async def remove_leftovers(self) -> list[str]:
        """Remove what operations left that were broken off, where nobody needs it: the paths."""
        gone = [one.path for device in self.devices for one in await device.leftovers(remove=True)]
        for path in gone:
            log.warning("removed what was left over", extra=fields(path=path))
        return gone

    async def leaks(self) -> Sequence[Leak]:
        """Kernel devices of ours that belong to no device and no other fvdd."""
        known = {device.record.backend for device in self._devices.values()}
        try:
            found = await self._services.transport.leaks(known)
        except (OSError, AttachError) as error:
            log.warning("leaked devices are not looked for: %s", error)
            return ()
        left = [leak for leak in found if not self._is_orphaned(leak.backend)]
        if self.sees_every_process:
            return left
        return [replace(leak, obstacle=leak.obstacle or _OUT_OF_SIGHT) for leak in left]

    def _is_orphaned(self, backend: str) -> bool:
        """Whether a directory whose record is of no use is, or may well be, that of a device."""
        _, name, attachment = backend.split(":", 2)
        for directory in self._orphans.values():
            own = attachment_in(directory)
            if own == attachment or (own is None and directory.name == name):
                return True
        return False

    def orphan_remedy(self, name: str) -> str:
        """What helps a device whose record is of no use."""
        return orphan_remedy(self._orphans[name], self._services.transport.backends())

    def _adopt(self, directory: Path) -> None:
        name = directory.name
        try:
            record = own_record(directory)
        except (ValueError, OSError) as error:
            if is_empty_leftover(directory):
                log.info("an attach had begun and left nothing", extra=fields(name=name))
                remove_directory(directory)
                return
            self._orphans[name] = directory
            log.warning("orphaned device", extra=fields(name=name, reason=error))
            return
        device = Device(self._services, record, directory, DeviceState.ORPHANED)
        self._devices[name] = device
        self._adopting[name] = asyncio.create_task(self._adopt_one(device), name=f"adopt {name}")

    async def _adopt_one(self, device: Device) -> None:
        try:
            await device.adopt()
        except Exception:  # a defect here must not take the other devices along
            log.exception("adopting failed", extra=fields(name=device.name))
        finally:
            self._adopting.pop(device.name, None)
            self._forget_closed(device)

    async def _revive_orphan(self, name: str, asked: RecoverRequest) -> Device:
        """Adopt what its live state tells of; ApiError where that is too little."""
        directory = self._orphans[name]
        try:
            record = own_record(directory)
        except ValueError:
            backends = self._services.transport.backends()
            record = rebuilt_record(directory, self.config, backends)
        record = record.model_copy(update=terms(record, asked, self.config))
        log.warning("its record is made anew", extra=fields(name=name, image=record.request.image))
        device = Device(self._services, record, directory, DeviceState.ORPHANED)
        self._devices[name] = device
        del self._orphans[name]
        await self._adopt_one(device)
        return device

    def _forget_closed(self, device: Device) -> None:
        # Only this device: another may have the name by now.
        if device.state is DeviceState.CLOSED and self._devices.get(device.name) is device:
            del self._devices[device.name]

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
        image, limit = request.image, self.config.limits.worker_timeout
        begin = time.monotonic()
        wanted = await look(image, lambda: file_id(image), limit=limit)
        self._refuse_known_image(image, wanted)
        if not request.read_only:
            await _check_not_held(image)
        device = self._new_device(request)
        self._devices[device.name] = device
        self._opening[device.name] = wanted
        try:
            await device.attach()
            self.on_duration("attach", time.monotonic() - begin)
        finally:
            del self._opening[device.name]
            self._forget_closed(device)
        return await device.status()

    async def detach(self, name: str, *, discard_unflushed: bool = False) -> DetachAnswer:
        """Take a device down cleanly; or give up one that cannot be, if that is asked for."""
        device = self.device(name)
        begin = time.monotonic()
        try:
            gone = await device.detach(discard_unflushed=discard_unflushed)
            self.on_duration("detach", time.monotonic() - begin)
        finally:
            self._forget_closed(device)
        record = device.record
        return DetachAnswer(
            name=name, device=record.device, image=record.request.image, discarded_unflushed=gone
        )

    async def recover(self, name: str, asked: RecoverRequest) -> DeviceStatus:
        """Bring a failed device back, or one whose record is of no use."""
        if name in self._orphans and name not in self._devices:
            device = await self._revive_orphan(name, asked)
            if device.state in (DeviceState.ATTACHED, DeviceState.CLOSED):
                return await device.status()
        device = self.device(name)
        try:
            await device.recover(asked)
        finally:
            self._forget_closed(device)
        return await device.status()

    async def upgrade(self, name: str) -> UpgradeAnswer:
        """Replace a device's worker by one of the installed version."""
        done = await self.device(name).upgrade()
        status = await self.status(name)
        return UpgradeAnswer(
            name=name,
            device=status.device,
            worker_pid=status.worker_pid,
            method=done.method,
            version_before=done.version_before,
            version=done.version,
            pause_seconds=done.pause_seconds,
        )

    async def snapshot(self, name: str, target: str) -> SnapshotAnswer:
        """Keep a device's image as it is and continue on a new one over it."""
        device = self.device(name)
        pause, base = await device.snapshot(target)
        return SnapshotAnswer(
            name=name, device=device.record.device, image=target, base=base, pause_seconds=pause
        )

    async def resize(self, name: str, size: str) -> ResizeAnswer:
        """Grow a device while it is in use."""
        device = self.device(name)
        done = await device.resize(size)
        return ResizeAnswer(
            name=name,
            device=device.record.device,
            old_size_bytes=done.old_size,
            size_bytes=done.new_size,
        )

    async def set_read_only(self, name: str, wanted: bool) -> DeviceStatus:
        """Make a device read-only or writable; its status then."""
        await self.device(name).set_read_only(wanted)
        return await self.status(name)

    async def backup(self, name: str, target: str) -> BackupAnswer:
        """Copy a device's disk as it is at one moment to a file."""
        device = self.device(name)
        written, pauses = await device.backup(target)
        return BackupAnswer(
            name=name,
            device=device.record.device,
            target=target,
            written_bytes=written,
            pause_seconds=tuple(pauses),
        )

    async def update(self, name: str, assignments: Mapping[str, str]) -> UpdateAnswer:
        """Change how the image of a device is run."""
        device = self.device(name)
        done = await device.update(assignments)
        return UpdateAnswer(
            name=name,
            device=device.record.device,
            changes={
                key: FieldChange(old=old, new=new) for key, (old, new) in done["changes"].items()
            },
            next_open=tuple(done["next_open"]),
        )

    async def prefetch(self, name: str, request: PrefetchRequest) -> DeviceStatus:
        device = self.device(name)
        if request.action == "rate":
            await device.update(rate_fields(request))
        elif request.policy is not None:
            await device.set_policy(request.policy)
        else:
            await device.prefetch("pause" if request.action == "pause" else "start")
        return await device.status()

    async def status(self, name: str) -> DeviceStatus:
        for orphan in self.orphans:
            if orphan.name == name and name not in self._devices:
                return orphan
        return await self.device(name).status()

    async def statuses(self) -> list[DeviceStatus]:
        """All devices, in the order of their names; workers are asked side by side."""
        known = await asyncio.gather(*(device.status() for device in self.devices))
        return sorted([*known, *self.orphans], key=lambda status: status.name)

    def device(self, name: str) -> Device:
        """The device called `name`; ApiError when there is none that can be worked with."""
        device = self._devices.get(name)
        if device is not None:
            return device
        for orphan in self.orphans:
            if orphan.name == name:
                raise ApiError(
                    "device_orphaned",
                    f"device {name} cannot be worked with: {orphan.reason}",
                    hint=self.orphan_remedy(name),
                )
        raise ApiError(
            "device_not_found",
            f"there is no device called '{name}'",
            hint="fvdctl list shows what is attached",
        )

    def begin_stop(self) -> None:
        """Take no new devices, and give up what would hold up the end of fvdd for long."""
        self._stopping = True
        for device in self.devices:
            device.end_backup()

    async def close(self) -> None:
        """fvdd ends: leave every device running under its worker."""
        self._stopping = True
        await gather_quietly(*self._adopting.values())
        for device in self.devices:
            await device.leave()

    def _refuse_known_image(self, image: str, wanted: tuple[int, int] | None) -> None:
        """Name the device that has the file `wanted`; the lock would only name this process."""
        for device in self._devices.values():
            own = device.record.image_id or self._opening.get(device.name)
            if wanted is not None and own == wanted and not device.record.request.read_only:
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
        if is_partition_name(name):
            of, _, number = name.rpartition("-part")
            raise ApiError(
                "invalid_name",
                f"'{name}' cannot be the name of a new device: so partition {number} of a device "
                f"'{of}' is called in /dev/fvd",
                hint=f"choose another --name, {name_from_image(name)} for instance",
            )
        storage, prefetch = self.config.storage, self.config.prefetch
        chosen = {  # for as long as it is attached, whatever the configuration says later
            "cache": request.cache or storage.cache,
            "on_full": request.on_full or storage.on_full,
            "prefetch_policy": request.prefetch_policy or prefetch.policy,
        }
        record = DeviceRecord(
            name=name,
            attachment=str(uuid.uuid4()),
            request=request.model_copy(update=chosen),
            timeouts=timeouts_for(self.config, request.connections),
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
