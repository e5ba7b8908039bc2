# SPDX-License-Identifier: Apache-2.0
"""Layer 2. What changed since the last commit, as records of a journal batch (FORMAT.md)."""
from libc.stdint cimport uint64_t
from .bitmap cimport bitmap_t
from .chunk_table cimport chunk_table_t
from .journal cimport journal_t

cdef struct changes_t:
    journal_t* journal
    bitmap_t* bitmap                   # NULL: none
    chunk_table_t* table               # NULL: none
    uint64_t block_size
    uint64_t base_size
    uint64_t chunk_size
    uint64_t first                     # run of blocks being gathered
    uint64_t end
    uint64_t blocks                    # taken
    uint64_t counted                   # pending blocks that these were
    uint64_t entries                   # taken
    uint64_t places_end                # one more than the highest place recorded
    bint overflow                      # more than a batch holds: a checkpoint must do it

# Begin a batch and put into it what is pending: first clear the marks, then read bits and entries,
# so that what changes later is marked again. The caller leads and has set the fields above first.
cdef void changes_take(changes_t* c) noexcept nogil
