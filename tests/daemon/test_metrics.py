# SPDX-License-Identifier: Apache-2.0
"""Metrics: parsed by the reference parser, and equal to what was done."""

import contextlib
import json
import os
import re
import select
import signal
import socket

import httpx
import pytest
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as openmetrics_families,
)

from fvdd.app import OBSERVERS_MAX
from fvdd.devices.maps import OBSERVED_MAX
from fvdd.metrics.names import COMPUTED, COUNTERS, GAUGES, HISTOGRAMS
from fvdengine.stats import read_stats
from fvdtest.daemon import Daemon, samples

MIB = 1 << 20
DEVICE = ("device", "nbd0")


def value(found, name, **labels):
    key = (name, tuple(sorted([DEVICE, *labels.items()])))
    assert key in found, f"{key} is missing"
    return found[key]


def test_counts_are_those_of_what_was_done(daemon, clone):
    image, model = clone()
    disk = daemon.attach(image, "--wait", "node")
    disk.read(0, 65536)
    disk.write(2 * MIB, b"w" * 65536)
    disk.write(3 * MIB + 100, b"p" * 8)
    disk.read(2 * MIB, 4096)
    disk.trim(4 * MIB, 8192)
    disk.write_zeroes(5 * MIB, 4096)
    disk.flush()
    found = daemon.metrics()
    for op, requests, size in (
        ("read", 2, 65536 + 4096), ("write", 2, 65536 + 8), ("discard", 1, 8192),
        ("write_zeroes", 1, 4096),
    ):  # fmt: skip
        assert value(found, "fvd_io_requests_total", op=op) == requests
        assert value(found, "fvd_io_bytes_total", op=op) == size
        assert value(found, "fvd_io_request_duration_seconds_count", op=op) == requests
    assert value(found, "fvd_io_requests_total", op="flush") == 1
    assert value(found, "fvd_read_bytes_total", source="base") == 65536
    assert value(found, "fvd_read_bytes_total", source="image") == 4096
    assert value(found, "fvd_cow_fills_total") >= 1
    assert value(found, "fvd_cow_fill_bytes_total") > 0
    assert value(found, "fvd_base_bytes_total", reason="demand") == 65536
    assert value(found, "fvd_base_requests_total", reason="demand", outcome="error") == 0
    assert value(found, "fvd_virtual_size_bytes") == model.size
    assert value(found, "fvd_image_base_bytes") == model.size
    assert value(found, "fvd_journal_size_bytes") > 0
    assert value(found, "fvd_journal_commits_total") >= 1
    assert value(found, "fvd_device_up") == 1
    assert value(found, "fvd_device_connections") == 1
    assert value(found, "fvd_prefetch_state", state="disabled") == 1
    assert value(found, "fvd_prefetch_state", state="running") == 0
    left = value(found, "fvd_prefetch_remaining_bytes")
    assert left + value(found, "fvd_image_local_bytes") == model.size
    assert found[("fvd_devices", (("state", "attached"),))] == 1
    assert found[("fvd_device_attach_duration_seconds_count", ())] == 1


def test_a_device_that_is_only_read_is_counted_too(daemon, clone):
    image, _ = clone()
    disk = daemon.attach(image, "--wait", "node", "-r")
    disk.read(0, 65536)
    found = daemon.metrics()
    assert value(found, "fvd_io_bytes_total", op="read") == 65536
    assert value(found, "fvd_base_bytes_total", reason="demand") == 65536


def test_errors_are_counted(daemon, clone):
    disk = daemon.attach(clone()[0], "--wait", "node")
    with pytest.raises(OSError, match="answered with an error"):
        disk.read(1 << 40, 4096)
    assert value(daemon.metrics(), "fvd_io_errors_total", op="read", error="einval") == 1


def test_prefetch_and_copy_on_read_are_counted(daemon, clone):
    image, model = clone("web", "--copy-on-read")
    disk = daemon.attach(image, "--wait", "node")
    disk.read(0, 65536)
    disk.read(0, 65536)
    daemon.ctl("prefetch", "web", "start")
    daemon.ctl("prefetch", "web", "wait", "--timeout", "60")
    found = daemon.metrics()
    copied = value(found, "fvd_cor_bytes_total")
    assert copied + sum(
        value(found, "fvd_cor_skipped_bytes_total", reason=reason)
        for reason in ("backlog", "busy", "nospace", "error")
    ) >= 65536  # fmt: skip
    assert value(found, "fvd_prefetch_bytes_total") + copied == model.size
    assert value(found, "fvd_base_bytes_total", reason="prefetch") >= model.size - copied
    assert value(found, "fvd_prefetch_state", state="done") == 1
    assert value(found, "fvd_prefetch_remaining_bytes") == 0


