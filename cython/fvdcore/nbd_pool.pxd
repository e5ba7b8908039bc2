# SPDX-License-Identifier: Apache-2.0
"""Layer 1. The connections to one export of an NBD server, each with a thread that drives it.

A thread connects, negotiates, polls, and connects again with back-off when the connection is lost.
Any thread sends requests on a connection that is ready; completions come from the driving thread.
`pool.mutex` guards everything here but the library's handles, which have locks of their own: no
function of the library is called with the mutex held, because its callbacks take it."""
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from .atomics cimport load_acquire
from .nbd_library cimport nbd_handle, nbd_library_t
from .sync cimport cond_t, gate_t, mutex_t, thread_t

cdef enum:
    NBD_CONNECTIONS_MAX = 16
    NBD_TEXT = 256
    NBD_EXTENTS = 8192                 # of one block status reply that are kept

cdef enum nbd_op_t:
    NBD_READ = 0
    NBD_WRITE = 1
    NBD_ZERO = 2
    NBD_TRIM = 3
    NBD_FLUSH = 4
    NBD_STATUS = 5

cdef enum nbd_state_t:
    NBD_DOWN = 0                       # connecting, or waiting to
    NBD_READY = 1

cdef enum nbd_request_state_t:
    REQUEST_FREE = 0
    REQUEST_WANTED = 1                 # to be sent (again)
    REQUEST_SENT = 2                   # the library has it and may touch its data
    REQUEST_RETIRED = 3                # error says how it went

cdef struct nbd_options_t:
    bint writable
    int connections                    # at most; more than one only where the server allows
    uint64_t timeout_ns                # base_timeout: how long one call may take
    # Length the export must have, 0 = unknown: then opening waits for the server. A longer export
    # is accepted unless exact.
    uint64_t length
    bint exact
    bint once                          # opening gives up with the first failed attempt
    int keeper_fd                      # duplicated and held as long as the export is used; or -1
    gate_t* gate

cdef struct nbd_pool_t

# A thread that waits for requests of its own.
cdef struct nbd_call_t:
    cond_t changed
    nbd_call_t* next
    nbd_call_t* previous

cdef struct nbd_extent_t:
    uint64_t end                       # offset behind the run
    bint zero

cdef struct nbd_connection_t:
    nbd_pool_t* pool
    int index
    thread_t thread
    int event_fd                       # wakes the thread out of poll
    nbd_handle* handle                 # NULL while there is none
    int state
    bint cut                           # the thread shall give this connection up
    int users                          # threads inside the library with this handle
    cond_t unused
    int in_flight
    uint64_t progress_ns               # when an answer came last, or the first request was sent
    uint64_t changes                   # writes sent
    uint64_t flushed                   # of these, covered by a flush
    uint64_t back_off_ns

cdef struct nbd_request_t:
    nbd_call_t* call
    nbd_connection_t* connection
    int op
    uint8_t* data                      # of a block status: nbd_extent_t[NBD_EXTENTS]
    uint64_t length
    uint64_t offset
    uint32_t flags
    int state
    int error                          # errno, positive
    bint refused                       # the library did not take it: it never left this process
    uint64_t sent_ns
    uint64_t not_before_ns             # a failed one is tried again then
    uint64_t back_off_ns
    uint64_t extents                   # entries in data
    # Of a read's reply so far: the lengths of its parts, and the differences of the squares of
    # their ends and begins. Parts that make the whole add up to its length and the square of it.
    uint64_t told
    uint64_t told_squares

cdef enum nbd_offer_t:
    NBD_KNOWN = 1                      # it was reached once: length and align are its own
    NBD_CAN_FUA = 2
    NBD_CAN_ZERO = 4
    NBD_CAN_TRIM = 8
    NBD_CAN_STATUS = 16

cdef struct nbd_pool_t:
    nbd_library_t lib
    nbd_options_t options
    char[1024] uri
    mutex_t mutex
    cond_t progress                    # a connection came up or an attempt failed
    nbd_call_t* calls
    nbd_connection_t[16] connections   # NBD_CONNECTIONS_MAX
    int started
    int ready
    bint stopping
    bint interrupted                   # calls send nothing any more
    uint64_t quiet_until               # and then wait so long for what was sent
    # What the server said when it was first reached; a later connection must offer as much.
    uint64_t offers                    # nbd_offer_t (atomic; changed with the mutex held)
    uint64_t length
    uint64_t align                     # smallest unit it takes
    uint64_t request_max               # largest request it takes; 0: no limit
    bint lost                          # writes may be lost with a connection: flushes fail
    bint unfit                         # reached, and not what was expected
    uint64_t attempts                  # of connecting that failed
    uint64_t losses                    # connections that were lost
    uint64_t heard_ns                  # when the server answered last, or took a connection
    char[256] error                    # why the last connection failed or was lost

cdef inline bint nbd_offers(const nbd_pool_t* p, uint64_t what) noexcept nogil:
    """Does the server offer all of it? Needs no mutex."""
    return load_acquire(&p.offers) & what == what

# Start to connect. Returns at once; 0 or a negative errno.
cdef int nbd_pool_open(nbd_pool_t* p, const char* uri, const nbd_options_t* o) noexcept nogil
# End the threads and free everything. No call is inside.
cdef void nbd_pool_close(nbd_pool_t* p) noexcept nogil
# Let calls fail instead of waiting for the server; for the end, when nobody wants their answers.
# What was sent gets quiet_ns to be answered: a client that leaves before ends nbdkit 1.32.
cdef void nbd_pool_interrupt(nbd_pool_t* p, uint64_t quiet_ns) noexcept nogil

# With the mutex held:
# Wait until a first connection has been made. 0, -ETIMEDOUT, or -EUCLEAN: it is unfit.
cdef int nbd_pool_wait(nbd_pool_t* p, uint64_t deadline_ns) noexcept nogil
# The ready connection with the fewest requests in flight, or NULL.
cdef nbd_connection_t* nbd_pool_pick(nbd_pool_t* p) noexcept nogil
# Send a request on a connection that is ready. The mutex is released meanwhile.
cdef void nbd_send(nbd_connection_t* c, nbd_request_t* r) noexcept nogil
# Give a connection up; what is in flight on it is retired with ENOTCONN soon.
cdef void nbd_cut(nbd_connection_t* c) noexcept nogil
cdef void nbd_call_begin(nbd_pool_t* p, nbd_call_t* call) noexcept nogil
cdef void nbd_call_end(nbd_pool_t* p, nbd_call_t* call) noexcept nogil
