# SPDX-License-Identifier: Apache-2.0
"""NBD negotiation, server side: the fixed newstyle handshake, up to the transmission phase.

The handshake is rare, full of strings and counts, and read from somebody we do not trust; so it
is written to be read, not to be fast. When it ends well the socket stands exactly behind the last
byte of the handshake (a client may have sent its first request already: nothing is read ahead),
and the engine takes the socket over.

What bounds a hostile client: the length of an option, the number of options, the number of
queries in an option, and one time limit over the whole handshake. Every refusal is the answer
that the protocol names for the case; where it names none (or the peer speaks something else) the
connection is closed by raising HandshakeError.

Where TLS is offered it is required: until a client has begun it, nothing else is answered, and
nothing that was agreed on before counts. Deliberately not offered: extended headers, oldstyle.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Final

NBD_MAGIC: Final = 0x4E42444D41474943
OPTION_MAGIC: Final = 0x49484156454F5054
REPLY_MAGIC: Final = 0x0003E889045565A9

OPTION_LENGTH_MAX: Final = 64 * 1024
OPTIONS_MAX: Final = 128
QUERIES_MAX: Final = 256
NAME_LENGTH_MAX: Final = 4096
TIME_LIMIT_SECONDS: Final = 10.0

BLOCK_SIZE_MIN: Final = 1
BLOCK_SIZE_PREFERRED: Final = 4096
REQUEST_LENGTH_MAX: Final = 32 * 1024 * 1024

BASE_ALLOCATION: Final = "base:allocation"
BASE_ALLOCATION_ID: Final = 1

_GREETING = struct.Struct(">QQH")
_CLIENT_FLAGS = struct.Struct(">I")
_OPTION = struct.Struct(">QII")
_REPLY = struct.Struct(">QIII")
_EXPORT = struct.Struct(">QH")
_INFO_EXPORT = struct.Struct(">HQH")
_INFO_BLOCK_SIZE = struct.Struct(">HIII")
_U16 = struct.Struct(">H")
_U32 = struct.Struct(">I")
_EXPORT_NAME_PADDING = bytes(124)


class HandshakeFlag(IntFlag):
    """Flags of the greeting and of the client's answer; both sides use the same two bits."""

    FIXED_NEWSTYLE = 1
    NO_ZEROES = 2


class Option(IntEnum):
    """What a client may ask for."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10


class Reply(IntEnum):
    """What the server answers to an option; errors have the top bit set."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = 0x80000001
    ERR_POLICY = 0x80000002
    ERR_INVALID = 0x80000003
    ERR_TLS_REQD = 0x80000005
    ERR_UNKNOWN = 0x80000006
    ERR_TOO_BIG = 0x80000009


class Info(IntEnum):
    """Kinds of information in a Reply.INFO."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class TransmissionFlag(IntFlag):
    """What an export can do, as told to clients and to the kernel."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8


def transmission_flags(read_only: bool, multi_conn: bool = True) -> TransmissionFlag:
    """Tell what the engine honours. SEND_DF is added where structured replies are agreed on."""
    flags = TransmissionFlag.HAS_FLAGS | TransmissionFlag.SEND_FLUSH | TransmissionFlag.SEND_FUA
    if read_only:
        flags |= TransmissionFlag.READ_ONLY
    else:
        flags |= TransmissionFlag.SEND_TRIM | TransmissionFlag.SEND_WRITE_ZEROES
    if multi_conn:
        flags |= TransmissionFlag.CAN_MULTI_CONN
    return flags


class HandshakeError(Exception):
    """The connection cannot go on and is to be closed; the text says why, for the log."""


@dataclass(frozen=True, slots=True)
class Export:
    """One thing to be had from this server. The empty name is the default export."""

    size: int
    read_only: bool = False
    multi_conn: bool = True
    name: str = ""
    description: str = ""


