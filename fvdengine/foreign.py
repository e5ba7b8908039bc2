# SPDX-License-Identifier: Apache-2.0
"""Bases in the formats of other programs, which a read-only qemu-nbd makes readable.

The format is the one that the image names, never probed. Such a file may itself name other files
(a backing file, an external data file, extents): these would be opened without our policy, so a
file that names any is refused here, by its own header, before qemu-nbd sees it. It sees the very
descriptor that was checked, and nothing below it.
"""

import json
import os
import re
import struct

from fvdengine.children import need_program
from fvdengine.errors import UnusableForeignBase

FORMATS = ("qcow2", "vmdk", "vhdx", "vdi")
_VMDK_DESCRIPTOR_MAX = 65536
_CLIENTS = 16


def check_self_contained(fd: int, path: str, image_format: str) -> None:
    """Raise UnusableForeignBase unless the file is of its format and names no other file."""
    _CHECKS[image_format](fd, path)


def qemu_nbd_argv(socket: str, image_format: str) -> list[str]:
    """The command that serves the descriptor @FD@, read-only, on a Unix socket."""
    node: dict[str, object] = {
        "driver": image_format,
        "file": {"driver": "file", "filename": "/proc/self/fd/@FD@"},
    }
    if image_format in ("qcow2", "vmdk"):
        node["backing"] = None
    return [
        need_program("qemu-nbd", "qemu-utils", "bases in other formats"),
        "--read-only", "--persistent", f"--shared={_CLIENTS}", f"--socket={socket}",
        "--cache=writeback", "--", "json:" + json.dumps(node),
    ]  # fmt: skip


def _refuse(path: str, image_format: str, reason: str) -> UnusableForeignBase:
    return UnusableForeignBase(base=path, format=image_format, reason=reason)


def _check_qcow2(fd: int, path: str) -> None:
    start = os.pread(fd, 104, 0)
    if len(start) < 72 or start[:4] != b"QFI\xfb":
        raise _refuse(path, "qcow2", "it does not begin as one")
    (version,) = struct.unpack_from(">I", start, 4)
    (backing,) = struct.unpack_from(">Q", start, 8)
    (crypt,) = struct.unpack_from(">I", start, 32)
    if version not in (2, 3):
        raise _refuse(path, "qcow2", f"its version is {version}")
    if backing:
        raise _refuse(path, "qcow2", "it has a backing file")
    if crypt:
        raise _refuse(path, "qcow2", "it is encrypted")
    features = struct.unpack_from(">Q", start, 72)[0] if version == 3 and len(start) >= 80 else 0
    if features & 4:
        raise _refuse(path, "qcow2", "its data lie in another file")


def _check_vmdk(fd: int, path: str) -> None:
    start = os.pread(fd, 512, 0)
    if len(start) < 512 or start[:4] != b"KDMV":
        raise _refuse(path, "vmdk", "it is not of the kind that has all its data in one file")
    (capacity,) = struct.unpack_from("<Q", start, 12)
    descriptor, sectors = struct.unpack_from("<QQ", start, 28)
    if not capacity or not descriptor or not 0 < sectors * 512 <= _VMDK_DESCRIPTOR_MAX:
        raise _refuse(path, "vmdk", "its description lies elsewhere")
    text = os.pread(fd, sectors * 512, descriptor * 512).split(b"\0")[0].decode("latin-1")
    extents = re.findall(r"^\s*(?:RW|RDONLY|NOACCESS)\s.*$", text, re.M | re.I)
    if len(extents) != 1 or not re.search(r"\sSPARSE\s", extents[0], re.I):
        raise _refuse(path, "vmdk", "its data lie in other files")
    if not re.search(r"^\s*parentCID\s*=\s*ffffffff\s*$", text, re.M | re.I):
        raise _refuse(path, "vmdk", "it has a parent")


def _check_vhdx(fd: int, path: str) -> None:
    # qemu-nbd itself refuses one with a parent.
    if os.pread(fd, 8, 0) != b"vhdxfile":
        raise _refuse(path, "vhdx", "it does not begin as one")


def _check_vdi(fd: int, path: str) -> None:
    # The same.
    if os.pread(fd, 4, 64) != struct.pack("<I", 0xBEDA107F):
        raise _refuse(path, "vdi", "it does not begin as one")


_CHECKS = {
    "qcow2": _check_qcow2, "vmdk": _check_vmdk, "vhdx": _check_vhdx, "vdi": _check_vdi,
}  # fmt: skip
