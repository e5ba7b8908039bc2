# SPDX-License-Identifier: Apache-2.0
"""Routes of the daemon itself: health, metrics, doctor, events, the status page."""

from __future__ import annotations

import os
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import StreamingResponse

from fvdapi.activity import CELLS_MAX, ActivityList, DeviceMap
from fvdapi.models import DeviceState, DoctorReport, Health, MetricList, ReclaimAnswer
from fvdd.api.audit import audit
from fvdd.devices.doctor import examine
from fvdd.devices.registry import Registry
from fvdd.events import EventHub, stream
from fvdd.metrics.activity import activities
from fvdd.metrics.collect import Metrics, version
from fvdd.metrics.page import STATUS_PAGE

NO_STORE = {"Cache-Control": "no-store"}
# The page loads nothing from anywhere else, and nobody may frame it.
ONLY_OURS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; connect-src 'self'; frame-ancestors 'none'"
}


def system_routes(registry: Registry, metrics: Metrics) -> APIRouter:
    router = APIRouter(tags=["system"])

    @router.get("/v1/doctor")
    async def doctor() -> DoctorReport:
        """What this kernel and host can do, and what to install."""
        return await examine(registry.config, registry)

    @router.post("/v1/reclaim")
    async def reclaim(request: Request) -> ReclaimAnswer:
        """Give kernel devices back, and remove files, that are ours and nobody's any more."""
        audit(request, "reclaim")
        reclaimed, left = await registry.reclaim()
        removed = await registry.remove_leftovers()
        return ReclaimAnswer(
            reclaimed=tuple(leak.device for leak in reclaimed),
            left=tuple(leak.device for leak in left),
            removed=tuple(os.fsencode(path).decode(errors="replace") for path in removed),
        )

    @router.get("/v1/metrics")
    async def metric_values() -> MetricList:
        """The same values as /metrics, as JSON."""
        return MetricList(families=tuple(await metrics.families()))

    return router


def event_routes(hub: EventHub) -> APIRouter:
    """The stream of what happens to devices."""
    router = APIRouter(tags=["events"])

    @router.get("/v1/events", response_class=StreamingResponse)
    async def events(past: bool = False) -> StreamingResponse:
        """State changes and troubles as they come (server-sent events); `past`: the last ones."""
        return StreamingResponse(
            stream(hub, past=past), media_type="text/event-stream", headers=NO_STORE
        )

    return router


def observation_routes(
    registry: Registry, metrics: Metrics, *, is_public: bool = False
) -> APIRouter:
    """What may be read without the right to change anything; also on the metrics address, which is
    `is_public`."""
    router = APIRouter(tags=["observation"])

    @router.head("/healthz", include_in_schema=False)
    @router.get("/healthz")
    async def healthz() -> Health:
        """Whether the daemon works, and how its devices are."""
        failed = sum(1 for device in registry.devices if device.state is DeviceState.FAILED)
        return Health(
            version=version(),
            pid=os.getpid(),
            devices=len(registry.devices),
            devices_failed=failed,
        )

    @router.get("/v1/activity")
    async def activity() -> ActivityList:
        """What every device is doing, in totals; asks no worker."""
        return activities(registry)

    @router.get("/v1/devices/{name}/map")
    async def device_map(name: str, cells: Annotated[int, Query(ge=1, le=CELLS_MAX)]) -> DeviceMap:
        """Which parts of a disk are local, in the base, or zero, by samples."""
        found = await registry.device(name).map(cells, is_observed=is_public)
        return DeviceMap.model_validate({"name": name, "size_bytes": found["size"], **found})

    @router.head("/", include_in_schema=False)
    @router.get("/", response_class=Response)
    async def page() -> Response:
        """A page for people, read-only."""
        return Response(STATUS_PAGE, media_type="text/html", headers=NO_STORE | ONLY_OURS)

    @router.head("/metrics", include_in_schema=False)
    @router.get("/metrics", response_class=Response)
    async def exposition(request: Request) -> Response:
        """Metrics in the text form that Prometheus reads."""
        body, content_type = await metrics.render(request.headers.get("accept", ""))
        return Response(body, media_type=None, headers={"Content-Type": content_type})

    return router
