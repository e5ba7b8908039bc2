# SPDX-License-Identifier: Apache-2.0
"""Which entry of a device's statistics page becomes which metric.

The page's names are the engine's; the metric names follow the conventions of Prometheus: one unit
and one quantity a name, base units, `_total` on counters, labels that sum up. An entry that a
page does not have (an engine of another version) gives no sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final


@dataclass(frozen=True, slots=True)
class Source:
    """One metric family and the entries that it is made of: entry -> label values."""

    name: str
    help: str
    entries: Mapping[str, tuple[str, ...]]
    labels: tuple[str, ...] = ()
    # Entries that are subtracted: requests that failed are not also requests that succeeded.
    minus: Mapping[str, str] = field(default_factory=dict)


_OPS: Final = ("read", "write", "flush", "discard", "write_zeroes")
_DATA_OPS: Final = ("read", "write", "discard", "write_zeroes")
_REASONS: Final = ("demand", "cow", "prefetch")


def _by(prefix: str, values: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    return {f"{prefix}{value}": (value,) for value in values}


def _one(name: str, help_text: str, entry: str) -> Source:
    return Source(name, help_text, {entry: ()})


def _base_requests() -> Source:
    entries: dict[str, tuple[str, ...]] = {}
    minus = {}
    for reason in _REASONS:
        entries[f"base_requests_{reason}"] = (reason, "ok")
        entries[f"base_errors_{reason}"] = (reason, "error")
        minus[f"base_requests_{reason}"] = f"base_errors_{reason}"
    return Source(
        "fvd_base_requests",
        "Requests to the base, by who needed the data and how they ended.",
        entries,
        ("reason", "outcome"),
        minus,
    )


COUNTERS: Final = (
    Source(
        "fvd_io_requests", "Requests of the device's users.", _by("io_requests_", _OPS), ("op",)
    ),
    Source("fvd_io_bytes", "Bytes of these requests.", _by("io_bytes_", _DATA_OPS), ("op",)),
    Source(
        "fvd_io_errors",
        "Requests answered with an error, by what the system call said.",
        _by("io_errors_", ("eio", "enospc", "einval", "eperm", "other")),
        ("error",),
    ),
    Source(
        "fvd_read_bytes",
        "Bytes read by the device's users, by where they came from.",
        _by("read_bytes_", ("image", "base", "zero")),
        ("source",),
    ),
    _one(
        "fvd_cow_fill_bytes",
        "Bytes read from the base to complete blocks that were written in part.",
        "cow_fill_bytes",
    ),
    _one("fvd_cow_fills", "Blocks completed from the base before a write.", "cow_fills"),
    _one("fvd_cor_bytes", "Bytes stored by copy-on-read.", "cor_bytes"),
    _one("fvd_cor_zero_bytes", "Bytes that copy-on-read found to be zeros.", "cor_zero_bytes"),
    Source(
        "fvd_cor_skipped_bytes",
        "Bytes that copy-on-read did not store, by the reason.",
        _by("cor_skipped_bytes_", ("backlog", "busy", "error")),
        ("reason",),
    ),
    _base_requests(),
    Source(
        "fvd_base_bytes",
        "Bytes read from the base, by who needed them.",
        _by("base_bytes_", _REASONS),
        ("reason",),
    ),
    _one("fvd_prefetch_bytes", "Bytes copied from the base by prefetch.", "prefetch_bytes"),
    _one("fvd_prefetch_zero_bytes", "Bytes of these that were zeros.", "prefetch_zero_bytes"),
    _one("fvd_journal_records", "Records written to the journal.", "journal_records"),
    _one("fvd_journal_bytes", "Bytes written to the journal.", "journal_bytes"),
    _one("fvd_journal_commits", "Groups of records made durable.", "journal_commits"),
    _one("fvd_journal_checkpoints", "Times the journal was emptied.", "journal_checkpoints"),
    _one("fvd_journal_replays", "Times the journal was replayed.", "journal_replays"),
    _one("fvd_image_write_bytes", "Bytes of data written to the image.", "image_write_bytes"),
    _one(
        "fvd_metadata_write_bytes",
        "Bytes of metadata written to the image.",
        "metadata_write_bytes",
    ),
    _one("fvd_image_flushes", "Flushes of the image's store.", "image_flushes"),
    _one("fvd_recv_calls", "System calls that received requests.", "recv_calls"),
    _one("fvd_send_calls", "System calls that sent replies.", "send_calls"),
    _one("fvd_crew_requests", "Requests handed to the crew because they block.", "crew_requests"),
)

GAUGES: Final = (
    _one("fvd_io_inflight", "Requests being worked on.", "io_inflight"),
    _one(
        "fvd_cor_outstanding_bytes", "Bytes that copy-on-read is storing.", "cor_outstanding_bytes"
    ),
    _one("fvd_image_local_bytes", "Bytes that no longer need the base.", "local_bytes"),
    _one("fvd_prefetch_remaining_bytes", "Bytes that only the base has.", "base_bytes_left"),
    _one("fvd_journal_used_bytes", "Bytes of the journal in use.", "journal_used_bytes"),
    _one("fvd_journal_size_bytes", "Size of the journal.", "journal_size_bytes"),
    _one("fvd_journal_epoch", "Epoch of the journal.", "journal_epoch"),
    _one("fvd_pending_blocks", "Blocks whose state is not durable yet.", "pending_blocks"),
    _one("fvd_fault_errno", "The errno that stopped the image, or 0.", "fault_errno"),
    _one("fvd_virtual_size_bytes", "Size of the device.", "virtual_size_bytes"),
    _one("fvd_image_base_bytes", "Size of the base.", "base_size_bytes"),
)

HISTOGRAMS: Final = (
    Source(
        "fvd_io_request_duration_seconds",
        "Time from a request's arrival to its reply.",
        _by("io_duration_", _OPS),
        ("op",),
    ),
    Source(
        "fvd_base_request_duration_seconds",
        "Time of requests to the base.",
        _by("base_duration_", _REASONS),
        ("reason",),
    ),
    _one("fvd_journal_commit_duration_seconds", "Time of journal commits.", "commit_duration"),
    _one(
        "fvd_journal_checkpoint_duration_seconds",
        "Time of journal checkpoints.",
        "checkpoint_duration",
    ),
)

# The gauge prefetch_state counts in this order.
PREFETCH_STATES: Final = ("disabled", "waiting", "running", "paused", "done", "failed")
