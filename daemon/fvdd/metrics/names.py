# SPDX-License-Identifier: Apache-2.0
"""Which entry of a device's statistics page becomes which metric.

The page's names are the engine's; the metric names follow the conventions of Prometheus: one unit
and one quantity a name, base units, `_total` on counters, labels that sum up. An entry that a
page does not have (an engine of another version) gives no sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from fvdengine.stats import HISTOGRAM_BUCKETS

# Bounds of requests: 4 us to 69 s. Of what waits for disks or for the base: 65 us to 137 s.
_NEAR: Final = (12, 36)
_FAR: Final = (16, 37)


@dataclass(frozen=True, slots=True)
class Source:
    """One metric family and the entries that it is made of: entry -> label values.

    Entries with the same label values are added up.
    """

    name: str
    help: str
    entries: Mapping[str, tuple[str, ...]]
    labels: tuple[str, ...] = ()
    # Entries that are subtracted: requests that failed are not also requests that succeeded.
    minus: Mapping[str, str] = field(default_factory=dict)
    # Of a histogram: the first and last power of two of ns that is a bound.
    powers: tuple[int, int] = _NEAR

    def bounds(self) -> tuple[str, ...]:
        """Upper bounds in seconds of the buckets, the last +Inf."""
        first, last = self.powers
        return (*(repr(2**power / 1e9) for power in range(first, last + 1)), "+Inf")

    def fold(self, buckets: Sequence[int]) -> list[int]:
        """Counts for these bounds, out of counts by powers of two (bucket k ends at 2^(k+1))."""
        first, last = self.powers
        return [sum(buckets[:first]), *buckets[first:last], sum(buckets[last:])]


_OPS: Final = ("read", "write", "flush", "discard", "write_zeroes")
_DATA_OPS: Final = ("read", "write", "discard", "write_zeroes")
_REASONS: Final = ("demand", "cow", "prefetch")
_PAUSES: Final = ("manual", "error", "slow_read", "slow_write", "foreground", "budget")
_SOURCES: Final = ("image", "base", "zero")
_ERRORS: Final = ("eio", "enospc", "einval", "eperm", "base", "other")


def _by(prefix: str, values: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    return {f"{prefix}{value}": (value,) for value in values}


def _one(name: str, help_text: str, entry: str, powers: tuple[int, int] = _NEAR) -> Source:
    return Source(name, help_text, {entry: ()}, powers=powers)


def _outcomes(good: str, bad: str) -> dict[str, tuple[str, ...]]:
    return {good: ("ok",), bad: ("error",)}


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
    Source(
        "fvd_io_bytes",
        "Bytes of the requests that succeeded.",
        _by("io_bytes_", _DATA_OPS),
        ("op",),
    ),
    Source(
        "fvd_io_errors",
        "Requests answered with an error, by what went wrong; base: the base could not be read.",
        {f"io_errors_{op}_{error}": (op, error) for op in _OPS for error in _ERRORS},
        ("op", "error"),
    ),
    Source(
        "fvd_read_bytes",
        "Bytes read by the device's users, by where they came from.",
        _by("read_bytes_", _SOURCES),
        ("source",),
    ),
    _one(
        "fvd_cow_fill_bytes",
        "Bytes read from the base to complete blocks that were written in part.",
        "cow_fill_bytes",
    ),
    _one("fvd_cow_fills", "Writes that had to be completed from the base.", "cow_fills"),
    _one("fvd_cor_bytes", "Bytes made local by copy-on-read.", "cor_bytes"),
    _one("fvd_cor_zero_bytes", "Bytes of these that were zeros.", "cor_zero_bytes"),
    _one("fvd_cor_blocks", "Blocks made local by copy-on-read.", "cor_blocks"),
    _one("fvd_cor_zero_blocks", "Blocks of these that were zeros.", "cor_zero_blocks"),
    Source(
        "fvd_cor_skipped_bytes",
        "Bytes that copy-on-read did not store, by the reason.",
        _by("cor_skipped_bytes_", ("backlog", "busy", "nospace", "error")),
        ("reason",),
    ),
    _base_requests(),
    Source(
        "fvd_base_bytes",
        "Bytes read from the base, by who needed them.",
        _by("base_bytes_", _REASONS),
        ("reason",),
    ),
    _one("fvd_prefetch_bytes", "Bytes made local by prefetch.", "prefetch_bytes"),
    _one("fvd_prefetch_zero_bytes", "Bytes of these that were zeros.", "prefetch_zero_bytes"),
    Source(
        "fvd_prefetch_pauses",
        "Pauses of prefetch, by the reason; error: the base could not be read.",
        _by("prefetch_pauses_", _PAUSES),
        ("reason",),
    ),
    _one("fvd_journal_records", "Records written to the journal.", "journal_records"),
    _one("fvd_journal_bytes", "Bytes written to the journal.", "journal_bytes"),
    _one("fvd_journal_commits", "Groups of changes made durable.", "journal_commits"),
    _one("fvd_journal_checkpoints", "Times the journal was emptied.", "journal_checkpoints"),
    _one("fvd_journal_replays", "Times the journal was replayed.", "journal_replays"),
    _one(
        "fvd_live_takeovers",
        "Times a process went on with the live state that a dead one left.",
        "takeovers",
    ),
    _one(
        "fvd_image_unclean_opens",
        "Opens of an image that was not closed clean, without its live state.",
        "unclean_opens",
    ),
    _one("fvd_image_write_bytes", "Bytes written to the image file.", "image_write_bytes"),
    _one("fvd_metadata_write_bytes", "Bytes of these that were metadata.", "metadata_write_bytes"),
    _one("fvd_image_flushes", "Flushes of the image file.", "image_flushes"),
    _one("fvd_recv_calls", "System calls that received requests.", "recv_calls"),
    _one("fvd_send_calls", "System calls that sent replies.", "send_calls"),
    _one("fvd_crew_requests", "Requests handed to the crew because they block.", "crew_requests"),
    _one("fvd_io_parkings", "Requests that began to wait for space.", "parkings"),
    Source(
        "fvd_store_growths",
        "Runs of the grow program that makes the image's block device longer, by outcome.",
        _outcomes("growths", "growth_errors"),
        ("outcome",),
    ),
    _one("fvd_store_growth_bytes", "Bytes that the store was longer after them.", "growth_bytes"),
    Source(
        "fvd_device_resizes",
        "Times that the device was to grow while it is in use, by outcome.",
        _outcomes("resizes", "resize_errors"),
        ("outcome",),
    ),
    _one("fvd_device_resize_bytes", "Bytes that it became larger.", "resize_bytes"),
)

GAUGES: Final = (
    _one("fvd_io_inflight", "Requests that were handed over and not answered.", "io_inflight"),
    _one("fvd_io_parked", "Requests of these that wait for space.", "io_parked"),
    _one(
        "fvd_cor_outstanding_bytes", "Bytes that copy-on-read is storing.", "cor_outstanding_bytes"
    ),
    _one("fvd_image_local_bytes", "Bytes that no longer need the base.", "local_bytes"),
    _one("fvd_prefetch_remaining_bytes", "Bytes that only the base has.", "base_bytes_left"),
    _one(
        "fvd_prefetch_throughput_bytes_per_second",
        "Moving average of what prefetch makes local.",
        "prefetch_rate",
    ),
    Source(
        "fvd_prefetch_measured_bytes_per_second",
        "Moving average of a stage of prefetch, which its minimum is compared with; 0: none yet.",
        {f"prefetch_{stage}_rate": (stage,) for stage in ("read", "write")},
        ("stage",),
    ),
    _one(
        "fvd_prefetch_window_bytes",
        "Bytes that prefetch may have in flight from the base.",
        "prefetch_window",
    ),
    _one("fvd_journal_used_bytes", "Bytes of the journal in use.", "journal_used_bytes"),
    _one("fvd_journal_size_bytes", "Size of the journal.", "journal_size_bytes"),
    _one("fvd_journal_epoch", "Epoch of the journal.", "journal_epoch"),
    _one(
        "fvd_journal_pending_records",
        "Records that the next commit has to write, at most: blocks whose state is not durable.",
        "pending_blocks",
    ),
    _one("fvd_fault_errno", "The errno that stopped the image, or 0.", "fault_errno"),
    _one("fvd_virtual_size_bytes", "Size of the device.", "virtual_size_bytes"),
    _one("fvd_image_base_bytes", "Size of the base.", "base_size_bytes"),
)

HISTOGRAMS: Final = (
    Source(
        "fvd_io_request_duration_seconds",
        "Time from a request's arrival to its reply.",
        {f"read_duration_{source}": ("read",) for source in _SOURCES}
        | _by("io_duration_", _OPS[1:]),
        ("op",),
    ),
    Source(
        "fvd_read_duration_seconds",
        "Time of reads, by where their data came from; base: at least in part.",
        _by("read_duration_", _SOURCES),
        ("source",),
    ),
    Source(
        "fvd_base_request_duration_seconds",
        "Time of requests to the base that succeeded.",
        _by("base_duration_", _REASONS),
        ("reason",),
        powers=_FAR,
    ),
    _one("fvd_journal_commit_duration_seconds", "Time of commits.", "commit_duration", _FAR),
    _one(
        "fvd_journal_checkpoint_duration_seconds",
        "Time of checkpoints.",
        "checkpoint_duration",
        _FAR,
    ),
)

# Entries that are not shown one by one: metrics are computed from them in fvdd.metrics.pages.
COMPUTED: Final = (
    "prefetch_state", "prefetch_paused_ns", "prefetch_paused_since", "prefetch_done",
    "block_bytes", "busy_since", "base_ok", "base_error", "connections", "store_used_bytes",
    "io_error",
)  # fmt: skip

# The gauge prefetch_state counts in this order.
PREFETCH_STATES: Final = ("disabled", "waiting", "running", "paused", "done", "failed")

assert all(source.powers[1] < HISTOGRAM_BUCKETS for source in HISTOGRAMS)
