# SPDX-License-Identifier: Apache-2.0
"""Layer 4. The connections of a device, and what native threads have to tell its owner: events, and
an eventfd that wakes whoever polls it."""
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from .dispatch cimport device_t
from .nbd_connection cimport connection_t
from .sync cimport cond_t, mutex_t, thread_t

cdef enum:
    ENDED_EVENTS = 256

cdef struct stall_t:
    bint waits                         # the connection of this slot is the sender's
    uint64_t deadline_ns
    uint64_t sent                      # progress at the deadline's setting

cdef struct links_t:
    device_t* device
    connection_t* slots                # CONNECTIONS_MAX
    uint64_t next_id
    mutex_t mutex
    cond_t changed
    int event_fd
    thread_t sender                    # sends for connections whose socket was full
    int sender_fd                      # eventfd: a connection stalled, or stop
    uint64_t sender_stopping
    stall_t[64] stalls                 # CONNECTIONS_MAX
    uint64_t[256] ended                # ids of connections that ended, not yet told
    uint64_t ended_count
    uint64_t prefetch_changed
    uint64_t fault_changed
    uint64_t space_changed

cdef int links_init(links_t* l, device_t* d) noexcept nogil
cdef void links_free(links_t* l) noexcept nogil
cdef int links_start(links_t* l) noexcept nogil
# Stop the sender. No connection lives.
cdef void links_stop(links_t* l) noexcept nogil
# Serve a connected stream socket, which is ours from now on (closed, also on failure). The id, or
# -EMFILE when all places are taken, or another negative errno.
# received: bytes that a predecessor had read from the socket beyond the last whole message.
cdef int64_t links_serve(links_t* l, int fd, bint structured, bint read_only, bint has_status,
        uint32_t status_id, const uint8_t* received, uint64_t received_length) noexcept nogil
# Let all connections part until the monotonic deadline. True: none lives; the parted ones are to be
# given (links_give). False: all go on as before.
cdef bint links_part(links_t* l, uint64_t deadline_ns) noexcept nogil
# The descriptor of the connection in a slot if it has parted, else -1. Frees the slot.
cdef int links_give(links_t* l, int slot) noexcept nogil
# Join the threads of connections that ended. One caller at a time.
cdef void links_reap(links_t* l) noexcept nogil
cdef int links_live(const links_t* l) noexcept nogil
# Shut all connections (now: without answers) and wait for their ends until the monotonic deadline.
# False: some still live.
cdef bint links_shut(links_t* l, bint now, uint64_t deadline_ns) noexcept nogil
# For prefetch_t.notify, commit_t.notify and parking_t.notify; owner is the links_t.
cdef void links_prefetch_changed(void* owner) noexcept nogil
cdef void links_fault_set(void* owner) noexcept nogil
cdef void links_space_changed(void* owner) noexcept nogil
