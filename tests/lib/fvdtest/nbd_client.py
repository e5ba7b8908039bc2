# SPDX-License-Identifier: Apache-2.0
"""A raw NBD client that can do everything right and everything wrong.

It is written from the protocol text, independently of the server: it shares no constant and no
code with it. Every message can be sent with any field off; every answer is checked to the byte.
All waiting is bounded by the socket's time limit.
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass, field
from types import TracebackType
from urllib.parse import parse_qs, urlsplit

NBDMAGIC = 0x4E42444D41474943
IHAVEOPT = 0x49484156454F5054
OPTION_REPLY_MAGIC = 0x3E889045565A9
REQUEST_MAGIC = 0x25609513
SIMPLE_REPLY_MAGIC = 0x67446698
CHUNK_MAGIC = 0x668E33EF

OPT_EXPORT_NAME, OPT_ABORT, OPT_LIST, OPT_STARTTLS, OPT_INFO, OPT_GO = 1, 2, 3, 5, 6, 7
OPT_STRUCTURED_REPLY, OPT_LIST_META_CONTEXT, OPT_SET_META_CONTEXT = 8, 9, 10
REP_ACK, REP_SERVER, REP_INFO, REP_META_CONTEXT = 1, 2, 3, 4
REP_ERR_UNSUP, REP_ERR_POLICY, REP_ERR_INVALID = 0x80000001, 0x80000002, 0x80000003
REP_ERR_UNKNOWN, REP_ERR_TOO_BIG = 0x80000006, 0x80000009

CMD_READ, CMD_WRITE, CMD_DISC, CMD_FLUSH, CMD_TRIM = 0, 1, 2, 3, 4
CMD_CACHE, CMD_WRITE_ZEROES, CMD_BLOCK_STATUS = 5, 6, 7
FLAG_FUA, FLAG_NO_HOLE, FLAG_DF, FLAG_REQ_ONE = 1, 2, 4, 8

CHUNK_NONE, CHUNK_OFFSET_DATA, CHUNK_OFFSET_HOLE, CHUNK_BLOCK_STATUS = 0, 1, 2, 5
CHUNK_ERROR, CHUNK_ERROR_OFFSET = 0x8001, 0x8002

EPERM, EIO, ENOMEM, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP, ESHUTDOWN = 1, 5, 12, 22, 28, 75, 95, 108


class NbdError(Exception):
    """The server answered a request with an error."""

    def __init__(self, errno: int) -> None:
        super().__init__(f"NBD error {errno}")
        self.errno = errno


class Closed(Exception):
    """The server closed the connection."""


@dataclass
class Answer:
    """One whole answer to a request, simple or structured."""

    cookie: int
    error: int = 0
    data: bytes = b""
    extents: list[tuple[int, int]] = field(default_factory=list)
    context_id: int | None = None
    structured: bool = False


def open_socket(uri: str, time_limit: float = 15.0) -> socket.socket:
    """Connect to nbd://HOST:PORT/ or nbd+unix:///?socket=PATH."""
    parts = urlsplit(uri)
    if parts.scheme == "nbd+unix":
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(time_limit)
        sock.connect(parse_qs(parts.query)["socket"][0])
        return sock
    assert parts.hostname is not None
    return socket.create_connection((parts.hostname, parts.port or 10809), time_limit)


