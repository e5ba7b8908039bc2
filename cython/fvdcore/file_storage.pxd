# SPDX-License-Identifier: Apache-2.0
"""Layer 1. storage_t over a regular file or block device, through the page cache."""
from .storage cimport storage_ops_t, storage_t

cdef struct file_storage_t:
    storage_t head                     # first: a file_storage_t* is a storage_t*
    storage_ops_t ops
    int fd
    bint is_device
    bint no_punch                      # the store cannot punch holes: zeros are written

# Duplicate fd and serve it. The caller keeps its own descriptor.
cdef int file_storage_open(file_storage_t* f, int fd) noexcept nogil
