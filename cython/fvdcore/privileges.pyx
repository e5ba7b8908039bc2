# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Layer 5. Giving up privileges, thread by thread.

Linux keeps capabilities for each thread, and one that another thread still has is worth as much to
an intruder as one's own. A thread can only limit itself; so the others are asked by a signal whose
handler does that and nothing else (system calls alone, and errno as it was). The engine's threads
block all signals: they have to be started by a thread that has been limited before.
"""
from libc.stdint cimport uint64_t

cdef extern from *:
    """
    #include <errno.h>
    #include <linux/capability.h>
    #include <signal.h>
    #include <stdint.h>
    #include <string.h>
    #include <sys/prctl.h>
    #include <sys/syscall.h>
    #include <unistd.h>

    /* Not the engine's wake signal, and none that Python or the C library uses. */
    #define FVD_LIMIT_SIGNAL (SIGRTMAX - 3)

    static uint64_t fvd_kept_capabilities;

    static int fvd_limit_thread(void) {
        struct __user_cap_header_struct head = { _LINUX_CAPABILITY_VERSION_3, 0 };
        struct __user_cap_data_struct data[2];
        int number, i;
        for (number = 0; number < 64; number++) {
            if (fvd_kept_capabilities >> number & 1) continue;
            /* EINVAL: behind the last one; EPERM: there is nothing that could be lost. */
            if (prctl(PR_CAPBSET_DROP, number, 0, 0, 0) < 0) break;
        }
        (void)prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
        if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0) return -errno;
        if (syscall(SYS_capget, &head, data) < 0) return -errno;
        for (i = 0; i < 2; i++) {
            data[i].effective = 0;
            data[i].inheritable = 0;
            data[i].permitted &= (uint32_t)(fvd_kept_capabilities >> (32 * i));
        }
        return syscall(SYS_capset, &head, data) < 0 ? -errno : 0;
    }

    static void fvd_on_limit(int number) {
        int before = errno;
        (void)number;
        (void)fvd_limit_thread();
        errno = before;
    }

    static int fvd_limit_prepare(uint64_t kept) {
        struct sigaction action;
        fvd_kept_capabilities = kept;
        memset(&action, 0, sizeof action);
        action.sa_handler = fvd_on_limit;
        action.sa_flags = SA_RESTART;
        sigemptyset(&action.sa_mask);
        return sigaction(FVD_LIMIT_SIGNAL, &action, NULL) < 0 ? -errno : 0;
    }

    static int fvd_limit_other(int thread) {
        return syscall(SYS_tgkill, getpid(), thread, FVD_LIMIT_SIGNAL) < 0 ? -errno : 0;
    }
    """
    int fvd_limit_thread() noexcept nogil
    int fvd_limit_prepare(uint64_t kept) noexcept nogil
    int fvd_limit_other(int thread) noexcept nogil


def limit_this_thread(uint64_t kept):
    """Leave the calling thread no effective and no inheritable capability, those in the bit set
    `kept` permitted and in the bounding set, and nothing to gain by a program. Raises OSError."""
    cdef int rc = fvd_limit_prepare(kept)
    if rc == 0:
        rc = fvd_limit_thread()
    if rc < 0:
        raise OSError(-rc, "giving up privileges failed")


def limit_thread(int thread):
    """Let another thread of this process do what limit_this_thread did last; that takes a moment.
    Raises OSError, for one that has ended ProcessLookupError."""
    cdef int rc = fvd_limit_other(thread)
    if rc < 0:
        raise OSError(-rc, "asking a thread to give up privileges failed")
