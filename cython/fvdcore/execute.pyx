# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Layer 4. What requests that only read do. See execute.pxd."""
from libc.stdint cimport uint32_t, uint64_t
from .atomics cimport load_acquire
from .bitmap cimport bitmap_all_present, bitmap_test
from .counters cimport OP_READ, OP_STATUS, block_t
from .fetch cimport fetch_begin, fetch_end, fetch_t
from .image cimport image_t
from .limits cimport NS_PER_S, STATUS_EXTENTS_MAX
from .read_path cimport image_read, image_status
from .request cimport request_t
from .storage cimport IO_HALF, IO_ONCE
from .sync cimport clock_now

cdef enum:
    FLAG_REQ_ONE = 8
    AGAIN_MAX_S = 1                    # an error that came so soon is the server's own


cdef int execute_read(image_t* m, fetch_t* f, request_t* r, block_t* n) noexcept nogil:
    """With copy-on-read, widened to whole blocks where an edge block is in the base."""
    cdef uint64_t begin = r.offset, end = r.offset + r.length, bs = m.block_size
    cdef uint64_t since = 0
    cdef int rc, flags = 0, window = -1
    if m.copy_on_read and load_acquire(&m.complete) == 0 and begin < m.base_size:
        if f.bytes:
            window = fetch_begin(f, m, &begin, &end)
        if begin % bs and not bitmap_test(&m.bitmap, begin // bs):
            begin -= begin % bs
        if end < m.base_size and end % bs and not bitmap_test(&m.bitmap, end // bs):
            end = min((end // bs + 1) * bs, m.base_size)
    r.touched = end - begin
    if begin == r.offset and end == r.offset + r.length:
        rc = image_read(m, r.data, r.length, r.offset, 0, n)
    else:
        since = clock_now(m.commit.gate)
        rc = image_read(m, r.data - (r.offset - begin), end - begin, begin,
                        IO_ONCE | IO_HALF, n)
    if window >= 0:
        fetch_end(f, window)
    # The guest's own part may be readable though its neighbourhood is not. If that took long, as
    # where the base is away, this has the other half of the time.
    if rc < 0 and since:
        if clock_now(m.commit.gate) - since >= AGAIN_MAX_S * NS_PER_S:
            flags = IO_HALF
        begin = r.offset
        end = r.offset + r.length
        rc = image_read(m, r.data, r.length, r.offset, flags, n)
    if rc == 0:
        r.read_offset = begin
        r.read_length = end - begin
    return rc


cdef int execute_status(image_t* m, request_t* r) noexcept nogil:
    """Pairs of (u32 length, u32 EXTENT_*), neighbours of one kind merged."""
    cdef uint64_t offset = r.offset, left = r.length, run, extents = 0
    cdef uint32_t* out = <uint32_t*>r.data
    cdef int kind
    while left:
        kind = image_status(m, left, offset, &run)
        if kind < 0:
            return kind
        offset += run
        left -= run
        if (extents and out[extents * 2 - 1] == <uint32_t>kind
                and out[extents * 2 - 2] + run < 1ULL << 32):
            out[extents * 2 - 2] += <uint32_t>run
            continue
        if extents == STATUS_EXTENTS_MAX or (extents and r.flags & FLAG_REQ_ONE):
            break
        out[extents * 2] = <uint32_t>run
        out[extents * 2 + 1] = <uint32_t>kind
        extents += 1
    r.body_length = extents * 8
    r.touched = r.body_length
    return 0


cdef bint request_behind_distant(const image_t* m, const request_t* r,
        const request_t* other) noexcept nogil:
    cdef uint64_t unit = m.chunk_size if m.compact else 1
    cdef uint64_t first = r.offset // unit
    cdef uint64_t last = (r.offset + max(r.length, <uint64_t>1) - 1) // unit
    while other != NULL:
        if (other.distant and other.length and other.offset // unit <= last
                and first <= (other.offset + other.length - 1) // unit):
            return True
        other = other.next_change
    return False


cdef bint request_needs_base(const image_t* m, const request_t* r) noexcept nogil:
    cdef uint64_t bs = m.block_size, end = min(r.offset + r.length, m.base_size)
    if r.length == 0 or r.offset >= end or load_acquire(&m.complete):
        return False
    if r.op in (OP_READ, OP_STATUS):
        return not bitmap_all_present(&m.bitmap, r.offset // bs, (end - 1) // bs + 1)
    # A change needs the base for what it leaves of its first and last block.
    if r.offset % bs and not bitmap_test(&m.bitmap, r.offset // bs):
        return True
    return end < m.base_size and end % bs and not bitmap_test(&m.bitmap, end // bs)
