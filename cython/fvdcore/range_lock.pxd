# SPDX-License-Identifier: Apache-2.0
"""Layer 2. Locks on block ranges, held only where a block is not yet local.

Guest writes wait for a range; copy-on-read waits for a moment, prefetch only ever tries. The table
is fixed; a linear walk is cheap because holders are at most the crew, prefetch and one inline write
a connection."""
from libc.stdint cimport uint64_t
from .limits cimport RANGE_LOCKS
from .sync cimport cond_t, gate_t, mutex_t

cdef struct range_locks_t:
    mutex_t mutex
    cond_t released
    int used                           # entries in the table
    int waiting
    int patient                        # of range_lock_until: they go behind those that wait
    uint64_t[256] first
    uint64_t[256] end

cdef int range_locks_init(range_locks_t* r, gate_t* gate) noexcept nogil
cdef void range_locks_free(range_locks_t* r) noexcept nogil
# Lock [first, end): wait until nobody holds a part of it.
cdef void range_lock(range_locks_t* r, uint64_t first, uint64_t end) noexcept nogil
cdef bint range_lock_try(range_locks_t* r, uint64_t first, uint64_t end) noexcept nogil
# The same, but wait for it until then.
cdef bint range_lock_until(range_locks_t* r, uint64_t first, uint64_t end,
        uint64_t deadline_ns) noexcept nogil
cdef void range_unlock(range_locks_t* r, uint64_t first, uint64_t end) noexcept nogil
# Wait until no lock is held at all (I5). New ones may follow at once.
cdef void range_locks_wait_idle(range_locks_t* r) noexcept nogil
