# SPDX-License-Identifier: Apache-2.0
"""`fvdctl serve` of an image whose data lie on another server, which is down or goes down."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from fvdengine.create import create_image
from fvdengine.options import CreateOptions
from fvdtest.daemon import wait_until
from fvdtest.model import MIB
from fvdtest.nbd_client import NbdError
from fvdtest.remote import Nbdkit
from fvdtest.serve import FVDCTL, Server, refused

SIZE = 2 * MIB


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Nbdkit]:
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "data.raw").write_bytes(bytes(2 * SIZE))
    with Nbdkit(tmp_path / "far", "file", tmp_path / "far" / "data.raw") as running:
        yield running


@pytest.fixture
def image(tmp_path: Path, store: Nbdkit) -> Path:
    path = tmp_path / "disk.fvd"
    create_image(
        path, CreateOptions(size=SIZE, compact=True, data_file=store.uri, data_file_format="nbd")
    )
    return path


def test_server_that_is_down_is_named_and_costs_nothing(image: Path, store: Nbdkit) -> None:
    store.kill()
    before = image.read_bytes()
    path = image.parent / "nbd.sock"
    said = refused(
        image, "--socket", str(path), "--allow-uri", store.uri, "--base-timeout", "0.2"
    ).splitlines()
    assert store.uri in said[0]
    assert "No such file" in said[0] or "refused" in said[0]
    assert "the server serves this export" in said[1]
    assert not path.exists()
    assert image.read_bytes() == before


def test_stop_ends_the_wait_for_a_server(image: Path, store: Nbdkit) -> None:
    store.kill()
    server = Server(image, "--allow-uri", store.uri, directory=image.parent, ready=False)
    wait_until(lambda: "level=warning" in server.log, "the word that it waits")
    assert store.uri in server.log
    assert not server.socket_path.exists()
    server.signal(signal.SIGINT)
    assert server.wait(10) == 0
    assert "Traceback" not in server.log


def test_server_that_comes_while_it_is_waited_for_is_used(image: Path, store: Nbdkit) -> None:
    store.kill()
    server = Server(image, "--allow-uri", store.uri, directory=image.parent, ready=False)
    wait_until(lambda: "level=warning" in server.log, "the word that it waits")
    store.start()
    with server:
        wait_until(server.socket_path.exists, "the socket")


def test_server_that_dies_is_named_when_the_image_cannot_be_closed(
    image: Path, store: Nbdkit
) -> None:
    options = ("--allow-uri", store.uri, "--base-timeout", "0.3")
    server = Server(image, *options, directory=image.parent)
    with server.connect() as client:
        client.write(0, b"safe")
        client.flush()
        store.kill()
        with pytest.raises(NbdError) as caught:
            client.write(MIB, b"lost")
        assert caught.value.errno == errno.EIO
    server.signal(signal.SIGTERM)
    assert server.wait() == 1
    message, hint = server.log.splitlines()[-2:]
    assert message.startswith(f"fvdctl: {image} could not be closed cleanly: Input/output error")
    assert store.uri in message
    assert "What was flushed is safe" in hint
    assert "See that this server runs, then open it again" in hint
    store.start()
    with Server(image, *options, directory=image.parent) as again, again.connect() as client:
        assert client.read(0, 4) == b"safe"


def test_disk_grows_no_further_than_the_export_that_has_its_data(
    tmp_path: Path, store: Nbdkit
) -> None:
    """The size that it has is no growth; further the export must go first, and be asked again."""
    path = tmp_path / "plain.fvd"
    create_image(
        path, CreateOptions(size=2 * SIZE, data_file=store.uri, data_file_format="nbd")
    )
    before = path.read_bytes()

    def resize(size: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*FVDCTL, "resize", str(path), size, "--allow-uri", store.uri],
            env={**os.environ, "FVDD_SOCKET": "/nonexistent/fvdd.sock"},
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    assert resize(str(2 * SIZE)).returncode == 0
    offline = resize("+1M")
    assert "Make the export larger first" in offline.stderr
    assert path.read_bytes() == before
    with Server(path, "--allow-uri", store.uri, directory=tmp_path):
        served = resize("+1M")
    assert (offline.returncode, served.returncode) == (1, 1)
    assert f"enlarge the export {store.uri}" in served.stderr
    assert "open it again" in served.stderr
