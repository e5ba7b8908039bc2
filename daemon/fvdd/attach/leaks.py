# SPDX-License-Identifier: Apache-2.0
"""Kernel devices of ours that nobody serves and nobody will: found, named, given back.

A device is ours by its backend identifier (fvd:NAME:ATTACHMENT); devices of others (qemu-nbd,
nbd-client, another program with identifiers of its own) are not even listed. One is leaked when no
device of this fvdd has that identifier, no worker process serves from a directory whose record has
it, and no other fvdd runs that might. It is given back only when nothing hangs on it: no holder, no
opener, nothing in flight.

Looking at /proc shows the processes of one PID namespace; a mount in any other, or one that is made
a moment later, is kept out by opening the node exclusively before it is looked at again.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fvdd.attach import holders, sysfs
from fvdd.attach.attachment import AttachError, Leak

# The number of the host's own PID namespace, in every kernel (PROC_PID_INIT_INO). The inner
# namespaces that /proc/self/status lists are no help: a /proc mounted in one shows nothing outside.
HOSTS_PID_NAMESPACE: Final = 0xEFFFFFFC

_OURS = re.compile(r"fvd:([^:]*):([^:]*)")


@dataclass(frozen=True, slots=True)
class Places:
    """Where to look; tests look elsewhere."""

    sys_block: str = "/sys/block"
    proc: str = "/proc"


def find_backends(places: Places | None = None) -> dict[str, str]:
    """The identifiers of ours, by the names of the kernel's devices that have them."""
    where = places or Places()
    found = {}
    for name in sorted(os.listdir(where.sys_block)):
        backend = _text(f"{where.sys_block}/{name}/backend")
        if re.fullmatch(r"nbd[0-9]+", name) and _OURS.fullmatch(backend):
            found[name] = backend
    return found


def find_leaks(known: Collection[str], places: Places | None = None) -> list[Leak]:
    """Devices with an identifier of ours that is not among `known`."""
    where = places or Places()
    return [
        Leak(f"/dev/{name}", int(name[3:]), backend, _obstacle(name, where, backend))
        for name, backend in find_backends(where).items()
        if backend not in known
    ]


def sees_every_process(proc: str = "/proc") -> bool:
    """Whether this process is in the host's own PID namespace, where nobody is hidden from it."""
    try:
        return os.stat(f"{proc}/self/ns/pid").st_ino == HOSTS_PID_NAMESPACE
    except OSError:
        return False


def hold(leak: Leak, places: Places | None = None) -> int:
    """Open a leaked device exclusively, so that nobody can mount it, and look again: the
    descriptor. AttachError: it must not be given back."""
    where = places or Places()
    name = f"nbd{leak.index}"
    try:
        fd = os.open(leak.device, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.EBUSY:
            found = _in_use(name, where) or "the kernel holds it for somebody it does not name"
            raise _stays(leak, found) from error
        raise _stays(leak, f"it cannot be opened ({error.strerror})") from error
    try:
        status = os.fstat(fd)
        number = (os.major(status.st_rdev), os.minor(status.st_rdev))
        if number != holders.read_disk(name, where.sys_block).numbers.get(name):
            raise _stays(leak, "its node leads elsewhere")
        if _text(f"{where.sys_block}/{name}/backend") != leak.backend:
            raise _stays(leak, "it is another's by now")
        found = _obstacle(name, where, leak.backend)
        if found:
            raise _stays(leak, found)
    except OSError as error:
        os.close(fd)
        raise _stays(leak, f"who uses it cannot be found out ({error.strerror})") from error
    except BaseException:
        os.close(fd)
        raise
    return fd


def _stays(leak: Leak, why: str) -> AttachError:
    return AttachError("device_held", why, f"{leak.device} is left alone")


def is_free(name: str, places: Places | None = None) -> str:
    """Why a device number cannot be used for a new device; empty when nothing hangs on it."""
    where = places or Places()
    folder = f"{where.sys_block}/{name}"
    try:
        pid = sysfs.read_text(f"{folder}/pid")
        if pid:
            return f"it is connected by process {pid}"
        if sysfs.read_text(f"{folder}/size") not in ("", "0"):
            return "the kernel has not let go of its last use"
        return _in_use(name, where)
    except OSError as error:
        return f"that it is not cannot be found out ({error.strerror})"


def _obstacle(name: str, where: Places, backend: str) -> str:
    """Why a leaked device cannot be given back now; empty when it can."""
    _, device, attachment = backend.split(":")
    for pid, words in _processes(where.proc):
        if b"fvdd.worker" in words and b"--dir" in words:
            directory = os.fsdecode(words[words.index(b"--dir") + 1])
            record = _text(f"{directory}/device.json")
            if attachment in record:
                return f"process {pid} serves it for another fvdd"
            if '"attachment"' not in record and os.path.basename(directory) == device:
                return f"process {pid} may serve it: {directory}, its directory, is gone or damaged"
        elif pid != os.getpid() and _is_daemon(words):
            return f"another fvdd runs (process {pid}), and it may be its own"
    return _in_use(name, where)


def _in_use(name: str, where: Places) -> str:
    in_flight = _text(f"{where.sys_block}/{name}/inflight").split()
    if any(count != "0" for count in in_flight):
        return "requests are in flight"
    disk = holders.read_disk(name, where.sys_block)
    found = holders.find_holders(
        disk, own_pid=os.getpid(), proc=where.proc, sys_block=where.sys_block
    )
    return holders.describe(found)


def _processes(proc: str) -> list[tuple[int, list[bytes]]]:
    found = []
    for entry in os.listdir(proc):
        if entry.isdigit():
            try:
                words = Path(f"{proc}/{entry}/cmdline").read_bytes().split(b"\0")
            except OSError as error:
                sysfs.raise_if_lacking(error)
                continue
            found.append((int(entry), words))
    return found


def _is_daemon(words: list[bytes]) -> bool:
    """Whether a command line is fvdd's: the program, or the module run by an interpreter."""
    for at, word in enumerate(words[:4]):
        if word == b"-m" and words[at + 1 : at + 2] == [b"fvdd"]:
            return True
        if os.path.basename(word) == b"fvdd":
            return True
    return False


def _text(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError as error:
        sysfs.raise_if_lacking(error)
        return ""
