# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Layer 2. Quiescence. See quiescence.pxd.

The fences pair: a user stores its slot and then loads the mapping; a closer stores the mapping and
then loads the slots. At least one of them sees the other's store."""
from libc.stdint cimport uint64_t
from libc.stdlib cimport free
from libc.string cimport memset
from posix.stdlib cimport posix_memalign
from .atomics cimport ctz64, fence, fetch_add_relaxed, load_acquire, store_relaxed, store_release
from .counters cimport BLOCK_SHARED, BLOCKS
from .limits cimport NS_PER_MS
from .sync cimport (
    clock_now, cond_free, cond_init, cond_wait, gate_t, mutex_free, mutex_init, mutex_lock,
    mutex_unlock,
)
from .syscalls cimport ENOMEM


cdef int quiescence_init(quiescence_t* q, gate_t* gate) noexcept nogil:
    cdef int rc
    memset(q, 0, sizeof(quiescence_t))
    if posix_memalign(<void**>&q.uses, 64, (BLOCKS + SHARED_USES) * sizeof(use_t)) != 0:
        q.uses = NULL
        return -ENOMEM
    memset(q.uses, 0, (BLOCKS + SHARED_USES) * sizeof(use_t))
    q.stamp = 1
    q.shared_free = ~<uint64_t>0
    q.gate = gate
    rc = mutex_init(&q.shared, gate)
    return rc if rc < 0 else cond_init(&q.left, gate)


cdef void quiescence_free(quiescence_t* q) noexcept nogil:
    if q.uses != NULL:
        free(q.uses)
        mutex_free(&q.shared)
        cond_free(&q.left)
        q.uses = NULL


cdef int take_shared(quiescence_t* q) noexcept nogil:
    cdef int i
    mutex_lock(&q.shared)
    while q.shared_free == 0:
        cond_wait(&q.left, &q.shared, clock_now(q.gate) + NS_PER_MS)
    i = ctz64(q.shared_free)
    q.shared_free &= q.shared_free - 1
    mutex_unlock(&q.shared)
    return BLOCKS + i


cdef int quiescence_enter(quiescence_t* q, int slot) noexcept nogil:
    if slot == BLOCK_SHARED:
        slot = take_shared(q)
    store_relaxed(&q.uses[slot].since, load_acquire(&q.stamp))
    fence()
    return slot


cdef void quiescence_leave(quiescence_t* q, int slot) noexcept nogil:
    store_release(&q.uses[slot].since, 0)
    if slot >= BLOCKS:
        mutex_lock(&q.shared)
        q.shared_free |= <uint64_t>1 << (slot - BLOCKS)
        mutex_unlock(&q.shared)


cdef uint64_t quiescence_stamp(quiescence_t* q) noexcept nogil:
    cdef uint64_t stamp
    fence()
    stamp = fetch_add_relaxed(&q.stamp, 1)
    fence()
    return stamp


cdef bint quiescent(const quiescence_t* q, uint64_t stamp) noexcept nogil:
    cdef uint64_t since
    cdef int slot
    for slot in range(BLOCKS + SHARED_USES):
        since = load_acquire(&q.uses[slot].since)
        if since != 0 and since <= stamp:
            return False
    return True


cdef void quiescence_pause(quiescence_t* q) noexcept nogil:
    # Whoever leaves must not pay for a wake-up that is hardly ever wanted.
    mutex_lock(&q.shared)
    cond_wait(&q.left, &q.shared, clock_now(q.gate) + NS_PER_MS)
    mutex_unlock(&q.shared)


cdef bint quiescence_wait(quiescence_t* q, uint64_t stamp, uint64_t deadline) noexcept nogil:
    while not quiescent(q, stamp):
        if clock_now(q.gate) >= deadline:
            return False
        quiescence_pause(q)
    return True
