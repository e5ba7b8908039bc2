# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Layer 3. Policies of prefetch. See manners.pxd."""
from libc.stdint cimport uint64_t
from libc.string cimport memset
from .atomics cimport load_relaxed, store_relaxed
from .limits cimport NEVER, NS_PER_MS, NS_PER_S

cdef enum:
    PIECES = 8                         # of a window, while no guest reads from the base
    PIECES_BUSY = 16                   # while one does: a guest's read may wait behind a piece
    GROWTH_BUSY = 32                   # and grows by such parts of itself
    BUSY_MS = 250                      # a guest is thought to go on reading so long
    FLOOR_S = 10                       # a floor is believed so long
    QUEUE_MS = 15                      # time of the queue allowed, at least
    QUEUE_PART = 4                     # or this part of the floor
    QUEUE_BUSY_US = 150                # the same while a guest reads
    QUEUE_BUSY_PART = 20
    DEMAND_MS = 20                     # a local base: a guest's read is felt so long
    YIELD_MS = 20                      # the longest wait for guests
    SMALL = 262144                     # a piece beside guests
    FEW = 4                            # pieces that a window regulates no more
    PACE_PART = 4                      # is left to guests, of what they leave
    PACE_LEAST = 8                     # this part of the rate is prefetch's in any case
    LATE_PIECES = 2                    # that may follow at once where they were held up
    METER_MS = 100                     # a sample of the rate takes
    SAMPLES = 3                        # of which the best counts
    RATE_S = 30                        # a rate is believed so long
    PROBE_US = 1000                    # time of the queue allowed while it is found


cdef void manners_init(manners_t* t, int policy, bint distant, uint64_t least, uint64_t step,
        uint64_t most) noexcept nogil:
    memset(t, 0, sizeof(manners_t))
    t.policy = policy
    t.distant = distant
    t.least = min(least, step)
    t.step = step
    t.most = max(most, t.least)
    store_relaxed(&t.window, t.least if policy == POLICY_POLITE and distant else t.most)
    t.other_window = t.least
    t.starting = True
    t.low_ns = NEVER


cdef inline bint is_measured(const manners_t* t) noexcept nogil:
    return t.policy == POLICY_POLITE and t.distant


