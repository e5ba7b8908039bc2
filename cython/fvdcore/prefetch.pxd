# SPDX-License-Identifier: Apache-2.0
"""Layer 3. Prefetch: one background thread that copies what is still in the base, then finishes."""
from libc.stdint cimport int64_t, uint8_t, uint64_t
from .failures cimport failures_t
from .image cimport image_t
from .sync cimport cond_t, mutex_t, thread_t

cdef enum prefetch_state_t:
    PREFETCH_DISABLED = 0
    PREFETCH_WAITING = 1               # for its start delay
    PREFETCH_RUNNING = 2
    PREFETCH_PAUSED = 3
    PREFETCH_DONE = 4
    PREFETCH_FAILED = 5                # the image takes no more (full, failed); start tries again

cdef struct prefetch_t:
    image_t* image
    mutex_t mutex
    cond_t changed
    thread_t thread
    uint64_t state
    uint64_t start_at                  # monotonic ns
    bint wanted                        # run, rather than pause
    bint stopping
    uint64_t cursor                    # block to look at next
    uint64_t step_blocks
    uint8_t* buffer
    uint64_t buffer_bytes
    uint64_t rate                      # bytes a second, moving average
    uint64_t copied                    # bytes made local by this session's prefetch
    failures_t* failures               # for the log; may be NULL
    void (*notify)(void* owner) noexcept nogil
    void* owner

cdef int prefetch_init(prefetch_t* p, image_t* m, int64_t delay_s) noexcept nogil
cdef void prefetch_free(prefetch_t* p) noexcept nogil
# Start the thread, unless prefetch is disabled or nothing is left to fetch.
cdef int prefetch_thread_start(prefetch_t* p) noexcept nogil
cdef void prefetch_stop(prefetch_t* p) noexcept nogil
# Run now (also when it was disabled, waiting, or failed) or pause after the step at hand.
cdef int prefetch_run(prefetch_t* p) noexcept nogil
cdef void prefetch_pause(prefetch_t* p) noexcept nogil
