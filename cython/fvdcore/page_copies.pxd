# SPDX-License-Identifier: Apache-2.0
"""Layer 2. Copies of the metadata pages that a checkpoint writes, so that their memory may change
meanwhile."""
from libc.stdint cimport uint8_t, uint64_t
from .bitmap cimport bitmap_t
from .chunk_table cimport chunk_table_t
from .storage cimport storage_t

cdef struct page_copies_t:
    uint8_t* bytes                     # the copy of page p at p * 4096
    uint64_t room                      # pages
    uint64_t* marks                    # bit p: page p was copied
    uint64_t pages                     # of the structure, when it was copied

cdef void copies_free(page_copies_t* k) noexcept nogil
# Copy the stale pages and clear their marks. -ENOMEM.
cdef int copies_take_bitmap(page_copies_t* k, bitmap_t* b) noexcept nogil
cdef int copies_take_table(page_copies_t* k, chunk_table_t* t) noexcept nogil
# Write them to their place in runs; *written bytes. The caller flushes.
cdef int copies_write(page_copies_t* k, storage_t* s, uint64_t offset,
        uint64_t* written) noexcept nogil
# They are durable now.
cdef void copies_settle_bitmap(page_copies_t* k, bitmap_t* b) noexcept nogil
cdef void copies_settle_table(page_copies_t* k, chunk_table_t* t) noexcept nogil
