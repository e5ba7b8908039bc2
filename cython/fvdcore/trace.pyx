# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Layer 1. The ring of a trace. See trace.pxd.

A bounded queue of many writers and one reader. The sequence of a place says whose turn it is:
position p may be written when it is p, and read when it is p + 1; reading makes it p +
TRACE_EVENTS, the turn of the next round. A writer that was switched off late may put an event after
the end: it lies in the ring until the next start takes it away."""
from libc.errno cimport errno
from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memcpy, memset
from .atomics cimport (
    compare_swap_acq_rel, fetch_add_relaxed, load_acquire, load_relaxed, store_relaxed,
    store_release,
)
from .syscalls cimport (
    EBUSY, MAP_ANONYMOUS, MAP_FAILED, MAP_NORESERVE, MAP_PRIVATE, PROT_READ, PROT_WRITE, c_gettid,
    c_mmap, c_munmap,
)


cdef inline trace_event_t* place(trace_t* t, uint64_t position) noexcept nogil:
    return t.ring + (position & (TRACE_EVENTS - 1))


cdef void trace_init(trace_t* t) noexcept nogil:
    memset(t, 0, sizeof(trace_t))


cdef void trace_free(trace_t* t) noexcept nogil:
    if t.ring != NULL:
        c_munmap(t.ring, TRACE_EVENTS * sizeof(trace_event_t))
    trace_init(t)


cdef int trace_start(trace_t* t) noexcept nogil:
    cdef trace_event_t left
    cdef uint64_t i
    cdef void* p
    if trace_is_on(t):
        return -EBUSY
    if t.ring == NULL:
        p = c_mmap(NULL, TRACE_EVENTS * sizeof(trace_event_t), PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        if p == MAP_FAILED:
            return -errno
        t.ring = <trace_event_t*>p
        for i in range(TRACE_EVENTS):
            t.ring[i].sequence = i
    while trace_take(t, &left, 1):
        pass
    store_relaxed(&t.lost, 0)
    # Whoever sees that it is on sees the ring.
    store_release(&t.on, 1)
    return 0


cdef void trace_stop(trace_t* t) noexcept nogil:
    store_release(&t.on, 0)


cdef uint64_t trace_lost(const trace_t* t) noexcept nogil:
    return load_relaxed(&t.lost)


cdef uint64_t trace_take(trace_t* t, trace_event_t* out, uint64_t most) noexcept nogil:
    cdef trace_event_t* e
    cdef uint64_t taken = 0
    if t.ring == NULL:
        return 0
    while taken < most:
        e = place(t, t.tail)
        if load_acquire(&e.sequence) != t.tail + 1:
            break
        out[taken] = e[0]
        # Readers count from 0: a gap would be an event that was lost inside.
        out[taken].sequence = t.tail
        store_release(&e.sequence, t.tail + TRACE_EVENTS)
        t.tail += 1
        taken += 1
    return taken


cdef void trace_put(trace_t* t, trace_event_t* e) noexcept nogil:
    cdef uint64_t position = load_relaxed(&t.head), sequence
    cdef trace_event_t* here
    while True:
        here = place(t, position)
        sequence = load_acquire(&here.sequence)
        if sequence == position:
            if compare_swap_acq_rel(&t.head, position, position + 1):
                break
            position = load_relaxed(&t.head)
        elif <int64_t>(sequence - position) < 0:
            fetch_add_relaxed(&t.lost, 1)
            return
        else:
            position = load_relaxed(&t.head)
    e.thread = c_gettid()
    # All but its sequence, which others look at meanwhile.
    memcpy(<uint64_t*>here + 1, <uint64_t*>e + 1, sizeof(trace_event_t) - sizeof(uint64_t))
    store_release(&here.sequence, position + 1)
