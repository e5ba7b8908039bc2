# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""A mutex with a condition, and a native thread that looks at its signal mask."""
from libc.stdint cimport uint64_t
from libc.string cimport memset

from fvdcore.limits cimport NEVER
from fvdcore.sync cimport (
    clock_now, cond_broadcast, cond_free, cond_init, cond_signal, cond_t, cond_wait, mutex_free,
    mutex_init, mutex_lock, mutex_t, mutex_unlock, thread_join, thread_start, thread_t,
)

cdef extern from *:
    """
    #include <pthread.h>
    #include <signal.h>
    static int fvd_blocked_signals(void) {
        sigset_t now;
        int n = 0;
        pthread_sigmask(SIG_SETMASK, NULL, &now);
        for (int s = 1; s < 32; s++)
            n += s != SIGKILL && s != SIGSTOP && sigismember(&now, s) == 1;
        return n;
    }
    """
    int blocked_signals "fvd_blocked_signals"() noexcept nogil


cdef void* look(void* argument) noexcept nogil:
    (<int*>argument)[0] = blocked_signals()
    return NULL


def now():
    return clock_now(NULL)


def signals_blocked_here():
    return blocked_signals()


def signals_blocked_in_a_thread():
    """How many of the 29 that can be; the thread is joined twice, and once before it began."""
    cdef thread_t t
    cdef int seen = -1, rc
    memset(&t, 0, sizeof(t))
    thread_join(&t)
    rc = thread_start(&t, NULL, look, &seen)
    if rc < 0:
        raise OSError(-rc, "thread_start")
    with nogil:
        thread_join(&t)
        thread_join(&t)
    return seen


cdef class Bell:
    """A condition with its mutex."""

    cdef mutex_t mutex
    cdef cond_t cond
    cdef int waiters
    cdef int rung

    def __init__(self):
        self.waiters = self.rung = 0
        if mutex_init(&self.mutex, NULL) < 0 or cond_init(&self.cond, NULL) < 0:
            raise MemoryError()

    def __dealloc__(self):
        mutex_free(&self.mutex)
        cond_free(&self.cond)

    def wait(self, long ms=-1):
        """Wait to be rung, at most so many milliseconds; what cond_wait returned last."""
        cdef uint64_t deadline = NEVER
        cdef int rc = 0
        if ms >= 0:
            deadline = clock_now(NULL) + <uint64_t>ms * 1000000
        with nogil:
            mutex_lock(&self.mutex)
            self.waiters += 1
            while self.rung == 0 and rc == 0:
                rc = cond_wait(&self.cond, &self.mutex, deadline)
            self.waiters -= 1
            if self.rung:
                self.rung -= 1
            mutex_unlock(&self.mutex)
        return rc

    def ring(self, int times=1):
        """Let so many go: one by a signal, more by a broadcast."""
        mutex_lock(&self.mutex)
        self.rung += times
        if times == 1:
            cond_signal(&self.cond)
        else:
            cond_broadcast(&self.cond)
        mutex_unlock(&self.mutex)

    def waiting(self):
        mutex_lock(&self.mutex)
        n = self.waiters
        mutex_unlock(&self.mutex)
        return n
