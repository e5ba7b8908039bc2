# SPDX-License-Identifier: Apache-2.0
"""Clients that are broken or hostile: an error or a closed connection, and nobody else notices.

One server for the whole file. Around every test a bystander keeps a connection open: afterwards
he writes and reads as if nothing had happened, and a newcomer can still connect.
"""

from __future__ import annotations

import contextlib
import random
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fvdtest import nbd_client as nbd
from fvdtest.nbd_client import Closed, NbdClient
from fvdtest.serve import Server
from fvdtest.tools import wait_until

from .conftest import World, clone_world

SIZE = 8 * 1024 * 1024 + 512
OVER_LIMIT = 32 * 1024 * 1024 + 1
CONNECTIONS = 64


@pytest.fixture(scope="module")
def victim_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return clone_world(tmp_path_factory.mktemp("malformed"), random.Random(1))


@pytest.fixture(scope="module")
def victim(victim_world: World) -> Iterator[Server]:
    with victim_world.serve("--connections", str(CONNECTIONS)) as server:
        yield server


@pytest.fixture(autouse=True)
def bystander(victim: Server, rng: random.Random) -> Iterator[NbdClient]:
    """Somebody who must notice nothing of what a test does."""
    with victim.connect(structured=True) as client:
        yield client
        data = rng.randbytes(5000)
        client.write(1_000_001, data)
        client.flush()
        assert client.read(1_000_001, len(data)) == data
        with victim.connect() as newcomer:
            assert newcomer.read(1_000_001, len(data)) == data
    assert victim.status is None


@pytest.fixture(params=[False, True], ids=["simple", "structured"])
def client(request: pytest.FixtureRequest, victim: Server) -> Iterator[NbdClient]:
    with victim.connect(structured=request.param, meta=request.param) as made:
        yield made


def expect_error(client: NbdClient, *allowed: int) -> None:
    """The next answer is one of these errors, and the connection still works."""
    answer = client.read_answer()
    assert answer.error in allowed
    assert len(client.read(512, 4096)) == 4096


@pytest.mark.parametrize(
    ("command", "offset", "length"),
    [
        pytest.param(nbd.CMD_READ, SIZE, 512, id="read behind the end"),
        pytest.param(nbd.CMD_READ, SIZE - 1, 2, id="read over the end"),
        pytest.param(nbd.CMD_READ, 2**64 - 512, 512, id="read to 2^64"),
        pytest.param(nbd.CMD_READ, 2**64 - 1, 0xFFFFFFFF, id="read beyond 2^64"),
        pytest.param(nbd.CMD_READ, 2**63, 4096, id="read at a negative offset"),
        pytest.param(nbd.CMD_TRIM, SIZE - 512, 1024, id="trim over the end"),
        pytest.param(nbd.CMD_TRIM, 0, 0xFFFFFFFF, id="trim of nearly 4 GiB"),
        pytest.param(nbd.CMD_TRIM, 2**64 - 512, 1024, id="trim over 2^64"),
        pytest.param(nbd.CMD_WRITE_ZEROES, SIZE, 1, id="zero behind the end"),
        pytest.param(nbd.CMD_WRITE_ZEROES, 4096, 0xFFFFF000, id="zero of nearly 4 GiB"),
        pytest.param(nbd.CMD_WRITE_ZEROES, 2**64 - 1, 1, id="zero to 2^64"),
    ],
)
def test_range_past_the_end_is_an_error(
    client: NbdClient, command: int, offset: int, length: int
) -> None:
    client.send_request(command, offset, length)
    expect_error(client, nbd.EINVAL, nbd.ENOSPC)


@pytest.mark.parametrize("offset", [SIZE, SIZE - 1000, 2**63, 2**64 - 1024])
def test_write_past_the_end_is_an_error_and_its_payload_is_skipped(
    client: NbdClient, offset: int
) -> None:
    client.send_request(nbd.CMD_WRITE, offset, 1024, bytes(1024))
    expect_error(client, nbd.EINVAL, nbd.ENOSPC)


def test_read_over_the_limit_is_an_error(client: NbdClient) -> None:
    for length in (OVER_LIMIT, 0xFFFFFFFF):
        client.send_request(nbd.CMD_READ, 0, length)
        expect_error(client, nbd.EINVAL, nbd.EOVERFLOW)


