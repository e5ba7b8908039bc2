# SPDX-License-Identifier: Apache-2.0
"""`fvdctl serve` as a program: what it prints, what it refuses, how it stops."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
from pathlib import Path
from uuid import uuid4

import pytest

from fvdengine.live import create_live
from fvdengine.opening import OpenOptions, open_plan
from fvdtest.nbd_client import NbdClient
from fvdtest.serve import FVDCTL, Server, refused
from fvdtest.tools import run, wait_until

from .conftest import World, create


def test_uri_is_the_only_output_and_works(clone: World) -> None:
    with clone.serve() as server:
        assert server.uri == f"nbd+unix:///?socket={server.socket_path}"
        assert stat.S_IMODE(os.stat(server.socket_path).st_mode) == 0o600
        run("nbdinfo", "--size", server.uri)
    assert not server.socket_path.exists()


def test_tcp_picks_a_port_and_listens_on_loopback(clone: World) -> None:
    with clone.serve(tcp=True) as server:
        assert server.uri.startswith("nbd://127.0.0.1:")
        clone.expect(server)


def test_socket_path_that_uris_must_quote(clone: World) -> None:
    path = clone.directory / "a b&c.sock"
    command = [*FVDCTL, "serve", str(clone.image), "--socket", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        assert process.stdout is not None
        uri = process.stdout.readline().decode().strip()
        assert run("nbdinfo", "--size", uri).strip() == str(clone.model.size)
    finally:
        process.terminate()
        assert process.wait(30) == 0
        assert process.stdout is not None
        process.stdout.close()


def test_quiet_prints_nothing_at_all(clone: World) -> None:
    path = clone.directory / "nbd.sock"
    command = [*FVDCTL, "serve", str(clone.image), "--socket", str(path), "-q"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        wait_until(path.exists, "the socket is there")
        with NbdClient.attach(f"nbd+unix:///?socket={path}") as client:
            client.read(0, 512)
    finally:
        process.terminate()
        assert process.communicate(timeout=30) == (b"", b"")
        assert process.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_stops_cleanly_with_clients_connected(clone: World, number: signal.Signals) -> None:
    server = clone.serve()
    with server, server.connect() as client:
        client.write(5000, b"kept")
        clone.model.write(5000, b"kept")
        server.signal(number)
        assert server.wait() == 0
        assert client.wait_closed() == b""
    run(*FVDCTL, "check", clone.image)
    with clone.serve() as server:
        clone.expect(server)


def test_two_signals_at_once_are_one_wish(clone: World) -> None:
    """`timeout` and a terminal signal the process and its whole group: the stop stays clean."""
    with clone.serve() as server, server.connect() as client:
        client.write(5000, b"kept")
        clone.model.write(5000, b"kept")
        server.signal(signal.SIGTERM)
        server.signal(signal.SIGINT)
        assert server.wait() == 0
    assert "closed cleanly" not in run(*FVDCTL, "info", clone.image)
    with clone.serve() as server:
        clone.expect(server)


def test_stale_socket_file_is_replaced(clone: World) -> None:
    server = clone.serve()
    server.kill()
    assert server.socket_path.exists()
    with clone.serve() as server:
        clone.expect(server)


def test_socket_of_a_living_server_is_refused(clone: World) -> None:
    other = create(clone.directory / "other.fvd", size=1 << 20)
    before = other.read_bytes()
    with clone.serve() as server:
        told = refused(other, "--socket", str(server.socket_path))
        assert "another server is listening" in told
        assert "hint: " in told
        clone.expect(server)
    assert other.read_bytes() == before


def test_file_in_the_place_of_the_socket_is_left_alone(clone: World) -> None:
    path = clone.directory / "precious"
    path.write_text("data")
    assert "not a socket" in refused(clone.image, "--socket", str(path))
    assert path.read_text() == "data"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        pytest.param((), "--socket", id="no address"),
        pytest.param(("--socket", "a", "--tcp", ":1"), "--socket", id="two addresses"),
        pytest.param(("--tcp", "0.0.0.0:0"), "without TLS", id="any address"),
        pytest.param(("--tcp", "[::]:0"), "without TLS", id="any v6 address"),
        pytest.param(("--tcp", "192.0.2.7:0"), "without TLS", id="foreign address"),
        pytest.param(("--tcp", "127.0.0.1:http"), "not HOST:PORT", id="port by name"),
        pytest.param(("--tcp", "127.0.0.1:70000"), "not HOST:PORT", id="port too large"),
        pytest.param(("--socket", "/nowhere/at/all.sock"), "make the directory", id="no directory"),
        pytest.param(("--socket", "x" * 200), "choose a shorter path", id="path too long"),
        pytest.param(("--tcp", ":0", "--connections", "0"), "connections", id="no connections"),
        pytest.param(("--tcp", ":0", "--prefetch-delay", "soon"), "seconds, or off", id="delay"),
        pytest.param(("--tcp", ":0", "--state", "/dev/null"), "/dev/null", id="state is a file"),
    ],
)
def test_bad_options_are_refused_and_change_nothing(
    clone: World, options: tuple[str, ...], words: str
) -> None:
    before = clone.image.read_bytes()
    assert words in refused(clone.image, *options)
    assert clone.image.read_bytes() == before


@pytest.mark.parametrize("kind", ["missing", "not an image", "truncated", "base missing"])
def test_bad_images_are_refused_with_a_hint(clone: World, kind: str) -> None:
    path = clone.image
    if kind == "missing":
        path = clone.directory / "nowhere.fvd"
    elif kind == "not an image":
        path = clone.directory / "base.raw"
    elif kind == "truncated":
        with path.open("r+b") as file:
            file.truncate(10_000)
    else:
        (clone.directory / "base.raw").rename(clone.directory / "elsewhere")
    before = path.read_bytes() if path.exists() else b""
    told = refused(path, "--socket", str(clone.directory / "s"))
    assert told.startswith("fvdctl: ")
    assert "\nhint: " in told
    assert (path.read_bytes() if path.exists() else b"") == before
    assert not (clone.directory / "s").exists()


def test_image_in_use_names_the_holder(clone: World) -> None:
    with clone.serve() as server:
        for options in ((), ("-r",)):
            told = refused(clone.image, "--tcp", ":0", *options)
            assert f"process {server.pid}" in told
        clone.expect(server)


def test_readers_share_an_image(clone: World) -> None:
    second = clone.directory / "second"
    second.mkdir()
    with clone.serve("-r") as first, Server(clone.image, "-r", directory=second) as other:
        clone.expect(first)
        clone.expect(other)
        assert "is in use by" in refused(clone.image, "--tcp", ":0")


def test_state_directory_of_a_living_server_is_refused_by_name(clone: World) -> None:
    state = clone.directory / "state"
    other = create(clone.directory / "other.fvd", size=1 << 20)
    with clone.serve("--state", str(state)) as server:
        for image in (clone.image, other):
            told = refused(image, "--tcp", ":0", "--state", str(state))
            assert f"is in use by process {server.pid} " in told
        clone.expect(server)


def test_state_directory_is_empty_of_live_state_after_a_clean_stop(clone: World) -> None:
    state = clone.directory / "state"
    with clone.serve("--state", str(state)) as server:
        assert {"live", "stats"} <= set(os.listdir(state))
        clone.scribble(server)
    assert not {"live", "stats"} & set(os.listdir(state))


def test_state_of_a_killed_server_must_be_taken_over_or_given_up(clone: World) -> None:
    state = clone.directory / "state"
    server = clone.serve("--state", str(state))
    with server.connect() as client:
        clone.scribble(server)
        client.write(1 << 20, b"acknowledged")
        clone.model.write(1 << 20, b"acknowledged")
        server.kill()
    after_kill = clone.image.read_bytes()
    for options in ((), ("-r",), ("--state", str(clone.directory / "other-state"))):
        told = refused(clone.image, "--tcp", ":0", *options)
        assert "left open by a process that died" in told
        assert "--discard-live-state" in told
    assert clone.image.read_bytes() == after_kill
    with clone.serve("--state", str(state)) as server:
        clone.expect(server)
    with clone.serve() as server:
        clone.expect(server)


def die_before_the_session(clone: World, state: Path) -> None:
    """What a server leaves that is killed between making its live state and opening the image."""
    with open_plan(clone.image, OpenOptions(discard_live_state=True)) as plan:
        create_live(state, plan, uuid4().bytes).close()


def test_server_killed_before_its_session_is_simply_started_again(clone: World) -> None:
    """The image is unclean, too: another server without live state was killed before."""
    clone.serve().kill()
    state = clone.directory / "state"
    die_before_the_session(clone, state)
    (state / "lock").touch()
    with clone.serve("--state", str(state)) as server:
        clone.scribble(server)
        clone.expect(server)


@pytest.mark.parametrize("kind", ["other files", "a link", "open to all"])
def test_a_directory_that_is_not_ours_to_fill_is_refused(clone: World, kind: str) -> None:
    state, victim = clone.directory / "state", clone.directory / "victim"
    state.mkdir(mode=0o700)
    victim.write_bytes(b"precious")
    if kind == "other files":
        (state / "notes").write_bytes(b"precious")
    elif kind == "a link":
        (state / "lock").symlink_to(victim)
    else:
        state.chmod(0o777)
    said = refused(clone.image, "--socket", str(clone.directory / "x.sock"), "--state", str(state))
    assert "cannot be a state directory" in said
    assert victim.read_bytes() == b"precious"
    assert not (state / "live").exists()


def test_live_state_elsewhere_is_never_given_up_unasked(clone: World) -> None:
    """Acknowledged in one state directory: another one that holds nothing must not discard it."""
    mine, other = clone.directory / "mine", clone.directory / "other"
    server = clone.serve("--state", str(mine))
    with server.connect() as client:
        client.write(8192, b"acknowledged")
        clone.model.write(8192, b"acknowledged")
    server.kill()
    die_before_the_session(clone, other)
    said = refused(clone.image, "--socket", str(clone.directory / "x.sock"), "--state", str(other))
    assert "not merged yet" in said
    with clone.serve("--state", str(mine)) as server:
        clone.expect(server)


def test_server_killed_after_a_clean_close_is_simply_started_again(clone: World) -> None:
    """The image is clean, but the live state was not removed yet."""
    state = clone.directory / "state"
    with clone.serve("--state", str(state)) as server:
        clone.scribble(server)
        left = {name: (state / name).read_bytes() for name in ("live", "stats")}
    for name, content in left.items():
        (state / name).write_bytes(content)
    with clone.serve("--state", str(state)) as server:
        clone.expect(server)
        clone.scribble(server)
    with clone.serve("-r") as server:
        clone.expect(server)


def test_discarded_live_state_leaves_what_was_flushed(clone: World) -> None:
    state = clone.directory / "state"
    server = clone.serve("--state", str(state))
    clone.scribble(server)  # ends with a flush
    with server.connect() as client:
        client.write(1 << 20, b"perhaps lost")
    server.kill()
    with clone.serve("--discard-live-state") as server, server.connect() as client:
        found = client.read(1 << 20, 12)
        assert found in (b"perhaps lost", clone.model.read(1 << 20, 12))
        clone.model.write(1 << 20, found)
        clone.expect(server)


def test_state_of_another_image_is_refused(clone: World) -> None:
    state = clone.directory / "state"
    other = create(clone.directory / "other.fvd", size=1 << 20)
    before = other.read_bytes()
    server = clone.serve("--state", str(state))
    clone.scribble(server)
    server.kill()
    assert "does not fit" in refused(other, "--tcp", ":0", "--state", str(state))
    assert other.read_bytes() == before
    with clone.serve("--state", str(state)) as server:
        clone.expect(server)


def test_single_connection_export_says_so(clone: World) -> None:
    with clone.serve("--connections", "1") as server:
        with server.connect() as client:
            assert client.flags & 256 == 0
            client.disconnect()
        # The place is free again as soon as the server has seen the end.
        wait_until(lambda: "connection_closed" in server.log, "the server noticed")
        clone.expect(server)


@pytest.mark.proof
def test_stuck_handshakes_end_by_themselves(clone: World) -> None:
    with clone.serve() as server:
        with NbdClient.connect(server.uri, time_limit=20) as silent:
            silent.receive(18)
            assert silent.wait_closed() == b""
        assert "took longer than 10 s" in server.log


def test_server_survives_a_reader_of_its_output_that_leaves(clone: World) -> None:
    path = clone.directory / "nbd.sock"
    reader, writer = socket.socketpair()
    command = [*FVDCTL, "serve", str(clone.image), "--socket", str(path)]
    reader.close()
    with writer, (clone.directory / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=writer, stderr=log)
    try:
        wait_until(path.exists, "the socket is there")
        with NbdClient.attach(f"nbd+unix:///?socket={path}") as client:
            client.read(0, 512)
    finally:
        process.terminate()
        assert process.wait(30) == 0


def test_allowed_directory_lets_a_base_lie_elsewhere(clone: World, tmp_path: Path) -> None:
    far = tmp_path / "far"
    far.mkdir()
    base = (tmp_path / "base.raw").rename(far / "base.raw")
    image = tmp_path / "sub" / "image.fvd"
    image.parent.mkdir()
    create(image, base=str(base), base_format="raw", allow_dirs=(str(far),))
    assert "--allow-dir" in refused(image, "--tcp", ":0")
    options = ("--allow-dir", str(far))
    with Server(image, *options, directory=tmp_path) as server, server.connect() as client:
        assert client.read(0, 4096) == clone.model.read(0, 4096)
