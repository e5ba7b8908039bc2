# SPDX-License-Identifier: Apache-2.0
"""A device as the control API shows it: what the worker said, what fvdd knows, in one answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from fvdapi.models import (
    DeviceState,
    DeviceStatus,
    JournalStatus,
    PrefetchState,
    PrefetchStatus,
)
from fvdd.devices.record import DeviceRecord
from fvdd.devices.troubles import page_of, prefetch_waits_for_base, troubles
from fvdengine.stats import Stats

if TYPE_CHECKING:
    from fvdd.devices.device import Device


def render_status(device: Device) -> DeviceStatus:
    """The status of a device of this fvdd, with the worker's last answer."""
    record, said, opened = device.record, device.last_status, device.opened
    page = page_of(device)
    return DeviceStatus(
        name=record.name,
        device=record.device,
        image=record.request.image,
        image_id=record.image_id,
        state=device.state,
        reason=device.reason,
        read_only=record.request.read_only,
        transport=record.request.transport,
        connections=record.request.connections,
        connections_alive=device.connections_alive,
        worker_pid=device.worker_pid,
        worker_version=_text(said, "version"),
        size_bytes=record.size_bytes,
        block_size=opened.block_size if opened is not None else 0,
        sector_size=record.request.sector_size,
        cache=_text(said, "cache") or "writeback",
        local_bytes=_number(said, "local_bytes"),
        base_bytes_left=_number(said, "base_bytes_left"),
        in_flight=_number(said, "in_flight"),
        pending_blocks=_number(said, "pending_blocks"),
        parked=_number(said, "parked"),
        growing_bytes=_number(said, "growing_bytes"),
        fault_errno=_number(said, "fault_errno"),
        prefetch=prefetch_status(said, page),
        journal=JournalStatus(
            used_bytes=_number(said, "journal_used_bytes"),
            size_bytes=_number(said, "journal_size_bytes"),
            epoch=_number(said, "epoch"),
        ),
        restarts=device.counters.restarts,
        reconnects=device.counters.reconnects,
        upgrades=device.counters.upgrades,
        writeback_errors=device.counters.writeback_errors,
        last_pause_seconds=device.counters.last_pause_seconds,
        timeouts=record.timeouts,
        image_uuid=record.image_uuid,
        attachment=record.attachment,
        attached_at=record.attached_at,
        warnings=opened.warnings if opened is not None else (),
        troubles=troubles(device, page),
    )


def render_orphan(name: str, record: DeviceRecord, reason: str, image: str) -> DeviceStatus:
    """The status of a device that an earlier fvdd left; `image` is empty where nobody knows it."""
    return DeviceStatus(
        name=name,
        device=record.device,
        image=image,
        state=DeviceState.ORPHANED,
        reason=reason,
        read_only=record.request.read_only,
        transport=record.request.transport,
        connections=record.request.connections,
        worker_pid=record.worker_pid,
        size_bytes=record.size_bytes,
        sector_size=record.request.sector_size,
        timeouts=record.timeouts,
        image_uuid=record.image_uuid,
        attachment=record.attachment,
        attached_at=record.attached_at,
    )


def prefetch_status(said: Mapping[str, object], page: Stats | None) -> PrefetchStatus:
    """Prefetch as the worker tells it; one that waits for the base has no rate and no end."""
    state, reason = _text(said, "prefetch_state"), None
    eta, rate = said.get("prefetch_eta"), _number(said, "prefetch_rate")
    if state == PrefetchState.RUNNING and page is not None and prefetch_waits_for_base(page):
        state, reason, eta, rate = PrefetchState.WAITING, "base", None, 0
    return PrefetchStatus(
        state=PrefetchState(state) if state in set(PrefetchState) else PrefetchState.DISABLED,
        bytes_fetched=_number(said, "prefetch_bytes"),
        rate_bytes_per_second=rate,
        eta_seconds=float(eta) if isinstance(eta, int | float) else None,
        paused_reason=reason or _paused_reason(said, state),
        policy=_text(said, "prefetch_policy"),
        window_bytes=_number(said, "prefetch_window"),
    )


def _paused_reason(said: Mapping[str, object], state: str | None) -> str | None:
    """Why it is paused; an older worker does not say, and pauses when it is told to."""
    if state != PrefetchState.PAUSED:
        return None
    return _text(said, "prefetch_reason") or "manual"


def _number(said: Mapping[str, object], key: str) -> int:
    value = said.get(key)
    return int(value) if isinstance(value, int | float) else 0


def _text(said: Mapping[str, object], key: str) -> str | None:
    value = said.get(key)
    return value if isinstance(value, str) else None
