# SPDX-License-Identifier: Apache-2.0
"""Layer 4. device_t: an open image chain with its threads, and the only switch on operation."""
from libc.stdint cimport int64_t, uint8_t, uint64_t
from .counters cimport (
    OP_DISCARD, OP_WRITE, OP_WRITE_ZEROES, block_t, counters_t, progress_t,
)
from .failures cimport failures_t
from .fetch cimport fetch_t
from .first_reads cimport first_reads_t
from .image cimport image_t
from .limits cimport CHAIN_MAX, CREW_MAX, REQUESTS
from .parking cimport parking_t
from .prefetch cimport prefetch_t
from .request cimport request_t
from .storage cimport storage_t
from .sync cimport cond_t, gate_t, mutex_t, thread_t

cdef struct device_t

cdef struct crew_member_t:
    device_t* device
    thread_t thread
    int index

cdef struct device_t:
    image_t* image                     # the top layer
    image_t* layers                    # CHAIN_MAX images, top first
    int layer_count
    storage_t** stores                 # what the layers lie in; each one block of calloc
    int store_count
    bint has_remote_base               # the bottom is an export of an NBD server
    bint base_may_hang                 # so long that it must not hold up what is local
    uint64_t base_timeout_ns           # what needs the base waits at most so long for a thread
    counters_t counters
    failures_t failures                # of requests and prefetch, for the log
    prefetch_t prefetch
    fetch_t fetch
    first_reads_t first_reads
    parking_t parking
    gate_t* gate
    request_t* requests                # REQUESTS of them
    uint8_t* arena                     # their buffers
    uint64_t arena_bytes
    bint write_through                 # what is answered is durable
    bint crew_writes                   # no write is served on its connection's own thread
    mutex_t mutex                      # free list and queue
    cond_t free_request
    cond_t queued
    cond_t change_done
    request_t* changes                 # writes, trims, zeroings handed over and not yet executed
    uint64_t change_count
    uint64_t next_order
    int free_count
    uint64_t several                   # there has been more than one connection at once
    request_t* free_list
    request_t* queue_head
    request_t* queue_tail
    request_t* copies                  # answered reads whose data are still to be copied
    request_t** copies_end
    uint64_t crew_stopping
    int crew_count                     # with the mutex
    int crew_most                      # more are started when so many wait for the base
    int crew_kept                      # of the crew, how many are kept from waiting for the base
    int distant_count                  # how many wait for it
    crew_member_t[160] crew            # CREW_MAX
    # What the crew does when a request has its result: set by the transport.
    void (*reply)(request_t* r) noexcept nogil
    # Has the client of a request that came over a connection given that connection up?
    bint (*is_gone)(request_t* r) noexcept nogil
    # Does its connection end, so that nothing of it may wait for space? NULL: never.
    bint (*is_leaving)(request_t* r) noexcept nogil

cdef int device_init(device_t* d, gate_t* gate) noexcept nogil
cdef void device_free(device_t* d) noexcept nogil
# Take a request: wait for a free one. held: how many the asker holds already, for a connection; it
# gets one only while more than that are free (and some are spared), so that clients that take no
# answers can never hold all. NULL: a caller of the Python face, who may have the last.
cdef request_t* request_take(device_t* d, const uint64_t* held) noexcept nogil
# Would request_take wait?
cdef bint request_scarce(device_t* d, uint64_t held) noexcept nogil
cdef void request_give(device_t* d, request_t* r) noexcept nogil
# One of the request's parts (reply, settle) is over.
cdef void request_part_done(device_t* d, request_t* r) noexcept nogil
# Hand a request to the crew. Requests that change overlapping ranges run in the order of their
# hand-over.
cdef void device_enqueue(device_t* d, request_t* r) noexcept nogil
# For a read that copy-on-read would settle, to be answered without the crew: the request in which
# its data, in r.data, go to the crew afterwards. NULL: the crew has to do all of it, because more
# must be read than is asked for or too much waits to be copied.
cdef request_t* device_begin_copy(device_t* d, uint64_t held, uint64_t length,
        uint64_t offset) noexcept nogil
# It was not answered: from now on the request is like any other.
cdef void device_call_copy_off(device_t* d, request_t* r) noexcept nogil
# Let the crew copy what was read, behind all that somebody waits for. The requests from first on;
# end: where the last one names the next.
cdef void device_enqueue_copies(device_t* d, request_t* first, request_t** end) noexcept nogil
# Must a write of this range be handed over, because an earlier change of it is with the crew? A
# kernel
# that gives up a connection re-sends its requests on another: the duplicate that is still queued
# here
# must not run after newer data.
cdef bint device_changing(device_t* d, uint64_t length, uint64_t offset) noexcept nogil
# The same for a write on the connection's own thread, r being a note of its range alone. With
# several connections it is marked, then the connection is looked at, then the write is done and the
# mark taken away: a duplicate that the kernel sends elsewhere after it gave this connection up, and
# all that is newer, finds the mark and waits. False: an earlier change is under way; nothing is
# marked.
cdef bint device_mark(device_t* d, request_t* r) noexcept nogil
cdef void device_unmark(device_t* d, request_t* r) noexcept nogil
# Count a finished request, and note it for the log if it failed; before: progress_of its block when
# it began.
cdef void device_account(device_t* d, block_t* n, const progress_t* before, int op, uint64_t offset,
        uint64_t length, int result, uint64_t begin_ns) noexcept nogil
# Put it into the trace, if one is taken.
cdef void device_trace(device_t* d, block_t* n, const progress_t* before, int op, uint64_t offset,
        uint64_t length, int result, uint64_t begin_ns, uint64_t end_ns) noexcept nogil
# Run it to its result, blocking. Block status replies lie in r.data as (u32 length, u32 kind)
# pairs.
cdef void device_execute(device_t* d, request_t* r, block_t* n) noexcept nogil
# What follows a reply: copy-on-read.
cdef void device_settle(device_t* d, request_t* r, block_t* n) noexcept nogil
# For the crew. Wait for earlier changes of the range; 1: it is parked behind one; -ENOSPC: it would
# be, and may not. Either may make another request of it, out of the pool, which is theirs to go on
# with.
cdef int device_begin_change(device_t* d, request_t** changing) noexcept nogil
# A change that failed: let it wait for space, if that is what it lacks and it may.
cdef bint device_park_change(device_t* d, request_t** changing) noexcept nogil
# What is parked was handed over before all that was never tried: it goes to the head of the queue,
# in order with what was put there before. The caller holds the mutex.
cdef void device_requeue(device_t* d) noexcept nogil
# Try all that is parked again, now: a connection is leaving, or there may be space.
cdef void device_unpark(device_t* d) noexcept nogil
# From now on nothing waits for space: what is parked is tried once more and answered.
cdef void device_stop_waiting(device_t* d) noexcept nogil
# Ask for longer storage if the image lacks some, though no guest's change waits for it.
cdef void device_ask_growth(device_t* d) noexcept nogil
# Storage may be longer now, says somebody; ok: he who was asked succeeded.
cdef void device_storage_grown(device_t* d, bint ok) noexcept nogil
# May a change that finds no space wait for it, at least while storage is made longer?
cdef inline bint device_waits(const device_t* d) noexcept nogil:
    return d.parking.waits or d.parking.helped

cdef inline bint changes_disk(const request_t* r) noexcept nogil:
    return r.op in (OP_WRITE, OP_DISCARD, OP_WRITE_ZEROES)
