# SPDX-License-Identifier: Apache-2.0
"""What a run took place on: processors, kernel, versions, load; and what a process has used."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

from fvdtest import tree

PROGRAMS = {
    "fio": ("fio", "--version"),
    "qemu-nbd": ("qemu-nbd", "--version"),
    "nbdkit": ("nbdkit", "--version"),
    "nbdcopy": ("nbdcopy", "--version"),
}
VERSION = re.compile(r"\d+\.\d+[\w.]*")
CPUCLOCK_SCHED = 2


def cpu_seconds(pid: int) -> float:
    """Processor time of a process so far, user and system, threads that ended included.

    This is the clock of clock_getcpuclockid: nanoseconds, where /proc counts ticks. Children that
    ended (of servers that fork) are added, in ticks.
    """
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    children = (int(fields[13]) + int(fields[14])) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime((~pid << 3) | CPUCLOCK_SCHED) + children


def resident_bytes(pid: int) -> int:
    """Proportional set size of a process: shared pages are divided among those who share."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = re.search(r"^Pss:\s+(\d+) kB", text, re.M)
    assert found is not None, text
    return int(found.group(1)) * 1024


def load_now() -> float:
    """Average number of tasks that wanted to run in the last minute."""
    return os.getloadavg()[0]


def version_of(words: tuple[str, ...]) -> str:
    """The version that a program tells, "" where it is not installed."""
    path = shutil.which(words[0]) or shutil.which(words[0], path="/usr/sbin:/sbin")
    if path is None:
        return ""
    done = subprocess.run([path, *words[1:]], capture_output=True, text=True, check=False)
    found = VERSION.search(done.stdout + done.stderr)
    return found.group() if found else "unknown"


def commit() -> str:
    """Commit of the tree, with a + where files differ from it; "" outside a repository."""
    words = ["git", "-C", str(tree.ROOT), "describe", "--always", "--dirty=+", "--exclude=*"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def describe() -> dict[str, object]:
    """Machine and versions, for the saved file."""
    text = Path("/proc/cpuinfo").read_text()
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.M)
    memory = re.search(r"^MemTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.M)
    return {
        "processors": len(os.sched_getaffinity(0)),
        "model": model.group(1) if model else "",
        "memory_bytes": int(memory.group(1)) * 1024 if memory else 0,
        "kernel": os.uname().release,
        "load": load_now(),
        "commit": commit(),
        "versions": {name: version_of(words) for name, words in PROGRAMS.items()},
    }
