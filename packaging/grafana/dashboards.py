#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The dashboards of fvd. Run this file to write fvd-fleet.json and fvd-device.json beside it."""

from __future__ import annotations

import json
from pathlib import Path

from panels import Dashboard, Link, Panel, Query, Row, Variable

THIS = '{instance="$instance",device="$device"}'
THIS_HOST = '{instance="$instance"}'
WINDOW = "[$__rate_interval]"
# Every host has an nbd0, so one device is one of one host.
INSTANCE = Variable("instance", "label_values(fvd_device_info, instance)")
INSTANCES = Variable("instance", "label_values(fvd_build_info, instance)", many=True)
DEVICE = Variable("device", f"label_values(fvd_device_info{THIS_HOST}, device)")
ITS_PAGE = ("/d/fvd-device?var-datasource=${datasource}&var-instance=${__data.fields.Host}"
            "&var-device=${__data.fields.Device}&${__url_time_range}")
FAILED = 'error!~"einval|eperm"'


def having(labels: str) -> str:
    """The selector of the chosen devices, with more labels."""
    return f'{{instance="$instance",device="$device",{labels}}}'


def rate(name: str, by: str = "device", labels: str = "") -> str:
    selector = having(labels) if labels else THIS
    return f"sum by ({by}) (rate({name}{selector}{WINDOW}))"


def quantile(q: float, name: str, by: str, labels: str = "") -> str:
    return f"histogram_quantile({q}, {rate(name + '_bucket', f'{by}, le', labels)})"


def heat(name: str, labels: str = "") -> str:
    selector = having(labels) if labels else THIS
    return f"sum by (le) (increase({name}_bucket{selector}{WINDOW}))"


def stat(title: str, unit: str, text: str, expr: str, steps=(), low: str = "green") -> Panel:
    return Panel(title, "stat", unit, text, [Query(expr)], width=3, height=4, steps=steps, low=low)


def lines(title: str, unit: str, text: str, *queries: Query, **options) -> Panel:
    return Panel(title, "timeseries", unit, text, queries, **options)


NOW = Row("Now", [
    stat("Up", "bool_yes_no", "All connections served. No: FvdDeviceDown.",
         f"min(fvd_device_up{THIS})", steps=[(1, "green")], low="red"),
    stat("Local", "percentunit", "What no longer needs the base.",
         f"sum(fvd_image_local_bytes{THIS}) / sum(fvd_virtual_size_bytes{THIS})"),
    stat("All local in", "s", "At the rate of the last ten minutes; no value while nothing moves.",
         f"max(fvd_prefetch_remaining_bytes{THIS}"
         f" / (rate(fvd_prefetch_bytes_total{THIS}[10m]) > 0))"),
    stat("Read", "Bps", "By users of the device.", rate("fvd_io_bytes_total", "job", 'op="read"')),
    stat("Written", "Bps", "By users of the device.",
         rate("fvd_io_bytes_total", "job", 'op="write"')),
    stat("Read p99", "s", "Slow: see where reads come from.",
         quantile(0.99, "fvd_io_request_duration_seconds", "job", 'op="read"'),
         steps=[(0.1, "yellow"), (0.5, "red")]),
    stat("Oldest request", "s", "Above 30 s: FvdHungIO.",
         f"max(fvd_io_oldest_inflight_seconds{THIS})", steps=[(5, "yellow"), (30, "red")]),
    stat("Reconnects, 24 h", "short", "Workers replaced. Many: FvdReconnectFlapping.",
         f"sum(increase(fvd_device_reconnects_total{THIS}[24h]))", steps=[(1, "yellow")]),
])  # fmt: skip

