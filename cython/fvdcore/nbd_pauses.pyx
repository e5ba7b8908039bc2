# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Layer 4. See nbd_pauses.pxd."""
from libc.stdint cimport uint64_t
from .limits cimport NS_PER_MS
from .sync cimport clock_now, gate_t
from .syscalls cimport thread_sleeps

cdef enum:
    LONG_MS = 5                        # of a write into the page cache
    WATCH_MS = 100                     # the kernel's pauses follow each other
    CREW_MS = 2000


cdef void pauses_before(pauses_t* p) noexcept nogil:
    if p.watched_until > p.last_ns:
        p.sleeps = thread_sleeps()


cdef bint pauses_after(pauses_t* p, gate_t* gate) noexcept nogil:
    cdef uint64_t now = clock_now(gate)
    cdef bint begins = False
    if now - p.last_ns > LONG_MS * NS_PER_MS:
        # Simulated time passes in sleep alone, and is to be the same in every run.
        if p.watched_until > p.last_ns and (gate != NULL or thread_sleeps() != p.sleeps):
            p.crew_until = now + CREW_MS * NS_PER_MS
            begins = True
        p.watched_until = max(now, p.crew_until) + WATCH_MS * NS_PER_MS
    p.last_ns = now
    return begins