cdef void note_guests(manners_t* t, bint busy) noexcept nogil:
    """Each state has a window of its own, and begins with a part of the other's."""
    cdef uint64_t window = t.window
    if busy == t.busy:
        return
    t.busy = busy
    t.regain = 0
    if busy:
        store_relaxed(&t.window, min(t.window, max(t.other_window, t.window // 4)))
        t.starting = False
    else:
        store_relaxed(&t.window, max(t.window, t.other_window // 2))
    store_relaxed(&t.window, max(t.window, t.least))
    t.other_window = window


cdef bint manners_look(manners_t* t, uint64_t demand, uint64_t demand_ns, uint64_t requests,
        uint64_t now) noexcept nogil:
    cdef bint wait
    if t.policy != POLICY_POLITE:
        return False
    if t.distant:
        note_guests(t, demand or (demand_ns and now < demand_ns + BUSY_MS * NS_PER_MS))
        wait = requests > demand
    else:
        wait = requests or (demand_ns and now < demand_ns + DEMAND_MS * NS_PER_MS)
    t.guests = wait
    if not wait or (t.yield_ns and now >= t.yield_ns + YIELD_MS * NS_PER_MS):
        t.yield_ns = 0
        return False
    if t.yield_ns == 0:
        t.yield_ns = max(now, <uint64_t>1)
    return True


cdef uint64_t manners_piece(const manners_t* t) noexcept nogil:
    if t.policy == POLICY_POLITE and t.guests and not t.distant:
        return min(max(<uint64_t>SMALL, t.least), t.step)
    if not is_measured(t):
        return t.step
    # Whoever plans does not hold the lock: a slot may be deciding.
    return min(max(load_relaxed(&t.window) // (PIECES_BUSY if t.busy else PIECES), t.least), t.step)


cdef bint manners_may(const manners_t* t) noexcept nogil:
    # Where pieces come at intervals one more may be late without a queue.
    return (not is_measured(t) or t.in_flight == 0
            or t.in_flight + manners_piece(t) <= t.window + (t.least if is_paced(t) else 0))


cdef uint64_t manners_ready(const manners_t* t) noexcept nogil:
    return t.next_ns if is_paced(t) else 0


cdef void manners_begin(manners_t* t, uint64_t bytes, uint64_t now) noexcept nogil:
    cdef uint64_t left, gap
    t.in_flight += bytes
    if is_paced(t):
        t.paced = True
        left = t.rate - min(t.guest_rate, t.rate)
        left = max(left - left // PACE_PART, t.rate // PACE_LEAST, <uint64_t>1)
        gap = <uint64_t>(<double>bytes * NS_PER_S / left)
        t.next_ns = max(t.next_ns, now - min(LATE_PIECES * gap, now)) + gap


# -- what the way carries ------------------------------------------------------------------------

cdef inline uint64_t busy_queue(const manners_t* t) noexcept nogil:
    return max(<uint64_t>QUEUE_BUSY_US * 1000, t.floor_ns // QUEUE_BUSY_PART)


cdef bint holds_few(const manners_t* t) noexcept nogil:
    """Is the way full with a few pieces, each of which is more than the queue allowed?"""
    return (t.rate != 0 and <double>t.rate * t.floor_ns < <double>FEW * t.least * NS_PER_S
            and <double>t.least * NS_PER_S > <double>t.rate * busy_queue(t))


cdef inline bint is_paced(const manners_t* t) noexcept nogil:
    return is_measured(t) and t.busy and not t.probing and holds_few(t)


cdef void note_rate(manners_t* t, uint64_t sample, uint64_t now) noexcept nogil:
    t.best = max(t.best, sample)
    t.samples += 1
    if t.samples < SAMPLES and (t.probing or sample < t.rate):
        return
    t.rate = t.best
    t.best = 0
    t.samples = 0
    # The queue that is allowed beside a guest may have been some delay that was none.
    if t.probing or not t.busy:
        t.rate_until = now + RATE_S * NS_PER_S


cdef void manners_meter(manners_t* t, uint64_t guest_bytes, uint64_t now) noexcept nogil:
    cdef uint64_t elapsed = now - t.metered_ns, guest
    if not is_measured(t) or elapsed < METER_MS * NS_PER_MS:
        return
    guest = <uint64_t>(<double>(guest_bytes - t.guest_bytes) * NS_PER_S / elapsed)
    t.guest_rate = (t.guest_rate + guest) // 2
    if t.crowded and not t.paced and t.metered_ns:
        note_rate(t, <uint64_t>(<double>t.came * NS_PER_S / elapsed) + guest, now)
    t.metered_ns = now
    t.guest_bytes = guest_bytes
    t.came = 0
    t.crowded = False
    t.paced = False
    t.probing = t.busy and now >= t.rate_until and holds_few(t)


# -- the window ----------------------------------------------------------------------------------

cdef uint64_t allowed_queue(const manners_t* t) noexcept nogil:
    if t.busy:
        return max(busy_queue(t), <uint64_t>PROBE_US * 1000 if t.probing else 0)
    return max(QUEUE_MS * NS_PER_MS, t.floor_ns // QUEUE_PART)


cdef void decide(manners_t* t, uint64_t used, uint64_t now) noexcept nogil:
    """Once in a round trip, by the piece that came fastest: what delays single ones is no queue."""
    cdef uint64_t low = t.low_ns, part
    t.low_ns = NEVER
    t.decided_ns = now
    if low > t.floor_ns + allowed_queue(t):
        t.crowded = True
        # The last doubling was too much.
        part = t.window // (2 if t.starting else PIECES)
        store_relaxed(&t.window, max(t.window - part, t.least))
        t.starting = False
        t.regain = 0
    elif used * 2 >= t.window:         # a window that is not used says nothing
        if t.window * 2 <= t.regain:
            part = t.window            # it had more before, and no queue
        else:
            part = t.window if t.starting else t.window // (GROWTH_BUSY if t.busy else PIECES)
        store_relaxed(&t.window, min(t.window + max(part, t.least // PIECES), t.most))


cdef void manners_end(manners_t* t, uint64_t bytes, uint64_t latency, bint ok,
        uint64_t now) noexcept nogil:
    cdef uint64_t used = t.in_flight
    t.in_flight -= min(bytes, t.in_flight)
    if not ok or not is_measured(t):
        return
    t.came += bytes
    if t.floor_ns == 0 or latency < t.floor_ns:
        t.floor_ns = max(latency, <uint64_t>1)
        t.floor_until = now + FLOOR_S * NS_PER_S
    elif now >= t.floor_until:
        # The way may have changed, or the floor was measured in a queue of ours: let it run dry.
        t.floor_ns = latency
        t.floor_until = now + FLOOR_S * NS_PER_S
        t.regain = t.window
        store_relaxed(&t.window, max(t.window // 4, t.least))
        t.low_ns = NEVER
        t.decided_ns = now
        return
    t.low_ns = min(t.low_ns, latency)
    # Not before a piece that was sent under the last decision can have come.
    if now >= t.decided_ns + t.low_ns:
        decide(t, used, now)