TROUBLE = Row("Trouble", [
    stat("Errors, 1 h", "short", "Requests that failed, but for wrong ones. FvdIOErrors.",
         f"sum(increase(fvd_io_errors_total{having(FAILED)}[1h]))", steps=[(0.5, "red")]),
    stat("Image fault", "none", "The errno that stopped the image, 0 for none. FvdImageFault.",
         f"max(fvd_fault_errno{THIS})", steps=[(1, "red")]),
    stat("Write-back errors, 24 h", "short", "The kernel lost data. FvdWritebackLost.",
         f"sum(increase(fvd_writeback_errors_total{THIS}[24h]))", steps=[(0.5, "red")]),
    stat("Opened unclean", "short", "Not closed clean before: a crash. FvdUncleanOpen.",
         f"sum(fvd_image_unclean_opens_total{THIS})", steps=[(1, "yellow")]),
    stat("Writes that wait", "short", "For space. FvdStoreFull.",
         f"sum(fvd_io_parked{THIS})", steps=[(1, "red")]),
    stat("Base answers", "bool_yes_no", "No: FvdBaseUnreachable, if it is still needed.",
         f"min(fvd_base_up{THIS})", steps=[(1, "green")], low="yellow"),
    stat("Prefetch failed", "bool_yes_no", "Yes: the image takes no more. FvdPrefetchFailed.",
         f"max(fvd_prefetch_state{having('state=' + chr(34) + 'failed' + chr(34))})",
         steps=[(1, "yellow")]),
    stat("Free on the store", "bytes", "None: not known here. FvdStoreAlmostFull.",
         f"min(fvd_backing_store_avail_bytes{THIS})", steps=[(1e9, "green")], low="red"),
])  # fmt: skip

CLIENT = Row("What its users do", [
    lines("Requests", "reqps", "By operation.",
          Query(rate("fvd_io_requests_total", "op"), "{{op}}")),
    lines("Bytes", "Bps", "Of requests that succeeded.",
          Query(rate("fvd_io_bytes_total", "op"), "{{op}}")),
    lines("Latency", "s", "Median and 99 of 100, by operation.",
          Query(quantile(0.5, "fvd_io_request_duration_seconds", "op"), "{{op}} p50"),
          Query(quantile(0.99, "fvd_io_request_duration_seconds", "op"), "{{op}} p99")),
    Panel("Reads", "heatmap", "s", "How long reads took: two bands are two sources.",
          [Query(heat("fvd_io_request_duration_seconds", 'op="read"'), "{{le}}")]),
    Panel("Writes and flushes", "heatmap", "s", "How long they took.",
          [Query(heat("fvd_io_request_duration_seconds", 'op=~"write|flush"'), "{{le}}")]),
    lines("In flight", "short", "Requests that block and have no answer yet.",
          Query(f"sum by (device) (fvd_io_inflight{THIS})", "{{device}}"), width=4),
    lines("Oldest in flight", "s", "How long it has been worked on. Above 30 s: FvdHungIO.",
          Query(f"max by (device) (fvd_io_oldest_inflight_seconds{THIS})", "{{device}}"),
          width=4),
    lines("Errors", "short", "What users were told, per second. Any: FvdIOErrors.",
          Query(rate("fvd_io_errors_total", "op, error"), "{{op}} {{error}}")),
    lines("Requests a system call", "short", "How well requests are batched: 1 is not at all.",
          Query(f"{rate('fvd_io_requests_total')} / {rate('fvd_recv_calls_total')}", "{{device}}")),
    lines("Blocking requests", "reqps", "Those that went to the crew's threads.",
          Query(rate("fvd_crew_requests_total"), "{{device}}")),
])  # fmt: skip

