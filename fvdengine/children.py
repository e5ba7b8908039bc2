# SPDX-License-Identifier: Apache-2.0
"""Servers that run as children of this process: nbdkit and qemu-nbd, for bases they understand.

Each serves one base, read-only, on a Unix socket in a directory of its own that nobody else may
enter; it never sees the image. Its life hangs on the *keeper*, the writing end of a pipe: when the
last duplicate of it is closed, the engine's included, the child is ended. When the child ends by
itself it is started again, with growing pauses. When this process dies, the kernel kills the child:
PR_SET_PDEATHSIG is bound to the thread that forked, hence one thread for each child, which stays.
"""

import contextlib
import os
import re
import select
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fvdengine.errors import ProgramMissing

STOP_SECONDS = 5.0
PAUSE_MIN_MS, PAUSE_MAX_MS = 50, 5000
LOG_BYTES = 2000
WORDS_MAX = 300
LATELY_SECONDS = 30.0
_CAP_SETPCAP = 8
_BESIDE_THE_POINT = re.compile(r"^Try using:|error: (?:read|write)[ a-z]*: .*(?:handshake|NBD_)")
# Who speaks, in whose name, and what we ourselves told it.
_PREAMBLE = re.compile(
    r"^(?:(?:nbdkit|qemu-nbd): (?:[\w.-]+(?:\[\d+\])?: )?(?:error: )?)?"
    r"(?:\S+\.py: \w+: error: )?(?:Unfit: )?(?:Failed to blk_new_open '.*': )?"
)
_NAME = re.compile(r"fvd-base-(\d+)-\w+")

Argv = Callable[[str], Sequence[str]]


@dataclass(slots=True)
class Child:
    """A server with its supervisor. `exits` counts how often it ended by itself, `words` are its
    last ones of the last time."""

    directory: str
    keeper: int
    exits: int = 0
    words: str = ""
    pid: int = 0
    changed: threading.Condition = field(default_factory=threading.Condition)

    @property
    def socket(self) -> str:
        return os.path.join(self.directory, "nbd.sock")

    @property
    def uri(self) -> str:
        return f"nbd+unix:///?socket={self.socket}"

    def last_words(self) -> str:
        """Return the last line that the child wrote of what it serves, for the message about its
        failure: without what any message of it has, and printable."""
        return _last_words(self.directory) or self.words


def said_lately(uri: str) -> str:
    """What the child of this process that serves `uri` said of what it serves, if that is not long
    ago; "" if it said nothing, or where no child serves it."""
    directory = os.path.dirname(uri.partition("?socket=")[2])
    if _NAME.fullmatch(os.path.basename(directory)) is None:
        return ""
    return _last_words(directory, time.time() - LATELY_SECONDS)


def _last_words(directory: str, since: float = 0.0) -> str:
    try:
        with open(os.path.join(directory, "log"), "rb") as file:
            status = os.fstat(file.fileno())
            file.seek(max(0, status.st_size - LOG_BYTES))
            lines = file.read().decode(errors="replace").split("\n")
    except OSError:
        return ""
    found = [line.strip() for line in lines if line.strip()]
    # nbdkit follows its message with a hint at its manual, or with word of a client that left.
    told = [line for line in found if not _BESIDE_THE_POINT.search(line)]
    if not told or status.st_mtime < since:
        return ""
    words = "".join(c if c.isprintable() else "?" for c in told[-1])
    return _PREAMBLE.sub("", words)[:WORDS_MAX] or words[:WORDS_MAX]


def need_program(program: str, package: str, purpose: str) -> str:
    """Return the path of a program; raise ProgramMissing, which names the Debian package."""
    path = shutil.which(program)
    if path is None:
        raise ProgramMissing(program=program, purpose=purpose, package=package)
    return path


def python_plugin(socket: str, purpose: str) -> list[str]:
    """The start of the command that serves, read-only, what a script of nbdkit's plugin for Python
    reads; raise ProgramMissing."""
    nbdkit = need_program("nbdkit", "nbdkit", purpose)
    plugin = [nbdkit, "--dump-plugin", "python"]
    if subprocess.run(plugin, capture_output=True, check=False).returncode != 0:
        raise ProgramMissing(
            program="nbdkit's plugin for Python", purpose=purpose, package="nbdkit-plugin-python"
        )
    return [nbdkit, "--foreground", "--readonly", f"--unix={socket}", "python"]


