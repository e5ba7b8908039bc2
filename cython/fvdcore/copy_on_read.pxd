# SPDX-License-Identifier: Apache-2.0
"""Layer 3. Copying base data into the image: the settle step of a read, and prefetch's writing
half."""
from libc.stdint cimport uint8_t, uint64_t
from .counters cimport block_t
from .image cimport image_t

# Store blocks [first, end) from data (what the base holds there). The caller holds their lock and
# knows that none is local. All-zero blocks become holes, never stored. *zeros: bytes of these.
cdef int image_store_copy(image_t* m, const uint8_t* data, uint64_t first, uint64_t end,
        uint64_t* zeros, block_t* n) noexcept nogil
# The same for blocks known to be a hole of the base.
cdef int image_store_hole(image_t* m, uint64_t first, uint64_t end) noexcept nogil
# May so many bytes more be copied, or wait for it? If so they count until they leave. later: for a
# copy that waits, which may have half, so that there is room for those that need not.
cdef bint copy_on_read_admit(image_t* m, uint64_t bytes, bint later) noexcept nogil
cdef void copy_on_read_leave(image_t* m, uint64_t bytes) noexcept nogil
# Settle a read: data holds [offset, offset + length) as read; store what came from the base and is
# still absent, in whole blocks. No guest waits for it; what is not copied is counted. admitted: the
# caller had all of it admitted, and lets it leave.
cdef void copy_on_read_settle(image_t* m, const uint8_t* data, uint64_t length, uint64_t offset,
        bint admitted, block_t* n) noexcept nogil
# Of a trace: blocks were stored, if it was on at begin (else that is 0).
cdef void image_trace_copy(image_t* m, const block_t* n, int kind, bint hole, uint64_t begin,
        uint64_t offset, uint64_t bytes) noexcept nogil
