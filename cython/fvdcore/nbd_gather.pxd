# SPDX-License-Identifier: Apache-2.0
"""Layer 4. When a connection's thread lets requests gather before it receives them.

A client with many requests in flight sends them one by one, and a server that is faster than its
client receives, serves and answers each with a wake-up and two system calls. So the thread naps
before it receives, as long as that costs the client nothing: it has answers left to read. A client
that asks for one thing at a time, or stops for answers, is never waited for."""
from libc.stdint cimport uint32_t, uint64_t

cdef struct gather_t:
    uint64_t nap_ns                    # before the next receive; 0: none
    uint32_t batches                   # until the next look or trial
    uint32_t gap                       # between trials that came to nothing
    uint32_t several                   # batches of more than one request since the last trial
    uint32_t poor                      # batches in a row for which the nap was not worth it
    bint trial                         # the nap is one

cdef void gather_init(gather_t* g) noexcept nogil
# The batch after a nap is served: is the question due whether the client has unread answers left?
cdef bint gather_asks(const gather_t* g) noexcept nogil
# So many requests were served after nap_ns; starved: it was asked, and the client had none left.
cdef void gather_note(gather_t* g, uint64_t requests, bint starved) noexcept nogil
