# SPDX-License-Identifier: Apache-2.0
"""The metrics of all devices and of the daemon, made anew for every scrape.

Counters come from the statistics pages that the workers share, so a scrape disturbs no worker and
works while one is being replaced. Series of detached devices end with the device: nothing is
remembered here. The label `device` is the kernel's name without /dev, as node_exporter has it.
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import math
import os
import platform
from collections.abc import Iterable, Iterator, Sequence
from typing import Final
from urllib.parse import urlsplit, urlunsplit

from prometheus_client import CollectorRegistry, Gauge, Histogram
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.gc_collector import GCCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from fvdapi.models import DeviceState, MetricFamily, MetricSample
from fvdd.devices import states
from fvdd.devices.device import Device
from fvdd.devices.registry import Registry
from fvdd.metrics.names import COUNTERS, GAUGES, HISTOGRAMS, PREFETCH_STATES, Source
from fvdengine import stats as pages
from fvdengine.errors import EngineError
from fvdengine.live import STATS_NAME
from fvdengine.stats import Stats

log = logging.getLogger("fvdd.metrics")

# Classic buckets out of the page's powers of two: from 2^12 ns (4 us) to 2^36 ns (69 s). Shorter
# ones are all "fast", longer ones all "hung".
BUCKET_FIRST: Final = 11
BUCKET_LAST: Final = 35

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
        self._prometheus = CollectorRegistry(auto_describe=False)
        ProcessCollector(registry=self._prometheus)
        GCCollector(registry=self._prometheus)
        self._prometheus.register(DeviceCollector(registry))
        self._loop_lag = Gauge(
            "fvd_event_loop_lag_seconds",
            "How late the daemon's loop last came back to a timer.",
            registry=self._prometheus,
        )
        self._durations = {
            "attach": Histogram(
                "fvd_device_attach_duration_seconds",
                "Time of successful attaches.",
                buckets=_ATTACH_BUCKETS,
                registry=self._prometheus,
            ),
            "detach": Histogram(
                "fvd_device_detach_duration_seconds",
                "Time of successful detaches.",
                buckets=_ATTACH_BUCKETS,
                registry=self._prometheus,
            ),
        }
        registry.on_duration = self.observe

    def observe(self, action: str, seconds: float) -> None:
        self._durations[action].observe(seconds)

    def loop_lag(self, seconds: float) -> None:
        self._loop_lag.set(seconds)

    async def refresh(self) -> None:
        """Ask the workers for what their pages do not hold (rate and ETA of prefetch)."""
        await self._registry.statuses()

    def families(self) -> Iterator[MetricFamily]:
        """The values as the API's own types."""
        for family in self._prometheus.collect():
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

    def render(self, accept: str) -> tuple[bytes, str]:
        """The exposition and its content type, in the form that the scraper asks for."""
        encoder, content_type = choose_encoder(accept)
        return encoder(self._prometheus), content_type


class DeviceCollector(Collector):
    """Families of all devices."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def collect(self) -> Iterable[Metric]:
        devices = [device for device in self._registry.devices if device.record.device]
        yield from _daemon_families(self._registry)
        yield from _life_families(devices)
        read = [(kernel_name(device), page) for device in devices if (page := _page(device))]
        yield from _page_families(read)


def kernel_name(device: Device) -> str:
    """The value of the label `device`."""
    return (device.record.device or "").removeprefix("/dev/")


def strip_secrets(base: str) -> str:
    """A base's name without credentials and query, as it may stand in a label."""
    if "://" not in base:
        return base
    parts = urlsplit(base)
    host = parts.hostname or ""
    return urlunsplit(
        (parts.scheme, host + (f":{parts.port}" if parts.port else ""), parts.path, "", "")
    )


def _daemon_families(registry: Registry) -> Iterator[Metric]:
    info = GaugeMetricFamily(
        "fvd_build_info", "Versions, as labels.", labels=["version", "python", "kernel"]
    )
    info.add_metric([version(), platform.python_version(), os.uname().release], 1)
    yield info
    count = GaugeMetricFamily("fvd_devices", "Devices by state.", labels=["state"])
    present = [device.state for device in registry.devices]
    present.extend(orphan.state for orphan in registry.orphans)
    for state in DeviceState:
        count.add_metric([state.value], present.count(state))
    yield count
    changes = CounterMetricFamily(
        "fvd_device_transitions", "Changes of devices' states.", labels=["previous", "state"]
    )
    for (previous, state_now), number in sorted(states.COUNTS.items()):
        changes.add_metric([previous, state_now], number)
    yield changes


