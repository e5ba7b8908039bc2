# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Gate: real threads and locks, but the engine's clock moves only when a test says so."""
from libc.stdint cimport uint64_t
from libc.string cimport memset

from fvdcore.limits cimport NEVER
from fvdcore.pthread cimport (
    pthread_cond_broadcast, pthread_cond_signal, pthread_cond_wait, pthread_create,
    pthread_detach, pthread_join, pthread_mutex_lock, pthread_mutex_unlock,
)
from fvdcore.sync cimport (
    cond_t, gate_t, mutex_free, mutex_init, mutex_lock, mutex_t, mutex_unlock, thread_body_t,
    thread_t,
)

cdef enum:
    ETIMEDOUT = 110


cdef void gate_lock(gate_t* g, mutex_t* m) noexcept nogil:
    pthread_mutex_lock(&m.native)


cdef void gate_unlock(gate_t* g, mutex_t* m) noexcept nogil:
    pthread_mutex_unlock(&m.native)


cdef int enrol(clock_gate_t* g, cond_t* c, mutex_t* m, uint64_t deadline) noexcept nogil:
    """Enter a sleeper unless its time is over; its place, or -1."""
    cdef int i, at = -1
    mutex_lock(&g.mutex)
    if deadline > g.now:
        for i in range(SLEEPERS):
            if g.sleepers[i].cond == NULL:
                at = i
                g.sleepers[i] = sleeper_t(c, m, deadline)
                g.waits += 1
                break
    mutex_unlock(&g.mutex)
    return at


cdef int gate_wait(gate_t* p, cond_t* c, mutex_t* m, uint64_t deadline) noexcept nogil:
    cdef clock_gate_t* g = <clock_gate_t*>p
    cdef int at = enrol(g, c, m, deadline)
    if at >= 0:
        pthread_cond_wait(&c.native, &m.native)
        mutex_lock(&g.mutex)
        g.sleepers[at].cond = NULL
        mutex_unlock(&g.mutex)
    return -ETIMEDOUT if gate_now(p) >= deadline else 0


cdef void gate_wake(gate_t* g, cond_t* c, bint all) noexcept nogil:
    if all:
        pthread_cond_broadcast(&c.native)
    else:
        pthread_cond_signal(&c.native)


cdef int gate_start(gate_t* g, thread_t* t, thread_body_t body, void* arg) noexcept nogil:
    return -pthread_create(&t.native, NULL, body, arg)


cdef void gate_join(gate_t* g, thread_t* t) noexcept nogil:
    pthread_join(t.native, NULL)


cdef void gate_leave(gate_t* g, thread_t* t) noexcept nogil:
    pthread_detach(t.native)


cdef uint64_t gate_now(gate_t* p) noexcept nogil:
    cdef clock_gate_t* g = <clock_gate_t*>p
    cdef uint64_t now
    mutex_lock(&g.mutex)
    now = g.now
    mutex_unlock(&g.mutex)
    return now


cdef class Gate:
    """advance(seconds) moves the clock and wakes those whose time has come."""

    def __cinit__(self):
        memset(&self.g, 0, sizeof(clock_gate_t))
        mutex_init(&self.g.mutex, NULL)
        self.g.now = 1000000000
        self.g.head = gate_t(NULL, gate_lock, gate_unlock, gate_wait, gate_wake, gate_start,
                             gate_join, gate_leave, gate_now)

    def __dealloc__(self):
        mutex_free(&self.g.mutex)

    cdef gate_t* raw(self):
        return &self.g.head

    def advance(self, double seconds):
        cdef int i
        cdef sleeper_t s
        mutex_lock(&self.g.mutex)
        self.g.now += <uint64_t>(seconds * 1e9)
        mutex_unlock(&self.g.mutex)
        for i in range(SLEEPERS):
            mutex_lock(&self.g.mutex)
            s = self.g.sleepers[i]
            mutex_unlock(&self.g.mutex)
            if s.cond != NULL and s.deadline <= self.g.now:
                with nogil:
                    # With its mutex held it sleeps already, or has not looked at the clock yet.
                    pthread_mutex_lock(&s.mutex.native)
                    pthread_cond_broadcast(&s.cond.native)
                    pthread_mutex_unlock(&s.mutex.native)

    def sleepers(self):
        """Seconds from now until each deadline, None for none; sorted, None last."""
        found = []
        mutex_lock(&self.g.mutex)
        for i in range(SLEEPERS):
            if self.g.sleepers[i].cond != NULL:
                deadline = self.g.sleepers[i].deadline
                found.append(None if deadline == NEVER else (deadline - self.g.now) / 1e9)
        mutex_unlock(&self.g.mutex)
        return sorted(found, key=lambda s: float("inf") if s is None else s)

    @property
    def waits(self):
        """How many waits have begun so far."""
        return self.g.waits
