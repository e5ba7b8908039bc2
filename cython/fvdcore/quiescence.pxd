# SPDX-License-Identifier: Apache-2.0
"""Layer 2. Which requests may still use a place in storage without holding a lock (I8).

A request that goes through the chunk table without a lock does so between enter and leave, in the
slot of its thread. Whoever closed a mapping takes a stamp; once quiescent() says so of that stamp,
every request that began before has ended, and the place has no user any more."""
from libc.stdint cimport uint64_t
from .counters cimport BLOCKS
from .sync cimport gate_t, mutex_t

cdef struct use_t:
    uint64_t since                     # 0: nothing in use; otherwise the stamp it entered under
    uint64_t[7] padding                # a cache line for each thread

cdef struct quiescence_t:
    use_t* uses                        # BLOCKS slots, one for each thread as in the stats page
    uint64_t stamp                     # the next one, from 1
    mutex_t shared                     # several callers share slot BLOCK_SHARED
    uint64_t sharing

cdef int quiescence_init(quiescence_t* q, gate_t* gate) noexcept nogil
cdef void quiescence_free(quiescence_t* q) noexcept nogil
cdef void quiescence_enter(quiescence_t* q, int slot) noexcept nogil
cdef void quiescence_leave(quiescence_t* q, int slot) noexcept nogil
# To be called after a mapping was closed. Never 0.
cdef uint64_t quiescence_stamp(quiescence_t* q) noexcept nogil
cdef bint quiescent(const quiescence_t* q, uint64_t stamp) noexcept nogil
