# SPDX-License-Identifier: Apache-2.0
"""Addresses, and a listener whose engine is a list."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from fvdd.attach.export import (
    ExportError,
    Listener,
    ListenerLimits,
    TcpAddress,
    UnixAddress,
)
from fvdd.attach.handshake import Export, Negotiated
from fvdtest import nbd_client as nbd
from fvdtest.nbd_client import NbdClient


@pytest.mark.parametrize(
    ("text", "uri"),
    [
        ("127.0.0.1:0", "nbd://127.0.0.1:"),
        (":0", "nbd://127.0.0.1:"),
        ("localhost:0", "nbd://"),
        ("127.1.2.3:0", "nbd://127.1.2.3:"),
    ],
)
def test_loopback_addresses_are_listened_on(text: str, uri: str) -> None:
    address = TcpAddress.parse(text)
    with address.listen() as sock:
        assert address.uri(sock).startswith(uri)
        assert address.uri(sock).endswith(f":{sock.getsockname()[1]}/")


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("0.0.0.0:0", "tls_required"),
        ("[::]:0", "tls_required"),
        ("192.0.2.1:10809", "tls_required"),
        ("127.0.0.1:-1", "bad_address"),
        ("127.0.0.1:65536", "bad_address"),
        ("127.0.0.1:nbd", "bad_address"),
        ("no such host.invalid:1", "cannot_listen"),
    ],
)
def test_other_addresses_are_refused(text: str, code: str) -> None:
    with pytest.raises(ExportError) as caught:
        TcpAddress.parse(text).listen()
    assert caught.value.code == code


def test_port_in_use_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = TcpAddress.parse(f"127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(ExportError, match="in use"):
            address.listen()


def test_release_leaves_the_socket_of_a_successor(tmp_path: Path) -> None:
    path = tmp_path / "s"
    first = UnixAddress(str(path))
    with first.listen():
        path.unlink()
        second = UnixAddress(str(path))
        with second.listen():
            first.release()
            assert path.exists()
            second.release()
            assert not path.exists()
        second.release()


class Bench:
    """A listener on a Unix socket, and what it delivered."""

    def __init__(self, directory: Path, limits: ListenerLimits, fail: bool) -> None:
        self._address = UnixAddress(str(directory / "s"))
        self._sock = self._address.listen()
        self._fail = fail
        self.uri = self._address.uri(self._sock)
        self.delivered: list[tuple[socket.socket, Negotiated]] = []
        self.listener = Listener(self._sock, Export(size=512), self._deliver, limits)

    def _deliver(self, sock: socket.socket, agreed: Negotiated) -> int:
        if self._fail:
            raise OSError("the engine is full")
        assert sock.getblocking()
        self.delivered.append((sock.dup(), agreed))
        return len(self.delivered)

    async def close(self) -> None:
        await self.listener.stop()
        self._address.release()
        self._sock.close()
        for sock, _ in self.delivered:
            sock.close()


def drive(
    directory: Path,
    scenario: Callable[[Bench], Awaitable[None]],
    limits: ListenerLimits,
    *,
    fail: bool = False,
) -> None:
    async def bounded() -> None:
        bench = Bench(directory, limits, fail)
        bench.listener.start()
        try:
            async with asyncio.timeout(20):
                await scenario(bench)
        finally:
            await bench.close()

    asyncio.run(bounded())


def go(uri: str) -> tuple[int, bytes]:
    """Connect and ask to go; the last reply."""
    with NbdClient.connect(uri) as client:
        client.greet()
        return client.option(nbd.OPT_GO, nbd.info_request(b"", []))[-1]


def test_places_are_counted_and_given_back(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        assert (await asyncio.to_thread(go, bench.uri))[0] == nbd.REP_ACK
        assert (await asyncio.to_thread(go, bench.uri))[0] == nbd.REP_ACK
        reply, text = await asyncio.to_thread(go, bench.uri)
        assert reply == nbd.REP_ERR_POLICY
        assert text == b"all 2 connections of this export are in use"
        bench.listener.connection_closed(1)
        assert (await asyncio.to_thread(go, bench.uri))[0] == nbd.REP_ACK
        assert len(bench.delivered) == 3

    drive(tmp_path, scenario, ListenerLimits(connections=2))


def test_engine_that_takes_no_socket_costs_no_place(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        for _ in range(5):
            assert (await asyncio.to_thread(go, bench.uri))[0] == nbd.REP_ACK
        assert bench.delivered == []

    drive(tmp_path, scenario, ListenerLimits(connections=1), fail=True)


def test_flood_of_silent_clients_drops_the_oldest(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        silent = [NbdClient.connect(bench.uri) for _ in range(10)]
        assert (await asyncio.to_thread(go, bench.uri))[0] == nbd.REP_ACK
        assert len(await asyncio.to_thread(silent[0].wait_closed)) == 18
        for client in silent:
            client.close()

    drive(tmp_path, scenario, ListenerLimits(handshakes=4))


def test_stop_drops_handshakes_and_keeps_delivered_connections(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        kept = NbdClient.connect(bench.uri)
        await asyncio.to_thread(kept.greet)
        await asyncio.to_thread(kept.go)
        half = NbdClient.connect(bench.uri)
        await asyncio.to_thread(half.greet)
        await bench.listener.stop()
        assert await asyncio.to_thread(half.wait_closed) == b""
        bench.delivered[0][0].sendall(b"alive")
        assert kept.receive(5) == b"alive"
        kept.close()

    drive(tmp_path, scenario, ListenerLimits())
