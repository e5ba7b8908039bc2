# SPDX-License-Identifier: Apache-2.0
"""Layer 2. Journal: records, pages, ring, replay (FORMAT.md section 4). Mechanism only; what is
recorded when, and what is flushed between, is commit's business.

The ring is counted in pages of 4096 bytes that only ever grow: page n lies at slot n % pages. Pages
[tail, head) are in use (atomic: the leader moves head, a checkpoint moves tail). A batch starts on
a fresh page, so a torn physical sector hurts only it."""
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from .atomics cimport load_acquire
from .bitmap cimport bitmap_t
from .chunk_table cimport chunk_table_t
from .storage cimport storage_t

cdef struct journal_t:
    storage_t* storage
    uint64_t offset
    uint64_t pages                     # 0: the image has no journal
    uint64_t head
    uint64_t tail
    uint64_t epoch                     # written into new sectors
    uint64_t sequence                  # of the next sector; never restarts
    uint32_t seed                      # crc32c of the image's uuid
    uint8_t* batch
    uint64_t batch_sectors_max
    uint64_t batch_sectors             # begun
    int cursor                         # next free byte of the last begun sector
    int bits_at                        # its last bitmap record, or -1
    uint64_t bits_end                  # the disk sector where that record ends
    int table_at                       # its last table record, or -1
    uint64_t table_first               # index range of that record
    uint64_t table_end
    uint64_t records

cdef int journal_init(journal_t* j, storage_t* s, uint64_t offset, uint64_t size,
        const uint8_t* uuid) noexcept nogil
cdef void journal_free(journal_t* j) noexcept nogil
# The image has another uuid from now on.
cdef void journal_reseed(journal_t* j, const uint8_t* uuid) noexcept nogil
# Overwrite the whole ring with zeros. The caller flushes.
cdef int journal_erase(journal_t* j) noexcept nogil
# Build a batch in memory: begin, put ..., seal. put returns -ENOSPC when the batch is full.
cdef void journal_begin(journal_t* j) noexcept nogil
cdef int journal_put_blocks(journal_t* j, uint64_t first_sector, uint64_t sectors) noexcept nogil
cdef int journal_put_entry(journal_t* j, uint64_t chunk, uint32_t entry) noexcept nogil
# Blocks within one chunk, with the chunk's entry in the same sector (I1).
cdef int journal_put_mapped(journal_t* j, uint64_t first_sector, uint64_t sectors, uint64_t chunk,
        uint32_t entry) noexcept nogil
cdef void journal_seal(journal_t* j) noexcept nogil
cdef uint64_t journal_batch_pages(const journal_t* j) noexcept nogil
# Write the sealed batch to the ring. The caller made sure that it has room, and flushes.
cdef int journal_write(journal_t* j) noexcept nogil
# Mark durable what the sealed batch recorded (after its flush). Either may be NULL.
cdef void journal_apply_batch(const journal_t* j, bitmap_t* b, uint64_t block_size,
        chunk_table_t* t) noexcept nogil

cdef inline uint64_t journal_used(const journal_t* j) noexcept nogil:
    """Pages of the ring in use."""
    cdef uint64_t tail = load_acquire(&j.tail)
    return load_acquire(&j.head) - tail
