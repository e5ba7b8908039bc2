# SPDX-License-Identifier: Apache-2.0
"""Every alert fires on a constructed series, and none does on a healthy one (promtool)."""

import json
import re
import subprocess

import pytest

from fvdtest import tree
from fvdtest.prometheus import HOST_ALONE

FOLDER = tree.ROOT / "packaging/prometheus"
RULES = FOLDER / "fvd.rules.yml"
ALERTS = re.findall(r"^ +- alert: (\w+)$", RULES.read_text(), re.M)
MINUTES = 120
DEVICE = 'instance="h:9809",job="fvd",device="nbd0"'
PROMTOOL_SECONDS = 60


def steady(value):
    return f"{value}x{MINUTES}"


def growing(step, start=0):
    return f"{start}{step:+}x{MINUTES}"


def histogram(name, labels, bucket):
    """All of ten requests a minute end in the bucket with this bound."""
    return {
        f'{name}_bucket{{{DEVICE},{labels}le="{bound}"}}': (
            growing(10) if float(bound) >= bucket else steady(0)
        )
        for bound in ("0.001", "0.1", "1.0", "4.0", "+Inf")
    }


def healthy():
    """A device that reads, writes and fetches, with a base that answers in milliseconds."""
    device = f"{{{DEVICE}}}"
    return {
        'up{job="fvd",instance="h:9809"}': steady(1),
        f"fvd_device_up{device}": steady(1),
        f'fvd_device_info{{{DEVICE},cookie="fvd:web:1"}}': steady(1),
        'fvd_devices{instance="h:9809",job="fvd",state="attached"}': steady(1),
        'fvd_devices{instance="h:9809",job="fvd",state="failed"}': steady(0),
        'fvd_devices{instance="h:9809",job="fvd",state="orphaned"}': steady(0),
        f"fvd_fault_errno{device}": steady(0),
        f"fvd_io_parked{device}": steady(0),
        f'fvd_store_growths_total{{{DEVICE},outcome="ok"}}': growing(1),
        f'fvd_store_growths_total{{{DEVICE},outcome="error"}}': steady(0),
        f"fvd_io_oldest_inflight_seconds{device}": steady(0.1),
        f'fvd_io_errors_total{{{DEVICE},op="read",error="eio"}}': steady(0),
        f'fvd_io_errors_total{{{DEVICE},op="read",error="einval"}}': growing(1),
        f'fvd_cor_skipped_bytes_total{{{DEVICE},reason="nospace"}}': steady(0),
        f'fvd_cor_skipped_bytes_total{{{DEVICE},reason="backlog"}}': growing(65536),
        f"fvd_base_up{device}": steady(1),
        f"fvd_prefetch_remaining_bytes{device}": growing(-1000000, 1000000000),
        f"fvd_prefetch_bytes_total{device}": growing(1000000),
        f'fvd_prefetch_state{{{DEVICE},state="running"}}': steady(1),
        f'fvd_prefetch_state{{{DEVICE},state="paused"}}': steady(0),
        f'fvd_prefetch_state{{{DEVICE},state="failed"}}': steady(0),
        f'fvd_device_reconnects_total{{{DEVICE},reason="crash"}}': steady(1),
        f"fvd_backing_store_avail_bytes{device}": growing(-1000000, 500000000000),
        f"fvd_virtual_size_bytes{device}": steady(10000000000),
        f"fvd_image_allocated_bytes{device}": growing(1000000, 1000000),
        f"fvd_image_local_bytes{device}": growing(1000000, 1000000),
        f"fvd_journal_used_bytes{device}": steady(4096),
        f"fvd_journal_size_bytes{device}": steady(1048576),
        f"fvd_image_unclean_opens_total{device}": steady(0),
        'fvd_event_loop_lag_seconds{instance="h:9809",job="fvd"}': steady(0.001),
        'node_filesystem_readonly{instance="h:9100",device="/dev/nbd0"}': steady(0),
        'node_filesystem_readonly{instance="h:9100",device="/dev/sr0"}': steady(1),
        'node_textfile_mtime_seconds{instance="h:9100",file="/var/lib/fvd.prom"}': growing(60),
        'node_textfile_scrape_error{instance="h:9100"}': steady(0),
        **histogram("fvd_io_request_duration_seconds", 'op="read",', 0.1),
        **histogram("fvd_base_request_duration_seconds", 'reason="demand",', 0.1),
        **histogram("fvd_journal_commit_duration_seconds", "", 0.1),
    }


def one(name, value, labels=DEVICE):
    return {f"{name}{{{labels}}}": value}


