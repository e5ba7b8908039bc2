# SPDX-License-Identifier: Apache-2.0
"""What each sector of the virtual disk may hold, now and after a power cut.

A request that changes the disk is an operation with a begin and an end on a clock of events. Per
sector the oracle keeps the operations that may still be what stands there. Operation 0 is the
content at the start: the base, or what the last crash left.

- A live read may show an operation unless a later one (begun after its end) had succeeded before
  the read began; what a read has shown orders the operations that had ended before it.
- After a power cut a sector may show an operation unless a later one is durable: it succeeded, and
  a successful flush began after its end, or it was FUA itself.
- An operation that failed, or was cut short by a crash, may have happened or not, for ever."""
from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef enum:
    ORACLE_LIST = 40                   # operations of one sector at most

cdef enum oracle_kind_t:
    KIND_START = 0
    KIND_WRITE = 1
    KIND_ZERO = 2
    KIND_TRIM = 3                      # zeros, or nothing happened

cdef enum oracle_state_t:
    OP_RUNNING = 0
    OP_DONE = 1
    OP_MAYBE = 2

cdef enum oracle_moment_t:
    MOMENT_LIVE = 0                    # a read of the running device, or after a takeover
    MOMENT_POWER = 1                   # after a power cut
    MOMENT_EITHER = 2                  # a device whose storage failed

cdef struct oracle_op_t:
    uint64_t begin
    uint64_t end
    uint64_t first                     # sectors
    uint64_t count
    uint8_t kind
    uint8_t state
    uint8_t durable

cdef struct oracle_entry_t:
    uint32_t op
    uint32_t after                     # operation + 1 that a read showed to be later, or 0
    uint64_t since                     # when that read ended

cdef struct oracle_t:
    uint64_t sectors
    uint64_t tick
    oracle_op_t* ops
    uint32_t op_count
    uint32_t op_max
    uint32_t settled                   # operations below it are durable or can never be
    oracle_entry_t* lists              # ORACLE_LIST a sector
    uint8_t* lengths
    uint64_t horizon                   # no read that is under way began before this tick
    uint8_t* start                     # content of operation 0, all sectors
    char[512] failure                  # the first sector that was wrong

cdef int oracle_init(oracle_t* o, uint64_t sectors, uint32_t op_max) noexcept nogil
cdef void oracle_free(oracle_t* o) noexcept nogil
cdef void oracle_copy(oracle_t* into, const oracle_t* o) noexcept nogil
# Begin a change of the sectors (horizon is set); its number is its stamp. 0: a list is full:
# flush first.
cdef uint32_t oracle_begin(oracle_t* o, int kind, uint64_t first, uint64_t count) noexcept nogil
cdef void oracle_end(oracle_t* o, uint32_t op, bint ok, bint durable) noexcept nogil
# A flush that began at the tick succeeded.
cdef void oracle_flushed(oracle_t* o, uint64_t began) noexcept nogil
# A sector's content, for a message.
cdef const char* oracle_name(uint32_t stamp) noexcept nogil
# Check what a read that began at the tick found. False: failure says what is wrong.
cdef bint oracle_check(oracle_t* o, const uint8_t* data, uint64_t first, uint64_t count,
        uint64_t began, int moment, bint learn) noexcept nogil
# All running operations were cut short.
cdef void oracle_crash(oracle_t* o) noexcept nogil
# From now on exactly this content, durable.
cdef void oracle_restart(oracle_t* o, const uint8_t* content) noexcept nogil
# The disk has so many sectors now; new ones are zero.
cdef void oracle_grow(oracle_t* o, uint64_t sectors) noexcept nogil
