# SPDX-License-Identifier: Apache-2.0
"""Layer 3. TRIM and WRITE_ZEROES (FORMAT.md section 6)."""
from libc.stdint cimport uint8_t, uint64_t
from .counters cimport block_t
from .image cimport image_t

# Give back the space of local data; blocks that are still in the base stay there.
cdef int image_trim(image_t* m, uint64_t length, uint64_t offset, block_t* n) noexcept nogil
# The range reads as zeros afterwards. keep: its space stays allocated. room: block_size bytes of
# scratch
# with block_size bytes of room on either side.
cdef int image_write_zeroes(image_t* m, uint64_t length, uint64_t offset, bint keep,
        uint8_t* room, block_t* n) noexcept nogil
