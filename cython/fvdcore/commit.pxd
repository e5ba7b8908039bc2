# SPDX-License-Identifier: Apache-2.0
"""Layer 2. The one pipeline by which metadata reach the disk (FORMAT.md section 6).

Everything that flushes is here. commit: take the changes whose data writes returned -> flush data
-> write journal pages -> flush -> mark durable. checkpoint: new epoch -> copy the stale bitmap
and table pages -> flush data -> write the table's copies -> flush -> the bitmap's -> flush ->
stable epoch -> flush -> the old pages are free.
One thread at a time leads (takes changes); flushes that arrive meanwhile share the next commit."""
from libc.stdint cimport uint8_t, uint64_t
from .bitmap cimport bitmap_t
from .chunk_table cimport chunk_table_t
from .counters cimport block_t, counters_t
from .header cimport header_t
from .journal cimport journal_t
from .page_copies cimport page_copies_t
from .places cimport places_t
from .storage cimport storage_t
from .sync cimport cond_t, gate_t, mutex_t, thread_t

cdef struct commit_t:
    storage_t* storage                 # header and metadata
    storage_t* data                    # where data lie: the same, or a data file
    header_t* header
    bitmap_t* bitmap                   # NULL: no bits to keep (no base)
    chunk_table_t* table               # NULL: no mappings to keep (raw layout)
    places_t* places                   # with a table
    journal_t* journal
    const counters_t* counters
    gate_t* gate
    uint64_t* fault                    # errno of the first failed flush or metadata write; sticky
    mutex_t mutex
    mutex_t flushing                   # a flush and its verdict are one step
    cond_t changed
    cond_t keeper_wake
    uint64_t started                   # commits begun
    uint64_t done                      # commits ended
    bint leading                       # somebody takes changes or copies the bitmap
    bint checkpointing                 # a checkpoint is between its begin and its end
    page_copies_t bitmap_copies        # of the checkpoint in progress
    page_copies_t table_copies
    uint64_t places_checkpoint         # its number among places
    uint64_t durable_length            # of the data file: its length at the last flush of it
    uint64_t reused_before             # table.reused when the last commit began to take changes
    uint64_t period_ns                 # journal_clean_buf_period; 0 = no timer
    uint64_t buffer_bytes              # journal_buf_size
    uint64_t pending_since             # when the keeper first saw pending changes; 0 = none
    uint64_t retired_since             # when the keeper first saw places without owner; 0 = none
    uint64_t keeper_state              # KEEPER_*
    bint stopping
    thread_t keeper
    void (*notify)(void* owner) noexcept nogil  # called once when the fault is set
    void* owner

cdef int commit_init(commit_t* c, gate_t* gate) noexcept nogil
cdef void commit_free(commit_t* c) noexcept nogil
cdef int commit_start(commit_t* c) noexcept nogil
cdef void commit_stop(commit_t* c) noexcept nogil
# Everything acknowledged before the call, data and metadata, is durable when it returns 0 (I6).
cdef int commit_flush(commit_t* c, block_t* n) noexcept nogil
cdef int commit_checkpoint(commit_t* c, block_t* n) noexcept nogil
# Let nobody commit or checkpoint until resume. -EIO: there was a fault, and nothing is held.
cdef int commit_pause(commit_t* c) noexcept nogil
cdef void commit_resume(commit_t* c) noexcept nogil
# Metadata changed: make the keeper look, if it has to.
cdef void commit_note(commit_t* c) noexcept nogil
# Sticky error: the errno, or 0. Writes and flushes answer EIO when it is set.
cdef int commit_fault(const commit_t* c) noexcept nogil
cdef void commit_set_fault(commit_t* c, int rc) noexcept nogil
# Flush the data, or header and metadata, with the verdict kept (the same where they share a file).
cdef int commit_flush_data(commit_t* c, block_t* n) noexcept nogil
cdef int commit_flush_metadata(commit_t* c, block_t* n) noexcept nogil
# Something changed that a commit has to record?
cdef bint commit_has_metadata(const commit_t* c) noexcept nogil