def test_every_entry_of_the_page_is_exposed(daemon, clone):
    daemon.attach(clone()[0])
    page = read_stats(daemon.state / "devices/web/stats")
    shown = {
        entry for source in (*COUNTERS, *GAUGES, *HISTOGRAMS) for entry in source.entries
    }  # fmt: skip
    assert {*page.counters, *page.gauges, *page.histograms} - shown <= set(COMPUTED)
    assert shown <= {*page.counters, *page.gauges, *page.histograms}


def test_series_end_with_the_device(daemon, clone):
    image, _ = clone()
    daemon.attach(image)
    daemon.ctl("detach", "web")
    assert not [key for key in daemon.metrics() if DEVICE in key[1]]


def test_counters_go_on_when_a_worker_is_replaced(daemon, clone):
    disk = daemon.attach(clone()[0], "--wait", "node")
    disk.write(MIB, b"w" * 65536)
    disk.read(0, 65536)
    before = daemon.metrics()
    os.kill(daemon.device("web").worker_pid, signal.SIGKILL)
    disk.write(2 * MIB, b"w" * 65536)
    after = daemon.metrics()
    assert value(after, "fvd_io_bytes_total", op="write") == 131072
    assert value(after, "fvd_live_takeovers_total") == 1
    assert value(after, "fvd_device_reconnects_total", reason="crash") == 1
    assert value(after, "fvd_image_unclean_opens_total") == 0
    for (name, labels), number in before.items():
        if DEVICE in labels and name.endswith(("_total", "_bucket", "_count")):
            assert after[name, labels] >= number, (name, labels)


def test_a_scrape_asks_no_worker(daemon, clone):
    """It must work, and promptly, while workers are stuck."""
    disk = daemon.attach(clone()[0], "--wait", "node")
    disk.read(0, 4096)
    pid = daemon.device("web").worker_pid
    os.kill(pid, signal.SIGSTOP)
    try:
        assert value(daemon.metrics(), "fvd_io_bytes_total", op="read") == 4096
    finally:
        os.kill(pid, signal.SIGCONT)


def test_what_a_device_is_stands_in_its_info(daemon, clone, base):
    image, _ = clone()
    daemon.attach(image)
    (labels,) = (dict(key[1]) for key in daemon.metrics() if key[0] == "fvd_device_info")
    assert labels["image"] == str(image)
    assert (labels["base"], labels["base_format"]) == (str(base), "raw")
    assert (labels["name"], labels["devpath"], labels["attach"]) == ("web", "/dev/nbd0", "nbd")


def test_names_and_labels_follow_the_conventions(daemon, clone):
    daemon.attach(clone()[0])
    text = daemon.ctl("metrics").stdout
    for line in re.findall(r"^# TYPE (fvd_\S+ \S+)$", text, re.M):
        name, kind = line.split()
        assert (kind == "counter") == name.endswith("_total"), name
        assert not re.search(r"_(ms|us|ns|kb|mb|percent)(_|$)", name), name
    for name, labels in samples(text):
        if name.startswith("fvd_device_info"):
            labelled = dict(labels)
            assert labelled["device"] == "nbd0"
            assert labelled["devpath"] == "/dev/nbd0"
    listed = json.loads(daemon.ctl("metrics", "--json").stdout)
    assert {"fvd_io_requests", "fvd_device_up"} <= {family["name"] for family in listed}


def test_buckets_rise_and_end_with_the_count(daemon, clone):
    disk = daemon.attach(clone()[0])
    for number in range(20):
        disk.read(number * 4096, 4096)
    found = daemon.metrics()
    name = "fvd_io_request_duration_seconds"
    buckets = sorted(
        (float(dict(labels)["le"]), count)
        for (key, labels), count in found.items()
        if key == f"{name}_bucket" and dict(labels)["op"] == "read"
    )
    counts = [count for _, count in buckets]
    assert counts == sorted(counts)
    assert buckets[-1] == (float("inf"), value(found, f"{name}_count", op="read"))
    assert buckets[0][0] < 1e-5
    assert buckets[-2][0] > 60
    assert 0 < value(found, f"{name}_sum", op="read") < 60


