# SPDX-License-Identifier: Apache-2.0
"""Layer 3. How prefetch behaves beside guests: how much of it may be in flight, and when it yields.

fixed: all slots, and the measured minimum of the header (throttle.pxd). eager: all slots, whatever
is measured. polite: from a distant base only as many bytes are in flight as the way holds without a
queue of its own. Latency tells: the least of late, the floor, is what an empty way takes, and what
comes on top is a queue, in which guests' reads wait as well. A short queue is allowed while no
guest reads from the base, a very short one while one does. With nothing in flight a piece may go,
so prefetch ends. Beside requests that guests have with the crew a piece waits a little.

Where the way holds only a few of the smallest pieces, no window is fine enough to keep its queue
short. Beside a guest pieces then come at intervals, at a part of what the way carries less what the
guest takes. What it carries is what came while a queue was seen; beside a guest that lasts it is
found again now and then.

Pure arithmetic on times that the caller gives, in ns; sizes in bytes; the caller locks."""
from libc.stdint cimport uint64_t

cdef enum policy_t:
    POLICY_FIXED = 0
    POLICY_EAGER = 1
    POLICY_POLITE = 2

cdef struct manners_t:
    int policy
    bint distant                       # the base is
    uint64_t least                     # window: one piece
    uint64_t most
    uint64_t step                      # largest piece
    uint64_t window                    # bytes that may be in flight (atomic)
    uint64_t other_window              # of the state that is not now: a guest reads, or none
    uint64_t regain                    # what it was before the floor was looked for; 0: no more
    uint64_t in_flight
    uint64_t floor_ns                  # 0: not known
    uint64_t floor_until               # when it is to be found again
    uint64_t low_ns                    # the least latency since the window was decided on
    uint64_t decided_ns
    bint starting                      # doubles each round trip, until a queue is seen
    bint busy                          # a guest reads from the base
    bint guests                        # requests of theirs are with the crew
    uint64_t yield_ns                  # since when it waits for guests; 0: it does not
    uint64_t rate                      # bytes a second on the way, guests' too; 0: not known
    uint64_t rate_until                # when it is to be found again
    uint64_t best                      # of samples that are to become the rate
    uint64_t samples
    uint64_t guest_rate                # of it, what guests take
    uint64_t metered_ns                # when this sample began
    uint64_t guest_bytes               # theirs by then
    uint64_t came                      # prefetch's since
    bint crowded                       # a queue was seen since: so much is all that the way carries
    bint paced                         # no: prefetch held itself back
    bint probing                       # beside a guest, the rate is being found
    uint64_t next_ns                   # when the next piece is due, where they are paced

cdef void manners_init(manners_t* t, int policy, bint distant, uint64_t least, uint64_t step,
        uint64_t most) noexcept nogil
# What guests do: their reads under way from the base, when the last one came, and all their
# requests with the crew. Whether prefetch has to wait a little, though not for long.
cdef bint manners_look(manners_t* t, uint64_t demand, uint64_t demand_ns, uint64_t requests,
        uint64_t now) noexcept nogil
# Bytes of the next piece.
cdef uint64_t manners_piece(const manners_t* t) noexcept nogil
# May it be read now?
cdef bint manners_may(const manners_t* t) noexcept nogil
# Not before then.
cdef uint64_t manners_ready(const manners_t* t) noexcept nogil
# What guests have read from the base, in all.
cdef void manners_meter(manners_t* t, uint64_t guest_bytes, uint64_t now) noexcept nogil
cdef void manners_begin(manners_t* t, uint64_t bytes, uint64_t now) noexcept nogil
# A piece has come, in latency ns; ok: without an error.
cdef void manners_end(manners_t* t, uint64_t bytes, uint64_t latency, bint ok,
        uint64_t now) noexcept nogil
