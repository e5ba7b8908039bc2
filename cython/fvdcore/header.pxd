# SPDX-License-Identifier: Apache-2.0
"""Layer 2. The header of an open image: load with validation, and change one sector at a time.

The header is never rewritten whole at run time: each update is one write of one known sector, from
the validated copy in memory (FORMAT.md section 1; the first implementation rewrote it whole,
from a read that may have failed)."""
from libc.stdint cimport uint8_t, uint64_t
from .layout cimport fvd_extension_t, fvd_header_t
from .limits cimport HEADER_BYTES
from .storage cimport storage_t
from .sync cimport mutex_t

cdef struct header_t:
    fvd_header_t fields                # as last read or written
    fvd_extension_t extension
    bint readable                      # the extension's sum is right
    bint trusted                       # the extension is ours; else an older writer was here
    bint trailers                      # journal sectors must carry trailers
    uint8_t[8192] bytes                # the same, as they stand on disk
    mutex_t mutex                      # prefetch's finish and a checkpoint may write at once
    const char* reason                 # why the last load refused, or NULL

cdef enum:
    HEADER_SECTORS = 14                # that hold fields; the extension stands in the next

# A field of 8 bytes or fewer, which no sector's end divides.
cdef struct header_value_t:
    int offset
    int width
    uint64_t value

# Read and check the header of an image whose data lie in data (the same, or a data file). -EUCLEAN:
# reason says why.
cdef int header_load(header_t* h, storage_t* image, storage_t* data) noexcept nogil
# Write one field's sector. The caller flushes.
cdef int header_store_clean(header_t* h, storage_t* image, bint clean) noexcept nogil
cdef int header_store_epoch(header_t* h, storage_t* image, uint64_t epoch) noexcept nogil
cdef int header_store_prefetched(header_t* h, storage_t* image) noexcept nogil
cdef int header_store_relocated(header_t* h, storage_t* image) noexcept nogil
cdef int header_store_table_size(header_t* h, storage_t* image, uint64_t bytes) noexcept nogil
cdef int header_store_disk_size(header_t* h, storage_t* image, uint64_t bytes) noexcept nogil
# Write those of the values that stand in the sector, at once. 1: it is written, 0: there is none or
# no other value; after an error the former values count.
cdef int header_store_values(header_t* h, storage_t* image, int sector,
        const header_value_t* values, int count) noexcept nogil
# The values that count now, in the places of those given.
cdef void header_former_values(header_t* h, const header_value_t* values, header_value_t* former,
        int count) noexcept nogil
# Do the values change more than one sector of an image that has a backup copy?
cdef bint header_must_stage(header_t* h, const header_value_t* values, int count) noexcept nogil
# Write the backup copy as the header will be with the values; and the bit that makes it count.
cdef int header_store_staged(header_t* h, storage_t* image, const header_value_t* values,
        int count) noexcept nogil
cdef int header_store_staged_bit(header_t* h, storage_t* image, bint staged) noexcept nogil
# Refresh the backup copy of the header, where the image has one.
cdef int header_store_backup(header_t* h, storage_t* image) noexcept nogil
# In place of an extension that does not count: a new one in memory, with a new uuid and a base of
# unknown identity. header_store_session writes it.
cdef int header_renew_extension(header_t* h) noexcept nogil
cdef int header_store_version(header_t* h, storage_t* image) noexcept nogil
# A new open_session unless keep_session; boot_id may be all zero.
cdef int header_store_session(header_t* h, storage_t* image, const uint8_t* boot_id,
        bint keep_session) noexcept nogil
