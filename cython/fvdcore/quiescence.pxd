# SPDX-License-Identifier: Apache-2.0
"""Layer 2. Which requests may still use a place in storage without holding a lock (I8).

A request that goes through the chunk table without a lock does so between enter and leave, in the
slot of its thread. Whoever closed a mapping takes a stamp; once quiescent() says so of that stamp,
every request that began before has ended, and the place has no user any more."""
from libc.stdint cimport uint64_t
from .counters cimport BLOCKS
from .sync cimport cond_t, gate_t, mutex_t

cdef enum:
    SHARED_USES = 64

cdef struct use_t:
    uint64_t since                     # 0: nothing in use; otherwise the stamp it entered under
    uint64_t[7] padding                # a cache line for each thread

cdef struct quiescence_t:
    use_t* uses                        # BLOCKS slots, one for each thread as in the stats page,
                                       # and SHARED_USES more
    uint64_t stamp                     # the next one, from 1
    mutex_t shared                     # guards shared_free
    uint64_t shared_free               # bit i: the i-th of the further slots is free
    cond_t left                        # only waited for with a deadline: nobody signals it
    gate_t* gate

cdef int quiescence_init(quiescence_t* q, gate_t* gate) noexcept nogil
cdef void quiescence_free(quiescence_t* q) noexcept nogil
# The slot to leave. Callers that share BLOCK_SHARED get one of the further slots each.
cdef int quiescence_enter(quiescence_t* q, int slot) noexcept nogil
cdef void quiescence_leave(quiescence_t* q, int slot) noexcept nogil
# To be called after a mapping was closed. Never 0.
cdef uint64_t quiescence_stamp(quiescence_t* q) noexcept nogil
cdef bint quiescent(const quiescence_t* q, uint64_t stamp) noexcept nogil
# A millisecond's wait, which nothing ends.
cdef void quiescence_pause(quiescence_t* q) noexcept nogil
# Look every millisecond until it is so, or the monotonic deadline (ns) has passed.
cdef bint quiescence_wait(quiescence_t* q, uint64_t stamp, uint64_t deadline) noexcept nogil
