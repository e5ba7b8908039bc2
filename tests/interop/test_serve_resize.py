# SPDX-License-Identifier: Apache-2.0
"""`fvdctl resize` and `update` of an image that `fvdctl serve` has open: the server does it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from pathlib import Path

import pytest

from fvdctl import serving
from fvdctl.serving import ask_server, is_served
from fvdengine.rendezvous import server_address
from fvdtest.serve import FVDCTL

from .conftest import World

GROWN = 1 << 20


def fvdctl(*words: object) -> subprocess.CompletedProcess[str]:
    """Run fvdctl where no fvdd can be asked."""
    return subprocess.run(
        [*FVDCTL, *map(str, words)],
        env={**os.environ, "FVDD_SOCKET": "/nonexistent/fvdd.sock"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_image_grows_and_who_connects_then_sees_it(world: World) -> None:
    old = world.model.size
    with world.serve() as server:
        with server.connect() as before:
            assert before.size == old
            done = fvdctl("resize", world.image, f"+{GROWN}", "--json")
            assert done.returncode == 0, done.stderr
            assert json.loads(done.stdout) == {
                "name": world.image.name, "device": None, "old_size_bytes": old,
                "size_bytes": old + GROWN,
            }  # fmt: skip
            # Who was there already goes on with the size that he was told.
            before.write(0, b"x" * 4096)
            world.model.write(0, b"x" * 4096)
        with server.connect() as after:
            assert after.size == old + GROWN
            assert after.read(old, GROWN) == bytes(GROWN)
            after.write(old + GROWN - 512, b"y" * 512)
            after.flush()
            assert after.read(0, 4096) == b"x" * 4096
    assert not is_served(str(world.image))
    done = fvdctl("info", world.image, "--json")
    assert json.loads(done.stdout)["size_bytes"] == old + GROWN
    assert fvdctl("check", world.image).returncode == 0
    with world.serve() as server, server.connect() as client:
        assert client.size == old + GROWN
        assert client.read(old + GROWN - 512, 512) == b"y" * 512


def test_killed_server_s_successor_has_the_new_size(clone: World, tmp_path: Path) -> None:
    state = tmp_path / "state"
    old = clone.model.size
    server = clone.serve("--state", str(state))
    assert fvdctl("resize", clone.image, old + GROWN).returncode == 0
    with server.connect() as client:
        client.write(old, b"z" * 512)
    server.kill()
    with clone.serve("--state", str(state)) as again, again.connect() as client:
        assert client.size == old + GROWN
        assert client.read(old, 512) == b"z" * 512


def test_fields_of_a_served_image_change_too(clone: World) -> None:
    with clone.serve():
        done = fvdctl("update", clone.image, "journal_buf_size=4k", "bytes_per_prefetch=64k")
        assert done.stdout.splitlines() == [
            "journal_buf_size: 4194304 -> 4096",
            "bytes_per_prefetch: 1048576 -> 65536 (when it is opened next)",
        ]
        refused = fvdctl("update", clone.image, "base_img=x")
        assert refused.returncode == 1
        assert "stop the server" in refused.stderr
    assert fvdctl("update", clone.image, "journal_buf_size=4k").stdout == "nothing to change\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("512",), "smaller than the present one"),
        (("+511",), "not a multiple of 512"),
        (("much",), "not a valid size"),
        (("512", "--shrink"), "--shrink is only for images that nobody uses"),
    ],
)
def test_refused_in_one_sentence(clone: World, words: tuple[str, ...], message: str) -> None:
    with clone.serve() as server:
        done = fvdctl("resize", clone.image, *words)
        assert (done.returncode, done.stdout) == (1, "")
        assert message in done.stderr
        assert "Traceback" not in server.log
        with server.connect() as client:
            assert client.size == clone.model.size


def test_readers_cannot_be_told_to_grow(clone: World) -> None:
    with clone.serve("--read-only"):
        done = fvdctl("resize", clone.image, f"+{GROWN}")
        assert done.returncode == 1
        assert "in use by process" in done.stderr


def test_server_answers_what_makes_no_sense(clone: World) -> None:
    with clone.serve() as server:
        with pytest.raises(Exception, match="knows no op 'dance'"):
            ask_server(str(clone.image), "dance")
        with pytest.raises(Exception, match="size must be a string"):
            ask_server(str(clone.image), "resize", size=7)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.connect(server_address(str(clone.image)))
            sock.send(b"not json")
            assert sock.recv(1) == b""
        assert is_served(str(clone.image))
        assert "Traceback" not in server.log


def test_address_that_somebody_else_has_costs_only_the_control(clone: World) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as squatter:
        squatter.bind(server_address(str(clone.image)))
        with clone.serve() as server:
            clone.expect(server)
            assert "cannot be told anything" in server.log


def test_users_who_are_not_obeyed_and_servers_that_are_not_believed(
    clone: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    with clone.serve():
        monkeypatch.setattr(serving, "may_command", lambda user: False)
        assert not is_served(str(clone.image))


def test_nobody_serves_what_does_not_exist(tmp_path: Path) -> None:
    assert not is_served(str(tmp_path / "none.fvd"))
    (tmp_path / "idle.fvd").write_bytes(b"")
    assert not is_served(str(tmp_path / "idle.fvd"))
