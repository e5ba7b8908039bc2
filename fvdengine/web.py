# SPDX-License-Identifier: Apache-2.0
"""What a web server says of a base: its length and its ETag, and how nbdkit is told to read it.

Redirections are not followed: they would lead where no pattern allowed it. Credentials come from
the environment and from files named there, never from an image and never on a command line:
FVD_HTTP_USER with FVD_HTTP_PASSWORD_FILE, FVD_HTTP_CAINFO; for ssh FVD_SSH_PASSWORD_FILE,
FVD_SSH_IDENTITY, or the agent and the keys of the user.
"""

import base64
import os
import re
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from fvdengine.children import need_program
from fvdengine.uris import Uri

_RANGE = re.compile(r"bytes 0-0/([0-9]{1,18})")


@dataclass(frozen=True, slots=True)
class Answer:
    """What the server said: `problem` is "" where the base can be read."""

    length: int = 0
    tag: str = ""
    problem: str = ""


def ask(uri: Uri, seconds: float) -> Answer:
    """Ask for the first byte: the answer tells length, ETag, and that ranges are understood."""
    # Imported here: a worker over a local base must start quickly.
    import http.client
    import ssl

    port = uri.port
    try:
        connection: http.client.HTTPConnection
        if uri.scheme == "https":
            context = ssl.create_default_context(cafile=os.environ.get("FVD_HTTP_CAINFO"))
            connection = http.client.HTTPSConnection(
                uri.host, port, timeout=seconds, context=context
            )
        else:
            connection = http.client.HTTPConnection(uri.host, port, timeout=seconds)
        parts = urlsplit(uri.text)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        try:
            connection.request("GET", target, headers={"Range": "bytes=0-0", **_credentials()})
            reply = connection.getresponse()
        finally:
            connection.close()
    except (OSError, http.client.HTTPException) as error:
        return Answer(problem=str(error) or type(error).__name__)
    if reply.status == 206:
        found = _RANGE.fullmatch(reply.headers.get("Content-Range", "").strip())
        if found is not None:
            tag = reply.headers.get("ETag") or reply.headers.get("Last-Modified") or ""
            return Answer(int(found[1]), tag.strip()[:1000])
    if reply.status in (200, 206):
        return Answer(problem="the server does not serve parts of a file")
    if 300 <= reply.status < 400:
        return Answer(problem="the server redirects; name the final address")
    return Answer(problem=f"the server says {reply.status} {reply.reason}")


def _credentials() -> dict[str, str]:
    user, name = os.environ.get("FVD_HTTP_USER"), os.environ.get("FVD_HTTP_PASSWORD_FILE")
    if not user or not name:
        return {}
    with open(name, encoding="utf-8") as file:
        password = file.readline().rstrip("\n")
    word = base64.b64encode(f"{user}:{password}".encode()).decode()
    return {"Authorization": f"Basic {word}"}


def nbdkit_argv(socket: str, uri: Uri) -> list[str]:
    """The command that serves what the URI names, read-only, on a Unix socket."""
    start = [
        need_program("nbdkit", "nbdkit", "bases behind http and ssh"),
        "--foreground", "--readonly", f"--unix={socket}",
    ]  # fmt: skip
    return [*start, *(_ssh_words(uri) if uri.scheme == "ssh" else _curl_words(uri))]


def _curl_words(uri: Uri) -> list[str]:
    protocols = "https" if uri.scheme == "https" else "http,https"
    words = ["curl", f"url={uri.text}", f"protocols={protocols}", "followlocation=false"]
    names = {"user": "FVD_HTTP_USER", "cainfo": "FVD_HTTP_CAINFO"}
    words += [f"{key}={os.environ[name]}" for key, name in names.items() if os.environ.get(name)]
    if os.environ.get("FVD_HTTP_PASSWORD_FILE"):
        words.append(f"password=+{os.environ['FVD_HTTP_PASSWORD_FILE']}")
    return words


def _ssh_words(uri: Uri) -> list[str]:
    words = ["ssh", f"host={uri.host}", f"path={unquote(uri.path)}"]
    user = urlsplit(uri.text).username
    if user:
        words.append(f"user={unquote(user)}")
    if uri.port is not None:
        words.append(f"port={uri.port}")
    if os.environ.get("FVD_SSH_IDENTITY"):
        words.append(f"identity={os.environ['FVD_SSH_IDENTITY']}")
    if os.environ.get("FVD_SSH_PASSWORD_FILE"):
        words.append(f"password=+{os.environ['FVD_SSH_PASSWORD_FILE']}")
    return words