def _life_families(devices: Sequence[Device]) -> Iterator[Metric]:
    """Identity and life of the devices: what fvdd itself knows."""
    info = GaugeMetricFamily(
        "fvd_device_info",
        "What a device is, as labels.",
        labels=["device", "devpath", "name", "image", "attach", "cookie"],
    )
    up = GaugeMetricFamily(
        "fvd_device_up", "Whether all its connections are served.", labels=["device"]
    )
    connections = GaugeMetricFamily(
        "fvd_device_connections", "Connections that are served.", labels=["device"]
    )
    reconnects = CounterMetricFamily(
        "fvd_device_reconnects",
        "Fresh connections given to the kernel, by what made them necessary.",
        labels=["device", "reason"],
    )
    stalled = CounterMetricFamily(
        "fvd_device_stalled_seconds", "Time without a worker.", labels=["device"]
    )
    free = GaugeMetricFamily(
        "fvd_backing_store_avail_bytes",
        "Free space of the file system that holds the image.",
        labels=["device"],
    )
    for device in devices:
        name, record = kernel_name(device), device.record
        image = strip_secrets(record.request.image)
        labels = [name, record.device or "", device.name, image, record.request.transport]
        info.add_metric([*labels, record.backend], 1)
        alive = device.connections_alive
        complete = alive >= record.request.connections
        up.add_metric([name], int(device.state is DeviceState.ATTACHED and complete))
        connections.add_metric([name], alive)
        reconnects.add_metric([name, "crash"], device.counters.restarts)
        reconnects.add_metric([name, "kernel_timeout"], device.counters.reconnects)
        stalled.add_metric([name], device.counters.stalled_seconds)
        available = _available(record.request.image)
        if available is not None:
            free.add_metric([name], available)
    yield from (info, up, connections, reconnects, stalled, free)
    yield from _prefetch_families(devices)


def _prefetch_families(devices: Sequence[Device]) -> Iterator[Metric]:
    """Rate and estimate of prefetch, which workers tell and pages do not hold."""
    rate = GaugeMetricFamily(
        "fvd_prefetch_throughput_bytes_per_second",
        "Moving average of the bytes that prefetch copies.",
        labels=["device"],
    )
    eta = GaugeMetricFamily(
        "fvd_prefetch_eta_seconds",
        "Time until everything is local at this rate; NaN while nobody can tell.",
        labels=["device"],
    )
    for device in devices:
        name, said = kernel_name(device), device.last_status
        speed, left = said.get("prefetch_rate"), said.get("prefetch_eta")
        rate.add_metric([name], float(speed) if isinstance(speed, int | float) else 0.0)
        eta.add_metric([name], float(left) if isinstance(left, int | float) else float("nan"))
    yield from (rate, eta)


def _page_families(read: Sequence[tuple[str, Stats]]) -> Iterator[Metric]:
    """What the engines counted."""
    for source in COUNTERS:
        counter = CounterMetricFamily(source.name, source.help, labels=["device", *source.labels])
        for name, page in read:
            for values, number in _samples(source, page.counters):
                counter.add_metric([name, *values], number)
        yield counter
    for source in GAUGES:
        gauge = GaugeMetricFamily(source.name, source.help, labels=["device", *source.labels])
        for name, page in read:
            for values, number in _samples(source, page.gauges):
                gauge.add_metric([name, *values], number)
        yield gauge
    for source in HISTOGRAMS:
        histogram = HistogramMetricFamily(
            source.name, source.help, labels=["device", *source.labels]
        )
        for name, page in read:
            for entry, values in source.entries.items():
                found = page.histograms.get(entry)
                if found is not None:
                    buckets = classic_buckets(found.buckets)
                    histogram.add_metric([name, *values], buckets, found.sum_ns / 1e9)
        yield histogram
    state = GaugeMetricFamily(
        "fvd_prefetch_state", "1 for the state that prefetch is in.", labels=["device", "state"]
    )
    for name, page in read:
        now = page.gauges.get("prefetch_state", 0)
        for number, word in enumerate(PREFETCH_STATES):
            state.add_metric([name, word], int(number == now))
    yield state


def classic_buckets(buckets: Sequence[int]) -> list[tuple[str, float]]:
    """Cumulative buckets with upper bounds in seconds, from counts by powers of two of ns."""
    made: list[tuple[str, float]] = []
    for last in range(BUCKET_FIRST, BUCKET_LAST + 1):
        made.append((repr(2 ** (last + 1) / 1e9), sum(buckets[: last + 1])))
    made.append(("+Inf", sum(buckets)))
    return made


def _samples(source: Source, page: dict[str, int]) -> Iterator[tuple[tuple[str, ...], int]]:
    for entry, values in source.entries.items():
        number = page.get(entry)
        if number is None:
            continue
        if entry in source.minus:
            number = max(0, number - page.get(source.minus[entry], 0))
        yield values, number


def _page(device: Device) -> Stats | None:
    path = device.directory / STATS_NAME
    try:
        return pages.read_stats(path)
    except (EngineError, OSError) as error:
        if device.state is DeviceState.ATTACHED and path.exists():
            log.warning("no statistics of %s: %s", device.name, error)
        return None


def _available(image: str) -> int | None:
    try:
        store = os.statvfs(image)
    except OSError:
        return None
    return store.f_bavail * store.f_frsize
