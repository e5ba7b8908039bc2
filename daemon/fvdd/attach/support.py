# SPDX-License-Identifier: Apache-2.0
"""Whether this host can attach over the kernel's nbd driver, and what to do when it cannot.

Four causes look alike from a distance and need different remedies: the driver is not there (not
built, package not installed, modules of the running kernel removed by an upgrade); the driver is
there but its netlink family is not visible (network namespace on a kernel up to 6.1); the right to
configure it is missing; the netlink library is missing.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from typing import TYPE_CHECKING, Final

from fvdd.attach.attachment import AttachError

if TYPE_CHECKING:
    from fvdd.attach.nbd_netlink import NbdNetlink

MODULE_FOLDER: Final = "/sys/module/nbd"
# No device is made in advance (idle nbd0..15 only confuse); partitions get minors of their own.
MODPROBE: Final = ("nbd", "nbds_max=0", "max_part=16")
MODPROBE_LIMIT_SECONDS: Final = 30.0

_CAP_SYS_ADMIN: Final = 21
_WHOLE_RANGE: Final = ["0", "0", "4294967295"]


def load_netlink() -> NbdNetlink:
    """The netlink interface, or AttachError when its library is not installed."""
    try:
        from fvdd.attach.nbd_netlink import NbdNetlink
    except ImportError as error:
        raise AttachError(
            "pyroute2_missing",
            f"the Python package pyroute2 cannot be imported ({error})",
            "install it beside fvd: pip install 'pyroute2>=0.9.2,<0.10'",
        ) from error
    return NbdNetlink()


async def require_nbd(netlink: NbdNetlink) -> None:
    """Return when devices can be attached; load the driver first if that is possible."""
    lacking = missing_privilege()
    if await family_answers(netlink):
        if lacking is not None:
            raise _no_permission(lacking)
        return
    tried = "" if lacking is not None else await load_module()
    if not tried and lacking is None and await family_answers(netlink):
        return
    if os.path.isdir(MODULE_FOLDER):
        raise AttachError(
            "nbd_family_missing",
            "the nbd driver is loaded but its netlink interface is not visible here",
            "fvdd runs in a network namespace of its own, which kernels up to 6.1 do not support: "
            "start it in the host's (no PrivateNetwork=yes, container with the host's network)",
        )
    raise module_missing(tried, lacking)


async def family_answers(netlink: NbdNetlink) -> bool:
    """Whether the driver's netlink family is there; newer kernels load the driver upon this."""
    from fvdd.attach.nbd_netlink import FamilyMissing

    try:
        await netlink.probe()
    except FamilyMissing:
        return False
    return True


async def load_module() -> str:
    """Run modprobe; an empty string when it succeeded, else what it said."""
    program = shutil.which("modprobe", path="/usr/sbin:/sbin:/usr/bin:/bin")
    if program is None:
        return "modprobe is not installed"
    process = await asyncio.create_subprocess_exec(
        program,
        *MODPROBE,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(MODPROBE_LIMIT_SECONDS):
            _, said = await process.communicate()
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        return "modprobe did not end"
    if process.returncode == 0:
        return ""
    return said.decode(errors="replace").strip() or f"modprobe ended with {process.returncode}"


def module_missing(tried: str, lacking: str | None) -> AttachError:
    """The error for "no driver", with the most likely cause on this very host."""
    release = os.uname().release
    code = "nbd_module_missing"
    if lacking is not None:
        return AttachError(
            code,
            f"the kernel's nbd driver is not loaded, and it cannot be loaded from here: {lacking}",
            "run as root: modprobe nbd nbds_max=0 max_part=16",
        )
    if tried == "modprobe is not installed":
        return AttachError(
            code,
            "the kernel's nbd driver is not loaded and modprobe is not installed",
            "install the package kmod, then attach again",
        )
    folder = modules_folder(release)
    if folder is None:
        return AttachError(
            code,
            f"the running kernel {release} has no nbd driver and no modules on this host",
            "an upgrade may have removed its modules: reboot into the installed kernel; a kernel "
            "built without modules needs CONFIG_BLK_DEV_NBD. 'fvdctl serve' works without it",
        )
    if not module_file_exists(folder):
        return AttachError(
            code,
            f"the running kernel {release} has no nbd module in {folder}",
            "install the package that holds it (Debian: linux-image-amd64, Ubuntu: "
            f"linux-modules-extra-{release}), or a kernel with CONFIG_BLK_DEV_NBD. "
            "'fvdctl serve' works without it",
        )
    return AttachError(
        code,
        f"the nbd module could not be loaded ({tried})",
        "the kernel's log says why (dmesg); a locked-down kernel refuses unsigned modules",
    )


def modules_folder(release: str) -> str | None:
    """The folder with the running kernel's modules, if there is one."""
    for root in ("/lib/modules", "/usr/lib/modules"):
        folder = os.path.join(root, release)
        if os.path.isdir(folder):
            return folder
    return None


def module_file_exists(folder: str) -> bool:
    """Whether a driver file lies in the folder (compressed or not) or is built in."""
    place = os.path.join(folder, "kernel", "drivers", "block")
    with contextlib.suppress(OSError):
        if any(entry.startswith("nbd.ko") for entry in os.listdir(place)):
            return True
    with contextlib.suppress(OSError), open(os.path.join(folder, "modules.builtin")) as file:
        return any(line.strip().endswith("/nbd.ko") for line in file)
    return False


def missing_privilege() -> str | None:
    """Why this process may not configure nbd; None when it may."""
    if not _has_capability(_CAP_SYS_ADMIN):
        return "fvdd lacks the capability CAP_SYS_ADMIN (it does not run as root)"
    try:
        with open("/proc/self/uid_map", encoding="ascii") as file:
            words = file.read().split()
    except OSError:
        return None
    if words != _WHOLE_RANGE:
        return "fvdd runs in a user namespace, where root does not own the host's devices"
    return None


def _has_capability(number: int) -> bool:
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        for line in file:
            if line.startswith("CapEff:"):
                return bool(int(line.split()[1], 16) >> number & 1)
    return False


def _no_permission(lacking: str) -> AttachError:
    return AttachError(
        "nbd_no_permission",
        f"the kernel's nbd driver may not be configured: {lacking}",
        "run fvdd as root in the host's user namespace",
    )
