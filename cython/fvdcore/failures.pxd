# SPDX-License-Identifier: Apache-2.0
"""Layer 1. What went wrong, for the log: the last failed requests with their place and errno.

Counters say how often; this says where. Failures are rare, so a mutex does; what nobody fetched in
time is counted as lost, not kept."""
from libc.stdint cimport uint64_t
from .sync cimport gate_t, mutex_t

cdef enum:
    FAILURES = 32                      # kept until they are taken
    OP_PREFETCH = 6                    # beside op_t: a read of the base by prefetch

cdef struct failure_t:
    int op                             # op_t or OP_PREFETCH
    int error                          # errno
    bint of_base                       # the base could not be read
    uint64_t offset                    # of the request, in the virtual disk
    uint64_t length

cdef struct failures_t:
    mutex_t mutex
    failure_t[32] ring
    int filled
    uint64_t lost
    void (*notify)(void* owner) noexcept nogil  # something is there to be taken
    void* owner

cdef int failures_init(failures_t* f, gate_t* gate) noexcept nogil
cdef void failures_free(failures_t* f) noexcept nogil
# result: a negative errno.
cdef void failure_note(failures_t* f, int op, int result, uint64_t offset, uint64_t length,
        bint of_base) noexcept nogil
# Move what is there to out (FAILURES of them) and what was lost to *lost; how many.
cdef int failures_take(failures_t* f, failure_t* out, uint64_t* lost) noexcept nogil
