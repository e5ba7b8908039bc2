# SPDX-License-Identifier: Apache-2.0
"""What this kernel and host can do for fvd, and what to do about what is missing.

Answers `fvdctl doctor`: inside fvdd, where the findings are those of the daemon itself, and as a
program (`python -P -m fvdd.devices.doctor`) when no daemon runs. Every finding that is not fine has
a remedy. Looking changes nothing, except that a missing driver is loaded when that is possible:
attach would do the same.
"""

from __future__ import annotations

import asyncio
import grp
import importlib.util
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from fvdapi.errors import ApiError
from fvdapi.models import DoctorReport, Finding
from fvdd.attach import support
from fvdd.attach.attachment import AttachError
from fvdd.config import Config, load
from fvdd.worker.seccomp import unavailable

if TYPE_CHECKING:
    from fvdd.devices.registry import Registry

# What a device with a large bitmap needs in the state directory, and then some.
STATE_SPACE_MIN: Final = 64 << 20

Level = Literal["ok", "warning", "problem"]


async def examine(config: Config, registry: Registry | None = None) -> DoctorReport:
    """All findings, the most basic first."""
    findings = [await _nbd(), *_nbd_parameters(), _udev(), _state_directory(config), _engine()]
    findings += [_group(config), _filter()]
    if registry is not None:
        findings.extend(_devices(registry))
        findings.extend(await _backups(registry))
        findings.extend(await _leftovers(registry))
        findings.extend(await _leaks(registry))
    return DoctorReport(findings=tuple(finding for finding in findings if finding is not None))


async def _nbd() -> Finding:
    try:
        await support.require_nbd(support.load_netlink())
    except AttachError as error:
        return _finding("nbd", "problem", error.message, error.hint, error.code)
    except OSError as error:
        return _finding("nbd", "problem", f"the driver cannot be asked ({error})", "see dmesg")
    release = os.uname().release
    return _finding("nbd", "ok", f"the nbd driver of kernel {release} answers")


def _nbd_parameters() -> list[Finding]:
    folder = Path(support.MODULE_FOLDER) / "parameters"
    if not folder.is_dir():
        return []
    try:
        partitions = int((folder / "max_part").read_text())
    except (OSError, ValueError):
        return []
    if partitions == 0:
        return [
            _finding(
                "nbd parameters",
                "warning",
                "the nbd module was loaded with max_part=0: partitions are scanned only on request",
                "load it with max_part=16 (modprobe -r nbd; modprobe nbd nbds_max=0 max_part=16)",
            )
        ]
    return [_finding("nbd parameters", "ok", f"up to {partitions} partitions a device")]


def _udev() -> Finding:
    if os.path.exists("/run/udev/control"):
        if shutil.which("udevadm") is not None:
            return _finding("udev", "ok", "udev runs; attach waits for it")
        return _finding(
            "udev", "warning", "udev runs but udevadm is missing", "install the package udev"
        )
    return _finding("udev", "ok", "no udev; nodes come from the kernel's devtmpfs")


def _state_directory(config: Config) -> Finding:
    path = config.daemon.state_dir
    topic = "state directory"
    probe = path
    while not os.path.isdir(probe):
        probe = os.path.dirname(probe)
    kind = _file_system(probe)
    if kind not in ("tmpfs", "ramfs"):
        return _finding(
            topic,
            "warning",
            f"{path} lies on {kind or 'an unknown file system'}, not on a tmpfs",
            "mount a tmpfs there (mode=0755) or name one with --state-dir: live state is written "
            "often",
        )
    store = os.statvfs(probe)
    free = store.f_bavail * store.f_frsize
    if free < STATE_SPACE_MIN:
        return _finding(
            topic,
            "warning",
            f"{path} has only {free >> 20} MiB left",
            "enlarge the tmpfs: mount -o remount,size=... on its mount point",
        )
    return _finding(topic, "ok", f"{path} lies on a {kind} with {free >> 20} MiB left")


