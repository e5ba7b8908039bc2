# SPDX-License-Identifier: Apache-2.0
"""URIs of remote bases and data files: which are understood, and which may be followed.

A URI in an image comes from an untrusted source, as a path does: following it makes this host
connect somewhere. So it is followed only where a pattern allows it. `--allow-uri` and the
configuration give patterns SCHEME://[USER@]HOST[:PORT][/PATH]; HOST may be `*` or begin with `*.`,
a USER allows only himself, none any, a PATH what lies under it; for Unix sockets the path is the
socket's. A URI that a user spells out on the command line, as the base of a new image, is its own
pattern. Nothing is probed.
"""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from fvdengine.errors import InvalidOption, InvalidUri, UriNotAllowed

NBD_SCHEMES = ("nbd", "nbds", "nbd+unix", "nbds+unix")
WEB_SCHEMES = ("http", "https")
SCHEMES = (*NBD_SCHEMES, *WEB_SCHEMES, "ssh", "s3")
URI_MAX = 1023  # what base_img can hold

_NBD_EXAMPLE = "nbd://HOST:PORT/EXPORT or nbd+unix:///EXPORT?socket=PATH"
_EXAMPLES = {
    "nbd": _NBD_EXAMPLE,
    "nbds": _NBD_EXAMPLE.replace("nbd:", "nbds:").replace("nbd+", "nbds+"),
    "http": "http://HOST/PATH",
    "https": "https://HOST/PATH",
    "ssh": "ssh://USER@HOST/PATH",
    "s3": "s3://BUCKET/KEY",
}

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?|[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*")
_PATTERN = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<rest>[\x21-\x7e]*)")


@dataclass(frozen=True, slots=True)
class Uri:
    """A URI that is understood. `path` is that of a socket where the scheme ends in +unix."""

    text: str
    scheme: str
    host: str
    port: int | None
    path: str
    user: str = ""

    @property
    def is_nbd(self) -> bool:
        return self.scheme in NBD_SCHEMES

    @property
    def is_unix(self) -> bool:
        return self.scheme.endswith("+unix")

    @property
    def shown(self) -> str:
        """The URI as messages show it: what may be a secret is left out."""
        return self.text if self.is_nbd else self.text.partition("?")[0]

    @property
    def pattern(self) -> str:
        """The narrowest usual pattern that allows it."""
        if self.is_unix:
            return f"{self.scheme}://{quote(self.path)}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        if self.user:
            host = f"{quote(self.user)}@{host}"
        return f"{self.scheme}://{host}" + (f":{self.port}" if self.port is not None else "")


def is_uri(text: str) -> bool:
    """Whether a name is meant as a URI rather than as a path."""
    return _SCHEME.match(text) is not None


def parse_uri(text: str) -> Uri:
    """Take a URI apart; raise InvalidUri with the reason where it cannot be used."""

    def need(holds: object, reason: str) -> None:
        if not holds:
            raise _invalid(text, reason)

    need(len(text) <= URI_MAX, f"it is longer than {URI_MAX} bytes")
    need(re.fullmatch(r"[\x21-\x7e]+", text), "it has characters that must be written as %XX")
    need("\\" not in text, "it has a backslash")
    need(is_uri(text), "it has no scheme")
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise _invalid(text, str(error)) from error
    need(parts.scheme in SCHEMES, f"the scheme is not one of {', '.join(SCHEMES)}")
    need(not parts.fragment and "#" not in text, "it has a fragment")
    need(parts.password is None, "it holds a password, which an image must not")
    need(parts.username is None or parts.scheme == "ssh", "it names a user")
    need(port != 0, "port 0 is none")
    path, user = unquote(parts.path), unquote(parts.username or "")
    need("\0" not in path + user, "it has a NUL")
    need(not {".", ".."} & set(path.split("/")), "its path has a . or .. in it")
    if parts.scheme.endswith("+unix"):
        need(not parts.netloc, "a Unix socket has no host; write nbd+unix:///EXPORT?socket=PATH")
        return Uri(text, parts.scheme, "", None, _socket_path(text, parts.query))
    need(parts.hostname, "it names no host")
    host = parts.hostname or ""
    need(_HOST.fullmatch(host), "the host is not a name or an address")
    if parts.scheme not in WEB_SCHEMES:
        need(not parts.query, "parameters are not taken from it")
    if parts.scheme == "ssh":
        need(len(path) > 1, "it names no file")
    if parts.scheme == "s3":
        need(len(path) > 1, "it names no object; write s3://BUCKET/KEY")
        need(port is None, "a bucket has no port")
    return Uri(text, parts.scheme, host, port, path, user)