# What makes each alert fire: series in the place of healthy ones.
SICK = {
    "FvdDaemonDown": {'up{job="fvd",instance="h:9809"}': steady(0)},
    "FvdDeviceDown": one("fvd_device_up", steady(0)),
    "FvdDeviceFailed": {
        'fvd_devices{instance="h:9809",job="fvd",state="failed"}': steady(1),
    },
    "FvdDeviceOrphaned": {
        'fvd_devices{instance="h:9809",job="fvd",state="orphaned"}': steady(2),
    },
    "FvdImageFault": one("fvd_fault_errno", steady(5)),
    "FvdWritebackLost": one("fvd_writeback_errors_total", growing(1)),
    "FvdStoreFull": one("fvd_io_parked", steady(3)),
    "FvdStoreGrowthFailed": {
        f'fvd_store_growths_total{{{DEVICE},outcome="error"}}': growing(1),
    },
    "FvdHungIO": one("fvd_io_oldest_inflight_seconds", growing(60)),
    "FvdIOErrors": {f'fvd_io_errors_total{{{DEVICE},op="read",error="eio"}}': growing(1)},
    "FvdCopySkippedForSpace": {
        f'fvd_cor_skipped_bytes_total{{{DEVICE},reason="nospace"}}': growing(4096),
    },
    "FvdBaseUnreachable": one("fvd_base_up", steady(0)),
    "FvdBaseSlow": histogram("fvd_base_request_duration_seconds", 'reason="demand",', 4.0),
    "FvdPrefetchStalled": one("fvd_prefetch_bytes_total", steady(5000000)),
    "FvdPrefetchFailed": {
        f'fvd_prefetch_state{{{DEVICE},state="running"}}': steady(0),
        f'fvd_prefetch_state{{{DEVICE},state="failed"}}': steady(1),
    },
    "FvdReadLatencyHigh": histogram("fvd_io_request_duration_seconds", 'op="read",', 1.0),
    "FvdCommitSlow": histogram("fvd_journal_commit_duration_seconds", "", 4.0),
    "FvdJournalFull": one("fvd_journal_used_bytes", steady(1048576)),
    "FvdReconnectFlapping": {
        f'fvd_device_reconnects_total{{{DEVICE},reason="crash"}}': growing(1),
    },
    "FvdStoreFillingUp": {
        **one("fvd_backing_store_avail_bytes", growing(-50000000, 8000000000)),
        **one("fvd_virtual_size_bytes", steady(10000000000)),
    },
    "FvdStoreAlmostFull": one("fvd_backing_store_avail_bytes", steady(900000000)),
    # Attached in the middle of the time, and found unclean.
    "FvdUncleanOpen": one("fvd_image_unclean_opens_total", f"_x{MINUTES - 10} 1x10"),
    "FvdFilesystemReadOnly": {
        'node_filesystem_readonly{instance="h:9100",device="/dev/nbd0"}': steady(1),
    },
    "FvdEventLoopLag": {
        'fvd_event_loop_lag_seconds{instance="h:9809",job="fvd"}': steady(0.5),
    },
    "FvdTextfileStale": {
        'node_textfile_mtime_seconds{instance="h:9100",file="/var/lib/fvd.prom"}': steady(0),
    },
    "FvdTextfileGone": {
        'node_textfile_mtime_seconds{instance="h:9100",file="/var/lib/fvd.prom"}': (
            f"0+60x{MINUTES - 20} _x20"
        ),
    },
    "FvdTextfileUnreadable": {
        # The file that cannot be read has no time.
        'node_textfile_mtime_seconds{instance="h:9100",file="/var/lib/fvd.prom"}': (
            f"0+60x{MINUTES - 20} _x20"
        ),
        'node_textfile_scrape_error{instance="h:9100"}': steady(1),
    },
}


def group(name, series, firing):
    """One group of promtool's tests: at the end of the time these alerts fire, and no other."""
    expected = [{"labels": f'{{alertname="{alert}"}}', "value": 1} for alert in firing]
    return {
        "name": name,
        "interval": "1m",
        "input_series": [{"series": key, "values": value} for key, value in series.items()],
        "promql_expr_test": [
            {
                "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
                "eval_time": f"{MINUTES}m",
                "exp_samples": expected,
            }
        ],
    }


