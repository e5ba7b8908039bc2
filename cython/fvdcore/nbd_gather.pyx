# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Layer 4. Letting requests gather. See nbd_gather.pxd.

A trial is made only where batches of several requests show that the client has several in flight,
and more and more rarely where trials bring too little. A nap grows while the client, when it gets
new answers, still has old ones to read, and shrinks when not: then the client has waited for us."""
from libc.stdint cimport uint32_t, uint64_t

cdef enum:
    NAP_MIN_NS = 50000                 # below it timers cost more than they spare
    NAP_MAX_NS = 250000
    TRIAL_NS = 100000
    GAP_MIN = 64                       # batches between trials, at first
    GAP_MAX = 65536
    LOOK_EVERY = 8                     # batches between two questions to the socket
    WORTH = 6                          # requests a batch for which a nap is worth it
    ENOUGH = 18                        # and for which it need not be longer
    POOR_MAX = 3                       # batches in a row that are not, and naps end
    SEVERAL_SHARE = 8                  # one batch in so many must have more than one request


cdef void gather_init(gather_t* g) noexcept nogil:
    g.nap_ns = 0
    g.batches = GAP_MIN
    g.gap = GAP_MIN
    g.several = 0
    g.poor = 0
    g.trial = False


cdef bint gather_asks(const gather_t* g) noexcept nogil:
    return g.nap_ns != 0 and g.batches <= 1


cdef void stop_napping(gather_t* g) noexcept nogil:
    g.nap_ns = 0
    g.poor = 0
    g.trial = False
    g.batches = g.gap
    g.several = 0


cdef void note_nap(gather_t* g, uint64_t requests, bint starved) noexcept nogil:
    cdef bint vain = starved and g.nap_ns <= NAP_MIN_NS
    g.poor = g.poor + 1 if requests < WORTH else 0
    # On a busy machine a single batch says little; a trial is only one.
    if vain or g.poor == POOR_MAX or (g.trial and g.poor):
        g.gap = min(g.gap * 2, <uint32_t>GAP_MAX)
        stop_napping(g)
        return
    if g.trial:
        g.trial = False
        g.gap = GAP_MIN
    if starved:
        g.nap_ns = max(g.nap_ns * 3 // 4, <uint64_t>NAP_MIN_NS)
    elif g.batches <= 1 and requests < ENOUGH:
        g.nap_ns = min(g.nap_ns * 5 // 4, <uint64_t>NAP_MAX_NS)
    g.batches = LOOK_EVERY if g.batches <= 1 else g.batches - 1


cdef void gather_note(gather_t* g, uint64_t requests, bint starved) noexcept nogil:
    if g.nap_ns:
        note_nap(g, requests, starved)
        return
    g.several += requests > 1
    g.batches -= 1
    if g.batches:
        return
    if g.several * SEVERAL_SHARE < g.gap:
        g.batches = g.gap
        g.several = 0
        return
    g.trial = True
    g.nap_ns = TRIAL_NS
    g.batches = 1