@pytest.mark.parametrize("length", [OVER_LIMIT, 0xFFFFFFFF])
def test_write_over_the_limit_is_an_error_or_the_end(client: NbdClient, length: int) -> None:
    client.send_request(nbd.CMD_WRITE, 0, length)
    with contextlib.suppress(Closed):
        # The server may read the payload first: give it some, and see that it hoards none.
        for _ in range(min(length, OVER_LIMIT) // 65536 + 1):
            client.send(bytes(65536))
        client.sock.shutdown(socket.SHUT_WR)
    with contextlib.suppress(OSError):
        client.wait_closed()


@pytest.mark.parametrize("command", [5, 8, 9, 255, 0xFFFF])
def test_unknown_command_is_an_error(client: NbdClient, command: int) -> None:
    client.send_request(command, 0, 512)
    expect_error(client, nbd.EINVAL, nbd.ENOTSUP)


@pytest.mark.parametrize("flags", [1 << 4, 1 << 5, 1 << 8, 1 << 15, 0xFFF0])
@pytest.mark.parametrize("command", [nbd.CMD_READ, nbd.CMD_FLUSH, nbd.CMD_TRIM])
def test_unknown_flag_is_an_error(client: NbdClient, command: int, flags: int) -> None:
    client.send_request(command, 0, 0 if command == nbd.CMD_FLUSH else 512, flags=flags)
    expect_error(client, nbd.EINVAL)


def test_unknown_flag_on_a_write_is_an_error_and_writes_nothing(client: NbdClient) -> None:
    before = client.read(0, 512)
    client.send_request(nbd.CMD_WRITE, 0, 512, bytes(b ^ 0xFF for b in before), flags=1 << 14)
    expect_error(client, nbd.EINVAL)
    assert client.read(0, 512) == before


def test_flags_that_belong_to_other_commands_are_errors(victim: Server) -> None:
    with victim.connect() as client:
        client.send_request(nbd.CMD_READ, 0, 512, flags=nbd.FLAG_DF)
        expect_error(client, nbd.EINVAL)
    with victim.connect(structured=True) as client:
        client.send_request(nbd.CMD_READ, 0, 512, flags=nbd.FLAG_NO_HOLE)
        expect_error(client, nbd.EINVAL)


@pytest.mark.parametrize(
    "command", [nbd.CMD_READ, nbd.CMD_FLUSH, nbd.CMD_TRIM, nbd.CMD_WRITE_ZEROES]
)
def test_fua_is_valid_on_every_command(client: NbdClient, command: int) -> None:
    length = 0 if command == nbd.CMD_FLUSH else 4096
    answer = client.call(command, 2_000_896 if length else 0, length, flags=nbd.FLAG_FUA)
    assert answer.error == 0


@pytest.mark.parametrize("command", [nbd.CMD_READ, nbd.CMD_TRIM, nbd.CMD_WRITE_ZEROES])
def test_length_of_zero_does_no_harm(client: NbdClient, command: int) -> None:
    client.send_request(command, 4096, 0)
    expect_error(client, 0, nbd.EINVAL)


def test_block_status_that_was_not_agreed_on_is_an_error(victim: Server) -> None:
    for structured in (False, True):
        with victim.connect(structured=structured) as client:
            client.send_request(nbd.CMD_BLOCK_STATUS, 0, 4096)
            expect_error(client, nbd.EINVAL)


@pytest.mark.parametrize(("offset", "length"), [(0, 0), (SIZE, 1), (2**64 - 1, 2), (SIZE - 1, 9)])
def test_block_status_of_a_bad_range_is_an_error(victim: Server, offset: int, length: int) -> None:
    with victim.connect(meta=True) as client:
        client.send_request(nbd.CMD_BLOCK_STATUS, offset, length)
        expect_error(client, nbd.EINVAL)
        assert sum(extent for extent, _ in client.block_status(0, 65536)) >= 512


@pytest.mark.parametrize("magic", [0, 0x25609514, 0x13956025, 0x67446698, 0xFFFFFFFF])
def test_bad_magic_closes_the_connection(client: NbdClient, magic: int) -> None:
    client.send_request(nbd.CMD_READ, 0, 512, magic=magic)
    assert client.wait_closed() == b""


def test_requests_before_a_bad_magic_are_answered(client: NbdClient) -> None:
    cookie = client.send_request(nbd.CMD_READ, 0, 512)
    assert client.read_answer().cookie == cookie
    client.send_request(nbd.CMD_READ, 0, 512, magic=1)
    client.wait_closed()


REQUEST = struct.pack(">IHHQQI", nbd.REQUEST_MAGIC, 0, nbd.CMD_WRITE, 9, 4096, 100_000)


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(REQUEST[:1], id="one byte"),
        pytest.param(REQUEST[:27], id="header less one byte"),
        pytest.param(REQUEST, id="no payload"),
        pytest.param(REQUEST + bytes(1), id="one byte of payload"),
        pytest.param(REQUEST + bytes(99_999), id="payload less one byte"),
    ],
)
@pytest.mark.parametrize("way", ["close", "shutdown", "reset"])
def test_truncated_request_ends_the_connection_and_writes_nothing(
    victim: Server, bystander: NbdClient, sent: bytes, way: str
) -> None:
    before = bystander.read(4096, 100_000)
    with victim.connect() as client:
        client.send(sent)
        if way == "shutdown":
            client.sock.shutdown(socket.SHUT_WR)
            assert client.wait_closed() == b""
        if way == "reset":
            linger = struct.pack("ii", 1, 0)
            client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    assert bystander.read(4096, 100_000) == before


