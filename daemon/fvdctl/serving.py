# SPDX-License-Identifier: Apache-2.0
"""Speak to the server of `fvdctl serve` that has an image open: one question, one answer."""

from __future__ import annotations

import errno
import json
import socket
from typing import Any, Final

from fvdapi.errors import ApiError
from fvdengine.rendezvous import may_command, peer_user, server_address

ANSWER_SECONDS: Final = 300.0
ANSWER_BYTES_MAX: Final = 128 * 1024

_NOBODY: Final = (errno.ECONNREFUSED, errno.ENOENT, errno.EACCES, errno.EPERM)


def ask_server(path: str, op: str, **arguments: object) -> dict[str, Any] | None:
    """What the server of the image at `path` answers to `op`; None when there is no server that
    could be asked. ApiError with its own words when it refuses."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(ANSWER_SECONDS)
        try:
            sock.connect(server_address(path))
            if not may_command(peer_user(sock)):
                return None
            sock.send(json.dumps({"id": 1, "op": op, **arguments}).encode())
            packet = sock.recv(ANSWER_BYTES_MAX)
        except TimeoutError as error:
            raise ApiError("timed_out", f"the server of {path} does not answer") from error
        except OSError as error:
            if error.errno in _NOBODY:
                return None
            raise _lost(path) from error
    try:
        answer = json.loads(packet)
        if answer.get("ok") is True:
            return dict(answer)
        said = answer["error"]
        raise ApiError(str(said["code"]), str(said["message"]), hint=str(said.get("hint", "")))
    except (ValueError, KeyError, TypeError, AttributeError) as bad:
        raise _lost(path) from bad


def is_served(path: str) -> bool:
    """Whether a server of ours has the image at `path` open."""
    return ask_server(path, "ping") is not None


def _lost(path: str) -> ApiError:
    return ApiError(
        "worker_failed",
        f"the server of {path} ended, or answered nothing that makes sense",
        hint=f"fvdctl info {path} shows whether the image was changed",
    )
