# SPDX-License-Identifier: Apache-2.0
"""Layer 1. One call over an NBD server, cut into pieces, several of which are in flight over all
connections at once. Pieces of reads that fail are sent again, with back-off, until the call's time
is over; writes are sent once (nbd_storage.pyx says why)."""
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from .nbd_pool cimport nbd_call_t, nbd_pool_t, nbd_request_t

cdef enum:
    NBD_PIECE = 262144                 # bytes of one request
    NBD_SLOTS = 8                      # pieces of one call in flight

cdef struct transfer_t:
    nbd_call_t call
    nbd_pool_t* pool
    int op
    uint8_t* data                      # of the next piece; NULL where none is carried
    uint64_t left
    uint64_t offset
    uint64_t piece
    uint32_t flags
    bint repeats                       # failed pieces are sent again
    bint once                          # but not those that the server itself refuses
    uint64_t deadline
    int failed                         # negative errno of the first failure
    nbd_request_t[8] slots             # NBD_SLOTS

# A call with the pool's time limit and no flags.
cdef void nbd_prepare(transfer_t* t, nbd_pool_t* p, int op, void* data, uint64_t length,
        uint64_t offset) noexcept nogil
# Carry it to its end. Returns with no piece in flight.
cdef int nbd_run(transfer_t* t) noexcept nogil
# Both.
cdef int nbd_transfer(nbd_pool_t* p, int op, void* data, uint64_t length, uint64_t offset,
        uint32_t flags, uint64_t piece) noexcept nogil
# A server's error as a storage error.
cdef int nbd_errno(int error) noexcept nogil
