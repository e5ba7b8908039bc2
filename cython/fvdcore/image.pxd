# SPDX-License-Identifier: Apache-2.0
"""Layer 3. image_t: an open FVD image. Open order, live memory, session, close."""
from libc.stdint cimport uint8_t, uint64_t
from .atomics cimport fetch_sub_acq_rel, load_relaxed
from .bitmap cimport bitmap_t
from .chunk_table cimport chunk_table_t
from .commit cimport commit_t
from .counters cimport block_t, counters_t
from .first_reads cimport first_reads_t
from .header cimport header_t
from .journal cimport journal_t
from .places cimport places_t
from .quiescence cimport quiescence_t
from .range_lock cimport range_locks_t
from .storage cimport storage_ops_t, storage_t
from .sync cimport gate_t, mutex_t

cdef struct image_options_t:
    bint read_only
    int live_fd                        # -1: private memory
    bint takeover                      # what is in the live memory is the truth (I7)
    const uint8_t* boot_id             # 16 bytes; zeros where nobody could take over
    const uint8_t* session             # 16 bytes for a new session, or NULL: random
    gate_t* gate

cdef struct image_t:
    storage_t head                     # first: an image is a storage_t for the layer above it
    storage_ops_t ops                  # filled by read_path
    storage_t* file                    # header and metadata
    storage_t* data                    # where data bytes lie: the file, or a data file
    header_t header
    storage_t* base                    # NULL: none, or not needed any more
    bitmap_t bitmap
    chunk_table_t table
    places_t places
    quiescence_t quiescence
    journal_t journal
    commit_t commit
    range_locks_t locks
    counters_t* counters
    bint has_bitmap                    # a base is (or was, at open) needed
    bint compact                       # a chunk table says where data lie
    bint read_only
    bint copy_on_read
    bint opened
    uint64_t complete                  # every block is local: no look-up is needed
    uint64_t size                      # of the disk (atomic: it may grow)
    uint64_t data_offset
    uint64_t chunk_size
    uint64_t base_size
    uint64_t block_size
    uint64_t outstanding               # bytes of copy-on-read between reply and settled
    uint64_t outstanding_max
    uint64_t demand                    # reads of the base for guests that are under way (atomic)
    uint64_t demand_ns                 # when the last one came (atomic)
    uint64_t demand_bytes              # that came so, in all (atomic)
    uint64_t demand_at                 # where the last read that began does so (atomic, a hint)
    uint64_t demand_end                # and where it ends (atomic, a hint)
    uint64_t base_users                # requests that are inside the base (atomic)
    uint64_t base_gone                 # nobody may enter it any more: all is local (atomic)
    first_reads_t* first_reads         # where they are noted, or NULL
    uint64_t private_fault
    void* live                         # live memory: one page of state, then the bitmap
    uint64_t live_bytes
    int live_fd                        # of the whole live file, or -1
    mutex_t resizing

# Open the image in file, with its data in data (the same, or a data file's) and over base (which
# may be NULL). The caller keeps all three and closes them after image_free. Nothing is written
# before everything is validated; a failed open leaves every byte as it was. On failure the struct
# is released and *reason may say why.
cdef int image_open(image_t* m, storage_t* file, storage_t* data, storage_t* base,
        counters_t* counters, const image_options_t* o, const char** reason) noexcept nogil
# Commit, checkpoint, clean = 1 (I4). The image stays open for image_free. 0 or the first error.
cdef int image_close(image_t* m, block_t* n) noexcept nogil
# Let go of memory without writing anything.
cdef void image_free(image_t* m) noexcept nogil
# All blocks are present: record that the base is not needed any more (I5).
cdef int image_finish(image_t* m, block_t* n) noexcept nogil

# Where the chunk table begins in the live file.
cdef uint64_t image_live_table(const image_t* m) noexcept nogil
# Bytes of the base that are not local yet.
cdef uint64_t image_base_bytes_left(const image_t* m) noexcept nogil
# Blocks [first, end), locked by the caller, are local now: bits, gauges, a nudge to the keeper.
cdef void image_set_local(image_t* m, uint64_t first, uint64_t end, bint copied) noexcept nogil
# Read from the base below base_size, counted under cause (n may be NULL: a lower layer does not
# count). -ESTALE: the base is gone, since all became local meanwhile: look at the bits again.
cdef int image_read_base(image_t* m, uint8_t* buffer, uint64_t length, uint64_t offset, int flags,
        int cause, block_t* n) noexcept nogil

# Use the base between these two, but for a holder of locks on blocks that are not local. False: it
# is gone, and there is nothing to leave.
cdef bint image_enter_base(image_t* m) noexcept nogil
cdef inline void image_leave_base(image_t* m) noexcept nogil:
    fetch_sub_acq_rel(&m.base_users, 1)

# Let nobody into the base any more: all blocks are local. False: somebody said so before.
cdef bint image_end_base(image_t* m) noexcept nogil

cdef inline bint image_needs_base(const image_t* m) noexcept nogil:
    return m.has_bitmap and load_relaxed(&m.complete) == 0

cdef inline uint64_t live_bytes_for(uint64_t bitmap_bytes, uint64_t table_bytes) noexcept nogil:
    """Engine's part of a live file: a page of state, the bitmap, the chunk table."""
    return 4096 + bitmap_bytes + table_bytes