class NbdClient:
    """One connection, from its first byte on."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.size = 0
        self.flags = 0
        self.structured = False
        self.context_id: int | None = None
        self._pending_reads: dict[int, tuple[int, int]] = {}
        self._cookie = 0

    @classmethod
    def connect(cls, uri: str, time_limit: float = 15.0) -> NbdClient:
        """Connect without saying a word."""
        return cls(open_socket(uri, time_limit))

    @classmethod
    def attach(cls, uri: str, *, structured: bool = False, meta: bool = False) -> NbdClient:
        """Connect and go to the transmission phase."""
        client = cls.connect(uri)
        client.greet()
        if structured or meta:
            client.ask_structured()
        if meta:
            client.ask_base_allocation()
        client.go()
        return client

    def __enter__(self) -> NbdClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close without a word of farewell."""
        self.sock.close()

    # The wire.

    def send(self, data: bytes) -> None:
        """Send bytes as they are."""
        try:
            self.sock.sendall(data)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise Closed from error

    def receive(self, length: int) -> bytes:
        """Receive exactly so many bytes, or raise Closed."""
        pieces = bytearray()
        while len(pieces) < length:
            try:
                piece = self.sock.recv(length - len(pieces))
            except ConnectionResetError as error:
                raise Closed from error
            if not piece:
                raise Closed
            pieces += piece
        return bytes(pieces)

    def wait_closed(self) -> bytes:
        """Read until the server closes; returns what it still sent."""
        pieces = bytearray()
        while True:
            try:
                piece = self.sock.recv(65536)
            except ConnectionResetError:
                return bytes(pieces)
            if not piece:
                return bytes(pieces)
            pieces += piece

    # The handshake.

    def greet(self, client_flags: int = 3) -> int:
        """Read the greeting and answer it; returns the server's flags."""
        magic, option_magic, flags = struct.unpack(">QQH", self.receive(18))
        assert magic == NBDMAGIC
        assert option_magic == IHAVEOPT
        self.send(struct.pack(">I", client_flags))
        return int(flags)

    def send_option(
        self, option: int, data: bytes = b"", *, magic: int = IHAVEOPT, length: int | None = None
    ) -> None:
        """Send an option, with any field off."""
        announced = len(data) if length is None else length
        self.send(struct.pack(">QII", magic, option, announced) + data)

    def read_option_reply(self, option: int) -> tuple[int, bytes]:
        """Read one reply to an option."""
        magic, echoed, reply, length = struct.unpack(">QIII", self.receive(20))
        assert magic == OPTION_REPLY_MAGIC
        assert echoed == option
        return int(reply), self.receive(length)

    def option(self, option: int, data: bytes = b"") -> list[tuple[int, bytes]]:
        """Send an option and read its replies, up to the acknowledgement or the error."""
        self.send_option(option, data)
        replies = []
        while True:
            reply, payload = self.read_option_reply(option)
            replies.append((reply, payload))
            if reply == REP_ACK or reply & 0x80000000:
                return replies

    def ask_structured(self) -> None:
        """Agree on structured replies."""
        assert self.option(OPT_STRUCTURED_REPLY) == [(REP_ACK, b"")]
        self.structured = True

    def ask_base_allocation(self, name: bytes = b"") -> None:
        """Agree on base:allocation."""
        replies = self.option(OPT_SET_META_CONTEXT, meta_query(name, [b"base:allocation"]))
        assert [reply for reply, _ in replies] == [REP_META_CONTEXT, REP_ACK]
        payload = replies[0][1]
        assert payload[4:] == b"base:allocation"
        (self.context_id,) = struct.unpack(">I", payload[:4])

    def go(self, name: bytes = b"") -> None:
        """Enter transmission."""
        replies = self.option(OPT_GO, info_request(name, []))
        assert replies[-1] == (REP_ACK, b""), replies
        for reply, payload in replies[:-1]:
            assert reply == REP_INFO
            if payload[:2] == b"\0\0":
                self.size, self.flags = struct.unpack(">QH", payload[2:])

    # Transmission.

    def send_request(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        payload: bytes = b"",
        *,
        flags: int = 0,
        magic: int = REQUEST_MAGIC,
        cookie: int | None = None,
    ) -> int:
        """Send a request, with any field off; returns its cookie."""
        if cookie is None:
            self._cookie += 1
            cookie = self._cookie
        if command == CMD_READ:
            self._pending_reads[cookie] = (offset, length)
        header = struct.pack(">IHHQQI", magic, flags, command, cookie, offset, length)
        self.send(header + payload)
        return cookie

    def read_answer(self) -> Answer:
        """Read one whole answer, whatever request it belongs to."""
        (magic,) = struct.unpack(">I", self.receive(4))
        if magic == SIMPLE_REPLY_MAGIC:
            error, cookie = struct.unpack(">IQ", self.receive(12))
            _, length = self._pending_reads.pop(cookie, (0, 0))
            assert error or not (self.structured and length), "a read needs a structured reply"
            return Answer(cookie, error, b"" if error else self.receive(length))
        assert magic == CHUNK_MAGIC, f"{magic:#x} is no reply"
        assert self.structured, "a structured reply was not agreed on"
        return self._read_chunks()

    def _read_chunks(self) -> Answer:
        answer: Answer | None = None
        pieces: list[tuple[int, bytes]] = []
        while True:
            flags, kind, cookie, length = struct.unpack(">HHQI", self.receive(16))
            payload = self.receive(length)
            answer = answer or Answer(cookie, structured=True)
            assert cookie == answer.cookie, "chunks of two answers are mixed"
            if kind == CHUNK_OFFSET_DATA:
                assert length > 8, "an empty data chunk"
                pieces.append((int.from_bytes(payload[:8], "big"), payload[8:]))
            elif kind == CHUNK_OFFSET_HOLE:
                hole_offset, hole = struct.unpack(">QI", payload)
                pieces.append((hole_offset, bytes(hole)))
            elif kind == CHUNK_BLOCK_STATUS:
                (answer.context_id,) = struct.unpack(">I", payload[:4])
                pairs = struct.iter_unpack(">II", payload[4:])
                answer.extents = [(int(extent), int(status)) for extent, status in pairs]
            elif kind & 0x8000:
                answer.error, message_length = struct.unpack(">IH", payload[:6])
                assert length >= 6 + message_length
            else:
                assert kind == CHUNK_NONE, f"unknown chunk {kind}"
            if flags & 1:
                offset, read_length = self._pending_reads.pop(cookie, (0, 0))
                if not answer.error:
                    answer.data = _assemble(pieces, offset, read_length)
                return answer

    def call(
        self, command: int, offset: int = 0, length: int = 0, payload: bytes = b"", flags: int = 0
    ) -> Answer:
        """Send a request and read its answer; raises NbdError where the answer is an error."""
        cookie = self.send_request(command, offset, length, payload, flags=flags)
        answer = self.read_answer()
        assert answer.cookie == cookie
        if answer.error:
            raise NbdError(answer.error)
        return answer

    def read(self, offset: int, length: int) -> bytes:
        """Read a range."""
        return self.call(CMD_READ, offset, length).data

    def write(self, offset: int, data: bytes, *, fua: bool = False) -> None:
        """Write a range."""
        self.call(CMD_WRITE, offset, len(data), data, FLAG_FUA if fua else 0)

    def flush(self) -> None:
        """Make what was acknowledged durable."""
        self.call(CMD_FLUSH)

    def trim(self, offset: int, length: int) -> None:
        """Say that a range is not needed."""
        self.call(CMD_TRIM, offset, length)

    def write_zeroes(self, offset: int, length: int, *, no_hole: bool = False) -> None:
        """Make a range read as zeros."""
        self.call(CMD_WRITE_ZEROES, offset, length, flags=FLAG_NO_HOLE if no_hole else 0)

    def block_status(self, offset: int, length: int) -> list[tuple[int, int]]:
        """Describe a range: (length, flags) with 1 = hole and 2 = reads as zeros."""
        answer = self.call(CMD_BLOCK_STATUS, offset, length)
        assert answer.context_id == self.context_id
        return answer.extents

    def disconnect(self) -> None:
        """Say farewell and wait for the server to close."""
        self.send_request(CMD_DISC)
        assert self.wait_closed() == b""
        self.close()


def _assemble(pieces: list[tuple[int, bytes]], offset: int, length: int) -> bytes:
    """Put the data chunks of a read together; they must cover it once and exactly."""
    data = bytearray()
    for piece_offset, piece in sorted(pieces):
        assert piece_offset == offset + len(data), "data chunks overlap or leave a gap"
        data += piece
    assert len(data) == length, "data chunks do not cover the read"
    return bytes(data)


def info_request(name: bytes, kinds: list[int]) -> bytes:
    """The payload of INFO and GO."""
    body = struct.pack(">I", len(name)) + name + struct.pack(">H", len(kinds))
    return body + b"".join(struct.pack(">H", kind) for kind in kinds)


def meta_query(name: bytes, queries: list[bytes]) -> bytes:
    """The payload of LIST_META_CONTEXT and SET_META_CONTEXT."""
    body = struct.pack(">I", len(name)) + name + struct.pack(">I", len(queries))
    return body + b"".join(struct.pack(">I", len(query)) + query for query in queries)
