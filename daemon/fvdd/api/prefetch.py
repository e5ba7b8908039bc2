# SPDX-License-Identifier: Apache-2.0
"""Routes of the background copy: start, pause, rates, policy."""

from __future__ import annotations

from fastapi import APIRouter, Request

from fvdapi.models import DeviceStatus, PrefetchRequest
from fvdd.api.audit import audit
from fvdd.devices.registry import Registry


def prefetch_routes(registry: Registry) -> APIRouter:
    router = APIRouter(prefix="/v1/devices", tags=["prefetch"])

    @router.post("/{name}/prefetch")
    async def control(request: Request, name: str, body: PrefetchRequest) -> DeviceStatus:
        """Start or pause copying the rest of the base, or say how fast it may go."""
        audit(request, f"prefetch {body.action}", name=name)
        return await registry.prefetch(name, body)

    return router