@dataclass(frozen=True, slots=True)
class Negotiated:
    """What both sides agreed on; all that the transmission phase needs to know."""

    export: Export
    structured: bool
    block_status_id: int | None
    flags: TransmissionFlag


Admission = Callable[[Export], str | None]
"""Asked once, when the client is about to enter transmission: None, or why it may not."""


Secure = Callable[[], socket.socket]
"""Begins TLS on the connection and returns the plain, non-blocking socket to go on with."""


class _Refusal(Exception):
    """An option is answered with an error and the handshake goes on."""

    def __init__(self, reply: Reply, message: str) -> None:
        super().__init__(message)
        self.reply = reply


class _Fields:
    """The payload of an option, taken apart from its front; never reads past its end."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def _take(self, length: int) -> bytes:
        if length > len(self._data) - self._at:
            raise _Refusal(Reply.ERR_INVALID, "a length inside the option exceeds the option")
        piece = self._data[self._at : self._at + length]
        self._at += length
        return piece

    def u16(self) -> int:
        (value,) = _U16.unpack(self._take(2))
        return int(value)

    def u32(self) -> int:
        (value,) = _U32.unpack(self._take(4))
        return int(value)

    def text(self) -> str:
        length = self.u32()
        if length > NAME_LENGTH_MAX:
            raise _Refusal(Reply.ERR_TOO_BIG, f"names end at {NAME_LENGTH_MAX} bytes")
        return _text(self._take(length))

    def end(self) -> None:
        if self._at != len(self._data):
            raise _Refusal(Reply.ERR_INVALID, "the option has bytes behind its last field")


def _text(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise _Refusal(Reply.ERR_INVALID, "a name is not UTF-8") from None


class _Session:
    """One handshake: what was agreed on so far, and a method for each option."""

    def __init__(
        self,
        sock: socket.socket,
        exports: Sequence[Export],
        admit: Admission,
        secure: Secure | None,
    ) -> None:
        self._sock = sock
        self._secure = secure
        self._needs_tls = secure is not None
        self._exports = {export.name: export for export in exports}
        self._admit = admit
        self._loop = asyncio.get_running_loop()
        self._client_flags = HandshakeFlag(0)
        self._structured = False
        self._context_export: str | None = None
        self._handlers: dict[int, Callable[[int, bytes], Awaitable[Negotiated | None]]] = {
            Option.LIST: self._list,
            Option.STARTTLS: self._starttls,
            Option.INFO: self._info_or_go,
            Option.GO: self._info_or_go,
            Option.STRUCTURED_REPLY: self._structured_reply,
            Option.LIST_META_CONTEXT: self._list_meta_context,
            Option.SET_META_CONTEXT: self._set_meta_context,
        }

    async def run(self) -> Negotiated | None:
        await self._greet()
        for _ in range(OPTIONS_MAX):
            magic, option, length = _OPTION.unpack(await self._receive(_OPTION.size))
            if magic != OPTION_MAGIC:
                raise HandshakeError("an option does not start with the option magic")
            if length > OPTION_LENGTH_MAX:
                await self._refuse_oversized(option, length)
            data = await self._receive(length)
            if option == Option.EXPORT_NAME:
                if self._needs_tls:
                    raise HandshakeError("the client did not begin TLS")
                return await self._export_name(data)
            if not self._client_flags & HandshakeFlag.FIXED_NEWSTYLE:
                raise HandshakeError(f"option {option} without the fixed newstyle flag")
            if option == Option.ABORT:
                # Some clients are polite, but do not wait for the answer.
                with contextlib.suppress(OSError):
                    await self._answer(option, Reply.ACK)
                return None
            try:
                agreed = await self._handle(option, data)
            except _Refusal as refusal:
                await self._answer(option, refusal.reply, str(refusal).encode())
            else:
                if agreed is not None:
                    return agreed
        raise HandshakeError(f"more than {OPTIONS_MAX} options")

    async def _greet(self) -> None:
        offered = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES
        await self._send(_GREETING.pack(NBD_MAGIC, OPTION_MAGIC, offered))
        (flags,) = _CLIENT_FLAGS.unpack(await self._receive(_CLIENT_FLAGS.size))
        if flags & ~int(offered):
            raise HandshakeError(f"unknown client flags {flags:#x}")
        self._client_flags = HandshakeFlag(flags)

    async def _handle(self, option: int, data: bytes) -> Negotiated | None:
        if self._needs_tls and option != Option.STARTTLS:
            raise _Refusal(Reply.ERR_TLS_REQD, "begin TLS first")
        handler = self._handlers.get(option)
        if handler is None:
            raise _Refusal(Reply.ERR_UNSUP, f"option {option} is not known here")
        return await handler(option, data)

    # The options, in the order of their numbers.

    async def _export_name(self, data: bytes) -> Negotiated:
        """The old way in: it has no error replies, so every refusal closes the connection."""
        try:
            export = self._find(_text(data))
        except _Refusal as refusal:
            raise HandshakeError(str(refusal)) from None
        agreed = self._agree(export)
        refused = self._admit(export)
        if refused is not None:
            raise HandshakeError(refused)
        answer = _EXPORT.pack(export.size, agreed.flags)
        if not self._client_flags & HandshakeFlag.NO_ZEROES:
            answer += _EXPORT_NAME_PADDING
        await self._send(answer)
        return agreed

    async def _list(self, option: int, data: bytes) -> None:
        _Fields(data).end()
        for export in self._exports.values():
            name = export.name.encode()
            description = export.description.encode()
            payload = _U32.pack(len(name)) + name + description
            await self._answer(option, Reply.SERVER, payload)
        await self._answer(option, Reply.ACK)

    async def _starttls(self, option: int, data: bytes) -> None:
        _Fields(data).end()
        if self._secure is None:
            raise _Refusal(Reply.ERR_UNSUP, "TLS is not available here")
        if not self._needs_tls:
            raise _Refusal(Reply.ERR_INVALID, "TLS has begun already")
        await self._answer(option, Reply.ACK)
        self._sock = self._secure()
        self._needs_tls = False
        # Whoever sat between may have said what came before.
        self._structured = False
        self._context_export = None

    async def _info_or_go(self, option: int, data: bytes) -> Negotiated | None:
        fields = _Fields(data)
        name = fields.text()
        wanted = {fields.u16() for _ in range(fields.u16())}
        fields.end()
        export = self._find(name)
        agreed = self._agree(export)
        if option == Option.GO:
            refused = self._admit(export)
            if refused is not None:
                raise _Refusal(Reply.ERR_POLICY, refused)
        for payload in _info_payloads(export, agreed.flags, wanted):
            await self._answer(option, Reply.INFO, payload)
        await self._answer(option, Reply.ACK)
        return agreed if option == Option.GO else None

    async def _structured_reply(self, option: int, data: bytes) -> None:
        _Fields(data).end()
        self._structured = True
        await self._answer(option, Reply.ACK)

    async def _list_meta_context(self, option: int, data: bytes) -> None:
        _, queries = self._meta_queries(data)
        if not queries or BASE_ALLOCATION in queries or "base:" in queries:
            await self._answer_base_allocation(option, context_id=0)
        await self._answer(option, Reply.ACK)

    async def _set_meta_context(self, option: int, data: bytes) -> None:
        # A new selection replaces the last one, and one that fails leaves none.
        self._context_export = None
        export, queries = self._meta_queries(data)
        if BASE_ALLOCATION in queries:
            await self._answer_base_allocation(option, BASE_ALLOCATION_ID)
            self._context_export = export.name
        await self._answer(option, Reply.ACK)

    def _meta_queries(self, data: bytes) -> tuple[Export, list[str]]:
        if not self._structured:
            raise _Refusal(Reply.ERR_INVALID, "ask for structured replies first")
        fields = _Fields(data)
        name = fields.text()
        count = fields.u32()
        if count > QUERIES_MAX:
            raise _Refusal(Reply.ERR_TOO_BIG, f"more than {QUERIES_MAX} queries")
        queries = [fields.text() for _ in range(count)]
        fields.end()
        return self._find(name), queries

    async def _answer_base_allocation(self, option: int, context_id: int) -> None:
        payload = _U32.pack(context_id) + BASE_ALLOCATION.encode()
        await self._answer(option, Reply.META_CONTEXT, payload)

    def _find(self, name: str) -> Export:
        export = self._exports.get(name)
        if export is None:
            raise _Refusal(Reply.ERR_UNKNOWN, f"no export named {name[:64]!r}")
        return export

    def _agree(self, export: Export) -> Negotiated:
        flags = transmission_flags(export.read_only, export.multi_conn)
        if self._structured:
            flags |= TransmissionFlag.SEND_DF
        chosen = self._structured and self._context_export == export.name
        return Negotiated(
            export=export,
            structured=self._structured,
            block_status_id=BASE_ALLOCATION_ID if chosen else None,
            flags=flags,
        )

    # The wire.

    async def _refuse_oversized(self, option: int, length: int) -> None:
        """Say so where the protocol has words for it, and close without reading the payload."""
        if option != Option.EXPORT_NAME and self._client_flags & HandshakeFlag.FIXED_NEWSTYLE:
            message = f"options end at {OPTION_LENGTH_MAX} bytes"
            await self._answer(option, Reply.ERR_TOO_BIG, message.encode())
        raise HandshakeError(f"option {option} of {length} bytes")

    async def _answer(self, option: int, reply: Reply, payload: bytes = b"") -> None:
        await self._send(_REPLY.pack(REPLY_MAGIC, option, reply, len(payload)) + payload)

    async def _send(self, data: bytes) -> None:
        await self._loop.sock_sendall(self._sock, data)

    async def _receive(self, length: int) -> bytes:
        buffer = bytearray(length)
        view = memoryview(buffer)
        while view:
            received = await self._loop.sock_recv_into(self._sock, view)
            if received == 0:
                raise HandshakeError("the client closed the connection")
            view = view[received:]
        return bytes(buffer)


def _info_payloads(export: Export, flags: TransmissionFlag, wanted: set[int]) -> list[bytes]:
    """The answers to INFO and GO: the export itself always, the rest when asked for."""
    payloads = [_INFO_EXPORT.pack(Info.EXPORT, export.size, flags)]
    if Info.NAME in wanted:
        payloads.append(_U16.pack(Info.NAME) + export.name.encode())
    if Info.DESCRIPTION in wanted and export.description:
        payloads.append(_U16.pack(Info.DESCRIPTION) + export.description.encode())
    if Info.BLOCK_SIZE in wanted:
        payloads.append(
            _INFO_BLOCK_SIZE.pack(
                Info.BLOCK_SIZE, BLOCK_SIZE_MIN, BLOCK_SIZE_PREFERRED, REQUEST_LENGTH_MAX
            )
        )
    return payloads


def _admit_everybody(export: Export) -> str | None:
    return None


async def negotiate(
    sock: socket.socket,
    exports: Sequence[Export],
    *,
    admit: Admission = _admit_everybody,
    time_limit: float = TIME_LIMIT_SECONDS,
    secure: Secure | None = None,
) -> Negotiated | None:
    """Run the handshake on a non-blocking stream socket, which stays the caller's.

    With `secure` TLS is required; what it returns is then the socket to serve.

    Returns None when the client ended it politely (ABORT). Raises HandshakeError when the
    connection is of no further use.
    """
    try:
        async with asyncio.timeout(time_limit):
            return await _Session(sock, exports, admit, secure).run()
    except TimeoutError:
        raise HandshakeError(f"the handshake took longer than {time_limit:g} s") from None
    except OSError as error:
        raise HandshakeError(f"the connection failed: {error.strerror}") from error
