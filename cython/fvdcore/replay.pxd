# SPDX-License-Identifier: Apache-2.0
"""Layer 2. Reading the journal of an image that is being opened (FORMAT.md section 4)."""
from libc.stdint cimport uint64_t
from .bitmap cimport bitmap_t
from .chunk_table cimport chunk_table_t
from .journal cimport journal_t

# What the records of an image may speak of.
cdef struct journal_scope_t:
    uint64_t stable_epoch              # sectors of lower epochs are ignored
    bint trailers                      # sectors without a trailer are ignored
    bint verifies                      # the image's uuid is known, so a wrong sum means torn
    bitmap_t* bitmap                   # NULL: bitmap records are not applied
    uint64_t block_size
    uint64_t base_size                 # of the blocks that bitmap records may name; 0: none may
    uint64_t disk_size                 # an older writer's may reach to here
    bint writes                        # what follows is recorded, too
    chunk_table_t* table               # NULL: table records do not fit the image

# Read every valid record of epochs >= stable_epoch, in order, and apply it: blocks durable, entries
# durable. Nothing is applied unless all records are sound: -EUCLEAN. Afterwards epoch and sequence
# are beyond all that was seen; -EOVERFLOW: too near to the end of their range for who writes.
# Returns the number of sectors that counted.
cdef int journal_replay(journal_t* j, const journal_scope_t* scope) noexcept nogil
