# SPDX-License-Identifier: Apache-2.0
"""Layer 1. storage_t over a regular file or block device, through the page cache."""
from libc.stdint cimport uint64_t
from .direct_io cimport direct_io_t
from .storage cimport storage_ops_t, storage_t

cdef struct file_storage_t:
    storage_t head                     # first: a file_storage_t* is a storage_t*
    storage_ops_t ops
    int fd
    direct_io_t direct                 # for data past the page cache; its fd is -1: none
    uint64_t cut                       # somebody has made it shorter: nothing is written (atomic)
    bint is_device
    bint no_punch                      # the store cannot punch holes: zeros are written

# From now on transfers at from_ and behind it go past the page cache, by a descriptor of the same
# file that was opened with O_DIRECT. Before threads use it.
cdef int file_storage_go_direct(storage_t* s, int fd, uint64_t from_) noexcept nogil
# The descriptor of storage that goes through the page cache of a file; -1: it does not.
cdef int file_storage_cached(const storage_t* s) noexcept nogil
# Duplicate fd and serve it. The caller keeps its own descriptor.
cdef int file_storage_open(file_storage_t* f, int fd) noexcept nogil
