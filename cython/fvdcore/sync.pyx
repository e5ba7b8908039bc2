# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Layer 0. Mutexes, conditions, threads, clock. See sync.pxd for the contract."""
from libc.stdint cimport uint64_t
from libc.string cimport memset
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec
from .checks cimport invariant
from .limits cimport NEVER, NS_PER_S, STACK_BYTES
from .pthread cimport (
    SIG_SETMASK, pthread_attr_destroy, pthread_attr_init, pthread_attr_setstacksize, pthread_attr_t,
    pthread_cond_broadcast, pthread_cond_destroy, pthread_cond_init, pthread_cond_signal,
    pthread_cond_timedwait, pthread_cond_wait, pthread_condattr_destroy, pthread_condattr_init,
    pthread_condattr_setclock, pthread_condattr_t, pthread_create, pthread_detach, pthread_join,
    pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock,
    pthread_sigmask, sigfillset, sigset_t, wake_allow, wake_prepare, wake_send,
)


cdef int mutex_init(mutex_t* m, gate_t* gate) noexcept nogil:
    m.gate = gate
    return -pthread_mutex_init(&m.native, NULL)


cdef void mutex_free(mutex_t* m) noexcept nogil:
    pthread_mutex_destroy(&m.native)


cdef void mutex_lock(mutex_t* m) noexcept nogil:
    if m.gate != NULL:
        m.gate.lock(m.gate, m)
    else:
        invariant(pthread_mutex_lock(&m.native) == 0)


cdef void mutex_unlock(mutex_t* m) noexcept nogil:
    if m.gate != NULL:
        m.gate.unlock(m.gate, m)
    else:
        invariant(pthread_mutex_unlock(&m.native) == 0)


cdef int cond_init(cond_t* c, gate_t* gate) noexcept nogil:
    cdef pthread_condattr_t attributes
    cdef int rc
    c.gate = gate
    rc = pthread_condattr_init(&attributes)
    if rc != 0:
        return -rc
    rc = pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC)
    if rc == 0:
        rc = pthread_cond_init(&c.native, &attributes)
    pthread_condattr_destroy(&attributes)
    return -rc


cdef void cond_free(cond_t* c) noexcept nogil:
    pthread_cond_destroy(&c.native)


cdef int cond_wait(cond_t* c, mutex_t* m, uint64_t deadline_ns) noexcept nogil:
    cdef timespec t
    if c.gate != NULL:
        return c.gate.wait(c.gate, c, m, deadline_ns)
    if deadline_ns == NEVER:
        return -pthread_cond_wait(&c.native, &m.native)
    t.tv_sec = <long>(deadline_ns // NS_PER_S)
    t.tv_nsec = <long>(deadline_ns % NS_PER_S)
    return -pthread_cond_timedwait(&c.native, &m.native, &t)


cdef void cond_signal(cond_t* c) noexcept nogil:
    if c.gate != NULL:
        c.gate.wake(c.gate, c, False)
    else:
        pthread_cond_signal(&c.native)


cdef void cond_broadcast(cond_t* c) noexcept nogil:
    if c.gate != NULL:
        c.gate.wake(c.gate, c, True)
    else:
        pthread_cond_broadcast(&c.native)


cdef int thread_start(thread_t* t, gate_t* gate, thread_body_t body, void* arg) noexcept nogil:
    cdef pthread_attr_t attributes
    cdef sigset_t all_signals
    cdef sigset_t before
    cdef int rc
    t.gate = gate
    if gate != NULL:
        rc = gate.start(gate, t, body, arg)
        t.started = rc == 0
        return rc
    rc = pthread_attr_init(&attributes)
    if rc != 0:
        return -rc
    pthread_attr_setstacksize(&attributes, STACK_BYTES)
    sigfillset(&all_signals)
    pthread_sigmask(SIG_SETMASK, &all_signals, &before)
    rc = pthread_create(&t.native, &attributes, body, arg)
    pthread_sigmask(SIG_SETMASK, &before, NULL)
    pthread_attr_destroy(&attributes)
    t.started = rc == 0
    return -rc


cdef void thread_join(thread_t* t) noexcept nogil:
    if not t.started:
        return
    t.started = False
    if t.gate != NULL:
        t.gate.join(t.gate, t)
    else:
        pthread_join(t.native, NULL)


cdef void thread_leave(thread_t* t) noexcept nogil:
    if not t.started:
        return
    t.started = False
    if t.gate != NULL:
        t.gate.leave(t.gate, t)
    else:
        pthread_detach(t.native)


cdef int thread_wake_prepare() noexcept nogil:
    return wake_prepare()


cdef void thread_wake_allow() noexcept nogil:
    wake_allow()


cdef void thread_wake(thread_t* t) noexcept nogil:
    if t.started and t.gate == NULL:
        wake_send(t.native)


cdef uint64_t clock_now(gate_t* gate) noexcept nogil:
    cdef timespec t
    if gate != NULL:
        return gate.now(gate)
    clock_gettime(CLOCK_MONOTONIC, &t)
    return <uint64_t>t.tv_sec * NS_PER_S + <uint64_t>t.tv_nsec