SOURCES = Row("Where reads come from", [
    lines("Bytes by source", "Bps", "Image is local, base was fetched just now.",
          Query(rate("fvd_read_bytes_total", "source"), "{{source}}"), stack=True),
    lines("Hit ratio", "percentunit", "Share of the reads that did not need the base.",
          Query("1 - " + rate("fvd_read_duration_seconds_count", "device", 'source="base"')
                + " / " + rate("fvd_read_duration_seconds_count"), "{{device}}"), max=1),
    lines("Latency by source", "s", "99 of 100 reads. Base high: FvdBaseSlow. Image: its store.",
          Query(quantile(0.99, "fvd_read_duration_seconds", "source"), "{{source}} p99"),
          Query(quantile(0.5, "fvd_read_duration_seconds", "source"), "{{source}} p50")),
    lines("Copy-on-read", "Bps", "Made local by reading, and what was not stored, by the reason.",
          Query(rate("fvd_cor_bytes_total", "job"), "stored"),
          Query(rate("fvd_cor_zero_bytes_total", "job"), "of this, zeros"),
          Query(rate("fvd_cor_skipped_bytes_total", "reason"), "skipped: {{reason}}")),
    lines("Copy-on-read under way", "bytes", "Being stored now; full: it skips (backlog).",
          Query(f"sum by (device) (fvd_cor_outstanding_bytes{THIS})", "{{device}}")),
    lines("Copy-on-write fills", "Bps", "Read from the base to complete writes of part of a block.",
          Query(rate("fvd_cow_fill_bytes_total"), "{{device}}")),
])  # fmt: skip

BASE = Row("The base", [
    lines("Bytes", "Bps", "By who needs them. Prefetch beside a slow demand: pause it.",
          Query(rate("fvd_base_bytes_total", "reason"), "{{reason}}"), stack=True),
    lines("Latency", "s", "Of requests to the base, by who needs the data.",
          Query(quantile(0.5, "fvd_base_request_duration_seconds", "reason"), "{{reason}} p50"),
          Query(quantile(0.99, "fvd_base_request_duration_seconds", "reason"), "{{reason}} p99")),
    lines("Requests and errors", "reqps", "Errors: FvdBaseUnreachable when they are the last word.",
          Query(rate("fvd_base_requests_total", "reason, outcome"), "{{reason}} {{outcome}}")),
    Panel("Answers", "state-timeline", "bool_yes_no", "Whether the last answer was a good one.",
          [Query(f"fvd_base_up{THIS}", "{{device}}")], width=12, height=5),
    lines("Since the last good answer", "s", "Grows while nothing is asked of the base, too.",
          Query(f"time() - fvd_base_last_success_timestamp_seconds{THIS}", "{{device}}"),
          width=12, height=5),
])  # fmt: skip

PREFETCH = Row("Prefetch", [
    Panel("State", "state-timeline", "short", "Paused by users or done; failed: the image is full.",
          [Query(f"fvd_prefetch_state{THIS} == 1", "{{device}} {{state}}")]),
    lines("Throughput", "Bps", "Moving average of the engine, and what was made local.",
          Query(f"sum by (device) (fvd_prefetch_throughput_bytes_per_second{THIS})",
                "{{device}} average"),
          Query(rate("fvd_prefetch_bytes_total"), "{{device}}"),
          Query(rate("fvd_prefetch_zero_bytes_total"), "{{device}} zeros")),
    lines("Remaining", "bytes", "What only the base has, and where that leads in half an hour.",
          Query(f"sum by (device) (fvd_prefetch_remaining_bytes{THIS})", "{{device}}"),
          Query(f"clamp_min(predict_linear(fvd_prefetch_remaining_bytes{THIS}[15m], 1800), 0)",
                "{{device}} in 30 min")),
    lines("Estimate", "s", "Time until all is local, as the device sees it.",
          Query(f"fvd_prefetch_eta_seconds{THIS}", "{{device}}")),
    lines("Pauses", "short", "By reason, in an hour.",
          Query(f"sum by (device, reason) (increase(fvd_prefetch_pauses_total{THIS}[1h]))",
                "{{device}} {{reason}}")),
    lines("Share of time paused", "percentunit", "1: all the time.",
          Query(rate("fvd_prefetch_paused_seconds_total"), "{{device}}"), max=1),
])  # fmt: skip

