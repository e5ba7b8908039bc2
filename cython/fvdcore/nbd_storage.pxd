# SPDX-License-Identifier: Apache-2.0
"""Layer 1. storage_t over an export of an NBD server, by libnbd: a remote base, or a data file."""
from libc.stdint cimport uint64_t
from .nbd_pool cimport nbd_extent_t, nbd_options_t, nbd_pool_t
from .storage cimport storage_ops_t, storage_t
from .sync cimport cond_t, mutex_t

cdef struct nbd_storage_t:
    storage_t head                     # first: an nbd_storage_t* is a storage_t*
    storage_ops_t ops
    nbd_pool_t pool
    bint opened
    int keeper_fd
    mutex_t edge                       # held for a write of parts of the server's smallest unit
    mutex_t extents_mutex              # guards what follows; read-only exports do not change
    cond_t told                        # whoever asked is ready
    bint asking                        # somebody does, and has what is his until he is ready
    nbd_extent_t* answer               # his
    uint64_t status_failures
    nbd_extent_t* extents              # of the last block status
    uint64_t extents_count
    uint64_t extents_begin
    uint64_t status_rest_s             # his: how long it is not asked for, as it failed
    uint64_t status_rest_until         # his

# Open the export of an NBD URI. With options.length it returns at once and connects in the
# background: reads wait for that up to the time limit. Otherwise it waits until the export's length
# is known. 0, or a negative errno with *reason, which lives as long as s: -ENOENT no libnbd,
# -ETIMEDOUT not reached, -EUCLEAN not what was expected. close() is needed after 0 only.
cdef int nbd_storage_open(nbd_storage_t* s, const char* uri, const nbd_options_t* o,
        const char** reason) noexcept nogil
# For the end: what waits for a base's server fails, what was sent only when its answer is there or
# quiet_ns are over. Other stores are left alone.
cdef void nbd_storage_interrupt(storage_t* s, uint64_t quiet_ns) noexcept nogil
