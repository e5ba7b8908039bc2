# SPDX-License-Identifier: Apache-2.0
"""Routes of devices: attach, list, show, detach, recover, upgrade."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response

from fvdapi.models import (
    AttachRequest,
    BackupAnswer,
    BackupRequest,
    DetachAnswer,
    DeviceList,
    DeviceStatus,
    ReadOnlyRequest,
    RecoverRequest,
    SnapshotAnswer,
    SnapshotRequest,
    UpgradeAnswer,
)
from fvdd.api.audit import audit
from fvdd.devices.registry import Registry

_T = TypeVar("_T")


def device_routes(registry: Registry) -> APIRouter:
    router = APIRouter(prefix="/v1/devices", tags=["devices"])

    @router.post("", status_code=201)
    async def attach(request: Request, body: AttachRequest, response: Response) -> DeviceStatus:
        """Attach an image as a block device; answers when the device is ready."""
        audit(request, "attach", image=body.image, name=body.name)
        status = await finish(registry.attach(body))
        response.headers["Location"] = f"/v1/devices/{status.name}"
        return status

    @router.get("")
    async def list_devices() -> DeviceList:
        """All devices, with their status."""
        return DeviceList(devices=tuple(await registry.statuses()))

    @router.get("/{name}")
    async def show(name: str) -> DeviceStatus:
        """One device."""
        return await registry.status(name)

    @router.delete("/{name}")
    async def detach(request: Request, name: str, discard_unflushed: bool = False) -> DetachAnswer:
        """Detach a device nobody holds; with `discard_unflushed` also if it cannot be revived."""
        audit(request, "detach", name=name, discard_unflushed=discard_unflushed)
        return await finish(registry.detach(name, discard_unflushed=discard_unflushed))

    @router.post("/{name}/recover")
    async def recover(request: Request, name: str, body: RecoverRequest) -> DeviceStatus:
        """Bring a failed device back: find its worker and kernel device, or replace the worker."""
        discard = body.discard_unflushed
        audit(request, "recover", name=name, image=body.image, discard_unflushed=discard)
        return await finish(registry.recover(name, body))

    @router.post("/{name}/upgrade")
    async def upgrade(request: Request, name: str) -> UpgradeAnswer:
        """Replace the worker by one of the installed version; no request fails, none is resent."""
        audit(request, "upgrade", name=name)
        return await finish(registry.upgrade(name))

    @router.post("/{name}/snapshot")
    async def snapshot(request: Request, name: str, body: SnapshotRequest) -> SnapshotAnswer:
        """Keep the image as it is, as the base of a new one that the device continues on."""
        audit(request, "snapshot", name=name, target=body.target)
        return await finish(registry.snapshot(name, body.target))

    @router.post("/{name}/read-only")
    async def set_read_only(request: Request, name: str, body: ReadOnlyRequest) -> DeviceStatus:
        """Make a device read-only or writable; refused while somebody holds it."""
        audit(request, "set_read_only", name=name, read_only=body.read_only)
        return await finish(registry.set_read_only(name, body.read_only))

    @router.post("/{name}/backup")
    async def backup(request: Request, name: str, body: BackupRequest) -> BackupAnswer:
        """Copy the disk as it is at one moment to a new raw file; the device stays in use."""
        audit(request, "backup", name=name, target=body.target)
        return await finish(registry.backup(name, body.target))

    return router


async def finish(work: Coroutine[Any, Any, _T]) -> _T:
    """Carry `work` through although the caller may go away: half an attach is of no use."""
    return await asyncio.shield(asyncio.ensure_future(work))
