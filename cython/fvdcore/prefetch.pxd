# SPDX-License-Identifier: Apache-2.0
"""Layer 3. Prefetch: a pipeline that copies what is still in the base, then finishes."""
from libc.stdint cimport int64_t, uint64_t
from .first_reads cimport first_read_t
from .image cimport image_t
from .pipeline cimport (
    PREFETCH_DISABLED, PREFETCH_DONE, PREFETCH_FAILED, PREFETCH_PAUSED, PREFETCH_RUNNING,
    PREFETCH_WAITING, SLOT_CLAIMED, SLOT_ENDED, SLOT_FREE, PAUSE_ERROR, PAUSE_NONE, prefetch_slot_t,
    prefetch_t,
)

cdef int prefetch_init(prefetch_t* p, image_t* m, int64_t delay_s) noexcept nogil
# Read so many bytes ahead at least: a distant base answers late. Before the threads start.
cdef void prefetch_widen(prefetch_t* p, uint64_t bytes) noexcept nogil
# Take caps and minima from the header; the caller holds the mutex, or no thread runs.
cdef void prefetch_take_rates(prefetch_t* p) noexcept nogil
# How it behaves beside guests (manners.pxd); the caller holds the mutex, or no thread runs.
cdef void prefetch_set_policy(prefetch_t* p, int policy, bint distant) noexcept nogil
# This device's part of what the host allows all of them, in bytes a second; 0: no limit. The same.
cdef void prefetch_set_budget(prefetch_t* p, uint64_t rate) noexcept nogil
# Fetch these bytes of the disk before all else, in their order; they are copied. Entries have a
# length. Before the threads start. 0 or -ENOMEM.
cdef int prefetch_set_order(prefetch_t* p, const first_read_t* order, uint64_t count) noexcept nogil
cdef void prefetch_free(prefetch_t* p) noexcept nogil
# Start the thread, unless prefetch is disabled or nothing is left to fetch.
cdef int prefetch_thread_start(prefetch_t* p) noexcept nogil
cdef void prefetch_stop(prefetch_t* p) noexcept nogil
# Run now (also when it was disabled, waiting, or failed) or pause after the step at hand.
cdef int prefetch_run(prefetch_t* p) noexcept nogil
cdef void prefetch_pause(prefetch_t* p) noexcept nogil
