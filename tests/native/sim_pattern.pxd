# SPDX-License-Identifier: Apache-2.0
"""What stands in a sector: a pattern that names its writer and its place, so that a wrong sector
tells where it came from and a torn one is seen."""
from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef enum:
    PATTERN_SECTOR = 512

cdef extern from *:
    """
    #define FVD_STAMP_BASE 0xFFFFFFF0u
    #define FVD_STAMP_POISON 0xFFFFFFF1u
    #define FVD_STAMP_GARBAGE 0xFFFFFFF2u
    #define FVD_STAMP_ZERO 0xFFFFFFF3u
    #define FVD_STAMP_TORN 0xFFFFFFF4u
    """
    const uint32_t STAMP_BASE "FVD_STAMP_BASE"
    const uint32_t STAMP_POISON "FVD_STAMP_POISON"     # storage never written by anybody
    const uint32_t STAMP_GARBAGE "FVD_STAMP_GARBAGE"   # what a power cut left in new space
    const uint32_t STAMP_ZERO "FVD_STAMP_ZERO"         # all zeros
    const uint32_t STAMP_TORN "FVD_STAMP_TORN"         # no pattern at all

cdef inline uint64_t pattern_word(uint32_t stamp, uint64_t sector) noexcept nogil:
    return ((sector << 32) | stamp) * <uint64_t>0x9E3779B97F4A7C15ULL

cdef inline void pattern_fill(uint8_t* p, uint32_t stamp, uint64_t sector) noexcept nogil:
    cdef uint64_t* w = <uint64_t*>p
    cdef uint64_t word = pattern_word(stamp, sector)
    cdef int i
    for i in range(64):
        w[i] = word + <uint64_t>i * <uint64_t>0xD1342543DE82EF95ULL

cdef inline uint32_t pattern_read(const uint8_t* p, uint64_t* sector) noexcept nogil:
    """The stamp that a sector shows, and the place it was made for."""
    cdef const uint64_t* w = <const uint64_t*>p
    cdef uint64_t word = w[0], plain, wrong = 0, any_bit = 0
    cdef int i
    for i in range(64):
        wrong |= w[i] ^ (word + <uint64_t>i * <uint64_t>0xD1342543DE82EF95ULL)
        any_bit |= w[i]
    sector[0] = 0
    if any_bit == 0:
        return STAMP_ZERO
    if wrong:
        return STAMP_TORN
    plain = word * <uint64_t>0xF1DE83E19937733DULL
    sector[0] = plain >> 32
    return <uint32_t>plain