def start_child(argv: Argv, *, pass_fd: int = -1) -> Child:
    """Start `argv(socket)` and its supervisor. It is ended when `Child.keeper` is closed.

    `pass_fd` is a descriptor that the child inherits under its number; it is duplicated.
    """
    need_program("setpriv", "util-linux", "servers of remote bases")
    parent = _parent_directory()
    _sweep(parent)
    directory = tempfile.mkdtemp(prefix=f"fvd-base-{os.getpid()}-", dir=parent)
    reading, writing = os.pipe2(os.O_CLOEXEC)
    child = Child(directory, writing)
    try:
        words = argv(child.socket)
    except BaseException:
        os.close(reading)
        os.close(writing)
        os.rmdir(directory)
        raise
    inherited = os.dup(pass_fd) if pass_fd >= 0 else -1
    command = [word.replace("@FD@", str(inherited)) for word in words]
    threading.Thread(
        target=_supervise, args=(child, command, reading, inherited), name="fvd-child", daemon=True
    ).start()
    return child


def _parent_directory() -> str:
    """A directory for sockets: short-lived, and not read by others."""
    for candidate in ("/run/fvd", os.environ.get("XDG_RUNTIME_DIR", "")):
        if candidate and os.path.isdir(candidate) and os.access(candidate, os.W_OK):
            return candidate
    return tempfile.gettempdir()


def _sweep(parent: str) -> None:
    """Remove what killed processes left behind."""
    with os.scandir(parent) as entries:
        for entry in entries:
            found = _NAME.fullmatch(entry.name)
            if found is None or os.path.exists(f"/proc/{found[1]}"):
                continue
            with contextlib.suppress(OSError):
                if entry.stat(follow_symlinks=False).st_uid == os.getuid():
                    shutil.rmtree(entry.path, ignore_errors=True)


def _supervise(child: Child, command: Sequence[str], reading: int, inherited: int) -> None:
    """Keep the child running until the keeper is closed; then end it and clean up."""
    pause = PAUSE_MIN_MS
    try:
        while True:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(child.socket)
            with open(os.path.join(child.directory, "log"), "wb") as log:
                process = subprocess.Popen(
                    [*_limits(), *command], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                    pass_fds=(inherited,) if inherited >= 0 else (), cwd=child.directory,
                )  # fmt: skip
            if _is_released(process, child, reading):
                return
            child.words = _last_words(child.directory) or child.words
            with child.changed:
                child.exits += 1
                child.changed.notify_all()
            if _hung_up(reading, pause):
                return
            pause = min(pause * 2, PAUSE_MAX_MS)
    finally:
        os.close(reading)
        if inherited >= 0:
            os.close(inherited)
        shutil.rmtree(child.directory, ignore_errors=True)


def _limits() -> list[str]:
    """What a child is started by: it dies with us, and parses what comes from afar with no rights
    but that of reading the file it was given. A thread that has given up its own cannot limit the
    child's further, and need not."""
    words = ["setpriv", "--pdeathsig", "KILL", "--no-new-privs"]
    with open("/proc/thread-self/status", encoding="ascii", errors="replace") as file:
        effective = next(int(line[7:], 16) for line in file if line.startswith("CapEff:"))
    if effective >> _CAP_SETPCAP & 1:
        words += ["--inh-caps=-all", "--bounding-set=-all,+dac_read_search"]
    return [*words, "--"]


def _is_released(process: "subprocess.Popen[bytes]", child: Child, reading: int) -> bool:
    """Wait until the child ends (False), or the keeper is closed, and the child ended (True)."""
    handle = os.pidfd_open(process.pid)
    child.pid = process.pid
    try:
        poll = select.poll()
        poll.register(reading, 0)
        poll.register(handle, select.POLLIN)
        events = dict(poll.poll())
        if reading not in events:
            process.wait()
            return False
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        return True
    finally:
        os.close(handle)


def _hung_up(reading: int, milliseconds: int) -> bool:
    poll = select.poll()
    poll.register(reading, 0)
    return bool(poll.poll(milliseconds))