def promtool(*words):
    done = subprocess.run(
        ["promtool", *map(str, words)],
        capture_output=True, text=True, timeout=PROMTOOL_SECONDS, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def run_groups(folder, *groups):
    # YAML is what promtool wants, and JSON is YAML.
    path = folder / "tests.json"
    tests = {"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": list(groups)}
    path.write_text(json.dumps(tests))
    return promtool("test", "rules", path)


def test_the_shipped_scrape_configuration_is_the_one_that_is_tried():
    """What the tests' Prometheus does with `instance` is what the configuration does."""
    (rule,) = HOST_ALONE
    text = (FOLDER / "prometheus.yml").read_text()
    assert text.count("relabel_configs:") == text.count("job_name:") == 2
    assert f"source_labels: [{rule['source_labels'][0]}]" in text
    assert f"regex: {rule['regex']}\n" in text
    assert f"target_label: {rule['target_label']}\n" in text


def test_rules_and_configuration_are_well_formed():
    assert promtool("check", "rules", "--lint=all", "--lint-fatal", RULES)[0] == 0
    status, said = promtool("check", "config", "--lint=all", FOLDER / "prometheus.yml")
    assert status == 0, said


def test_a_healthy_device_fires_nothing(tmp_path):
    status, said = run_groups(tmp_path, group("healthy", healthy(), []))
    assert status == 0, said


@pytest.mark.parametrize("alert", sorted(SICK))
def test_alert_fires_alone(tmp_path, alert):
    status, said = run_groups(tmp_path, group(alert, healthy() | SICK[alert], [alert]))
    assert status == 0, said


@pytest.mark.parametrize(("minutes", "firing"), [(25, []), (38, ["FvdPrefetchStalled"])])
def test_a_stalled_prefetch_is_told_after_half_an_hour(tmp_path, minutes, firing):
    """Also when it flips between running and paused meanwhile."""
    moved = MINUTES - minutes
    flipping = {
        f'fvd_prefetch_state{{{DEVICE},state="running"}}': " ".join(["1 0"] * (MINUTES // 2 + 1)),
        f'fvd_prefetch_state{{{DEVICE},state="paused"}}': " ".join(["0 1"] * (MINUTES // 2 + 1)),
    }
    still = one("fvd_prefetch_bytes_total", f"0+1000000x{moved} {moved}000000x{minutes}")
    status, said = run_groups(tmp_path, group("stalled", healthy() | flipping | still, firing))
    assert status == 0, said


@pytest.mark.parametrize(
    "series",
    [
        # A volume that a program extends: nobody knows what is free.
        {"fvd_backing_store_avail_bytes": None, "fvd_image_allocated_bytes": steady(10**9)},
        # All of the disk has its place already, whatever is left beside it.
        {
            "fvd_backing_store_avail_bytes": steady(1000),
            "fvd_image_allocated_bytes": steady(10_000_001_000),
        },
    ],
)
def test_a_store_that_cannot_become_full_is_no_alarm(tmp_path, series):
    shown = healthy()
    for name, values in series.items():
        shown.pop(f"{name}{{{DEVICE}}}")
        shown |= one(name, values) if values is not None else {}
    status, said = run_groups(tmp_path, group("store", shown, []))
    assert status == 0, said


@pytest.mark.parametrize(
    "series",
    [
        # The host went down a second time: the same device, attached anew.
        {
            f"fvd_image_unclean_opens_total{{{DEVICE}}}": steady(1),
            f'fvd_device_info{{{DEVICE},cookie="fvd:web:1"}}': f"1x{MINUTES - 17} _x17",
            f'fvd_device_info{{{DEVICE},cookie="fvd:web:2"}}': f"_x{MINUTES - 10} 1x10",
        },
        # What was not flushed was given up, in the same attachment.
        {f"fvd_image_unclean_opens_total{{{DEVICE}}}": f"1x{MINUTES - 10} 2x10"},
    ],
)
def test_the_second_unclean_open_is_told_as_well(tmp_path, series):
    status, said = run_groups(tmp_path, group("second", healthy() | series, ["FvdUncleanOpen"]))
    assert status == 0, said


def test_an_unclean_open_is_told_for_a_quarter_of_an_hour(tmp_path):
    old = {f"fvd_image_unclean_opens_total{{{DEVICE}}}": steady(1)}
    status, said = run_groups(tmp_path, group("old", healthy() | old, []))
    assert status == 0, said


def test_every_alert_has_its_series():
    assert sorted(ALERTS) == sorted(SICK)


def test_a_wrong_expectation_is_noticed(tmp_path):
    status, said = run_groups(tmp_path, group("wrong", healthy(), ["FvdDaemonDown"]))
    assert status == 1
    assert "FvdDaemonDown" in said


@pytest.mark.parametrize("alert", ALERTS)
def test_every_alert_has_a_section_in_the_runbook(alert):
    text = (FOLDER / "README.md").read_text()
    section = re.search(rf"^### {alert}\n\n(.*?)(?=^#|\Z)", text, re.M | re.S)
    assert section, f"README.md has no section {alert}"
    assert len(section[1].split()) >= 20
    assert f'runbook: "README.md#{alert.lower()}"' in RULES.read_text()