CAPACITY = Row("Room", [
    lines("Image", "bytes", "Size of the device, what is local, what the file takes.",
          Query(f"fvd_virtual_size_bytes{THIS}", "{{device}} size"),
          Query(f"fvd_image_local_bytes{THIS}", "{{device}} local"),
          Query(f"fvd_image_allocated_bytes{THIS}", "{{device}} allocated")),
    lines("Store free", "bytes", "Of the store that the data are in, its size, and in six hours.",
          Query(f"fvd_backing_store_avail_bytes{THIS}", "{{device}}"),
          Query(f"fvd_backing_store_size_bytes{THIS}", "{{device}} size"),
          Query(f"predict_linear(fvd_backing_store_avail_bytes{THIS}[1h], 6 * 3600)",
                "{{device}} in 6 h")),
    lines("Written to the image", "Bps", "Data and metadata; users' own bytes for comparison.",
          Query(rate("fvd_image_write_bytes_total", "job"), "all"),
          Query(rate("fvd_metadata_write_bytes_total", "job"), "metadata"),
          Query(rate("fvd_io_bytes_total", "job", 'op="write"'), "by users")),
    lines("Waiting for space", "short", "Writes that found none. Any, for a minute: FvdStoreFull.",
          Query(f"sum by (device) (fvd_io_parked{THIS})", "{{device}} now"),
          Query(f"sum by (device) (increase(fvd_io_parkings_total{THIS}[1h]))",
                "{{device}} in an hour")),
    lines("Growths", "short", "Of storage by the grow program and of the device, in an hour.",
          Query(f"sum by (device, outcome) (increase(fvd_store_growths_total{THIS}[1h]))",
                "{{device}} storage: {{outcome}}"),
          Query(f"sum by (device, outcome) (increase(fvd_device_resizes_total{THIS}[1h]))",
                "{{device}} device: {{outcome}}")),
    lines("Growth in bytes", "bytes", "Of storage and of the device, in an hour.",
          Query(f"sum by (device) (increase(fvd_store_growth_bytes_total{THIS}[1h]))",
                "{{device}} storage"),
          Query(f"sum by (device) (increase(fvd_device_resize_bytes_total{THIS}[1h]))",
                "{{device}} device")),
])  # fmt: skip

JOURNAL = Row("Journal", [
    lines("Fill", "percentunit", "Emptied when it is half full. Stays full: FvdJournalFull.",
          Query(f"fvd_journal_used_bytes{THIS} / fvd_journal_size_bytes{THIS}", "{{device}}"),
          max=1),
    lines("Records and commits", "ops", "A commit makes a group of records durable.",
          Query(rate("fvd_journal_records_total", "job"), "records"),
          Query(rate("fvd_journal_commits_total", "job"), "commits"),
          Query(rate("fvd_image_flushes_total", "job"), "flushes of the store")),
    lines("Commit", "s", "What a flush of a user waits for. Above 1 s: FvdCommitSlow.",
          Query(quantile(0.5, "fvd_journal_commit_duration_seconds", "device"), "{{device}} p50"),
          Query(quantile(0.99, "fvd_journal_commit_duration_seconds", "device"), "{{device}} p99")),
    lines("Checkpoint", "s", "Duration, when there was one.",
          Query(quantile(0.99, "fvd_journal_checkpoint_duration_seconds", "device"),
                "{{device}} p99")),
    lines("Checkpoints and replays", "short", "In an hour.",
          Query(f"sum by (device) (increase(fvd_journal_checkpoints_total{THIS}[1h]))",
                "{{device}} checkpoints"),
          Query(f"sum by (device) (increase(fvd_journal_replays_total{THIS}[1h]))",
                "{{device}} replays")),
    lines("Not durable yet", "bytes", "Blocks that the next commit records.",
          Query(f"fvd_journal_pending_bytes{THIS}", "{{device}}"), width=4),
    lines("Written to the journal", "Bps", "Whole sectors of it.",
          Query(rate("fvd_journal_bytes_total"), "{{device}}"), width=4),
])  # fmt: skip

