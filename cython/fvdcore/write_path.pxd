# SPDX-License-Identifier: Apache-2.0
"""Layer 3. Writes: straight to local blocks; otherwise lock, complete partial blocks from the base
(copy-on-write), write, set the bits."""
from libc.stdint cimport uint8_t, uint64_t
from .counters cimport block_t
from .image cimport image_t

cdef enum:
    WRITE_TRY = 1                      # -EAGAIN and no change where it would wait
    WRITE_FUA = 2                      # durable when it returns (I6)

# Write length bytes at offset. Without WRITE_TRY, block_size bytes before and behind data are
# scratch space. After an error the blocks' bits are as before; data of local blocks may be partly
# new.
cdef int image_write(image_t* m, uint8_t* data, uint64_t length, uint64_t offset, int flags,
        block_t* n) noexcept nogil
