# SPDX-License-Identifier: Apache-2.0
"""The program of a child that waits for a base and then serves it; late.py starts it.

It does what an opening of the image does with a base: the path policy, the locks, the identity.
Where that fails it says so and ends, and is started again after a while.
"""

import json
import os
import sys

from fvdengine import chain, foreign, locking, paths
from fvdengine.chain import Identity
from fvdengine.children import need_program
from fvdengine.errors import BaseChanged, EngineError, IoFailed
from fvdengine.header import BASE_FILE, BASE_UNKNOWN
from fvdengine.late import LateBase

CLIENTS = 16


def main() -> int:
    socket, spec = sys.argv[1:]
    base = LateBase(**json.loads(spec))
    try:
        words = prepare(base, socket)
    except EngineError as error:
        print(error.message, file=sys.stderr)
        return 1
    return os.execv(words[0], words)


def prepare(base: LateBase, socket: str) -> list[str]:
    """Open the base, for as long as that takes; the command that serves it. Raises EngineError."""
    fd, real = paths.open_base(base.name, base.image_path, base.allow_dirs, base.directory)
    try:
        locking.lock(fd, real, exclusive=False)
    except IoFailed as error:  # it may lie where there are no locks
        print(error.message, file=sys.stderr)
    _check(base, fd, real)
    if base.format == "fvd":
        os.close(fd)
        return _worker_argv(base, real, socket)
    os.set_inheritable(fd, True)
    if base.format in foreign.FORMATS:
        foreign.check_self_contained(fd, real, base.format)
        argv = foreign.qemu_nbd_argv(socket, base.format)
        return [word.replace("@FD@", str(fd)) for word in argv]
    return [
        need_program("nbdkit", "nbdkit", "bases on storage that hangs"), "--foreground",
        "--readonly", f"--unix={socket}", f"--threads={CLIENTS}", "file", f"/proc/self/fd/{fd}",
    ]  # fmt: skip


def _check(base: LateBase, fd: int, real: str) -> None:
    """Raise BaseChanged where it is not what the image was made from."""
    if base.kind == BASE_UNKNOWN or base.accept_changed:
        return
    wanted = Identity(base.kind, bytes.fromhex(base.id), base.length)
    if base.format in foreign.FORMATS:  # its server knows the length
        found = Identity(BASE_FILE, chain.file_id(fd), base.length)
    else:
        found = chain.identity_of(chain.open_layer(fd, real, base.format))
    if reason := chain.difference(wanted, found):
        raise BaseChanged(path=base.image_path, base=real, reason=reason)


def _worker_argv(base: LateBase, real: str, socket: str) -> list[str]:
    """An image is served by a worker, which opens what lies below it."""
    words = [sys.executable, "-P", "-m", "fvdd.worker", "serve", real, "--read-only", "--quiet"]
    words += ["--socket", socket, "--base-timeout", str(base.base_timeout)]
    words += [word for name in base.allow_dirs for word in ("--allow-dir", name)]
    words += [word for name in base.allow_uris for word in ("--allow-uri", name)]
    return words


if __name__ == "__main__":
    sys.exit(main())
