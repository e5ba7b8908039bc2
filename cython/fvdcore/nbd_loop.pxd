# SPDX-License-Identifier: Apache-2.0
"""Layer 4. One NBD connection in the transmission phase, on a thread of its own."""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from .counters cimport block_t
from .dispatch cimport device_t
from .request cimport request_t
from .sync cimport cond_t, mutex_t, thread_t

cdef enum connection_state_t:
    CONNECTION_FREE = 0
    CONNECTION_LIVE = 1
    CONNECTION_ENDED = 2               # its thread is done; to be joined

cdef struct connection_t:
    device_t* device
    uint64_t id
    uint64_t state
    int fd
    bint structured
    bint read_only
    uint32_t status_id                 # metadata context of base:allocation
    bint has_status
    thread_t thread
    block_t* counters
    mutex_t mutex                      # sending, out list, in_flight
    cond_t changed
    bint sending                       # somebody owns the socket's write side
    request_t* out_head                # replies of the crew that wait to be sent
    request_t* out_tail
    uint64_t out_sent                  # bytes of the first of them that are sent
    uint64_t in_flight                 # requests with the crew
    uint64_t held                      # those of them that are of the pool (atomic)
    uint64_t leaving                   # it receives nothing more: its requests wait for no space
    uint64_t dead                      # the socket failed: replies are dropped
    uint8_t* receive
    uint8_t* reply
    uint64_t reply_length              # gathered replies of the batch
    uint64_t writing                   # its thread is within a write that is not marked
    request_t mark                     # of a write on its thread, while there are others
    uint64_t parting                   # stop between two messages
    uint64_t have                      # bytes of the next message received, before start and parted
    bint parted                        # ended so: fd and received bytes are whole
    void (*ended)(connection_t* c) noexcept nogil
    void (*stalled)(connection_t* c) noexcept nogil  # a reply waits for room in the socket
    void* owner

# Take fd and serve it until the client leaves, beginning with what a predecessor had received. The
# struct stays the caller's until state is ENDED.
cdef int connection_start(connection_t* c, const uint8_t* received,
        uint64_t received_length) noexcept nogil
# Ask it to part; again after a while, since its thread may have been about to wait. stay: call that
# off; restart: the same where it has parted already.
cdef void connection_part(connection_t* c) noexcept nogil
cdef void connection_stay(connection_t* c) noexcept nogil
cdef int connection_restart(connection_t* c) noexcept nogil
# The socket of a parted connection, the caller's from now on; what was received is freed.
cdef int connection_give(connection_t* c) noexcept nogil
# Read no more: what was received is finished and answered, then the connection ends. now: without
# answers. The connection must have been started and not been joined.
cdef void connection_shut(connection_t* c, bint now) noexcept nogil
# For the sender, who owns the write side of a stalled connection. resume: True when nothing waits
# any
# more and the write side is given up. give_up: the client took nothing for too long.
cdef bint connection_resume(connection_t* c) noexcept nogil
cdef void connection_give_up(connection_t* c) noexcept nogil
# device_t.is_gone, device_t.is_leaving.
cdef bint connection_is_gone(request_t* r) noexcept nogil
cdef bint connection_is_leaving(request_t* r) noexcept nogil
# The crew's way to answer (device_t.reply).
cdef void connection_reply(request_t* r) noexcept nogil
