# SPDX-License-Identifier: Apache-2.0
"""Layer 1. request_t: one guest request that may block, with its buffer.

The buffer is reserved address space: [room | payload | room], each room as large as the largest
block, so that a widened write or read is one contiguous transfer. Only touched pages cost
memory."""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

cdef struct request_t:
    request_t* next
    request_t* next_change             # in device_t.changes
    uint64_t order                     # of its hand-over among those that change the disk
    bint distant                       # it may wait for a distant base
    bint parked                        # it waits for space, or behind one that does
    bint apart                         # it has left the pool, for memory of its own
    uint64_t* held                     # its connection's requests of the pool; NULL: none counts
    bint answered                      # a read of which only the copy is left
    bint waited                        # it was parked once
    uint64_t growths                   # of parking_t when it was tried last
    void* connection                   # nbd_loop's; NULL: a caller of the Python face
    int op                             # op_t
    uint16_t flags                     # NBD command flags
    uint64_t cookie
    uint64_t offset
    uint64_t length
    uint64_t begin_ns
    int result                         # 0 or negative errno
    uint8_t* area
    uint8_t* data                      # payload: area + room
    uint64_t read_offset               # what the buffer holds after a read: the request widened
    uint64_t read_length
    uint64_t touched                   # bytes of the area that may be resident
    uint64_t parts                     # reply and settle; the last to end gives it back
    uint8_t[32] head                   # reply header
    uint64_t head_length
    uint64_t body_length               # of data to send behind it
