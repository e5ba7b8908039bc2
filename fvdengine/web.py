# SPDX-License-Identifier: Apache-2.0
"""What a web server says of a base: its length and its ETag, and how nbdkit is told to read it.
Both is done by web_export.py.

Redirections are not followed: they would lead where no pattern allowed it. Credentials come from
the environment and from files named there, never from an image and never on a command line:
FVD_HTTP_USER with FVD_HTTP_PASSWORD_FILE, FVD_HTTP_CAINFO; for ssh FVD_SSH_PASSWORD_FILE,
FVD_SSH_IDENTITY, or the agent and the keys of the user.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from fvdengine.children import need_program, python_plugin
from fvdengine.uris import Uri

PURPOSE = "bases behind http"
SCRIPT = str(Path(__file__).with_name("web_export.py"))


@dataclass(frozen=True, slots=True)
class Answer:
    """What the server said: `problem` is "" where the base can be read."""

    length: int = 0
    tag: str = ""
    problem: str = ""


def ask(uri: Uri, seconds: float) -> Answer:
    """Ask for the first byte: the answer tells length, ETag, and that ranges are understood."""
    # Imported here: a worker over a local base must start quickly.
    from http.client import HTTPException

    from fvdengine import web_export

    files = _files()
    try:
        length, tag = web_export.ask(
            uri.text, seconds, files.get("cainfo", ""), files.get("password-file", "")
        )
    except (OSError, ValueError, HTTPException, web_export.Unfit) as error:
        return Answer(problem=str(error) or type(error).__name__)
    return Answer(length, tag)


def _files() -> dict[str, str]:
    """The files that the environment names, as they are found from any directory."""
    names = {"cainfo": "FVD_HTTP_CAINFO", "password-file": "FVD_HTTP_PASSWORD_FILE"}
    found = {key: os.environ.get(name) for key, name in names.items()}
    return {key: os.path.abspath(name) for key, name in found.items() if name}


def nbdkit_argv(socket: str, uri: Uri, length: int = 0, identity: str = "") -> list[str]:
    """The command that serves what the URI names, read-only, on a Unix socket. A file on a web
    server only while it has this length and this identity (Remote.identity), where they are known.
    """
    if uri.scheme == "ssh":
        nbdkit = need_program("nbdkit", "nbdkit", "bases behind ssh")
        return [nbdkit, "--foreground", "--readonly", f"--unix={socket}", *_ssh_words(uri)]
    words = [f"uri={uri.text}", f"length={length}", f"identity={identity}"]
    words += [f"{key}={name}" for key, name in _files().items()]
    return [*python_plugin(socket, PURPOSE), SCRIPT, *words]


def _ssh_words(uri: Uri) -> list[str]:
    words = ["ssh", f"host={uri.host}", f"path={uri.path}"]
    if uri.user:
        words.append(f"user={uri.user}")
    if uri.port is not None:
        words.append(f"port={uri.port}")
    if os.environ.get("FVD_SSH_IDENTITY"):
        words.append(f"identity={os.environ['FVD_SSH_IDENTITY']}")
    if os.environ.get("FVD_SSH_PASSWORD_FILE"):
        words.append(f"password=+{os.environ['FVD_SSH_PASSWORD_FILE']}")
    return words
