# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Layer 2. Block-range locks. See range_lock.pxd."""
from libc.stdint cimport uint64_t
from libc.string cimport memset
from .checks cimport invariant
from .limits cimport NEVER, RANGE_LOCKS
from .sync cimport (
    cond_broadcast, cond_free, cond_init, cond_wait, gate_t, mutex_free, mutex_init, mutex_lock,
    mutex_unlock,
)


cdef int range_locks_init(range_locks_t* r, gate_t* gate) noexcept nogil:
    cdef int rc
    memset(r, 0, sizeof(range_locks_t))
    rc = mutex_init(&r.mutex, gate)
    return rc if rc < 0 else cond_init(&r.released, gate)


cdef void range_locks_free(range_locks_t* r) noexcept nogil:
    mutex_free(&r.mutex)
    cond_free(&r.released)


cdef bint taken(const range_locks_t* r, uint64_t first, uint64_t end) noexcept nogil:
    cdef int i
    if r.used == RANGE_LOCKS:
        return True
    for i in range(r.used):
        if r.first[i] < end and first < r.end[i]:
            return True
    return False


cdef void insert(range_locks_t* r, uint64_t first, uint64_t end) noexcept nogil:
    r.first[r.used] = first
    r.end[r.used] = end
    r.used += 1


cdef void range_lock(range_locks_t* r, uint64_t first, uint64_t end) noexcept nogil:
    invariant(first < end)
    mutex_lock(&r.mutex)
    while taken(r, first, end):
        r.waiting += 1
        cond_wait(&r.released, &r.mutex, NEVER)
        r.waiting -= 1
    insert(r, first, end)
    mutex_unlock(&r.mutex)


cdef bint range_lock_try(range_locks_t* r, uint64_t first, uint64_t end) noexcept nogil:
    cdef bint free_range
    invariant(first < end)
    mutex_lock(&r.mutex)
    # Nobody overtakes a waiting guest write.
    free_range = not taken(r, first, end) and r.waiting == 0
    if free_range:
        insert(r, first, end)
    mutex_unlock(&r.mutex)
    return free_range


cdef bint range_lock_until(range_locks_t* r, uint64_t first, uint64_t end,
        uint64_t deadline_ns) noexcept nogil:
    cdef bint free_range
    invariant(first < end)
    mutex_lock(&r.mutex)
    r.patient += 1
    free_range = not taken(r, first, end) and r.waiting == 0
    while not free_range and cond_wait(&r.released, &r.mutex, deadline_ns) == 0:
        free_range = not taken(r, first, end) and r.waiting == 0
    r.patient -= 1
    if free_range:
        insert(r, first, end)
    mutex_unlock(&r.mutex)
    return free_range


cdef void range_unlock(range_locks_t* r, uint64_t first, uint64_t end) noexcept nogil:
    cdef int i
    mutex_lock(&r.mutex)
    for i in range(r.used):
        if r.first[i] == first and r.end[i] == end:
            break
    else:
        invariant(False)
    r.used -= 1
    r.first[i] = r.first[r.used]
    r.end[i] = r.end[r.used]
    if r.waiting or r.patient:
        cond_broadcast(&r.released)
    mutex_unlock(&r.mutex)


cdef void range_locks_wait_idle(range_locks_t* r) noexcept nogil:
    mutex_lock(&r.mutex)
    while r.used:
        r.waiting += 1
        cond_wait(&r.released, &r.mutex, NEVER)
        r.waiting -= 1
    mutex_unlock(&r.mutex)