def test_client_that_shuts_down_its_side_still_gets_its_answers(client: NbdClient) -> None:
    cookies = {client.send_request(nbd.CMD_READ, i * 4096, 4096) for i in range(20)}
    client.sock.shutdown(socket.SHUT_WR)
    assert {client.read_answer().cookie for _ in range(20)} == cookies
    assert client.wait_closed() == b""


def test_disconnect_finishes_what_was_asked_before(client: NbdClient, bystander: NbdClient) -> None:
    for i in range(20):
        client.send_request(nbd.CMD_WRITE, i * 10_000, 10_000, bytes([i + 1]) * 10_000)
    for _ in range(20):
        assert client.read_answer().error == 0
    client.disconnect()
    for i in range(20):
        assert bystander.read(i * 10_000, 10_000) == bytes([i + 1]) * 10_000


def test_client_that_never_reads_its_answers_blocks_nobody(
    victim: Server, bystander: NbdClient
) -> None:
    with victim.connect() as greedy:
        greedy.sock.settimeout(1)
        header = struct.pack(">IHHQQI", nbd.REQUEST_MAGIC, 0, nbd.CMD_READ, 1, 0, 1 << 20)
        with contextlib.suppress(TimeoutError, Closed):
            for _ in range(2000):
                greedy.send(header * 10)
        for i in range(50):
            assert len(bystander.read(i * 4096, 4096)) == 4096


def test_many_requests_at_once_are_all_answered(client: NbdClient) -> None:
    count = 2000
    requests = b"".join(
        struct.pack(">IHHQQI", nbd.REQUEST_MAGIC, 0, nbd.CMD_FLUSH, 10_000 + i, 0, 0)
        for i in range(count)
    )
    client.send(requests)
    answered = {client.read_answer().cookie for _ in range(count)}
    assert answered == set(range(10_000, 10_000 + count))


def test_requests_with_one_cookie_are_answered_one_by_one(client: NbdClient) -> None:
    for _ in range(10):
        client.send_request(nbd.CMD_READ, 0, 0x200, cookie=7)
        assert client.read_answer().cookie == 7


def test_write_to_a_read_only_export_is_refused(victim_world: World, tmp_path: Path) -> None:
    world = clone_world(tmp_path, random.Random(2))
    before = world.image.read_bytes()
    with world.serve("-r") as server:
        for structured in (False, True):
            with server.connect(structured=structured) as client:
                for command in (nbd.CMD_WRITE, nbd.CMD_TRIM, nbd.CMD_WRITE_ZEROES):
                    client.send_request(command, 0, 512, bytes(512 * (command == nbd.CMD_WRITE)))
                    expect_error(client, nbd.EPERM)
                client.flush()
        world.expect(server)
    assert world.image.read_bytes() == before


