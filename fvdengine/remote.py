# SPDX-License-Identifier: Apache-2.0
"""Bases behind URIs: where the engine finds them, how long they are, what they are known by.

A remote base need not be reachable when an image is opened: what is local is served without it,
and the rest waits. Then its length is what the image remembers, and the engine refuses a server
that turns out to have another one. So an unreachable base is a warning, a changed one an error.
"""

import contextlib
import errno
import hashlib
import os
import struct
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from fvdengine import foreign, s3, uris, web
from fvdengine.children import Child, start_child
from fvdengine.errors import (
    BaseUnreachable,
    DataServerUnreachable,
    EngineMissing,
    ProgramMissing,
    UnsupportedUriFormat,
    UnusableForeignBase,
)
from fvdengine.uris import Uri
from fvdengine.web import Answer

# How long create waits for a server, and an open, which can do without.
CREATE_SECONDS = 15.0
OPEN_SECONDS = 1.0
ZERO_SECONDS = 60.0  # for each request: a server may have to write the zeros
CHILD_OPEN_SECONDS = 5.0  # for a server that has to be started first
CHILD_POLL_SECONDS = 0.02
NOT_ASKED = "it was not asked"


@dataclass(frozen=True, slots=True)
class Remote:
    """A base that the engine reaches through an NBD server.

    uri: of the server. keeper: a descriptor that is held while the base is used. length: bytes;
    is_reached: whether that is what the server says, else it is what the image remembers, which is
    exact or the least that it needs. tag: what the server offers to recognise the content by;
    file_id: for a local file in another format, what the file itself is recognised by. is_late: it
    is a file that somebody else waits for and serves (late.py).
    """

    uri: str
    keeper: int
    length: int
    is_reached: bool = True
    is_exact: bool = True
    tag: str = ""
    file_id: bytes = b""
    is_late: bool = False

    @property
    def options(self) -> dict[str, int | bool]:
        """What the engine wants to know of it."""
        return {"length": self.length, "exact": self.is_exact, "keeper": self.keeper}

    @property
    def identity(self) -> bytes:
        """The field base_id: SHA-256 of the tag and the length."""
        return identity(self.tag, self.length)


@dataclass(frozen=True, slots=True)
class Remembered:
    """What an image knows of its base: the length, whether it is exactly this, and the identity
    that it must have, b"" where any will do."""

    length: int
    is_exact: bool
    identity: bytes = b""


def identity(tag: str, length: int) -> bytes:
    """What a base behind a URI is recognised by."""
    return hashlib.sha256(tag.encode() + struct.pack("<xQ", length)).digest()


def open_remote(
    uri: Uri, image_format: str, image_path: str, known: Remembered | None, seconds: float
) -> tuple[Remote, str]:
    """Return the base and a warning, "" if there is none; the caller closes `keeper`.

    With `known` a server that cannot be reached in `seconds` is a warning, else it raises
    BaseUnreachable. With 0 seconds no attempt is made.
    """
    if image_format != "raw":
        raise UnsupportedUriFormat(path=image_path, uri=uri.shown, format=image_format)
    if uri.is_nbd:
        answer = _ask_export(uri.text, seconds)
        return _settle(uri.text, _new_keeper(), answer, uri.shown, known)
    told: Answer | None = None
    if uri.scheme != "ssh" and seconds > 0:
        told = s3.ask(uri, seconds) if uri.scheme == "s3" else web.ask(uri, seconds)
        if told.problem and known is None:
            raise BaseUnreachable(base=uri.shown, reason=told.problem)
    child = start_child(lambda socket: _child_argv(socket, uri, told, known))
    return _settle(child.uri, child.keeper, told or _ask_child(child, seconds), uri.shown, known)


def _child_argv(
    socket: str, uri: Uri, told: Answer | None, known: Remembered | None
) -> list[str]:
    """The command of the child; it serves what its server told of just now, else what the image
    remembers."""
    reached = told if told is not None and not told.problem else None
    if uri.scheme == "s3":
        return s3.nbdkit_argv(socket, uri, reached.tag if reached is not None else "")
    if reached is not None:
        wanted = identity(reached.tag, reached.length).hex()
        return web.nbdkit_argv(socket, uri, reached.length, wanted)
    if known is not None:
        length = known.length if known.is_exact else 0
        return web.nbdkit_argv(socket, uri, length, known.identity.hex())
    return web.nbdkit_argv(socket, uri)


def data_server_length(uri: Uri) -> int:
    """Return the length in bytes of the export that an image's data shall lie in.

    Raise DataServerUnreachable when it does not answer within CREATE_SECONDS, or takes no writes.
    """
    answer = _ask_export(uri.text, CREATE_SECONDS, writable=True)
    if answer.problem:
        raise DataServerUnreachable(data=uri.shown, reason=answer.problem)
    return answer.length


