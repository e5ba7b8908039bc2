# SPDX-License-Identifier: Apache-2.0
"""Layer 3. Where the bytes of the disk lie in storage: in raw layout at a fixed distance, in
compact layout where the chunk table says (FORMAT.md section 3)."""
from libc.stdint cimport uint8_t, uint64_t
from .counters cimport block_t
from .image cimport image_t

# The run of [offset, offset + length) at offset that lies together: *run bytes at *address of the
# data. False: these are unmapped and read as zeros. *closed: they must not be written without the
# chunk's lock (may be NULL).
cdef bint data_find(const image_t* m, uint64_t length, uint64_t offset, uint64_t* run,
        uint64_t* address, bint* closed) noexcept nogil
# Use of places without a lock (I8): between these two, in the slot of n's thread. Nothing in raw
# layout, nor for n NULL (an image that is only read).
cdef int data_enter(image_t* m, const block_t* n) noexcept nogil
cdef void data_leave(image_t* m, int slot) noexcept nogil
# Write a range of which every chunk is mapped and open, without a lock. -EAGAIN: one is not.
cdef int data_write_mapped(image_t* m, const uint8_t* data, uint64_t length, uint64_t offset,
        block_t* n) noexcept nogil
# Blocks [*first, *end) widened to the chunks they lie in; raw: as they are.
cdef void data_widen(const image_t* m, uint64_t* first, uint64_t* end) noexcept nogil
# Are all chunks of the range mapped and open, so that a lock of the blocks alone is enough?
cdef bint data_all_mapped(const image_t* m, uint64_t length, uint64_t offset) noexcept nogil
# Was it for want of space, where a checkpoint may give back what lost its owner?
cdef bint data_may_free(const image_t* m, int rc) noexcept nogil
# The following need the lock of the chunks that they touch where these may be unmapped.
# Write; chunks without a place get one. Where storage is full, after a checkpoint that gives back
# what lost its owner. may_work false: -EAGAIN rather than that, or zeroing or growing storage.
cdef int data_store(image_t* m, const uint8_t* data, uint64_t length, uint64_t offset,
        bint may_work, block_t* n) noexcept nogil
# Make the range read as zeros once its bits are set: unmapped chunks do already. With ZERO_KEEP
# every chunk gets a place.
cdef int data_zero(image_t* m, uint64_t length, uint64_t offset, int flags) noexcept nogil
# Take a chunk's place away: it reads as zeros.
cdef void data_unmap(image_t* m, uint64_t chunk) noexcept nogil
# Lock for blocks that are copied from the base; never waits.
cdef bint data_lock_copy(image_t* m, uint64_t first, uint64_t end) noexcept nogil
# The same, but wait for it until then.
cdef bint data_lock_soon(image_t* m, uint64_t first, uint64_t end,
        uint64_t deadline_ns) noexcept nogil
cdef void data_unlock_copy(image_t* m, uint64_t first, uint64_t end) noexcept nogil
# Begin to write the range's dirty pages to the device; a hint. The caller holds the chunks' lock.
cdef void data_start_writeback(image_t* m, uint64_t length, uint64_t offset) noexcept nogil
