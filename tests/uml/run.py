#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Run any command of this host inside User Mode Linux: a real kernel with nbd, as a process.

The guest sees the host's root file system read-only, the current folder (and every --share)
read-write, and its own /run, /tmp, /dev/shm. Output is streamed, the exit status is the command's:
124 after a time-out, 125 when the kernel died (its console follows on stderr), 137 when the plug
was pulled. Results never pass the console: it loses lines; they are files of a job folder.
Standard library only, so that it runs before anything is installed.
"""

import argparse
import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fvd"
DEBIAN_KERNEL = Path("/usr/bin/linux.uml")
NEW_KERNEL = CACHE / "uml" / "linux"
TIMED_OUT, DIED, PLUG_PULLED = 124, 125, 137
POLL_SECONDS = 0.02
TMPFS_MAGIC = 0x01021994
CONSOLE_TAIL = 4000


class MachineError(Exception):
    """The machine cannot be started here; the text says why and what to do."""


@dataclass(frozen=True, slots=True)
class Job:
    """What to run in the guest, and in which surroundings."""

    argv: list[str]
    kernel: str = "debian"
    memory: str = "1G"
    timeout: float = 300.0
    pull: str | None = None
    ubd: list[str] = field(default_factory=list)
    store: str | None = None
    store_at: str = "/run/store"
    shares: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    kernel_arguments: list[str] = field(default_factory=list)
    quiet: bool = False


def kernels() -> dict[str, Path]:
    """The kernels that are there, by name."""
    known = {"debian": DEBIAN_KERNEL, "new": NEW_KERNEL}
    return {name: path for name, path in known.items() if os.access(path, os.X_OK)}


def kernel_path(name: str) -> Path:
    """The file of a kernel, named "debian" or "new" or given as a path."""
    if "/" in name:
        return Path(name)
    found = kernels().get(name)
    if found is None:
        remedy = "make uml-kernel" if name == "new" else "apt-get install user-mode-linux kmod"
        raise MachineError(f"the {name} User Mode Linux kernel is not here; try: {remedy}")
    return found


def bytes_of(text: str) -> int:
    """A size such as 512M or 1G in bytes."""
    factor = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1].upper())
    return int(text[:-1]) * factor if factor else int(text)


def memory_folder(memory: int) -> str | None:
    """A folder fit for the guest's memory: tmpfs, room enough, programs may run from it."""
    seen = [os.environ.get("TMPDIR", ""), "/dev/shm", "/run", "/tmp"]
    mounts = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mounts").read_text().splitlines():
            words = line.split()
            mounts[words[1]] = (words[2], words[3].split(","))
    for folder in seen:
        kind, options = mounts.get(folder, ("", []))
        if kind != "tmpfs" or "noexec" in options or not os.access(folder, os.W_OK):
            continue
        room = os.statvfs(folder)
        if room.f_bavail * room.f_frsize >= memory:
            return folder
    return None


def make_store(job: Job, folder: Path) -> str | None:
    """A fresh sparse file with a file system, for stores that need holes; dies with the job."""
    if job.store is None:
        return None
    size, _, kind = job.store.partition(":")
    path = folder / "store.img"
    with path.open("wb") as file:
        file.truncate(bytes_of(size))
    options = ["-q", "-F"] if (kind or "ext4") == "ext4" else ["-q", "-f"]
    subprocess.run([f"mkfs.{kind or 'ext4'}", *options, str(path)], check=True)
    (folder / "store").write_text(job.store_at)
    return str(path)


def write_job(job: Job, folder: Path) -> None:
    """Leave for the guest what it has to know."""
    here = str(Path.cwd())
    shares = list(dict.fromkeys([here, str(ROOT), *(os.path.abspath(s) for s in job.shares)]))
    inside = [s for s in shares if s != "/"]
    (folder / "shares").write_text("".join(f"{share}\n" for share in inside))
    (folder / "cmd").write_text("exec " + shlex.join(job.argv) + "\n")
    environment = {
        "HOME": "/tmp",
        "LANG": "C.UTF-8",
        "PATH": f"{ROOT}/.venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "PYTHONUNBUFFERED": "1",
        "UML_DIRECTORY": here,
        "FVD_UML": job.kernel,
    } | job.environment
    lines = [f"{name}={shlex.quote(value)}\n" for name, value in environment.items()]
    (folder / "env").write_text("".join(lines))
    (folder / "out").touch()
    shutil.copy(Path(__file__).with_name("init.sh"), folder / "init")
    (folder / "init").chmod(0o755)