def wait_for_data_server(uri: Uri, seconds: float, *, writable: bool) -> Iterator[str]:
    """Wait until the server of an image's data answers: at most `seconds`, then raise
    DataServerUnreachable. Yields why it does not, once, if it does not at once."""
    end = time.monotonic() + seconds
    answer = _ask_export(uri.text, seconds, writable=writable)
    if not answer.problem:
        return
    yield answer.problem
    if (left := end - time.monotonic()) > 0:
        answer = _ask_export(uri.text, left, writable=writable, once=False)
    if answer.problem:
        raise DataServerUnreachable(data=uri.shown, reason=answer.problem)


def data_server_holds_data(uri: Uri) -> bool:
    """Whether the export reads as anything but zeros, or is too large to find out by reading.

    Raises DataServerUnreachable.
    """
    from fvdcore import export_holds_data

    with _as_unreachable(uri):
        return export_holds_data(uri.text, CREATE_SECONDS)


def zero_data_server(uri: Uri, parts: Iterable[tuple[int, int]]) -> None:
    """Make the parts (offset, length) in bytes of the export read as zeros, and all that is
    written to it durable. Raises DataServerUnreachable."""
    from fvdcore import zero_export

    with _as_unreachable(uri):
        zero_export(uri.text, ZERO_SECONDS, parts)


@contextlib.contextmanager
def _as_unreachable(uri: Uri) -> Iterator[None]:
    from fvdcore import EngineFault

    try:
        yield
    except EngineFault as error:
        reason = error.reason or os.strerror(error.errno)
        raise DataServerUnreachable(data=uri.shown, reason=reason) from None


def open_foreign(
    fd: int, path: str, image_format: str, known: Remembered | None, seconds: float
) -> tuple[Remote, str]:
    """The same for an open file in another program's format; `fd` is duplicated."""
    foreign.check_self_contained(fd, path, image_format)
    child = start_child(lambda socket: foreign.qemu_nbd_argv(socket, image_format), pass_fd=fd)
    answer = _ask_child(child, seconds)
    if child.exits and answer.problem and known is None:
        os.close(child.keeper)
        raise UnusableForeignBase(base=path, format=image_format, reason=answer.problem)
    return _settle(child.uri, child.keeper, answer, path, known)


def _settle(
    uri: str, keeper: int, answer: Answer, shown: str, known: Remembered | None
) -> tuple[Remote, str]:
    """Take the server's word, or what the image knows."""
    if answer.length or not answer.problem:
        return Remote(uri, keeper, answer.length, tag=answer.tag), ""
    if known is None:
        os.close(keeper)
        raise BaseUnreachable(base=shown, reason=answer.problem)
    warning = ""
    if answer.problem != NOT_ASKED:
        warning = (
            f"the base {shown} cannot be reached now ({answer.problem}): "
            "what is not local waits for it"
        )
    return Remote(uri, keeper, known.length, False, known.is_exact), warning


def _new_keeper() -> int:
    """Return a descriptor that stands for a server nobody has to keep. Like any keeper it is the
    writing end of a pipe, so that whoever takes it for a file with content fails at once."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    os.close(reading)
    return writing


def _ask_export(
    uri: str, seconds: float, *, writable: bool = False, once: bool = True
) -> Answer:
    """Ask an NBD server for the length of an export."""
    if seconds <= 0:
        return Answer(problem=NOT_ASKED)
    try:
        from fvdcore import EngineFault, export_length
    except ImportError as error:
        raise EngineMissing(reason=str(error)) from error
    try:
        return Answer(export_length(uri, seconds, once=once, writable=writable))
    except EngineFault as error:
        if error.errno == errno.ENOENT:
            raise ProgramMissing(
                program="libnbd", purpose="remote bases", package="libnbd0"
            ) from None
        return Answer(problem=error.reason or os.strerror(error.errno))


def _ask_child(child: Child, seconds: float) -> Answer:
    """Ask a child's export as soon as it serves; give up when it has ended by itself."""
    try:
        return _wait_for_child(child, seconds)
    except BaseException:
        os.close(child.keeper)
        raise


def _wait_for_child(child: Child, seconds: float) -> Answer:
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        if os.path.exists(child.socket):
            answer = _ask_export(child.uri, left)
            if not answer.problem:
                return answer
        with child.changed:
            if child.exits or child.changed.wait(CHILD_POLL_SECONDS):
                words = child.last_words() or "the server of the base ended"
                return Answer(problem=words)
    return Answer(problem=child.last_words() or "no answer" if seconds > 0 else NOT_ASKED)


def parse_allowed(
    name: str, patterns: tuple[str, ...], image_path: str, role: str = "base"
) -> Uri:
    """Return the URI that an image names; raise InvalidUri, UriNotAllowed, InvalidOption."""
    uris.check_patterns(pattern for pattern in patterns if pattern != name)
    uri = uris.parse_uri(name)
    uris.check_allowed(uri, patterns, image_path, role)
    return uri
