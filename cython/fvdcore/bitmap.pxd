# SPDX-License-Identifier: Apache-2.0
"""Layer 2. Which blocks are local, in memory: present (readers use it) and durable (on disk).

A block is *present* once its data are in the page cache or on the device; the bit is set with
release order after the data write returned, and read with acquire order, without a lock. It is
*durable* once the bitmap or a journal record on stable storage says so. The difference is
*pending*: what the next commit has to record. Bits only go from 0 to 1 while an image is open."""
from libc.stdint cimport uint8_t, uint64_t
from .atomics cimport load_acquire
from .sync cimport gate_t, mutex_t

cdef struct bitmap_t:
    uint64_t* present                  # live memory or private; whole pages of 4096 bytes
    uint64_t* durable                  # written by the committing thread alone; read anywhere
    uint64_t* dirty_words              # bit w: word w may hold pending bits
    uint64_t* dirty_groups             # bit g: word g of dirty_words is not zero
    uint64_t* stale_pages              # bit p: 4096-byte page p differs from its place on disk
    mutex_t setting                    # held while bits and their marks are set
    uint64_t blocks
    uint64_t words                     # of present, padding of the last page included
    uint64_t pages
    uint64_t pending                   # blocks set and not yet taken by a commit
    uint64_t pending_copied            # of these, set by copy-on-read and prefetch
    uint64_t local                     # blocks present
    bint owns_present

# present: memory of bytes (a multiple of 4096) that the caller keeps, or NULL to allocate.
cdef int bitmap_init(bitmap_t* b, uint64_t blocks, uint64_t bytes, void* present,
        gate_t* gate) noexcept nogil
cdef void bitmap_free(bitmap_t* b) noexcept nogil
# First clear block of [first, end), or end.
cdef uint64_t bitmap_next_clear(const bitmap_t* b, uint64_t first, uint64_t end) noexcept nogil
# Where the run of clear blocks ends, in (block, end], that begins with a block < end which the
# caller saw clear. The block is not looked at again: a writer may have set it since, and the run
# would be empty.
cdef uint64_t bitmap_run_end(const bitmap_t* b, uint64_t block, uint64_t end) noexcept nogil
# Set [first, end) present and note it for the next commit. The caller holds the range's lock and
# its
# data writes have returned (I1). copied: by copy-on-read or prefetch. Returns the blocks newly
# set.
cdef uint64_t bitmap_set_present(bitmap_t* b, uint64_t first, uint64_t end,
        bint copied) noexcept nogil
# Set bits in both arrays: load and replay, before any thread runs.
cdef void bitmap_set_durable(bitmap_t* b, uint64_t first, uint64_t end) noexcept nogil
# Whoever saw a present bit before this call finds its marks set after it: what commit and
# checkpoint
# call before they look at the marks.
cdef void bitmap_settle_marks(bitmap_t* b) noexcept nogil
# After a takeover: note all of present that is not durable. -EUCLEAN if durable exceeds present.
cdef int bitmap_note_difference(bitmap_t* b) noexcept nogil
# After load: clear the padding bits of both arrays; then, after replay and takeover, count.
cdef void bitmap_clear_padding(bitmap_t* b) noexcept nogil
cdef void bitmap_recount(bitmap_t* b) noexcept nogil

cdef inline bint bitmap_test(const bitmap_t* b, uint64_t block) noexcept nogil:
    return (load_acquire(b.present + (block >> 6)) >> (block & 63)) & 1

cdef inline bint bitmap_all_present(const bitmap_t* b, uint64_t first,
        uint64_t end) noexcept nogil:
    return bitmap_next_clear(b, first, end) == end
