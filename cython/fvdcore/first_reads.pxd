# SPDX-License-Identifier: Apache-2.0
"""Layer 1. What guests read from the base, in their order: a profile that prefetch can follow when
another clone of the same base starts. Bounded: what comes when it is full is not noted."""
from libc.stdint cimport uint64_t
from .sync cimport gate_t, mutex_t

cdef enum:
    FIRST_READS_MAX = 65536

cdef struct first_read_t:
    uint64_t offset
    uint64_t length

cdef struct first_reads_t:
    mutex_t mutex
    first_read_t* reads                # FIRST_READS_MAX; NULL: nothing is noted
    uint64_t count

cdef int first_reads_init(first_reads_t* f, gate_t* gate) noexcept nogil
cdef void first_reads_free(first_reads_t* f) noexcept nogil
# A read that goes on where the last one ended makes it longer.
cdef void first_reads_note(first_reads_t* f, uint64_t offset, uint64_t length) noexcept nogil
