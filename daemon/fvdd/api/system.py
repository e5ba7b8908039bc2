# SPDX-License-Identifier: Apache-2.0
"""Routes of the daemon itself: health, metrics, doctor."""

from __future__ import annotations

import os

from fastapi import APIRouter, Request, Response

from fvdapi.models import DeviceState, DoctorReport, Health, MetricList
from fvdd.devices.doctor import examine
from fvdd.devices.registry import Registry
from fvdd.metrics.collect import Metrics, version


def system_routes(registry: Registry, metrics: Metrics) -> APIRouter:
    router = APIRouter(tags=["system"])

    @router.get("/v1/doctor")
    async def doctor() -> DoctorReport:
        """What this kernel and host can do, and what to install."""
        return await examine(registry.config, registry)

    @router.get("/v1/metrics")
    async def metric_values() -> MetricList:
        """The same values as /metrics, as JSON."""
        return MetricList(families=tuple(metrics.families()))

    return router


def observation_routes(registry: Registry, metrics: Metrics) -> APIRouter:
    """What may be read without the right to change anything; also on the metrics address."""
    router = APIRouter(tags=["observation"])

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

    @router.get("/metrics", response_class=Response)
    async def exposition(request: Request) -> Response:
        """Metrics in the text form that Prometheus reads."""
        body, content_type = metrics.render(request.headers.get("accept", ""))
        return Response(body, media_type=None, headers={"Content-Type": content_type})

    return router