def _engine() -> Finding:
    if importlib.util.find_spec("fvdcore.device") is None:
        return _finding(
            "engine",
            "problem",
            "the compiled engine fvdcore is not installed for this Python",
            "install fvd with pip, or build it in place with: python tests/dev.py build",
        )
    return _finding("engine", "ok", "the compiled engine is installed")


def _group(config: Config) -> Finding:
    try:
        entry = grp.getgrnam(config.daemon.group)
    except KeyError:
        return _finding(
            "group",
            "ok",
            f"there is no group {config.daemon.group}: only root may use the daemon",
        )
    members = ", ".join(entry.gr_mem) or "nobody"
    return _finding(
        "group", "ok", f"members of {entry.gr_name} may use the daemon as root: {members}"
    )


def _filter() -> Finding:
    reason = unavailable()
    if reason:
        return _finding(
            "system call filter", "warning", f"workers run without one: {reason}",
            "they work; give them one with a kernel that has seccomp and the package libseccomp2",
        )  # fmt: skip
    return _finding("system call filter", "ok", "workers run under a seccomp filter")


def _devices(registry: Registry) -> list[Finding]:
    found = []
    for device in registry.devices:
        if device.reason is not None:
            found.append(
                _finding(
                    f"device {device.name}",
                    "problem" if device.state.value == "failed" else "warning",
                    f"{device.state.value}: {device.reason}",
                    f"fvdctl status {device.name} says more; once the cause is removed: "
                    f"fvdctl recover {device.name}",
                )
            )
    for orphan in registry.orphans:
        found.append(
            _finding(
                f"device {orphan.name}",
                "warning",
                f"orphaned: {orphan.reason}",
                registry.orphan_remedy(orphan.name),
            )
        )
    return found


async def _backups(registry: Registry) -> list[Finding]:
    return [
        _finding(
            f"device {device.name}",
            "warning",
            f"a backup was broken off: {left[0]} belongs to {device.record.request.image}",
            left[1],
        )
        for device in registry.devices
        if (left := await device.backup_leftover()) is not None
    ]


async def _leftovers(registry: Registry) -> list[Finding]:
    return [
        _finding(f"device {device.name}", "warning", leftover.text, leftover.remedy)
        for device in registry.devices
        for leftover in await device.leftovers()
    ]


async def _leaks(registry: Registry) -> list[Finding]:
    nobody, remedy = "nobody", "end what uses it, then: fvdctl doctor --reclaim"
    if not registry.sees_every_process:
        nobody = "nobody whom fvdd sees from its PID namespace"
        remedy = (
            "ask an fvdd that sees all processes of the host (in a container: one with the PIDs of "
            "the host): fvdctl doctor --reclaim"
        )
    return [
        _finding(
            f"device {leak.device}",
            "warning",
            f"{leak.device} ({leak.backend}) is leaked: {nobody} serves it"
            + (f"; it stays because {leak.obstacle}" if leak.obstacle else ""),
            remedy,
        )
        for leak in await registry.leaks()
    ]


def _file_system(path: str) -> str:
    """The type of the file system that `path` lies on, from mountinfo."""
    number = os.stat(path).st_dev
    wanted = f"{os.major(number)}:{os.minor(number)}"
    with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            words = line.split()
            if len(words) > 6 and words[2] == wanted:
                return words[words.index("-") + 1]
    return ""


def _finding(topic: str, level: Level, message: str, remedy: str = "", code: str = "") -> Finding:
    return Finding(topic=topic, level=level, message=message, remedy=remedy, code=code)


def main() -> int:
    """Print the report as JSON."""
    try:
        config = load(None)
    except ApiError as error:
        finding = _finding("configuration", "problem", error.message, error.hint, error.code)
        report = DoctorReport(findings=(finding,))
    else:
        report = asyncio.run(examine(config))
    sys.stdout.write(report.model_dump_json() + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
