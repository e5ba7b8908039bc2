# SPDX-License-Identifier: Apache-2.0
"""What every device is doing now, for `fvdctl top` and the status page."""

from __future__ import annotations

import time

from fvdapi.activity import Activity, ActivityList
from fvdapi.models import PrefetchState
from fvdd.devices.device import Device
from fvdd.devices.registry import Registry
from fvdd.devices.troubles import (
    base_is_down,
    page_of,
    prefetch_waits_for_base,
    troubles,
)
from fvdd.metrics.collect import version
from fvdd.metrics.identity import strip_secrets
from fvdd.metrics.pages import prefetch_eta, prefetch_state, seconds_since
from fvdengine.stats import Stats

# What is shown -> the histograms of the page that it is the sum of.
DURATIONS = {
    "read": ("read_duration_image", "read_duration_base", "read_duration_zero"),
    "write": ("io_duration_write",),
    "flush": ("io_duration_flush",),
    "base": ("base_duration_demand", "base_duration_cow", "base_duration_prefetch"),
    "commit": ("commit_duration",),
}
# Reads that did not find all in the image.
READS_OF_BASE = ("read_duration_base",)


def activities(registry: Registry) -> ActivityList:
    """All devices of this fvdd, by name."""
    now_ns = time.monotonic_ns()
    devices = sorted(registry.devices, key=lambda device: device.name)
    return ActivityList(
        clock=now_ns / 1e9,
        version=version(),
        devices=tuple(activity(device, page_of(device), now_ns) for device in devices),
    )


def activity(device: Device, page: Stats | None, now_ns: int) -> Activity:
    """One device; without a page, what fvdd itself knows."""
    page = page or Stats()
    gauges, opened = page.gauges, device.opened
    waits = prefetch_waits_for_base(page)
    return Activity(
        name=device.name,
        device=device.record.device,
        image=device.record.request.image,
        base=strip_secrets(opened.base) if opened is not None else "",
        state=device.state,
        reason=device.reason,
        connections=device.record.request.connections,
        connections_alive=device.connections_alive,
        size_bytes=gauges.get("virtual_size_bytes", device.record.size_bytes),
        local_bytes=gauges.get("local_bytes", 0),
        remaining_bytes=gauges.get("base_bytes_left", 0),
        prefetch=PrefetchState.WAITING if waits else PrefetchState(prefetch_state(page)),
        prefetch_rate=0 if waits else gauges.get("prefetch_rate", 0),
        prefetch_eta=None if waits else prefetch_eta(page),
        journal_used_bytes=gauges.get("journal_used_bytes", 0),
        journal_size_bytes=gauges.get("journal_size_bytes", 0),
        pending_bytes=max(0, gauges.get("pending_blocks", 0)) * gauges.get("block_bytes", 0),
        in_flight=max(0, gauges.get("io_inflight", 0)),
        oldest_seconds=seconds_since(page, "busy_since", now_ns) or 0.0,
        fault_errno=gauges.get("fault_errno", 0),
        base_up=not base_is_down(page),
        troubles=troubles(device, page),
        restarts=device.counters.restarts,
        stalled_seconds=device.stalled_seconds,
        counters={name: number for name, number in page.counters.items() if number},
        reads_of_base=sum(_buckets(page, READS_OF_BASE)),
        durations={name: _buckets(page, parts) for name, parts in DURATIONS.items()},
    )


def _buckets(page: Stats, parts: tuple[str, ...]) -> list[int]:
    """The sum of these histograms, without the zeros at the end."""
    known = [page.histograms[part].buckets for part in parts if part in page.histograms]
    summed = [sum(counts) for counts in zip(*known, strict=True)]
    while summed and not summed[-1]:
        summed.pop()
    return summed