@pytest.fixture
def reachable(tmp_path):
    """A daemon with a metrics address, and its port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    daemon = Daemon(tmp_path, metrics=f"127.0.0.1:{port}").start()
    try:
        yield daemon, port
        daemon.detach_all()
    finally:
        daemon.stop()
        daemon.kill_workers()


def test_metrics_on_the_network_are_read_only(reachable, clone):
    daemon, port = reachable
    daemon.attach(clone()[0])
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:
        answer = http.get("/metrics", headers={"Accept": "application/openmetrics-text"})
        assert answer.headers["content-type"].startswith("application/openmetrics-text")
        assert list(openmetrics_families(answer.text))
        assert http.get("/healthz").json()["devices"] == 1
        for address in ("/metrics", "/healthz", "/"):
            asked = http.head(address)
            assert (asked.status_code, asked.content) == (200, b"")
        for address in ("/v1/devices", "/v1/doctor"):
            assert http.get(address).status_code == 404
        assert http.delete("/v1/devices/web").status_code == 404


def test_who_crowds_the_metrics_address_keeps_nobody_out(reachable):
    address = ("127.0.0.1", reachable[1])
    with contextlib.ExitStack() as open_ones:
        crowd = [
            open_ones.enter_context(socket.create_connection(address))
            for _ in range(2 * OBSERVERS_MAX)
        ]
        for silent in crowd:
            with contextlib.suppress(OSError):
                silent.sendall(b"GET /metrics HTTP/1.1\r\nHo")
        assert httpx.get(f"http://127.0.0.1:{address[1]}/healthz", timeout=30).json()["pid"]
        # The oldest were sent away; the newest are still waited for.
        crowd[0].settimeout(30)
        with contextlib.suppress(ConnectionResetError):
            assert crowd[0].recv(1) == b""
        crowd[-1].setblocking(False)
        with pytest.raises(BlockingIOError):
            crowd[-1].recv(1)


def test_maps_asked_for_at_the_metrics_address_leave_the_verbs_alone(reachable, clone):
    daemon, port = reachable
    daemon.attach(clone()[0])
    worker = daemon.device("web").worker_pid
    with contextlib.ExitStack() as stack:
        os.kill(worker, signal.SIGSTOP)
        stack.callback(os.kill, worker, signal.SIGCONT)
        waiting = set()
        for cells in range(1, OBSERVERS_MAX + 1):
            one = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            request = f"GET /v1/devices/web/map?cells={cells} HTTP/1.1\r\nHost: x\r\n\r\n"
            one.sendall(request.encode())
            waiting.add(one)
        while len(waiting) > OBSERVED_MAX + 1:
            ready = select.select(list(waiting), [], [], 30)[0]
            assert ready
            for one in ready:
                assert one.recv(1 << 16).startswith(b"HTTP/1.1 503 ")
                waiting.remove(one)
        os.kill(worker, signal.SIGCONT)
        daemon.ctl("prefetch", "web", "pause")
        served = 0
        for one in waiting:
            one.settimeout(30)
            # All may have been asked for before the first began; then that is one of those few.
            said = one.recv(1 << 16)
            assert said.startswith((b"HTTP/1.1 200 ", b"HTTP/1.1 503 "))
            served += said.startswith(b"HTTP/1.1 200 ")
        assert served in (OBSERVED_MAX, OBSERVED_MAX + 1)


def test_a_textfile_for_node_exporter_has_what_a_scrape_has(daemon, clone, tmp_path):
    daemon.attach(clone()[0])
    path = tmp_path / "fvd.prom"
    assert daemon.ctl("metrics", "--textfile", path).stdout == ""
    found = samples(path.read_text())
    assert value(found, "fvd_device_up") == 1
    assert {name for name, _ in daemon.metrics() if name.startswith("fvd_")} == {
        name for name, _ in found
    }


def test_a_textfile_that_cannot_be_written_is_named_and_stays(daemon, tmp_path):
    path = tmp_path / "nowhere/fvd.prom"
    done = daemon.ctl("metrics", "--textfile", path, check=False)
    assert done.returncode == 1
    assert str(path) in done.stderr
    assert "is as it was" in done.stderr


@pytest.mark.parametrize("options", [("--textfile", "x.txt"), ("--json", "--textfile", "x.prom")])
def test_a_textfile_that_nobody_would_read_is_refused(daemon, options):
    done = daemon.ctl("metrics", *options, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("fvdctl: ")
