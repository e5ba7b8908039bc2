# SPDX-License-Identifier: Apache-2.0
"""Layer 3. The pipeline of prefetch: its state, and the slots that copy runs of blocks."""
from libc.stdint cimport uint8_t, uint64_t
from .failures cimport failures_t
from .first_reads cimport first_read_t
from .image cimport image_t
from .manners cimport manners_t
from .sync cimport cond_t, mutex_t, thread_t
from .throttle cimport bucket_t, meter_t

cdef enum prefetch_state_t:
    PREFETCH_DISABLED = 0
    PREFETCH_WAITING = 1               # for its start delay
    PREFETCH_RUNNING = 2
    PREFETCH_PAUSED = 3
    PREFETCH_DONE = 4
    PREFETCH_FAILED = 5                # the image takes no more (full, failed); start tries again

cdef enum pause_reason_t:              # why it pauses although it is wanted
    PAUSE_NONE = 0
    PAUSE_ERROR = 1
    PAUSE_SLOW_READ = 2
    PAUSE_SLOW_WRITE = 3

cdef enum slot_state_t:
    SLOT_FREE = 0
    SLOT_CLAIMED = 1                   # its thread copies [first, end)
    SLOT_ENDED = 2                     # rc and busy say how it went

cdef enum plan_t:
    PLAN_CLAIMED = 0
    PLAN_WAIT = 1                      # all that is absent is in the slots
    PLAN_COMPLETE = 2

cdef struct prefetch_t

# One buffer of the pipeline, with the thread that fills it from the base and empties it into the
# image.
cdef struct prefetch_slot_t:
    prefetch_t* prefetch
    thread_t thread
    uint8_t* buffer
    uint64_t state                     # slot_state_t (atomic)
    uint64_t first
    uint64_t end
    bint hole
    uint64_t charged                   # bytes that manners thinks to be in flight
    bint busy                          # somebody else held the blocks
    int rc

cdef struct prefetch_t:
    image_t* image
    mutex_t mutex
    cond_t changed
    thread_t thread
    uint64_t state
    uint64_t start_at                  # monotonic ns
    bint wanted                        # run, rather than pause
    bint full                          # failed for want of space; tried again at hold_until
    bint stopping
    uint64_t cursor                    # block to look at next
    uint64_t step_blocks
    first_read_t* order                # bytes to fetch before all else, in this order, or NULL
    uint64_t order_count
    uint64_t order_at                  # entry at hand
    uint64_t order_block               # of it, where to go on; 0: at its start
    prefetch_slot_t[64] slots          # PREFETCH_SLOTS_MAX
    int slot_count
    cond_t work                        # slots wait for a claim, or for their turn to write
    bint writing                       # one slot writes at a time, whose is what follows
    uint64_t unwritten                 # bytes of small copies that no write-back was begun for
    uint64_t unwritten_first           # the blocks that they are among
    uint64_t unwritten_end
    uint64_t hold_until                # monotonic ns; pauses although it is wanted
    uint64_t reason                    # of that pause (atomic)
    uint64_t back_off_ms
    uint64_t narrow                    # pieces are halved so often: some of the base fails (atomic)
    bint divisible                     # a piece of several blocks failed in this round
    int good                           # that came since the last that failed, or was halved less
    uint64_t random
    bucket_t read_cap
    bucket_t write_cap
    bucket_t budget                    # this device's part of the host's
    manners_t manners
    meter_t read_meter
    meter_t write_meter
    uint8_t* buffer                    # of all slots
    uint64_t buffer_bytes
    uint64_t rate                      # bytes a second, moving average
    uint64_t copied                    # bytes made local by this session's prefetch
    failures_t* failures               # for the log; may be NULL
    void (*notify)(void* owner) noexcept nogil
    void* owner

# The caller holds the mutex.
cdef void pipeline_set_state(prefetch_t* p, uint64_t state) noexcept nogil
# Claim the next run for a free slot; a plan_t. Only the lead does.
cdef int pipeline_plan(prefetch_t* p, prefetch_slot_t* s) noexcept nogil
# Give the slot its run.
cdef void pipeline_claim(prefetch_t* p, prefetch_slot_t* s) noexcept nogil
# A slot in that state, or NULL.
cdef prefetch_slot_t* pipeline_slot(prefetch_t* p, uint64_t state) noexcept nogil
# Free the slots that have ended. The worst of their results: a full image before an error.
cdef int pipeline_collect(prefetch_t* p, bint* busy, bint* done) noexcept nogil
# Buffers and threads of the slots, the first time.
cdef int pipeline_start(prefetch_t* p) noexcept nogil