LIFE = Row("Life", [
    lines("Reconnects", "short", "Fresh connections, in an hour, by what made them necessary.",
          Query(f"sum by (device, reason) (increase(fvd_device_reconnects_total{THIS}[1h]))",
                "{{device}} {{reason}}"),
          Query(f"sum by (device) (increase(fvd_live_takeovers_total{THIS}[1h]))",
                "{{device}} takeovers")),
    lines("Stalled", "s", "Seconds without a worker, in an hour.",
          Query(f"sum by (device) (increase(fvd_device_stalled_seconds_total{THIS}[1h]))",
                "{{device}}")),
    lines("Connections", "short", "That are served.",
          Query(f"fvd_device_connections{THIS}", "{{device}}")),
    lines("Kernel's view: busy", "percentunit",
          "How busy node_exporter sees the device; both jobs must call the host by one name.",
          Query(f"rate(node_disk_io_time_seconds_total{THIS}{WINDOW})", "{{device}}"), max=1),
    Panel("What it is", "table", "", "Names of the device, for example of its base.",
          [Query(f"fvd_device_info{THIS}")], width=24, height=4, columns={
              "device": ("Device", ""), "name": ("Name", ""), "image": ("Image", ""),
              "base": ("Base", ""), "base_format": ("Format", "")}),
])  # fmt: skip

ITS_FVDD = '{job="fvd",instance="$instance"}'


def mean_of(name: str) -> str:
    """Mean duration in the last hour, of a host."""
    total, count = (f"rate({name}_{word}{THIS_HOST}[1h])" for word in ("sum", "count"))
    return f"sum by (instance) ({total}) / sum by (instance) ({count})"


DAEMON = Row("The daemon", [
    lines("Processor", "percentunit", "Of fvdd alone, not of devices; not by way of a textfile.",
          Query(f"rate(process_cpu_seconds_total{ITS_FVDD}{WINDOW})", "{{instance}}")),
    lines("Memory", "bytes", "Resident, of fvdd itself; not by way of a textfile.",
          Query(f"process_resident_memory_bytes{ITS_FVDD}", "{{instance}}")),
    lines("Lag", "s", "How late fvdd comes back to its timers. Above 0.25: FvdEventLoopLag.",
          Query(f"fvd_event_loop_lag_seconds{THIS_HOST}", "{{instance}}"), width=4),
    lines("Open files", "short", "Of fvdd itself; not by way of a textfile.",
          Query(f"process_open_fds{ITS_FVDD}", "{{instance}}"), width=4),
    lines("Attach and detach", "s", "Mean time of those that succeeded.",
          Query(mean_of("fvd_device_attach_duration_seconds"), "{{instance}} attach"),
          Query(mean_of("fvd_device_detach_duration_seconds"), "{{instance}} detach")),
    lines("Garbage collections", "ops", "Of fvdd's Python; not by way of a textfile.",
          Query(f"sum by (instance) (rate(python_gc_collections_total{ITS_FVDD}{WINDOW}))",
                "{{instance}}")),
    Panel("Versions", "table", "", "Of fvd, Python and the kernel of the host.",
          [Query(f"fvd_build_info{THIS_HOST}")], columns={
              "instance": ("Host", ""), "version": ("fvd", ""), "python": ("Python", ""),
              "kernel": ("Kernel", "")}),
])  # fmt: skip

HOST = '{instance=~"$instance"}'
P99 = ('histogram_quantile(0.99, sum by (instance, device, le) '
       '(rate(fvd_io_request_duration_seconds_bucket{op="read",instance=~"$instance"}[5m])))')
