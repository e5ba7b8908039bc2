# SPDX-License-Identifier: Apache-2.0
"""Where the server of an image can be spoken to while it has the image open.

An address in Linux's abstract namespace of Unix sockets, made from which file the image is: nothing
has to be named, nothing is left behind however the server ends, and only one process can have an
image open for writing. Names there have no permissions, so both sides look at who the other is.
"""

import os
import socket
import stat
import struct


def server_address(path: str) -> str:
    """The address for the image at `path`; OSError when there is no such file."""
    found = os.stat(path)
    if stat.S_ISBLK(found.st_mode):
        return f"\0fvd-serve:device:{found.st_rdev}"
    return f"\0fvd-serve:{found.st_dev}:{found.st_ino}"


def may_command(user: int) -> bool:
    """Whether we obey the user with this number, or believe it: root and ourselves."""
    return user in (0, os.geteuid())


def peer_user(sock: socket.socket) -> int:
    """The number of the user on the other side of a Unix socket."""
    _, user, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(user)
