# SPDX-License-Identifier: Apache-2.0
"""Layer 4. Does the kernel hold back the writes that a connection's own thread makes?

Linux lets a thread wait in write() while too much is dirty, and file systems know no RWF_NOWAIT
for that. Reads of the same connection would wait behind it, so its writes are the crew's as long as
that lasts. A thread that lost its processor took as long, but has not slept: the first long write
makes us count, and the next one tells the two apart."""
from libc.stdint cimport uint64_t
from .sync cimport gate_t

cdef struct pauses_t:
    uint64_t last_ns                   # when the batch, or the write before, had ended
    uint64_t watched_until             # sleeps are counted
    uint64_t crew_until                # no write is made on the connection's thread
    uint64_t sleeps                    # before this write

# A batch begins.
cdef inline void pauses_begin(pauses_t* p, uint64_t now) noexcept nogil:
    p.last_ns = now

cdef inline bint pauses_last(const pauses_t* p) noexcept nogil:
    """Are writes the crew's, in this batch?"""
    return p.crew_until > p.last_ns

# Around every write on the connection's thread. True: from now on they are the crew's.
cdef void pauses_before(pauses_t* p) noexcept nogil
cdef bint pauses_after(pauses_t* p, gate_t* gate) noexcept nogil
