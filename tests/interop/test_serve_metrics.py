# SPDX-License-Identifier: Apache-2.0
"""`fvdctl serve --metrics`: the metrics of the one image, right and there while it is served."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import urllib.error
import urllib.request

import pytest
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as openmetrics_families,
)
from prometheus_client.parser import text_string_to_metric_families

from fvdd.worker.metrics_server import CONNECTIONS_MAX
from fvdtest.serve import Server, refused
from fvdtest.tools import wait_until

from .conftest import World

MIB = 1 << 20


def address_of(server: Server) -> str:
    pattern = re.compile(r"message=metrics url=(http://\S+)/metrics")
    wait_until(lambda: pattern.search(server.log) is not None, "the address in the log")
    return pattern.findall(server.log)[0]


def scrape(server: Server, accept: str = "", path: str = "/metrics") -> str:
    request = urllib.request.Request(address_of(server) + path, headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=20) as answer:
        return str(answer.read().decode())


def values(text: str) -> dict[tuple[str, tuple[str, ...]], float]:
    return {
        (s.name, tuple(v for k, v in sorted(s.labels.items()) if k != "device")): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


@pytest.mark.parametrize("kept", ["private", "state", "state read-only"])
def test_what_was_done_is_counted(clone: World, kept: str) -> None:
    options = ["--metrics", "127.0.0.1:0"]
    if kept != "private":
        options += ["--state", str(clone.directory / "state")]
    if kept == "state read-only":
        options += ["--read-only"]
    with clone.serve(*options) as server:
        with server.connect() as client:
            client.read(0, 65536)
            if "read-only" not in kept:
                client.write(MIB, b"w" * 4096)
            text = scrape(server)
        found = values(text)
        assert found["fvd_io_bytes_total", ("read",)] == 65536
        assert found["fvd_read_bytes_total", ("base",)] == 65536
        assert found["fvd_device_connections", ()] == 1
        if "read-only" not in kept:
            assert found["fvd_io_bytes_total", ("write",)] == 4096
        name = clone.image.stem
        assert f'fvd_device_info{{device="{name}",devpath="",name="{name}",' in text
        assert 'attach="serve"' in text
        assert text.count("\nfvd_build_info{") == 1


def test_openmetrics_is_spoken_to_who_asks_for_it(clone: World) -> None:
    with clone.serve("--metrics", "127.0.0.1:0") as server:
        text = scrape(server, "application/openmetrics-text; version=1.0.0")
        assert {"fvd_device_up", "fvd_io_requests"} <= {f.name for f in openmetrics_families(text)}
        head = urllib.request.Request(address_of(server) + "/metrics", method="HEAD")
        with urllib.request.urlopen(head, timeout=20) as answer:
            assert (answer.status, answer.read()) == (200, b"")
        with pytest.raises(urllib.error.HTTPError, match="404"):
            scrape(server, path="/etc/passwd")


def test_a_scraper_that_says_nothing_holds_nobody_up(clone: World) -> None:
    with clone.serve("--metrics", "127.0.0.1:0") as server:
        scrape(server)
        port = int(address_of(server).rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)):
            assert scrape(server)
            clone.expect(server)


def test_who_crowds_the_address_keeps_no_scraper_out_and_takes_few_threads(clone: World) -> None:
    with clone.serve("--metrics", "127.0.0.1:0") as server, contextlib.ExitStack() as open_ones:
        port = int(address_of(server).rpartition(":")[2])
        before = len(os.listdir(f"/proc/{server.pid}/task"))
        crowd = [
            open_ones.enter_context(socket.create_connection(("127.0.0.1", port)))
            for _ in range(4 * CONNECTIONS_MAX)
        ]
        assert scrape(server)
        crowd[0].settimeout(5)  # less than the patience with one alone
        with contextlib.suppress(ConnectionResetError):
            assert crowd[0].recv(1) == b""
        wait_until(
            lambda: len(os.listdir(f"/proc/{server.pid}/task")) <= before + CONNECTIONS_MAX,
            "threads to end",
        )


@pytest.mark.parametrize("address", ["9809", "127.0.0.1:x", ":1", "127.0.0.1:99999"])
def test_an_address_that_is_none_is_refused(clone: World, address: str) -> None:
    where = ("--socket", str(clone.directory / "nbd.sock"))
    assert "is not HOST:PORT" in refused(clone.image, *where, "--metrics", address)


def test_an_address_in_use_is_refused_before_the_image_is_touched(clone: World) -> None:
    before = clone.image.read_bytes()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        where = ("--socket", str(clone.directory / "nbd.sock"))
        message = refused(clone.image, *where, "--metrics", address)
    assert "cannot listen on the metrics address" in message
    assert clone.image.read_bytes() == before
