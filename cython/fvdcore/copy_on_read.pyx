# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Layer 3. Copying base data into the image. See copy_on_read.pxd.

Blocks are looked at again under their lock, so a copy never lands on newer guest data. A block that
is absent now was absent when its data were read, because bits only go from 0 to 1: the buffer holds
base data there. Zeros are not stored: the place is punched first, since storage under a 0 bit may
hold what a failed write left (I9)."""
from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memcmp
from .atomics cimport compare_swap_acq_rel, fetch_sub_relaxed, load_acquire, load_relaxed
from .bitmap cimport bitmap_next_clear, bitmap_run_end
from .commit cimport commit_fault
from .counters cimport (
    G_COR_OUTSTANDING, N_COR_BLOCKS, N_COR_BYTES, N_COR_SKIPPED_BACKLOG, N_COR_SKIPPED_BUSY,
    N_COR_SKIPPED_ERROR, N_COR_SKIPPED_NOSPACE, N_COR_ZERO_BLOCKS, N_COR_ZERO_BYTES, block_t,
    count, counters_trace, gauge_add,
)
from .data_area cimport (
    data_lock_soon, data_start_writeback, data_store, data_unlock_copy, data_zero,
)
from .image cimport image_set_local, image_t
from .limits cimport NS_PER_MS, WRITEBACK_MIN
from .sync cimport clock_now
from .syscalls cimport EIO, ENOSPC
from .trace cimport TRACE_COPY, trace_is_on

cdef enum:
    LOCK_WAIT_MS = 200                 # for blocks that somebody else stores


cdef bint all_zero(const uint8_t* p, uint64_t length) noexcept nogil:
    """length >= 8."""
    return (<const uint64_t*>p)[0] == 0 and memcmp(p, p + 8, length - 8) == 0


cdef inline uint64_t block_bytes(const image_t* m, uint64_t first, uint64_t end) noexcept nogil:
    return min(end * m.block_size, m.base_size) - first * m.block_size


cdef int image_store_hole(image_t* m, uint64_t first, uint64_t end) noexcept nogil:
    cdef int rc = data_zero(m, block_bytes(m, first, end), first * m.block_size, 0)
    if rc == 0:
        image_set_local(m, first, end, True)
    return rc


cdef void image_trace_copy(image_t* m, const block_t* n, int kind, bint hole, uint64_t begin,
        uint64_t offset, uint64_t bytes) noexcept nogil:
    if begin:
        counters_trace(m.counters, n, kind, hole, begin, clock_now(m.commit.gate), offset, bytes,
                       0, 0)


cdef int store_data(image_t* m, const uint8_t* data, uint64_t first, uint64_t end,
        block_t* n) noexcept nogil:
    cdef uint64_t bytes = block_bytes(m, first, end)
    cdef int rc = data_store(m, data, bytes, first * m.block_size, True, n)
    if rc < 0:
        return rc
    image_set_local(m, first, end, True)
    # So that the next guest fsync does not pay for what was fetched.
    if bytes >= WRITEBACK_MIN:
        data_start_writeback(m, bytes, first * m.block_size)
    return 0


cdef int image_store_copy(image_t* m, const uint8_t* data, uint64_t first, uint64_t end,
        uint64_t* zeros, block_t* n) noexcept nogil:
    cdef uint64_t at = first, run
    cdef const uint8_t* here
    cdef bint zero
    cdef int rc
    zeros[0] = 0
    if commit_fault(&m.commit):
        return -EIO
    while at < end:
        here = data + (at - first) * m.block_size
        zero = all_zero(here, block_bytes(m, at, at + 1))
        run = at + 1
        while run < end and all_zero(data + (run - first) * m.block_size,
                                     block_bytes(m, run, run + 1)) == zero:
            run += 1
        if zero:
            rc = image_store_hole(m, at, run)
            zeros[0] += block_bytes(m, at, run)
        else:
            rc = store_data(m, here, at, run, n)
        if rc < 0:
            return rc
        at = run
    return 0


cdef void settle_run(image_t* m, const uint8_t* data, uint64_t first, uint64_t end,
        block_t* n) noexcept nogil:
    """One run of blocks seen absent: lock, look again, store what still is."""
    cdef uint64_t at = first, stop, bytes, zeros = 0, begin
    cdef int rc
    # Reads of neighbours share the block at their border, or the chunk that they are in.
    if not data_lock_soon(m, first, end, clock_now(m.commit.gate) + LOCK_WAIT_MS * NS_PER_MS):
        count(n, N_COR_SKIPPED_BUSY, block_bytes(m, first, end))
        return
    while at < end:
        at = bitmap_next_clear(&m.bitmap, at, end)
        if at == end:
            break
        stop = bitmap_run_end(&m.bitmap, at, end)
        bytes = block_bytes(m, at, stop)
        begin = clock_now(m.commit.gate) if trace_is_on(&m.counters.trace) else 0
        rc = image_store_copy(m, data + (at - first) * m.block_size, at, stop, &zeros, n)
        if rc < 0:
            count(n, N_COR_SKIPPED_NOSPACE if rc == -ENOSPC else N_COR_SKIPPED_ERROR, bytes)
        else:
            image_trace_copy(m, n, TRACE_COPY, False, begin, at * m.block_size, bytes)
            count(n, N_COR_BYTES, bytes)
            count(n, N_COR_ZERO_BYTES, zeros)
            count(n, N_COR_BLOCKS, stop - at)
            count(n, N_COR_ZERO_BLOCKS, (zeros + m.block_size - 1) // m.block_size)
        at = stop
    data_unlock_copy(m, first, end)


cdef bint copy_on_read_admit(image_t* m, uint64_t bytes, bint later) noexcept nogil:
    cdef uint64_t most = m.outstanding_max // 2 if later else m.outstanding_max
    cdef uint64_t now = load_relaxed(&m.outstanding)
    # Not added and taken back: that would keep others out for the moment.
    while now + bytes <= most:
        if compare_swap_acq_rel(&m.outstanding, now, now + bytes):
            gauge_add(m.counters, G_COR_OUTSTANDING, <long long>bytes)
            return True
        now = load_relaxed(&m.outstanding)
    return False


cdef void copy_on_read_leave(image_t* m, uint64_t bytes) noexcept nogil:
    gauge_add(m.counters, G_COR_OUTSTANDING, -<long long>bytes)
    fetch_sub_relaxed(&m.outstanding, bytes)


cdef void copy_on_read_settle(image_t* m, const uint8_t* data, uint64_t length, uint64_t offset,
        bint admitted, block_t* n) noexcept nogil:
    cdef uint64_t bs = m.block_size, first, end, at, stop, bytes
    if load_acquire(&m.complete) or offset >= m.base_size:
        return
    first = (offset + bs - 1) // bs
    end = (min(offset + length, m.base_size) + bs - 1) // bs
    # The last block counts only if all of it (up to the base's end) was read.
    if offset + length < m.base_size:
        end = (offset + length) // bs
    at = first
    while at < end:
        at = bitmap_next_clear(&m.bitmap, at, end)
        if at >= end:
            return
        stop = bitmap_run_end(&m.bitmap, at, end)
        bytes = block_bytes(m, at, stop)
        if admitted:
            settle_run(m, data + (at * bs - offset), at, stop, n)
        elif copy_on_read_admit(m, bytes, False):
            settle_run(m, data + (at * bs - offset), at, stop, n)
            copy_on_read_leave(m, bytes)
        else:
            count(n, N_COR_SKIPPED_BACKLOG, bytes)
        at = stop
