# SPDX-License-Identifier: Apache-2.0
"""Layer 2. The chunk table in memory: where each chunk of a compact image lies (FORMAT.md).

An entry is UNMAPPED or a place number, and in memory may carry CLOSED: the place may be read but
not written without the chunk's lock, because it is being moved. Entries change under the range lock
of their whole chunk, and are read (acquire) without one. An entry that changed is *dirty* until a
commit takes it, and *loose* until a commit or checkpoint made it durable: a sector of the journal
with a bit of a loose chunk must hold the chunk's entry as well (I1)."""
from libc.stdint cimport uint32_t, uint64_t
from .atomics cimport load_acquire32, load_relaxed
from .sync cimport gate_t, mutex_t

cdef extern from *:
    """
    #define FVD_UNMAPPED 0xFFFFFFFFu
    #define FVD_CLOSED 0x80000000u
    #define FVD_PLACES_MAX 0x7FFFFFFFull
    """
    const uint32_t UNMAPPED "FVD_UNMAPPED"
    const uint32_t CLOSED "FVD_CLOSED"
    const uint64_t PLACES_MAX "FVD_PLACES_MAX"  # place numbers are below it

cdef struct chunk_table_t:
    uint32_t* present                  # live memory or private; whole pages of 4096 bytes
    uint64_t reserved                  # bytes of address space at present
    uint64_t chunks                    # of the disk
    uint64_t pages                     # of the table on disk
    uint64_t* dirty                    # bit c: entry c changed since the last commit took it
    uint64_t* dirty_groups             # bit g: word g of dirty is not zero
    uint64_t* loose                    # bit c: entry c is not durable
    uint64_t* stale_pages              # bit p: page p differs from its place on disk
    mutex_t setting                    # held while an entry and its marks change
    uint64_t pending                   # changes since the last commit took them
    uint64_t mapped                    # chunks with a place
    uint64_t reused                    # mappings to places with former content, ever

# bytes (a multiple of 4096) of table for so many chunks. live_fd >= 0: the memory is that file's
# from live_offset on, which the caller has made long enough.
cdef int table_init(chunk_table_t* t, uint64_t chunks, uint64_t bytes, int live_fd,
        uint64_t live_offset, gate_t* gate) noexcept nogil
cdef void table_free(chunk_table_t* t) noexcept nogil
# Memory for a table of so many bytes, its new entries unmapped. The caller made live memory long
# enough. Readers may run.
cdef int table_prepare(chunk_table_t* t, uint64_t bytes, int live_fd,
        uint64_t live_offset) noexcept nogil
# The disk has so many chunks and the table so many (prepared) bytes from now on.
cdef void table_publish(chunk_table_t* t, uint64_t chunks, uint64_t bytes) noexcept nogil
# Let the next checkpoint write the pages of these entries.
cdef void table_mark_stale(chunk_table_t* t, uint64_t first, uint64_t end) noexcept nogil
# Change an entry and note it for the next commit. The caller holds the chunk's lock. reused: the
# place has had content in this session, so its zeroing must be flushed before (I2).
cdef void table_set(chunk_table_t* t, uint64_t chunk, uint32_t entry, bint reused) noexcept nogil
# As replay does: the entry is durable, its page on disk is not up to date.
cdef void table_set_durable(chunk_table_t* t, uint64_t chunk, uint32_t entry) noexcept nogil
# After load and replay: bit 31 means nothing, nor do entries behind the last chunk; count mapped.
cdef void table_settle_load(chunk_table_t* t) noexcept nogil
# After a takeover: note every entry in which present differs from what the disk says.
cdef void table_note_difference(chunk_table_t* t, const uint32_t* disk) noexcept nogil
# Whoever saw a changed entry before this call finds its marks set after it.
cdef void table_settle_marks(chunk_table_t* t) noexcept nogil
# The entry was recorded durably with this value: it is loose no more, unless it changed since.
cdef void table_recorded(chunk_table_t* t, uint64_t chunk, uint32_t entry) noexcept nogil

cdef inline uint32_t table_entry(const chunk_table_t* t, uint64_t chunk) noexcept nogil:
    """As it stands, CLOSED included."""
    return load_acquire32(t.present + chunk)

cdef inline bint table_is_loose(const chunk_table_t* t, uint64_t chunk) noexcept nogil:
    return (load_relaxed(t.loose + (chunk >> 6)) >> (chunk & 63)) & 1
