# SPDX-License-Identifier: Apache-2.0
"""Unix sockets in the file system, where a path that exists is a server that listens.

A socket appears under its path only once it listens: it is bound under a name of its own beside
it and linked into place. So nobody who waits for the path is refused, and nobody takes a server
that is about to listen for a dead one. Addresses hold 107 bytes, so longer names go by an open
descriptor of their folder.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import socket
import stat
from collections.abc import Iterator
from typing import Final

ADDRESS_LENGTH_MAX: Final = 107


@contextlib.contextmanager
def short_path(path: str | os.PathLike[str]) -> Iterator[str]:
    """A name for the socket `path` that fits an address, which holds 107 bytes, however long it is.

    The directory is named by an open descriptor; OSError when it is not there.
    """
    folder, name = os.path.split(os.fspath(path))
    directory = os.open(folder or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{name}"
    finally:
        os.close(directory)


def listen_at(path: str, backlog: int, *, mode: int = 0o600, group: int = -1) -> socket.socket:
    """A stream socket that listens on `path`, with this mode and (where that is allowed) group.

    A socket there that nobody listens on is replaced. OSError otherwise, with EADDRINUSE where
    somebody listens, EEXIST for a file that is no socket, ENAMETOOLONG for a path that clients
    could not give; nothing is left behind then.
    """
    if len(os.fsencode(path)) > ADDRESS_LENGTH_MAX:
        raise OSError(errno.ENAMETOOLONG, "the path is too long", path)
    _remove_stale(path)
    own = f"{path}.{secrets.token_hex(4)}"
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    umask = os.umask(0o177)
    try:
        _bind(sock, own)
        with contextlib.suppress(PermissionError):
            os.chown(own, -1, group)
        os.chmod(own, mode)
        sock.listen(backlog)
        # A link, unlike a rename, replaces nothing: of two that begin at once the first wins.
        os.link(own, path)
    except FileExistsError as error:
        sock.close()
        raise OSError(errno.EADDRINUSE, "somebody listens there", path) from error
    except BaseException:
        sock.close()
        raise
    finally:
        os.umask(umask)
        with contextlib.suppress(OSError):
            os.unlink(own)
    return sock


def _bind(sock: socket.socket, path: str) -> None:
    """By its name where it fits, since tools show what was bound."""
    if len(os.fsencode(path)) <= ADDRESS_LENGTH_MAX:
        sock.bind(path)
        return
    with short_path(path) as name:
        sock.bind(name)


def _remove_stale(path: str) -> None:
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise OSError(errno.EEXIST, "it exists and is not a socket", path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        result = probe.connect_ex(path)
    if result != errno.ECONNREFUSED:
        raise OSError(errno.EADDRINUSE, "somebody listens there", path)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
