# SPDX-License-Identifier: Apache-2.0
"""Bases behind URIs: where the engine finds them, how long they are, what they are known by.

A remote base need not be reachable when an image is opened: what is local is served without it,
and the rest waits. Then its length is what the image remembers, and the engine refuses a server
that turns out to have another one. So an unreachable base is a warning, a changed one an error.
"""

import errno
import hashlib
import os
import struct
from dataclasses import dataclass

from fvdengine import uris
from fvdengine.errors import (
    BaseUnreachable,
    EngineMissing,
    ProgramMissing,
    UnsupportedUriFormat,
)
from fvdengine.uris import Uri

# How long create waits for a server, and an open, which can do without.
CREATE_SECONDS = 15.0
OPEN_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Remote:
    """A base that the engine reaches through an NBD server.

    uri: of the server. keeper: a descriptor that is held while the base is used. length: bytes;
    is_reached: whether that is what the server says, else it is what the image remembers, which is
    exact or the least that it needs. tag: what the server offers to recognise the content by.
    """

    uri: str
    keeper: int
    length: int
    is_reached: bool = True
    is_exact: bool = True
    tag: str = ""

    @property
    def options(self) -> dict[str, int | bool]:
        """What the engine wants to know of it."""
        return {"length": self.length, "exact": self.is_exact, "keeper": self.keeper}

    @property
    def identity(self) -> bytes:
        """The field base_id: SHA-256 of the tag and the length."""
        return hashlib.sha256(self.tag.encode() + struct.pack("<xQ", self.length)).digest()


@dataclass(frozen=True, slots=True)
class Remembered:
    """What an image knows of its base: the length, and whether it is exactly this."""

    length: int
    is_exact: bool


def open_remote(
    uri: Uri, image_format: str, image_path: str, remembered: Remembered | None,
    seconds: float = OPEN_SECONDS,
) -> tuple[Remote, str]:
    """Return the base and a warning, "" if there is none; the caller closes `keeper`.

    With `remembered` a server that cannot be reached in `seconds` is a warning, else it raises
    BaseUnreachable. With 0 seconds no attempt is made.
    """  # fmt: skip
    if image_format != "raw":
        raise UnsupportedUriFormat(path=image_path, uri=uri.shown, format=image_format)
    keeper = _new_keeper()
    try:
        reason = ""
        if seconds > 0 or remembered is None:
            length, reason = _ask_length(uri.text, seconds or CREATE_SECONDS)
            if not reason:
                return Remote(uri.text, keeper, length), ""
        if remembered is None:
            raise BaseUnreachable(base=uri.shown, reason=reason)
        warning = ""
        if reason:
            warning = (
                f"the base {uri.shown} of {image_path} cannot be reached now ({reason}): "
                "what is not local waits for it"
            )
        known = Remote(uri.text, keeper, remembered.length, False, remembered.is_exact)
        return known, warning
    except BaseException:
        os.close(keeper)
        raise


def _new_keeper() -> int:
    """Return a descriptor that stands for a server nobody has to keep. Like any keeper it is the
    writing end of a pipe, so that whoever takes it for a file with content fails at once."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    os.close(reading)
    return writing


def _ask_length(uri: str, seconds: float) -> tuple[int, str]:
    """Return the export's length, or why it cannot be had."""
    try:
        from fvdcore import EngineFault, export_length
    except ImportError as error:
        raise EngineMissing(reason=str(error)) from error
    try:
        return export_length(uri, seconds, once=True), ""
    except EngineFault as error:
        if error.errno == errno.ENOENT:
            raise ProgramMissing(
                program="libnbd", purpose="remote bases", package="libnbd0"
            ) from None
        return 0, error.reason or os.strerror(error.errno)


def parse_allowed(
    name: str, patterns: tuple[str, ...], image_path: str, role: str = "base"
) -> Uri:
    """Return the URI that an image names; raise InvalidUri, UriNotAllowed, InvalidOption."""
    uris.check_patterns(pattern for pattern in patterns if pattern != name)
    uri = uris.parse_uri(name)
    uris.check_allowed(uri, patterns, image_path, role)
    return uri
