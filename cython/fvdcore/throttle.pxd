# SPDX-License-Identifier: Apache-2.0
"""Layer 3. How fast prefetch may go: caps, and the rule that lets it step back where it is slow.

Pure arithmetic on times that the caller gives, in ns; rates are bytes a second; the caller locks.
"""
from libc.stdint cimport uint64_t

# A cap: bytes are paid for after they were moved, in time that must pass before more is begun.
cdef struct bucket_t:
    uint64_t rate                      # 0: no cap
    uint64_t ready_ns                  # nothing is begun before

# A measured minimum (the rule of FVD): over each measuring time in which something was being moved,
# avg = 0.8 avg + 0.2 of this one's throughput. Below the minimum a coin decides: pause for a random
# time, or only forget the average, so that many clones of one slow base do not all step back.
cdef struct meter_t:
    uint64_t minimum                   # 0: never
    uint64_t window_ns
    uint64_t average                   # 0: none yet (atomic)
    uint64_t bytes                     # moved in this window
    uint64_t busy_ns                   # in which something was in flight
    uint64_t since_ns
    uint64_t in_flight

# The rate of a cap in the header, in KiB a second.
cdef uint64_t cap_of(uint64_t kb) noexcept nogil
cdef void bucket_init(bucket_t* b, uint64_t rate) noexcept nogil
cdef void bucket_pay(bucket_t* b, uint64_t bytes, uint64_t now) noexcept nogil

cdef void meter_init(meter_t* t, uint64_t minimum, uint64_t window_ns) noexcept nogil
cdef void meter_begin(meter_t* t, uint64_t now) noexcept nogil
# Whether the throughput of a window that is over now lies below the minimum.
cdef bint meter_end(meter_t* t, uint64_t bytes, uint64_t now) noexcept nogil
cdef void meter_forget(meter_t* t, uint64_t now) noexcept nogil

# The next number of a sequence (xorshift64*); *state is not 0.
cdef uint64_t random_next(uint64_t* state) noexcept nogil
# What to do where it is too slow: 0 = nothing, else pause for so many ns, at most limit_ns.
cdef uint64_t pause_drawn(uint64_t* state, uint64_t limit_ns) noexcept nogil
# So many ns, a quarter less or more: clones that one base failed at once shall not all come back
# at once.
cdef uint64_t pause_about(uint64_t* state, uint64_t ns) noexcept nogil
