# SPDX-License-Identifier: Apache-2.0
"""A filter of system calls for this process, through libseccomp.

It names what is refused (EPERM), not what is allowed: the calls that the engine, the C library, the
interpreter and their next versions need are not to be known in full, and a call that is missing
from a list of allowed ones would be an I/O error of somebody's disk. What is refused are families
that a process serving a disk has no business with, and that an intruder would want first.

libseccomp is loaded at run time: Debian has it wherever systemd is. It knows the numbers of the
calls on each architecture, and refuses calls by way of another architecture's table.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

LIBRARY: Final = "libseccomp.so.2"

_ALLOW: Final = 0x7FFF0000
_ERRNO: Final = 0x00050000
_KILL_PROCESS: Final = 0x80000000
# Attributes of a filter.
_BAD_ARCHITECTURE, _ALL_THREADS, _NO_SSB, _OPTIMIZE = 2, 4, 7, 8
_BINARY_TREE: Final = 2
# Comparisons.
_NE, _EQ, _GT, _MASKED_EQ = 1, 4, 6, 7

_CLONE_THREAD: Final = 0x10000
# NEWNS NEWCGROUP NEWUTS NEWIPC NEWUSER NEWPID NEWNET
_CLONE_NAMESPACES: Final = (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000,
                            0x40000000)  # fmt: skip
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C

# The kernel itself: its code, its clock, its console, what is mounted, other keys and identities.
_NEVER: Final = """
init_module finit_module delete_module kexec_load kexec_file_load bpf perf_event_open userfaultfd
create_module get_kernel_syms query_module uselib
ptrace process_vm_readv process_vm_writev process_madvise kcmp pidfd_getfd move_pages migrate_pages
mount umount umount2 pivot_root chroot fsopen fsconfig fsmount fspick move_mount open_tree
mount_setattr unshare setns
open_by_handle_at fanotify_init fanotify_mark quotactl quotactl_fd swapon swapoff acct
reboot sethostname setdomainname settimeofday stime clock_settime clock_adjtime adjtimex
iopl ioperm modify_ldt vm86 vm86old syslog vhangup nfsservctl _sysctl sysfs
add_key request_key keyctl io_uring_setup io_uring_enter io_uring_register
"""

# Other programs, other processes, other people's rights.
_NOT_WITHOUT_PROGRAMS: Final = """
execve execveat fork vfork kill tkill rt_sigqueueinfo rt_tgsigqueueinfo pidfd_send_signal
setuid setgid setreuid setregid setresuid setresgid setfsuid setfsgid setgroups capset
creat openat2 rename renameat renameat2 link linkat symlink symlinkat mknod mknodat mkdir mkdirat
chmod fchmod fchmodat fchmodat2 chown lchown fchown fchownat truncate
setxattr lsetxattr fsetxattr removexattr lremovexattr fremovexattr
"""

_Comparison = tuple[int, int, int, int]


class SeccompUnavailable(Exception):
    """There is no filter, and the text says why."""


@dataclass(frozen=True, slots=True)
class Needs:
    """What a process still has to do once its files are open.

    programs: start others, which inherit the filter. volumes: they change block devices, which
    takes nearly everything. network: sockets beyond AF_UNIX.
    """

    programs: bool = False
    volumes: bool = False
    network: bool = False


class _Argument(ctypes.Structure):
    _fields_ = (
        ("argument", ctypes.c_uint),
        ("comparison", ctypes.c_int),
        ("first", ctypes.c_uint64),
        ("second", ctypes.c_uint64),
    )


@dataclass(frozen=True, slots=True)
class Rule:
    """A call that is refused, where `when` is (argument, comparison, value, second value)."""

    call: str
    when: _Comparison | None = None
    error: int = errno.EPERM


def rules(needs: Needs) -> Iterator[Rule]:
    """What a process with these needs is refused."""
    for call in _NEVER.split():
        yield Rule(call)
    # Its flags lie in memory, out of a filter's sight; the C library then uses clone.
    yield Rule("clone3", error=errno.ENOSYS)
    for flag in _CLONE_NAMESPACES:
        yield Rule("clone", (0, _MASKED_EQ, flag, flag))
    for command in (_TIOCSTI, _TIOCLINUX):
        yield Rule("ioctl", (1, _MASKED_EQ, 0xFFFFFFFF, command))
    yield Rule("prlimit64", (0, _NE, 0, 0))
    if not needs.programs:
        yield from _alone()
    if not needs.volumes:
        yield from _sockets(network=needs.network)


def _alone() -> Iterator[Rule]:
    for call in _NOT_WITHOUT_PROGRAMS.split():
        yield Rule(call)
    yield Rule("clone", (0, _MASKED_EQ, _CLONE_THREAD, 0))
    yield Rule("tgkill", (0, _NE, os.getpid(), 0))
    # Files are opened for reading alone: all that is written to is open by now.
    for call, flags in (("open", 1), ("openat", 2)):
        for forbidden in (os.O_WRONLY, os.O_RDWR):
            yield Rule(call, (flags, _MASKED_EQ, forbidden, forbidden))
        for forbidden in (os.O_CREAT, os.O_TRUNC):
            yield Rule(call, (flags, _MASKED_EQ, forbidden, forbidden))


def _sockets(*, network: bool) -> Iterator[Rule]:
    if not network:
        yield Rule("socket", (0, _NE, 1, 0))
        return
    # AF_UNIX 1, AF_INET 2, AF_INET6 10
    yield Rule("socket", (0, _GT, 10, 0))
    for family in (0, *range(3, 10)):
        yield Rule("socket", (0, _EQ, family, 0))


def install(needs: Needs) -> None:
    """Put the filter over all threads of this process, for good; SeccompUnavailable says why not.

    Threads must not have been given another filter one by one. Programs that are started inherit
    it, and gain no privileges from then on.
    """
    library = _load()
    filter_ = ctypes.c_void_p(library.seccomp_init(ctypes.c_uint32(_ALLOW)))
    if not filter_:
        raise SeccompUnavailable("libseccomp has no memory")
    try:
        _must(library.seccomp_attr_set(filter_, _BAD_ARCHITECTURE, ctypes.c_uint32(_KILL_PROCESS)))
        _must(library.seccomp_attr_set(filter_, _ALL_THREADS, ctypes.c_uint32(1)))
        # Not known to every version: speed alone. The process is no host of foreign code.
        library.seccomp_attr_set(filter_, _NO_SSB, ctypes.c_uint32(1))
        library.seccomp_attr_set(filter_, _OPTIMIZE, ctypes.c_uint32(_BINARY_TREE))
        for rule in rules(needs):
            _add(library, filter_, rule)
        _must(library.seccomp_load(filter_))
    finally:
        library.seccomp_release(filter_)


def is_supported() -> bool:
    """Whether this kernel has filters of system calls."""
    libc = ctypes.CDLL(None, use_errno=True)
    # Without an address the call fails in any case: EFAULT where the kernel knows it.
    mode_filter = ctypes.c_ulong(2)
    libc.prctl(ctypes.c_int(22), mode_filter, None, ctypes.c_ulong(0), ctypes.c_ulong(0))
    return ctypes.get_errno() == errno.EFAULT


def unavailable() -> str:
    """Why there can be no filter here, "" if there can."""
    try:
        _load()
    except SeccompUnavailable as error:
        return str(error)
    return ""


def _load() -> ctypes.CDLL:
    if not is_supported():
        raise SeccompUnavailable("this kernel has no seccomp filters")
    try:
        library = ctypes.CDLL(LIBRARY, use_errno=True)
    except OSError:
        raise SeccompUnavailable(
            f"{LIBRARY} is missing; install the Debian package libseccomp2"
        ) from None
    library.seccomp_init.restype = ctypes.c_void_p
    return library


def _add(library: ctypes.CDLL, filter_: ctypes.c_void_p, rule: Rule) -> None:
    number = library.seccomp_syscall_resolve_name(rule.call.encode())
    if number < 0:  # this architecture, or this version of the library, has no such call
        return
    argument = _Argument(*rule.when) if rule.when is not None else None
    _must(
        library.seccomp_rule_add_array(
            filter_, ctypes.c_uint32(_ERRNO | rule.error), ctypes.c_int(number),
            ctypes.c_uint(0 if argument is None else 1),
            None if argument is None else ctypes.byref(argument),
        )
    )  # fmt: skip


def _must(result: int) -> None:
    if result < 0:
        raise SeccompUnavailable(f"libseccomp: {os.strerror(-result)}")
