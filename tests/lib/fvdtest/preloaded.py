# SPDX-License-Identifier: Apache-2.0
"""Run fvdctl again and again without paying each time for the start of Python.

A process of its own imports what fvdctl needs, and forks for every call: each command line still
is a process with its own arguments, environment, directory and descriptors, as the shell would
start it; only the third of a second of imports before its first step falls away. It ends when the
tests do, at the end of its socket.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

LIBRARY = Path(__file__).resolve().parents[1]
MODULES = ("fvdctl.main", "fvdapi.client", "fvdctl.commands.device", "fvdctl.commands.lifecycle")
REQUEST_BYTES = 1 << 17
STANDARD = 3  # input, output, errors
FAILED = 255

Done = subprocess.CompletedProcess[str]


def run_fvdctl(words: Sequence[str], environment: dict[str, str], seconds: float) -> Done:
    """Run a command line to its end, at most so long; what it printed and its exit status."""
    ours, theirs = socket.socketpair()
    with (
        ours, theirs, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors,
        Path(os.devnull).open("rb") as nothing,
    ):  # fmt: skip
        request = {"words": [*words], "environment": environment, "directory": os.getcwd()}
        descriptors = [nothing.fileno(), out.fileno(), errors.fileno(), theirs.fileno()]
        socket.send_fds(_server(), [json.dumps(request).encode()], descriptors)
        theirs.close()
        ours.settimeout(seconds)
        answers = ours.makefile("r")
        pid = int(answers.readline())
        try:
            status = int(answers.readline())
        except TimeoutError:
            os.kill(pid, signal.SIGKILL)
            raise
        out.seek(0)
        errors.seek(0)
        return Done(["fvdctl", *words], status, out.read().decode(), errors.read().decode())


@functools.cache
def _server() -> socket.socket:
    """The socket of the process that forks, which is started by the first call."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        subprocess.run(
            [sys.executable, "-P", "-m", "fvdtest.preloaded", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=os.environ | {"PYTHONPATH": str(LIBRARY)},
            check=True,
        )
    return ours


def serve(requests: socket.socket) -> None:
    """Fork for every request until the other side is gone."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who wait
    while True:
        message, descriptors, _, _ = socket.recv_fds(requests, REQUEST_BYTES, STANDARD + 1)
        if not message:
            return
        if not os.fork():
            requests.close()
            os._exit(watch(message, descriptors))
        for descriptor in descriptors:
            os.close(descriptor)


def watch(message: bytes, descriptors: list[int]) -> int:
    """Start the command line and tell first its pid, then its exit status."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if not pid:
        os.close(descriptors[STANDARD])
        become_fvdctl(message, descriptors[:STANDARD])
    with socket.socket(fileno=descriptors[STANDARD]) as answer:
        answer.sendall(b"%d\n" % pid)
        _, status = os.waitpid(pid, 0)
        answer.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
    return 0


def become_fvdctl(message: bytes, descriptors: list[int]) -> None:
    """In the forked process: everything as a new program finds it, and run."""
    request = json.loads(message)
    for place, descriptor in enumerate(descriptors):
        os.dup2(descriptor, place)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["directory"])
    sys.argv = ["fvdctl", *request["words"]]
    status: object = FAILED
    try:
        status = import_module("fvdctl.main").main()
    except SystemExit as end:
        status = end.code
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else FAILED)


def detach() -> None:
    """Leave the one that started this; it goes on when the imports are done."""
    if os.fork():
        os._exit(0)
    os.setsid()


if __name__ == "__main__":
    for module in MODULES:
        import_module(module)
    detach()
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        serve(connection)
    os._exit(0)
