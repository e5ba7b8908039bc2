# SPDX-License-Identifier: Apache-2.0
"""What the filter refuses and what it leaves, tried by a process that has put it on itself."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fvdd.worker import seccomp
from fvdd.worker.seccomp import Needs, SeccompUnavailable, rules

pytestmark = pytest.mark.skipif(
    not seccomp.is_supported(), reason="the kernel has no filters of system calls"
)

# Each call is made with arguments that would fail in another way, or do no harm, without a filter.
SCRIPT = """
import ctypes, errno, json, os, socket, sys, threading
from fvdd.worker.seccomp import Needs, install
libc = ctypes.CDLL(None, use_errno=True)
library = ctypes.CDLL("libseccomp.so.2")
folder, needs = sys.argv[1], Needs(**json.loads(sys.argv[2]))
open(folder + "/old", "w").close()
go, found = threading.Event(), {}

def call(name, *arguments):
    number = library.seccomp_syscall_resolve_name(name.encode())
    ctypes.set_errno(0)
    result = libc.syscall(ctypes.c_long(number), *map(ctypes.c_long, arguments))
    return errno.errorcode[ctypes.get_errno()] if result < 0 else "done"

def attempt(action):
    try:
        action()
    except OSError as error:
        return errno.errorcode[error.errno]
    return "done"

def unshare(flags):
    return call("unshare", flags)

def started_before():
    go.wait()
    found["other thread: ptrace"] = call("ptrace", 99999, 0, 0, 0)

other = threading.Thread(target=started_before)
other.start()
install(needs)
go.set()
other.join()
for name in ("ptrace", "mount", "init_module", "bpf", "kexec_load", "keyctl", "setns",
             "open_by_handle_at", "io_uring_setup", "pidfd_getfd", "reboot", "execve",
             "process_vm_readv", "setresuid", "renameat2"):
    found[name] = call(name, -1, -1, -1, -1, -1, -1)
found["unshare"] = unshare(0)
found["clone namespace"] = call("clone", 0x10000000 | 0x10000, 0, 0, 0, 0)
found["prlimit of another"] = call("prlimit64", os.getppid(), 7, 0, 0)
found["kill"] = attempt(lambda: os.kill(os.getppid(), 0))
found["push into the terminal"] = call("ioctl", 99, 0x5412, 0)
found["write a file"] = attempt(lambda: os.close(os.open(folder + "/old", os.O_WRONLY)))
found["make a file"] = attempt(lambda: os.close(os.open(folder + "/new", os.O_RDONLY | os.O_CREAT)))
found["TCP"] = attempt(lambda: socket.socket(socket.AF_INET).close())
found["packets"] = attempt(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW).close())
found["vsock"] = attempt(lambda: socket.socket(socket.AF_VSOCK).close())

def program():
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)

found["fork"] = attempt(program)
found["read a file"] = attempt(lambda: os.close(os.open(folder + "/old", os.O_RDONLY)))
found["memory"] = attempt(lambda: os.close(os.memfd_create("x")))
found["Unix socket"] = attempt(lambda: socket.socket(socket.AF_UNIX).close())
found["remove a file"] = attempt(lambda: os.unlink(folder + "/old"))
late = threading.Thread(target=lambda: found.update(thread="done"))
late.start()
late.join()
print(json.dumps(found))
"""

NEVER = (
    "other thread: ptrace", "ptrace", "mount", "init_module", "bpf", "kexec_load", "keyctl",
    "setns", "open_by_handle_at", "io_uring_setup", "pidfd_getfd", "reboot", "process_vm_readv",
    "unshare", "clone namespace", "prlimit of another", "push into the terminal",
)  # fmt: skip
ALONE = ("execve", "setresuid", "renameat2", "kill", "write a file", "make a file", "fork")
ALWAYS = ("read a file", "memory", "Unix socket", "remove a file", "thread")


def tried(tmp_path, **needs):
    done = subprocess.run(
        [sys.executable, "-P", "-c", SCRIPT, str(tmp_path), json.dumps(needs)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_process_that_needs_nothing_more(tmp_path):
    found = tried(tmp_path)
    refused = {*NEVER, *ALONE, "TCP", "packets", "vsock"}
    assert {name for name, answer in found.items() if answer == "EPERM"} == refused
    assert {found[name] for name in ALWAYS} == {"done"}


def test_remote_base_needs_the_network_and_no_more(tmp_path):
    found = tried(tmp_path, network=True)
    assert found["TCP"] == "done"
    assert {found[name] for name in (*NEVER, *ALONE, "packets", "vsock")} == {"EPERM"}


def test_programs_may_be_started_and_are_refused_the_rest(tmp_path):
    found = tried(tmp_path, programs=True, network=True)
    assert {found[name] for name in NEVER} == {"EPERM"}
    assert "EPERM" not in {found[name] for name in ALONE}
    assert {found["packets"], found["vsock"]} == {"EPERM"}


def test_every_rule_of_an_architecture_that_we_test_is_known():
    """A misspelt name would be left out in silence."""
    known = seccomp._load()
    names = {rule.call for rule in rules(Needs())}
    unknown = {n for n in names if known.seccomp_syscall_resolve_name(n.encode()) == -1}
    # Of newer kernels than the library of Debian 12.
    assert unknown <= {"fchmodat2"}
    # Calls of other architectures and of long ago have negative numbers.
    assert len([n for n in names if known.seccomp_syscall_resolve_name(n.encode()) >= 0]) > 80


def test_library_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(seccomp, "LIBRARY", "libseccomp.so.none")
    with pytest.raises(SeccompUnavailable, match="libseccomp2"):
        seccomp.install(Needs())
    assert "Seccomp:\t0" in Path("/proc/self/status").read_text()


def test_kernel_without_filters_is_named(monkeypatch):
    monkeypatch.setattr(seccomp, "is_supported", lambda: False)
    with pytest.raises(SeccompUnavailable, match="no seccomp filters"):
        seccomp.install(Needs())
