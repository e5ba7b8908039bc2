# SPDX-License-Identifier: Apache-2.0
"""Whether storage answers at all, asked in a process of its own.

A look at a file on a network file system whose server is gone, or on a suspended device, waits in
the kernel, where nobody can call it back: a process with a thread there neither ends nor lets go of
its locks. So a program that has nothing of ours looks first. One that hangs is left behind, killed:
it ends when the storage answers.
"""

import os
import secrets
import select
import signal
import threading
import time

# Storage that answers does so in milliseconds; an idle disk may have to begin to turn.
SECONDS = 2.0
# Storage that has just answered is not asked again: a chain of images mostly lies in one folder.
FRESH_SECONDS = 1.0
PROGRAMS = ("/usr/bin", "/bin")


_answered: dict[str, float] = {}


def answers(path: str, seconds: float = SECONDS) -> bool:
    """Whether a look at the file, whatever that finds, takes less than `seconds`. It is not opened,
    and no matter what it is, that has no effect."""
    folder = os.path.dirname(path)
    begin = time.monotonic()
    # A link may lead to other storage.
    is_fresh = begin - _answered.get(folder, -FRESH_SECONDS) < FRESH_SECONDS
    if is_fresh and not os.path.islink(path):
        return True
    if not _ends(("stat", "-L", "--", path), seconds):
        return False
    _answered[folder] = begin
    return True


def changes(folder: str, seconds: float = SECONDS) -> bool:
    """Whether an attempt to change something in the folder, whatever comes of it, takes less than
    `seconds`: a file system that is frozen answers looks alone. Nothing is changed."""
    nobody = os.path.join(folder, f".fvd-{secrets.token_hex(16)}")
    return _ends(("rmdir", "--", nobody), seconds)


def reads(fd: int, length: int, seconds: float = SECONDS) -> bool:
    """Whether the first bytes of an open file are read, or an error is, in less than `seconds`.
    Moves the file's offset."""
    return _ends(("head", "-c", str(length)), seconds, fd)


def _ends(words: tuple[str, ...], seconds: float, stdin: int = -1) -> bool:
    """Whether the program ends in time; where it cannot be started, nothing is known, and waiting
    is as good."""
    program = next(
        (path for path in (f"{folder}/{words[0]}" for folder in PROGRAMS) if os.path.exists(path)),
        "",
    )
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    actions = [(os.POSIX_SPAWN_DUP2, stdin if stdin >= 0 else null, 0)]
    actions += [(os.POSIX_SPAWN_DUP2, null, 1), (os.POSIX_SPAWN_DUP2, null, 2)]
    try:
        pid = os.posix_spawn(program, words, {}, file_actions=actions)
    except OSError:
        return True
    finally:
        os.close(null)
    try:
        handle = os.pidfd_open(pid)
    except OSError:  # valgrind knows no such call
        os.waitpid(pid, 0)
        return True
    try:
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        if poll.poll(seconds * 1000):
            os.waitpid(pid, 0)
            return True
        signal.pidfd_send_signal(handle, signal.SIGKILL)
        threading.Thread(
            target=os.waitpid, args=(pid, 0), name="fvd-patience", daemon=True
        ).start()
        return False
    finally:
        os.close(handle)
