# SPDX-License-Identifier: Apache-2.0
"""Layer 1. Transfers past the page cache (O_DIRECT), of any alignment."""
from libc.stdint cimport uint8_t, uint64_t
from .sync cimport cond_t, mutex_t

cdef struct direct_io_t:
    int fd                             # opened with O_DIRECT; -1: everything goes through the cache
    uint64_t from_                     # where the data begin; metadata in front of them are cached
    uint64_t unit                      # bytes that offset, length and memory are multiples of
    mutex_t mutex                      # users, alone
    cond_t changed
    uint64_t users                     # writes of whole units that are under way
    bint alone                         # a write of parts of units is, or waits to be

# Use the description of fd, opened with O_DIRECT, for what lies at from_ and behind it. Raises
# nothing; a negative errno: it cannot be done.
cdef int direct_open(direct_io_t* d, int fd, uint64_t from_) noexcept nogil
cdef void direct_close(direct_io_t* d) noexcept nogil
# How much of [offset, offset + length) at offset goes this way: all, or what lies before the file's
# last, partial unit, or nothing. file_length: what the file has now.
cdef uint64_t direct_part(const direct_io_t* d, uint64_t length, uint64_t offset,
        uint64_t file_length) noexcept nogil
# Transfer all of a range that direct_part allowed. flags: those of the system calls.
cdef int direct_read(direct_io_t* d, uint8_t* buffer, uint64_t length,
        uint64_t offset) noexcept nogil
cdef int direct_write(direct_io_t* d, const uint8_t* buffer, uint64_t length, uint64_t offset,
        int flags) noexcept nogil
