# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Layer 2. Quiescence. See quiescence.pxd.

The fences pair: a user stores its slot and then loads the mapping; a closer stores the mapping and
then loads the slots. At least one of them sees the other's store."""
from libc.stdint cimport uint64_t
from libc.stdlib cimport free
from libc.string cimport memset
from posix.stdlib cimport posix_memalign
from .atomics cimport fence, fetch_add_relaxed, load_acquire, store_relaxed, store_release
from .counters cimport BLOCK_SHARED, BLOCKS
from .sync cimport gate_t, mutex_free, mutex_init, mutex_lock, mutex_unlock
from .syscalls cimport ENOMEM


cdef int quiescence_init(quiescence_t* q, gate_t* gate) noexcept nogil:
    memset(q, 0, sizeof(quiescence_t))
    if posix_memalign(<void**>&q.uses, 64, BLOCKS * sizeof(use_t)) != 0:
        q.uses = NULL
        return -ENOMEM
    memset(q.uses, 0, BLOCKS * sizeof(use_t))
    q.stamp = 1
    return mutex_init(&q.shared, gate)


cdef void quiescence_free(quiescence_t* q) noexcept nogil:
    if q.uses != NULL:
        free(q.uses)
        mutex_free(&q.shared)
        q.uses = NULL


cdef void quiescence_enter(quiescence_t* q, int slot) noexcept nogil:
    if slot == BLOCK_SHARED:
        # The stamp of the first of those that overlap stands for all of them.
        mutex_lock(&q.shared)
        if q.sharing == 0:
            store_relaxed(&q.uses[slot].since, load_acquire(&q.stamp))
        q.sharing += 1
        fence()
        mutex_unlock(&q.shared)
        return
    store_relaxed(&q.uses[slot].since, load_acquire(&q.stamp))
    fence()


cdef void quiescence_leave(quiescence_t* q, int slot) noexcept nogil:
    if slot == BLOCK_SHARED:
        mutex_lock(&q.shared)
        q.sharing -= 1
        if q.sharing == 0:
            store_release(&q.uses[slot].since, 0)
        mutex_unlock(&q.shared)
        return
    store_release(&q.uses[slot].since, 0)


cdef uint64_t quiescence_stamp(quiescence_t* q) noexcept nogil:
    cdef uint64_t stamp
    fence()
    stamp = fetch_add_relaxed(&q.stamp, 1)
    fence()
    return stamp


cdef bint quiescent(const quiescence_t* q, uint64_t stamp) noexcept nogil:
    cdef uint64_t since
    cdef int slot
    for slot in range(BLOCKS):
        since = load_acquire(&q.uses[slot].since)
        if since != 0 and since <= stamp:
            return False
    return True