def boot_command(job: Job, folder: Path, store: str | None) -> list[str]:
    """The command line of the kernel."""
    path = kernel_path(job.kernel)
    disks = [*([store] if store else []), *(os.path.abspath(disk) for disk in job.ubd)]
    return [
        str(path),
        f"mem={job.memory}",
        "rootfstype=hostfs",
        "rootflags=/",
        "ro",
        f"init={folder}/init",
        "con=null",
        "con0=null,fd:1",
        "quiet",
        f"job={folder}",
        f"uml_dir={folder}/",
        "nbd.nbds_max=0",
        "nbd.max_part=16",
        *(["seccomp=on"] if path != DEBIAN_KERNEL else []),
        *(f"ubd{index}={disk}" for index, disk in enumerate(disks)),
        *job.kernel_arguments,
    ]


def with_memory(command: list[str], memory: int, folder: Path) -> tuple[list[str], dict[str, str]]:
    """The command and environment that give the guest's memory a home on this machine."""
    home = memory_folder(memory)
    if home is not None:
        return command, {"TMPDIR": home}
    if os.geteuid() == 0:
        private = folder / "memory"
        private.mkdir()
        script = 'mount -t tmpfs -o size="$1" memory "$2" && shift 2 && exec "$@"'
        words = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh"]
        probe = [*words, str(1 << 20), str(private), "true"]
        if subprocess.run(probe, check=False, capture_output=True).returncode == 0:
            return [*words, str(memory + (64 << 20)), str(private), *command], {
                "TMPDIR": str(private)
            }
    return command, {"TMPDIR": str(folder)}


@contextlib.contextmanager
def booted(job: Job, folder: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """The running machine; whatever happens, nothing of it is left afterwards."""
    command = boot_command(job, folder, make_store(job, folder))
    command, extra = with_memory(command, bytes_of(job.memory), folder)
    environment = {k: v for k, v in os.environ.items() if k not in ("TMP", "TEMP")} | extra
    with (folder / "console").open("wb") as console:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def follow(job: Job, folder: Path, process: "subprocess.Popen[bytes]") -> int:
    """Stream the guest's output until it ends in one way or another; return the exit status."""
    deadline = time.monotonic() + job.timeout
    pattern = re.compile(job.pull) if job.pull else None
    recent = ""
    with (folder / "out").open(errors="replace") as out:
        while True:
            ended = (folder / "rc").exists()
            dead = process.poll() is not None
            text = out.read()
            if text:
                sys.stdout.write(text)
                sys.stdout.flush()
                recent = (recent + text)[-65536:]
            if pattern and pattern.search(recent):
                return PLUG_PULLED
            if ended:
                return int((folder / "rc").read_text())
            if dead:
                return DIED
            if time.monotonic() > deadline:
                return TIMED_OUT
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(POLL_SECONDS)


def run(job: Job) -> int:
    """Boot, run the command, tear everything down; return the exit status."""
    kernel_path(job.kernel)
    begin = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="fvd-uml."))
    try:
        write_job(job, folder)
        with booted(job, folder) as process:
            status = follow(job, folder, process)
        if status in (TIMED_OUT, DIED):
            console = (folder / "console").read_text(errors="replace")
            sys.stderr.write(console[-CONSOLE_TAIL:])
            reason = "time-out" if status == TIMED_OUT else "the kernel died"
            sys.stderr.write(f"\numl: {reason} after {time.monotonic() - begin:.1f} s\n")
        elif not job.quiet:
            sys.stderr.write(f"uml: exit status {status} after {time.monotonic() - begin:.1f} s\n")
        return status
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def parse(words: list[str]) -> Job:
    """The job that a command line describes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--kernel", default="debian", help="debian (default), new, or the path of one")
    add("--mem", default="1G", help="ceiling of the guest's memory")
    add("--timeout", type=float, default=300.0, metavar="SECONDS")
    add("--pull", metavar="REGEX", help="pull the plug when the output matches")
    add("--ubd", action="append", default=[], metavar="FILE", help="a disk: ubda, ubdb, ...")
    add("--store", metavar="SIZE[:ext4|xfs]", help="a fresh file system as ubda, mounted")
    add("--store-at", default="/run/store", metavar="DIR", help="where to mount it")
    add("--share", action="append", default=[], metavar="DIR", help="read-write in the guest")
    add("--env", action="append", default=[], metavar="NAME=VALUE")
    add("--arg", action="append", default=[], metavar="WORD", help="for the kernel command line")
    add("--quiet", "-q", action="store_true", help="no closing line")
    add("argv", nargs="+", help="the command; put -- before it")
    given = parser.parse_args(words)
    return Job(
        argv=given.argv,
        kernel=given.kernel,
        memory=given.mem,
        timeout=given.timeout,
        pull=given.pull,
        ubd=given.ubd,
        store=given.store,
        store_at=given.store_at,
        shares=given.share,
        environment=dict(pair.split("=", 1) for pair in given.env),
        kernel_arguments=given.arg,
        quiet=given.quiet,
    )


def main() -> int:
    """Command line entry."""
    try:
        return run(parse(sys.argv[1:]))
    except (MachineError, subprocess.CalledProcessError) as error:
        sys.stderr.write(f"uml: {error}\n")
        return DIED


if __name__ == "__main__":
    sys.exit(main())
