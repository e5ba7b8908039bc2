# SPDX-License-Identifier: Apache-2.0
"""Routes for an image while its device is in use: extents, resize, update."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request

from fvdapi.activity import Extents
from fvdapi.models import ResizeAnswer, ResizeRequest, UpdateAnswer, UpdateRequest
from fvdd.api.audit import audit
from fvdd.api.devices import finish
from fvdd.devices.registry import Registry


def running_routes(registry: Registry) -> APIRouter:
    router = APIRouter(prefix="/v1/devices", tags=["devices"])

    @router.get("/{name}/extents")
    async def extents(name: str, offset: Annotated[int, Query(ge=0)] = 0) -> Extents:
        """Where each part of the disk is, from an offset on; `next` says where to go on."""
        return Extents.model_validate(await registry.device(name).extents(offset))

    @router.post("/{name}/resize")
    async def resize(request: Request, name: str, body: ResizeRequest) -> ResizeAnswer:
        """Grow the disk; file systems and partitions on it grow by their own programs."""
        audit(request, "resize", name=name, size=body.size)
        return await finish(registry.resize(name, body.size))

    @router.patch("/{name}")
    async def update(request: Request, name: str, body: UpdateRequest) -> UpdateAnswer:
        """Change fields of the image's header, all or none; most take effect at once."""
        audit(request, "update", name=name, fields=",".join(sorted(body.fields)))
        return await finish(registry.update(name, body.fields))

    return router
