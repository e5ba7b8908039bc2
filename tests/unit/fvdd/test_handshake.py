# SPDX-License-Identifier: Apache-2.0
"""The NBD handshake on socket pairs, against a raw client that shares no code with it.

The server side runs on its own event loop in a thread; its outcome (what was agreed on, or why
the connection was given up) is what each test looks at besides the bytes on the wire.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from fvdd.attach import handshake
from fvdd.attach.handshake import Export, HandshakeError, Negotiated, TransmissionFlag
from fvdtest import nbd_client as nbd
from fvdtest.nbd_client import NbdClient

SIZE = 64 * 1024 * 1024 + 512
WRITABLE_FLAGS = 1 | 4 | 8 | 32 | 64 | 256


@dataclass
class Handshake:
    """One handshake under way: the client's end, and the server's outcome once it is over."""

    client: NbdClient
    server_sock: socket.socket
    thread: threading.Thread | None = None
    outcome: Negotiated | None = None
    error: str | None = None
    admitted: list[str] = field(default_factory=list)

    def join(self) -> None:
        assert self.thread is not None
        self.thread.join(10)
        assert not self.thread.is_alive(), "the handshake did not end"


class Starter:
    """Starts handshakes and cleans up behind them."""

    def __init__(self) -> None:
        self.started: list[Handshake] = []

    def __call__(
        self, *exports: Export, refusal: str | None = None, time_limit: float = 5.0
    ) -> Handshake:
        client_sock, server_sock = socket.socketpair()
        client_sock.settimeout(5)
        server_sock.setblocking(False)
        shake = Handshake(NbdClient(client_sock), server_sock)
        offered = list(exports) or [Export(size=SIZE)]

        def admit(export: Export) -> str | None:
            shake.admitted.append(export.name)
            return refusal

        def serve() -> None:
            try:
                shake.outcome = asyncio.run(
                    handshake.negotiate(server_sock, offered, admit=admit, time_limit=time_limit)
                )
            except HandshakeError as error:
                shake.error = str(error)
                server_sock.close()

        shake.thread = threading.Thread(target=serve)
        shake.thread.start()
        self.started.append(shake)
        return shake


@pytest.fixture
def start() -> Iterator[Starter]:
    starter = Starter()
    yield starter
    for shake in starter.started:
        shake.client.close()
        shake.join()
        shake.server_sock.close()


def test_go_agrees_on_size_and_flags(start: Starter) -> None:
    shake = start()
    assert shake.client.greet() == 3
    shake.client.go()
    shake.join()
    assert (shake.client.size, shake.client.flags) == (SIZE, WRITABLE_FLAGS)
    assert shake.outcome == Negotiated(
        export=Export(size=SIZE),
        structured=False,
        block_status_id=None,
        flags=TransmissionFlag(WRITABLE_FLAGS),
    )
    assert shake.admitted == [""]


def test_go_of_a_read_only_single_connection_export_offers_nothing_else(start: Starter) -> None:
    shake = start(Export(size=SIZE, read_only=True, multi_conn=False))
    shake.client.greet()
    shake.client.go()
    assert shake.client.flags == 1 | 2 | 4 | 8


def test_structured_replies_add_the_df_flag(start: Starter) -> None:
    shake = start()
    shake.client.greet()
    shake.client.ask_structured()
    shake.client.go()
    shake.join()
    assert shake.client.flags == WRITABLE_FLAGS | 128
    assert shake.outcome is not None
    assert shake.outcome.structured
    assert shake.outcome.block_status_id is None


def test_base_allocation_is_agreed_on(start: Starter) -> None:
    shake = start()
    shake.client.greet()
    shake.client.ask_structured()
    shake.client.ask_base_allocation()
    shake.client.go()
    shake.join()
    assert shake.outcome is not None
    assert shake.outcome.block_status_id == shake.client.context_id


@pytest.mark.parametrize(
    "second",
    [
        pytest.param([b"qemu:dirty-bitmap:x"], id="nothing known"),
        pytest.param([], id="empty"),
        pytest.param([b"base:"], id="wildcard selects nothing"),
    ],
)
def test_a_second_selection_of_contexts_replaces_the_first(
    start: Starter, second: list[bytes]
) -> None:
    shake = start()
    shake.client.greet()
    shake.client.ask_structured()
    shake.client.ask_base_allocation()
    replies = shake.client.option(nbd.OPT_SET_META_CONTEXT, nbd.meta_query(b"", second))
    assert replies == [(nbd.REP_ACK, b"")]
    shake.client.go()
    shake.join()
    assert shake.outcome is not None
    assert shake.outcome.block_status_id is None


def test_a_failed_selection_of_contexts_leaves_none(start: Starter) -> None:
    shake = start()
    shake.client.greet()
    shake.client.ask_structured()
    shake.client.ask_base_allocation()
    replies = shake.client.option(nbd.OPT_SET_META_CONTEXT, b"\0\0\0\0\0")
    assert [reply for reply, _ in replies] == [nbd.REP_ERR_INVALID]
    shake.client.go()
    shake.join()
    assert shake.outcome is not None
    assert shake.outcome.block_status_id is None


def test_contexts_of_one_export_do_not_follow_to_another(start: Starter) -> None:
    shake = start(Export(size=SIZE), Export(size=512, name="other"))
    shake.client.greet()
    shake.client.ask_structured()
    shake.client.ask_base_allocation(b"other")
    shake.client.go(b"")
    shake.join()
    assert shake.outcome is not None
    assert shake.outcome.block_status_id is None


@pytest.mark.parametrize(
    ("queries", "found"),
    [([], 1), ([b"base:"], 1), ([b"base:allocation"], 1), ([b"other:"], 0), ([b"base:al"], 0)],
)
def test_list_of_contexts(start: Starter, queries: list[bytes], found: int) -> None:
    shake = start()
    shake.client.greet()
    shake.client.ask_structured()
    replies = shake.client.option(nbd.OPT_LIST_META_CONTEXT, nbd.meta_query(b"", queries))
    expected = [(nbd.REP_META_CONTEXT, b"\0\0\0\0base:allocation")] * found
    assert replies == [*expected, (nbd.REP_ACK, b"")]


@pytest.mark.parametrize("option", [nbd.OPT_LIST_META_CONTEXT, nbd.OPT_SET_META_CONTEXT])
def test_contexts_need_structured_replies(start: Starter, option: int) -> None:
    shake = start()
    shake.client.greet()
    replies = shake.client.option(option, nbd.meta_query(b"", []))
    assert [reply for reply, _ in replies] == [nbd.REP_ERR_INVALID]


def test_info_tells_what_is_asked_and_stays_in_the_handshake(start: Starter) -> None:
    shake = start(Export(size=SIZE, description="a clone"))
    shake.client.greet()
    for _ in range(2):
        replies = shake.client.option(nbd.OPT_INFO, nbd.info_request(b"", [1, 2, 3, 77]))
        payloads = [payload for reply, payload in replies if reply == nbd.REP_INFO]
        assert replies[-1] == (nbd.REP_ACK, b"")
        assert payloads == [
            struct.pack(">HQH", 0, SIZE, WRITABLE_FLAGS),
            struct.pack(">H", 1),
            struct.pack(">H", 2) + b"a clone",
            struct.pack(">HIII", 3, 1, 4096, 32 * 1024 * 1024),
        ]
    assert shake.admitted == []
    shake.client.go()
    shake.join()
    assert shake.outcome is not None


def test_list_names_every_export(start: Starter) -> None:
    shake = start(Export(size=1024, description="one"), Export(size=512, name="two"))
    shake.client.greet()
    assert shake.client.option(nbd.OPT_LIST) == [
        (nbd.REP_SERVER, b"\0\0\0\0one"),
        (nbd.REP_SERVER, b"\0\0\0\3two"),
        (nbd.REP_ACK, b""),
    ]


@pytest.mark.parametrize(("client_flags", "padding"), [(3, 0), (1, 124), (2, 0), (0, 124)])
def test_export_name_enters_transmission(start: Starter, client_flags: int, padding: int) -> None:
    shake = start()
    shake.client.greet(client_flags)
    shake.client.send_option(nbd.OPT_EXPORT_NAME, b"")
    assert shake.client.receive(10 + padding) == (
        struct.pack(">QH", SIZE, WRITABLE_FLAGS) + bytes(padding)
    )
    shake.join()
    assert shake.outcome is not None


@pytest.mark.parametrize("name", [b"nowhere", b"\xff\xfe", b"x" * 5000])
def test_export_name_that_is_unknown_closes(start: Starter, name: bytes) -> None:
    shake = start()
    shake.client.greet()
    shake.client.send_option(nbd.OPT_EXPORT_NAME, name)
    assert shake.client.wait_closed() == b""
    shake.join()
    assert shake.error is not None


def test_go_of_an_unknown_export_leaves_the_handshake_usable(start: Starter) -> None:
    shake = start()
    shake.client.greet()
    for option in (nbd.OPT_GO, nbd.OPT_INFO):
        replies = shake.client.option(option, nbd.info_request(b"nowhere", []))
        assert [reply for reply, _ in replies] == [nbd.REP_ERR_UNKNOWN]
    shake.client.go()


def test_go_refused_by_policy_says_why(start: Starter) -> None:
    shake = start(refusal="the house is full")
    shake.client.greet()
    replies = shake.client.option(nbd.OPT_GO, nbd.info_request(b"", []))
    assert replies == [(nbd.REP_ERR_POLICY, b"the house is full")]


def test_abort_is_acknowledged_and_ends_politely(start: Starter) -> None:
    shake = start()
    shake.client.greet()
    assert shake.client.option(nbd.OPT_ABORT) == [(nbd.REP_ACK, b"")]
    shake.join()
    assert (shake.outcome, shake.error) == (None, None)


@pytest.mark.parametrize("option", [nbd.OPT_STARTTLS, 4, 11, 12, 0, 0xFFFFFFFF])
def test_unsupported_options_are_refused_in_the_protocols_words(
    start: Starter, option: int
) -> None:
    shake = start()
    shake.client.greet()
    data = b"" if option == nbd.OPT_STARTTLS else b"payload"
    replies = shake.client.option(option, data)
    assert [reply for reply, _ in replies] == [nbd.REP_ERR_UNSUP]
    shake.client.go()


@pytest.mark.parametrize(
    ("option", "data"),
    [
        pytest.param(nbd.OPT_LIST, b"x", id="list with data"),
        pytest.param(nbd.OPT_STARTTLS, b"x", id="starttls with data"),
        pytest.param(nbd.OPT_STRUCTURED_REPLY, b"x", id="structured with data"),
        pytest.param(nbd.OPT_GO, b"", id="go without data"),
        pytest.param(nbd.OPT_GO, b"\0\0\0\4ab", id="name longer than option"),
        pytest.param(nbd.OPT_GO, b"\0\0\0\0\0\5\0\3", id="more infos than option"),
        pytest.param(nbd.OPT_GO, nbd.info_request(b"", []) + b"x", id="bytes behind"),
        pytest.param(nbd.OPT_INFO, b"\0\0\0\1\xff\0\0", id="name not utf-8"),
    ],
)
def test_malformed_options_are_invalid_and_the_handshake_goes_on(
    start: Starter, option: int, data: bytes
) -> None:
    shake = start()
    shake.client.greet()
    replies = shake.client.option(option, data)
    assert [reply for reply, _ in replies] == [nbd.REP_ERR_INVALID]
    shake.client.go()


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\0\0\x10\x01" + bytes(4097), id="name too long"),
        pytest.param(b"\0\0\0\0\0\0\1\1" + bytes(4 * 257), id="too many queries"),
        pytest.param(b"\0\0\0\0\xff\xff\xff\xff", id="absurd number of queries"),
    ],
)
def test_queries_beyond_the_limits_are_too_big(start: Starter, data: bytes) -> None:
    shake = start()
    shake.client.greet()
    shake.client.ask_structured()
    replies = shake.client.option(nbd.OPT_SET_META_CONTEXT, data)
    assert [reply for reply, _ in replies] == [nbd.REP_ERR_TOO_BIG]
    shake.client.go()


@pytest.mark.parametrize("length", [handshake.OPTION_LENGTH_MAX + 1, 0xFFFFFFFF])
def test_an_oversized_option_is_answered_and_closed_unread(start: Starter, length: int) -> None:
    shake = start()
    shake.client.greet()
    shake.client.send_option(nbd.OPT_GO, length=length)
    reply, _ = shake.client.read_option_reply(nbd.OPT_GO)
    assert reply == nbd.REP_ERR_TOO_BIG
    assert shake.client.wait_closed() == b""
    shake.join()
    assert shake.error is not None


def test_an_endless_series_of_options_is_cut_off(start: Starter) -> None:
    shake = start()
    shake.client.greet()
    for _ in range(handshake.OPTIONS_MAX):
        shake.client.option(nbd.OPT_LIST)
    shake.client.wait_closed()
    shake.join()
    assert shake.error == f"more than {handshake.OPTIONS_MAX} options"


@pytest.mark.parametrize(
    "garbage",
    [
        pytest.param(b"GET / HTTP/1.1\r\nHost: nowhere\r\n\r\n", id="http"),
        pytest.param(b"\xff" * 64, id="ones"),
        pytest.param(struct.pack(">I", 3) + bytes(64), id="zeros as option"),
        pytest.param(struct.pack(">I", 7), id="unknown client flag"),
        pytest.param(
            struct.pack(">IQII", 0, nbd.IHAVEOPT, nbd.OPT_GO, 6) + bytes(6), id="go, not fixed"
        ),
    ],
)
def test_garbage_closes_the_connection(start: Starter, garbage: bytes) -> None:
    shake = start()
    shake.client.receive(18)
    shake.client.send(garbage)
    assert shake.client.wait_closed() == b""
    shake.join()
    assert shake.error is not None


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(b"", id="silent"),
        pytest.param(b"\0\0", id="half a flag word"),
        pytest.param(struct.pack(">IQ", 3, nbd.IHAVEOPT), id="half an option"),
        pytest.param(
            struct.pack(">IQII", 3, nbd.IHAVEOPT, nbd.OPT_GO, 100) + b"abc", id="half a payload"
        ),
    ],
)
def test_a_stuck_client_runs_into_the_time_limit(start: Starter, sent: bytes) -> None:
    shake = start(time_limit=0.2)
    shake.client.send(sent)
    shake.client.wait_closed()
    shake.join()
    assert shake.error == "the handshake took longer than 0.2 s"


def test_a_client_that_never_reads_runs_into_the_time_limit(start: Starter) -> None:
    shake = start(Export(size=SIZE, description="d" * 4000), time_limit=0.5)
    shake.server_sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    shake.client.greet()
    shake.client.send(struct.pack(">QII", nbd.IHAVEOPT, nbd.OPT_LIST, 0) * 100)
    shake.join()
    assert shake.error == "the handshake took longer than 0.5 s"


def test_a_client_that_leaves_ends_the_handshake(start: Starter) -> None:
    shake = start()
    shake.client.greet()
    shake.client.close()
    shake.join()
    assert shake.error == "the client closed the connection"


def test_nothing_is_read_behind_the_handshake(start: Starter) -> None:
    shake = start()
    first_request = struct.pack(">IHHQQI", nbd.REQUEST_MAGIC, 0, nbd.CMD_READ, 1, 0, 512)
    go = nbd.info_request(b"", [])
    shake.client.send(
        struct.pack(">IQII", 3, nbd.IHAVEOPT, nbd.OPT_GO, len(go)) + go + first_request
    )
    shake.join()
    assert shake.outcome is not None
    assert shake.server_sock.recv(100) == first_request
