# SPDX-License-Identifier: Apache-2.0
"""The metrics of all devices and of the daemon, made anew for every scrape.

Counters come from the statistics pages that the workers share, so a scrape disturbs no worker and
works while one is being replaced. Series of detached devices end with the device: nothing is
remembered here. The label `device` is the kernel's name without /dev, as node_exporter has it.

What the daemon counts about itself is prometheus_client's; the devices' many lines are written by
fvdd.metrics.exposition, ten times as fast.
"""

from __future__ import annotations

import asyncio
import functools
import importlib.metadata
import math
import time
from collections.abc import Iterator, Sequence
from typing import Final

from prometheus_client import CollectorRegistry, Gauge, Histogram
from prometheus_client.exposition import choose_encoder
from prometheus_client.gc_collector import GCCollector
from prometheus_client.metrics import disable_created_metrics
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.process_collector import ProcessCollector

from fvdapi.models import DeviceState, MetricFamily, MetricSample
from fvdd.devices import states
from fvdd.devices.device import Device
from fvdd.devices.registry import Registry
from fvdd.devices.troubles import page_of
from fvdd.metrics.exposition import Exposition, exposition_of
from fvdd.metrics.identity import Identity, write_build, write_identities
from fvdd.metrics.pages import write_pages
from fvdd.metrics.stores import Looker, Store, write_stores
from fvdengine.stats import Stats

# When a histogram of fvdd was made is when fvdd started, and that is known already.
disable_created_metrics()  # type: ignore[no-untyped-call]

_ATTACH_BUCKETS: Final = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 90)


@functools.cache
def version() -> str:
    """The installed version of fvd."""
    try:
        return importlib.metadata.version("fvd")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


class Metrics:
    """What /metrics answers."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._looker, self._looking = Looker(), asyncio.Lock()
        self._own = CollectorRegistry(auto_describe=False)
        ProcessCollector(registry=self._own)
        GCCollector(registry=self._own)
        self._loop_lag = Gauge(
            "fvd_event_loop_lag_seconds",
            "How late the daemon's loop last came back to a timer.",
            registry=self._own,
        )
        self._durations = {
            action: Histogram(
                f"fvd_device_{action}_duration_seconds",
                f"Time of each {action} that succeeded.",
                buckets=_ATTACH_BUCKETS,
                registry=self._own,
            )
            for action in ("attach", "detach")
        }
        registry.on_duration = self.observe

    def observe(self, action: str, seconds: float) -> None:
        self._durations[action].observe(seconds)

    def loop_lag(self, seconds: float) -> None:
        self._loop_lag.set(seconds)

    async def families(self) -> list[MetricFamily]:
        """The values as the API's own types."""
        return list(self._families((await self.render(""))[0].decode()))

    def _families(self, text: str) -> Iterator[MetricFamily]:
        for family in text_string_to_metric_families(text):
            samples = (
                MetricSample(
                    name=sample.name,
                    labels=sample.labels,
                    value=None if math.isnan(sample.value) else sample.value,
                )
                for sample in family.samples
            )
            yield MetricFamily(
                name=family.name,
                type=family.type,
                help=family.documentation,
                samples=tuple(samples),
            )

    async def render(self, accept: str) -> tuple[bytes, str]:
        """The exposition and its content type, in the form that the scraper asks for."""
        encoder, content_type = choose_encoder(accept)
        openmetrics = content_type.startswith("application/openmetrics-text")
        out = Exposition(openmetrics=openmetrics)
        devices = [device for device in self._registry.devices if device.record.device]
        pages = [(device, page) for device in devices if (page := page_of(device))]
        stores = [_store(device, page) for device, page in pages]
        async with self._looking:  # beside the loop, which storage may hold up
            rooms = await asyncio.to_thread(self._looker.rooms, stores)
        _write_daemon(out, self._registry)
        _write_lives(out, devices)
        write_stores(out, rooms)
        read = [(kernel_name(device), page) for device, page in pages]
        write_pages(out, read, time.monotonic_ns(), time.time())
        own = encoder(self._own).decode()
        return exposition_of((own, out.text()), openmetrics=openmetrics), content_type


def kernel_name(device: Device) -> str:
    """The value of the label `device`."""
    return (device.record.device or "").removeprefix("/dev/")


def _write_daemon(out: Exposition, registry: Registry) -> None:
    write_build(out, version())
    out.family("fvd_devices", "gauge", "Devices by state.")
    present = [device.state for device in registry.devices]
    present.extend(orphan.state for orphan in registry.orphans)
    for state in DeviceState:
        out.sample("fvd_devices", (("state", state.value),), present.count(state))
    name = "fvd_devices_leaked_reclaimed"
    out.family(name, "counter", "Leaked kernel devices that were given back.")
    out.sample(f"{name}_total", (), registry.reclaimed_count)
    out.family("fvd_device_transitions", "counter", "Changes of devices' states.")
    for (previous, now), number in sorted(states.COUNTS.items()):
        labels = (("previous", previous), ("state", now))
        out.sample("fvd_device_transitions_total", labels, number)


def _write_lives(out: Exposition, devices: Sequence[Device]) -> None:
    """Identity and life of the devices: what fvdd itself knows."""
    named = [(kernel_name(device), device) for device in devices]
    write_identities(out, [_identity(device) for device in devices])
    out.family("fvd_device_up", "gauge", "Whether all its connections are served.")
    for name, device in named:
        complete = device.connections_alive >= device.record.request.connections
        is_up = device.state is DeviceState.ATTACHED and complete
        out.sample("fvd_device_up", (("device", name),), int(is_up))
    out.family("fvd_device_connections", "gauge", "Connections that are served.")
    for name, device in named:
        out.sample("fvd_device_connections", (("device", name),), device.connections_alive)
    reconnects = "fvd_device_reconnects"
    out.family(
        reconnects, "counter", "Fresh connections given to the kernel, by what made them necessary."
    )
    for name, device in named:
        by_reason = {
            "crash": device.counters.restarts, "kernel_timeout": device.counters.reconnects,
        }  # fmt: skip
        for reason, number in by_reason.items():
            out.sample(f"{reconnects}_total", (("device", name), ("reason", reason)), number)
    out.family("fvd_device_stalled_seconds", "counter", "Time without a worker.")
    for name, device in named:
        out.sample("fvd_device_stalled_seconds_total", (("device", name),), device.stalled_seconds)
    out.family("fvd_writeback_errors", "counter", "Times the kernel lost written data.")
    for name, device in named:
        lost = device.counters.writeback_errors
        out.sample("fvd_writeback_errors_total", (("device", name),), lost)


def _store(device: Device, page: Stats) -> Store:
    opened = device.opened
    used = page.gauges.get("store_used_bytes")
    if opened is None:
        return Store(kernel_name(device), "", None, grows=False, used=used)
    return Store(kernel_name(device), opened.data, opened.data_id, opened.grows, used)


def _identity(device: Device) -> Identity:
    record, opened = device.record, device.opened
    return Identity(
        device=kernel_name(device),
        devpath=record.device or "",
        name=device.name,
        image=record.request.image,
        attach=record.request.transport,
        base=opened.base if opened is not None else "",
        base_format=opened.base_format if opened is not None else "",
        cookie=record.backend,
    )
