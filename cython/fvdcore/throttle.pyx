# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Layer 3. Caps and measured minima of prefetch. See throttle.pxd."""
from libc.stdint cimport uint64_t
from libc.string cimport memset
from .atomics cimport store_relaxed
from .limits cimport NS_PER_MS, NS_PER_S

cdef enum:
    BURST_MS = 20                      # of a cap, so that its steps need not be exact
    UNLIMITED_KB = 1000000000          # a maximum that is none


cdef uint64_t cap_of(uint64_t kb) noexcept nogil:
    return kb * 1024 if 0 < kb < UNLIMITED_KB else 0


cdef void bucket_init(bucket_t* b, uint64_t rate) noexcept nogil:
    b.rate = rate
    b.ready_ns = 0


cdef void bucket_pay(bucket_t* b, uint64_t bytes, uint64_t now) noexcept nogil:
    if b.rate == 0:
        return
    # What was not used is lost, but for the burst.
    if b.ready_ns + BURST_MS * NS_PER_MS < now:
        b.ready_ns = now - BURST_MS * NS_PER_MS
    # No overflow: a step has at most 2^31 bytes, and seconds are split off.
    b.ready_ns += bytes // b.rate * NS_PER_S + bytes % b.rate * NS_PER_S // b.rate


cdef void meter_init(meter_t* t, uint64_t minimum, uint64_t window_ns) noexcept nogil:
    memset(t, 0, sizeof(meter_t))
    t.minimum = minimum
    t.window_ns = window_ns


cdef void settle_time(meter_t* t, uint64_t now) noexcept nogil:
    if t.in_flight and now > t.since_ns:
        t.busy_ns += now - t.since_ns
    t.since_ns = now


cdef void meter_begin(meter_t* t, uint64_t now) noexcept nogil:
    settle_time(t, now)
    t.in_flight += 1


cdef bint meter_end(meter_t* t, uint64_t bytes, uint64_t now) noexcept nogil:
    cdef uint64_t rate
    settle_time(t, now)
    if t.in_flight:
        t.in_flight -= 1
    t.bytes += bytes
    if t.busy_ns < t.window_ns:
        return False
    rate = <uint64_t>(<double>t.bytes * NS_PER_S / t.busy_ns)
    rate = rate if t.average == 0 else (t.average * 4 + rate) // 5
    store_relaxed(&t.average, max(rate, <uint64_t>1))
    t.bytes = 0
    t.busy_ns = 0
    return t.average < t.minimum


cdef void meter_forget(meter_t* t, uint64_t now) noexcept nogil:
    store_relaxed(&t.average, 0)
    t.bytes = 0
    t.busy_ns = 0
    t.since_ns = now


cdef uint64_t random_next(uint64_t* state) noexcept nogil:
    cdef uint64_t x = state[0]
    x ^= x >> 12
    x ^= x << 25
    x ^= x >> 27
    state[0] = x
    return x * <uint64_t>2685821657736338717


cdef uint64_t pause_drawn(uint64_t* state, uint64_t limit_ns) noexcept nogil:
    if limit_ns == 0 or random_next(state) >> 63:
        return 0
    return 1 + random_next(state) % limit_ns


cdef uint64_t pause_about(uint64_t* state, uint64_t ns) noexcept nogil:
    return ns - ns // 4 + random_next(state) % (ns // 2 + 1)