HANDSHAKES: list[Callable[[NbdClient], None]] = [
    lambda client: client.send(b""),
    lambda client: client.send(b"\r\n\r\n"),
    lambda client: client.send(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"),
    lambda client: client.send(b"\xff" * 100_000),
    lambda client: client.send(bytes(100_000)),
    lambda client: client.send(struct.pack(">IQII", 3, nbd.IHAVEOPT, nbd.OPT_GO, 0xFFFFFFFF)),
    lambda client: client.send(struct.pack(">IQII", 3, nbd.IHAVEOPT, nbd.OPT_GO, 70_000)),
    lambda client: client.send(struct.pack(">IQII", 3, nbd.IHAVEOPT, nbd.OPT_EXPORT_NAME, 9999)),
    lambda client: client.send(struct.pack(">I", 3) + REQUEST),
]


@pytest.mark.parametrize("number", range(len(HANDSHAKES)))
def test_garbage_in_the_handshake_harms_nobody(victim: Server, number: int) -> None:
    client = NbdClient.connect(victim.uri)
    with client, contextlib.suppress(Closed):
        HANDSHAKES[number](client)
        client.sock.shutdown(socket.SHUT_WR)
        client.wait_closed()


def test_silent_clients_keep_nobody_out(victim: Server) -> None:
    """More of them than handshakes may be under way: the oldest give way."""
    with contextlib.ExitStack() as silent:
        for _ in range(100):
            silent.enter_context(NbdClient.connect(victim.uri))
        with victim.connect() as client:
            assert len(client.read(0, 512)) == 512


def test_request_in_one_packet_with_the_handshake_is_answered(victim: Server) -> None:
    with NbdClient.connect(victim.uri) as client:
        go = nbd.info_request(b"", [])
        request = struct.pack(">IHHQQI", nbd.REQUEST_MAGIC, 0, nbd.CMD_READ, 1, 512, 512)
        client.send(struct.pack(">IQII", 3, nbd.IHAVEOPT, nbd.OPT_GO, len(go)) + go + request)
        client.receive(18)
        while client.read_option_reply(nbd.OPT_GO)[0] != nbd.REP_ACK:
            pass
        assert struct.unpack(">IIQ", client.receive(16)) == (nbd.SIMPLE_REPLY_MAGIC, 0, 1)
        assert len(client.receive(512)) == 512


def test_one_connection_too_many_is_told_so_and_gets_in_later(
    victim: Server, bystander: NbdClient
) -> None:
    with contextlib.ExitStack() as crowd:
        # Those of tests before may still be on their way out, so fill up until it is full.
        refusal = b""
        while not refusal:
            client = crowd.enter_context(NbdClient.connect(victim.uri))
            client.greet()
            *_, (reply, text) = client.option(nbd.OPT_GO, nbd.info_request(b"", []))
            if reply == nbd.REP_ERR_POLICY:
                refusal = text
        assert refusal == b"all 64 connections of this export are in use"

    def gets_in() -> bool:
        with NbdClient.connect(victim.uri) as late:
            late.greet()
            *_, (reply, _) = late.option(nbd.OPT_GO, nbd.info_request(b"", []))
            return reply == nbd.REP_ACK

    wait_until(gets_in, "a place became free")


def mangled_requests(rng: random.Random) -> bytes:
    """Valid requests with random bytes flipped, cut short or run together."""
    stream = bytearray()
    for _ in range(rng.randint(1, 8)):
        command = rng.choice([0, 0, 1, 3, 4, 6, 7, 5, rng.randrange(65536)])
        length = rng.choice([0, 1, 512, 4096, 70_000])
        offset = 3_000_000 + rng.randrange(100_000)
        flags = rng.choice([0, 0, 1, 4])
        stream += struct.pack(">IHHQQI", nbd.REQUEST_MAGIC, flags, command, 1, offset, length)
        stream += rng.randbytes(length) if command == nbd.CMD_WRITE else b""
    for _ in range(rng.randint(0, 4)):
        stream[rng.randrange(len(stream))] = rng.randrange(256)
    return bytes(stream[: rng.randint(1, len(stream))])


def test_random_garbage_never_harms_the_server(victim: Server, rng: random.Random) -> None:
    for _ in range(150):
        client = victim.connect(structured=rng.random() < 0.5)
        with client, contextlib.suppress(Closed, TimeoutError):
            client.sock.settimeout(5)
            client.send(mangled_requests(rng))
            client.sock.shutdown(socket.SHUT_WR)
            client.wait_closed()