FLEET = [
    Row("All hosts", [
        stat("Devices", "short", "Attached.", f'sum(fvd_devices{{state="attached",{HOST[1:]})'),
        stat("Not up", "short", "FvdDeviceDown after a minute.",
             f"count(fvd_device_up{HOST} == 0) or vector(0)", steps=[(1, "red")]),
        stat("Given up or orphaned", "short", "FvdDeviceFailed, FvdDeviceOrphaned.",
             f'sum(fvd_devices{{state=~"failed|orphaned",{HOST[1:]})', steps=[(1, "red")]),
        stat("Images with a fault", "short", "FvdImageFault.",
             f"count(fvd_fault_errno{HOST} != 0) or vector(0)", steps=[(1, "red")]),
        stat("Base does not answer", "short", "FvdBaseUnreachable.",
             f"count(fvd_base_up{HOST} == 0) or vector(0)", steps=[(1, "yellow")]),
        stat("Local", "percentunit", "Of all bytes of all devices.",
             f"sum(fvd_image_local_bytes{HOST}) / sum(fvd_virtual_size_bytes{HOST})"),
        stat("Read", "Bps", "By users of all devices.",
             f'sum(rate(fvd_io_bytes_total{{op="read",{HOST[1:]}[$__rate_interval]))'),
        stat("Written", "Bps", "By users of all devices.",
             f'sum(rate(fvd_io_bytes_total{{op="write",{HOST[1:]}[$__rate_interval]))'),
    ]),
    Row("Devices", [
        Panel("Every device", "table", "", "Click on a device for its own page; sort by a column.",
              [Query(f"fvd_device_info{HOST}"),
               Query(f"fvd_image_local_bytes{HOST} / (fvd_virtual_size_bytes{HOST} > 0)"),
               Query(f"fvd_prefetch_eta_seconds{HOST}"),
               Query(P99),
               Query("sum by (instance, device) (increase(fvd_io_errors_total"
                     f'{{instance=~"$instance",{FAILED}}}[1h]))'),
               Query(f"fvd_backing_store_avail_bytes{HOST}")],
              width=24, height=10, leads={"Device": ITS_PAGE, "Name": ITS_PAGE}, columns={
                  "instance": ("Host", ""), "device": ("Device", ""), "name": ("Name", ""),
                  "image": ("Image", ""), "base": ("Base", ""),
                  "Value #B": ("Local", "percentunit"), "Value #C": ("All local in", "s"),
                  "Value #D": ("Read p99", "s"), "Value #E": ("Errors, 1 h", "short"),
                  "Value #F": ("Store free", "bytes")}),
    ]),
    Row("Compared", [
        lines("Slowest readers", "s", "The ten devices with the slowest reads, 99 of 100.",
              Query(f"topk(10, {P99})", "{{instance}} {{device}}")),
        lines("Hungriest for their base", "Bps", "The ten devices that read most of their base.",
              Query(f"topk(10, sum by (instance, device) (rate(fvd_base_bytes_total{HOST}"
                    "[$__rate_interval])))", "{{instance}} {{device}}")),
        lines("Devices by state", "short", "Of all hosts.",
              Query(f"sum by (state) (fvd_devices{HOST})", "{{state}}"), stack=True),
        lines("Prefetch by state", "short", "Devices.",
              Query(f"sum by (state) (fvd_prefetch_state{HOST})", "{{state}}"), stack=True),
        lines("Store free", "bytes", "The ten stores with the least room.",
              Query(f"bottomk(10, fvd_backing_store_avail_bytes{HOST})",
                    "{{instance}} {{device}}")),
        lines("State changes", "ops", "Attaches, deaths, detaches, per second.",
              Query(f"sum by (state) (rate(fvd_device_transitions_total{HOST}[$__rate_interval]))",
                    "to {{state}}")),
    ]),
]  # fmt: skip

DASHBOARDS = (
    Dashboard("fvd-fleet", "fvd: all devices", FLEET, [INSTANCES],
              links=[Link("One device", "/d/fvd-device", carries=False)]),
    Dashboard("fvd-device", "fvd: one device",
              [NOW, TROUBLE, CLIENT, SOURCES, BASE, PREFETCH, CAPACITY, JOURNAL, LIFE, DAEMON],
              [INSTANCE, DEVICE], links=[Link("All devices", "/d/fvd-fleet", carries=True)]),
)  # fmt: skip


def written(dashboard: Dashboard) -> str:
    """The content of the dashboard's file."""
    return json.dumps(dashboard.as_json(), indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    for one in DASHBOARDS:
        (Path(__file__).parent / f"{one.uid}.json").write_text(written(one))
