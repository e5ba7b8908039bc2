# SPDX-License-Identifier: Apache-2.0
"""Layer 4. What the modules that serve one NBD connection share of it."""
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from .counters cimport block_t, tally_t
from .dispatch cimport device_t
from .nbd_gather cimport gather_t
from .nbd_pauses cimport pauses_t
from .request cimport request_t
from .splice cimport splice_t
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
    request_t* copies                  # answered reads of the batch that the crew is to copy
    request_t** copies_end
    uint64_t copies_held               # so many, which count as held
    splice_t splice
    uint64_t begin_ns                  # when the batch had arrived
    tally_t tally                      # what of it was served, not yet counted
    bint alone                         # its requests are counted alone: a trace is taken
    uint64_t batch                     # requests served since the last receive
    gather_t gather
    pauses_t pauses                    # in which the kernel holds its writes back
    uint64_t writing                   # its thread is within a write that is not marked
    request_t mark                     # of a write on its thread, while there are others
    uint64_t parting                   # stop between two messages
    uint64_t have                      # bytes of the next message received, before start and parted
    bint parted                        # ended so: fd and received bytes are whole
    void (*ended)(connection_t* c) noexcept nogil
    void (*stalled)(connection_t* c) noexcept nogil  # a reply waits for room in the socket
    void* owner
