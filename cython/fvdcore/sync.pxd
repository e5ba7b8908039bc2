# SPDX-License-Identifier: Apache-2.0
"""Layer 0. Mutexes, conditions, threads and the clock: the only places, beside storage calls and
sockets, where an engine thread may block. Each object carries a gate pointer: NULL in production,
the simulator's table in simulation, so that a seeded scheduler owns every interleaving."""
from libc.stdint cimport uint64_t
from .pthread cimport pthread_cond_t, pthread_mutex_t, pthread_t

ctypedef void* (*thread_body_t)(void*) noexcept nogil

cdef struct gate_t

cdef struct mutex_t:
    pthread_mutex_t native
    gate_t* gate

cdef struct cond_t:
    pthread_cond_t native
    gate_t* gate

cdef struct thread_t:
    pthread_t native
    gate_t* gate
    bint started

cdef struct gate_t:
    void* owner
    void (*lock)(gate_t* g, mutex_t* m) noexcept nogil
    void (*unlock)(gate_t* g, mutex_t* m) noexcept nogil
    int (*wait)(gate_t* g, cond_t* c, mutex_t* m, uint64_t deadline_ns) noexcept nogil
    void (*wake)(gate_t* g, cond_t* c, bint all) noexcept nogil
    int (*start)(gate_t* g, thread_t* t, thread_body_t body, void* arg) noexcept nogil
    void (*join)(gate_t* g, thread_t* t) noexcept nogil
    void (*leave)(gate_t* g, thread_t* t) noexcept nogil
    uint64_t (*now)(gate_t* g) noexcept nogil

# All *_init return 0 or a negative errno; *_free of a zeroed object is harmless only for thread_t.
cdef int mutex_init(mutex_t* m, gate_t* gate) noexcept nogil
cdef void mutex_free(mutex_t* m) noexcept nogil
cdef void mutex_lock(mutex_t* m) noexcept nogil
cdef void mutex_unlock(mutex_t* m) noexcept nogil

cdef int cond_init(cond_t* c, gate_t* gate) noexcept nogil
cdef void cond_free(cond_t* c) noexcept nogil
# Wait until woken or the monotonic deadline (NEVER = none). 0, or -ETIMEDOUT; may wake early.
cdef int cond_wait(cond_t* c, mutex_t* m, uint64_t deadline_ns) noexcept nogil
cdef void cond_signal(cond_t* c) noexcept nogil
cdef void cond_broadcast(cond_t* c) noexcept nogil

# Start body(arg) on a thread with all signals blocked, so that Python's main thread gets them.
cdef int thread_start(thread_t* t, gate_t* gate, thread_body_t body, void* arg) noexcept nogil
cdef void thread_join(thread_t* t) noexcept nogil
# Leave it to itself: it hangs in the kernel, say.
cdef void thread_leave(thread_t* t) noexcept nogil
# A thread that waits in a system call outside sync (a socket) can be woken out of it: the call ends
# with EINTR. prepare: once a process; allow: by the thread itself; wake: while it is not joined.
cdef int thread_wake_prepare() noexcept nogil
cdef void thread_wake_allow() noexcept nogil
cdef void thread_wake(thread_t* t) noexcept nogil

# Monotonic nanoseconds.
cdef uint64_t clock_now(gate_t* gate) noexcept nogil