def _invalid(text: str, reason: str) -> InvalidUri:
    """The error, with an example of the scheme that seems to be meant."""
    scheme = text.partition(":")[0].lower()
    example = _EXAMPLES.get(scheme.partition("+")[0], _NBD_EXAMPLE)
    return InvalidUri(uri=text[:200], reason=reason, example=example)


def _socket_path(text: str, query: str) -> str:
    try:
        given = parse_qsl(query, keep_blank_values=True, strict_parsing=True, max_num_fields=8)
    except ValueError:
        given = []
    if [name for name, _ in given] != ["socket"]:
        raise _invalid(text, "it must have socket=PATH as its only parameter")
    path = given[0][1]
    if not path.startswith("/") or "\0" in path:
        raise _invalid(text, "the path of its socket is not absolute")
    return path


def check_patterns(patterns: Iterable[str]) -> None:
    """Raise InvalidOption where one of the patterns of --allow-uri means nothing."""
    for pattern in patterns:
        found = _PATTERN.fullmatch(pattern)
        if found is None:
            raise InvalidOption(
                option="--allow-uri", reason=f"{pattern} is not SCHEME://HOST[:PORT][/PATH]",
                hint="For example nbd://*.example.org, or nbd+unix:///run/golden.",
            )  # fmt: skip
        if found["scheme"] not in SCHEMES:
            raise InvalidOption(
                option="--allow-uri", reason=f"{pattern} has an unknown scheme",
                hint=f"Known are {', '.join(SCHEMES)}.",
            )  # fmt: skip


def is_allowed(uri: Uri, patterns: Iterable[str]) -> bool:
    """Whether one of the patterns allows the URI, or is the URI itself."""
    return any(pattern == uri.text or _matches(uri, pattern) for pattern in patterns)


def check_allowed(uri: Uri, patterns: Iterable[str], image_path: str, role: str = "base") -> None:
    """Raise UriNotAllowed, which names the pattern that would allow it."""
    if not is_allowed(uri, patterns):
        raise UriNotAllowed(
            path=image_path, uri=uri.shown, role=role, pattern=uri.pattern
        )


def _matches(uri: Uri, pattern: str) -> bool:
    found = _PATTERN.fullmatch(pattern)
    if found is None or found["scheme"] != uri.scheme or "?" in pattern:
        return False
    if uri.is_unix:
        # Symlinks resolved on both sides, as for files.
        allowed = unquote(found["rest"])
        return allowed in ("", "/") or _lies_under(
            os.path.realpath(uri.path), os.path.realpath(allowed)
        )
    place, slash, path = found["rest"].partition("/")
    return _is_same_place(uri, place) and (not slash or _lies_under(uri.path, "/" + path))


def _is_same_place(uri: Uri, place: str) -> bool:
    try:
        parts = urlsplit(f"//{place}")
        port, host, user = parts.port, parts.hostname or "", parts.username
    except ValueError:
        return False
    if user is not None and unquote(user) != uri.user:
        return False
    if port is not None and port != uri.port:
        return False
    if host == "*":
        return True
    if host.startswith("*."):
        return uri.host.endswith(host[1:]) and len(uri.host) > len(host) - 1
    return host == uri.host and host != ""


def _lies_under(path: str, root: str) -> bool:
    root = root.rstrip("/")
    return path == root or path.startswith(root + "/")
