# SPDX-License-Identifier: Apache-2.0
"""Layer 1. A trace: what a device does and when, in a ring that somebody empties meanwhile.

Off, an event costs a load and a branch. On, any thread puts events without a lock or a wait; where
the ring is full an event is lost and counted. One reader at a time takes them."""
from libc.stdint cimport int32_t, uint32_t, uint64_t
from .atomics cimport load_acquire

cdef enum:
    TRACE_EVENTS = 65536               # of the ring; a power of two
    TRACE_EVENT_BYTES = 64

cdef enum trace_kind_t:
    TRACE_REQUEST = 0                  # what: op_t; from its arrival to its answer
    TRACE_BASE = 1                     # what: cause_t; a read of the base
    TRACE_COMMIT = 2
    TRACE_CHECKPOINT = 3
    TRACE_FLUSH = 4                    # one flush of a file, within a commit or checkpoint
    TRACE_PREFETCH = 5                 # blocks made local; what: 1 for a hole of the base
    TRACE_COPY = 6                     # blocks kept by copy-on-read

# The bytes that readers of a trace decode (fvdapi/tracing.py).
cdef struct trace_event_t:
    uint64_t sequence
    uint64_t begin_ns                  # CLOCK_MONOTONIC
    uint64_t end_ns
    uint64_t offset                    # bytes of the virtual disk; 0 where there is no place
    uint64_t length
    uint32_t kind
    uint32_t what
    int32_t result                     # 0 or negative errno
    uint32_t thread                    # the kernel's number of it
    uint32_t role                      # its block of the stats page: what kind of thread it is
    uint32_t source                    # of a read, bits: 1 image, 2 base, 4 zeros

cdef struct trace_t:
    uint64_t on
    uint64_t head                      # the next event to be put; atomic
    uint64_t tail                      # the next to be taken; the reader's
    uint64_t lost                      # atomic
    trace_event_t* ring                # NULL before the first start; kept until trace_free

cdef void trace_init(trace_t* t) noexcept nogil
# No thread puts events any more.
cdef void trace_free(trace_t* t) noexcept nogil
# 0, -EBUSY (it is on), -ENOMEM. start, stop and take are one caller's at a time.
cdef int trace_start(trace_t* t) noexcept nogil
cdef void trace_stop(trace_t* t) noexcept nogil
# Move at most `most` events to out, the oldest first; how many.
cdef uint64_t trace_take(trace_t* t, trace_event_t* out, uint64_t most) noexcept nogil
# Events that found the ring full since start.
cdef uint64_t trace_lost(const trace_t* t) noexcept nogil
# Put an event; sequence and thread are filled in.
cdef void trace_put(trace_t* t, trace_event_t* e) noexcept nogil

cdef inline bint trace_is_on(const trace_t* t) noexcept nogil:
    return load_acquire(&t.on) != 0
