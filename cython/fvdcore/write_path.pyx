# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Layer 3. Writes. See write_path.pxd.

A block's bit is set only after its whole content was written (I1 begins here), under the block's
range lock, so that copy-on-read, prefetch and other writes of the same block cannot come between
(the first implementation's overlapping writes could). A write to local blocks takes no lock at
all."""
from libc.stdint cimport uint8_t, uint64_t
from .atomics cimport load_acquire
from .bitmap cimport bitmap_all_present, bitmap_test
from .commit cimport commit_fault, commit_flush
from .counters cimport (
    CAUSE_COW, N_COW_FILL_BYTES, N_COW_FILLS, N_IMAGE_WRITE_BYTES, block_t, count,
)
from .image cimport image_read_base, image_set_local, image_t
from .range_lock cimport range_lock, range_lock_try, range_unlock
from .storage cimport storage_write
from .syscalls cimport EAGAIN, EIO, EROFS


cdef int write_local(image_t* m, const uint8_t* data, uint64_t length, uint64_t offset,
        block_t* n) noexcept nogil:
    """Every touched block is local."""
    cdef int rc = storage_write(m.data, data, length, m.data_offset + offset, 0)
    if rc == 0:
        count(n, N_IMAGE_WRITE_BYTES, length)
    return rc


cdef int fill_edges(image_t* m, uint8_t* data, uint64_t length, uint64_t offset, uint64_t* head,
        uint64_t* tail, block_t* n) noexcept nogil:
    """Read what the partial first and last block lack from the base, into the room beside data."""
    cdef int rc = 0
    if head[0]:
        rc = image_read_base(m, data - head[0], head[0], offset - head[0], 0, CAUSE_COW, n)
    if rc == 0 and tail[0]:
        rc = image_read_base(m, data + length, tail[0], offset + length, 0, CAUSE_COW, n)
    if rc == 0:
        count(n, N_COW_FILLS, 1)
        count(n, N_COW_FILL_BYTES, head[0] + tail[0])
    return rc


cdef int write_locked(image_t* m, uint8_t* data, uint64_t length, uint64_t offset, int flags,
        block_t* n) noexcept nogil:
    """The blocks are locked by us; some may not be local."""
    cdef uint64_t bs = m.block_size, end = offset + length
    cdef uint64_t first = offset // bs
    cdef uint64_t last = (min(end, m.base_size) - 1) // bs
    cdef uint64_t block_end = min((last + 1) * bs, m.base_size)
    cdef uint64_t head = 0, tail = 0
    cdef int rc
    if offset % bs and not bitmap_test(&m.bitmap, first):
        head = offset % bs
    if end < block_end and not bitmap_test(&m.bitmap, last):
        tail = block_end - end
    if head or tail:
        if flags & WRITE_TRY:
            return -EAGAIN
        rc = fill_edges(m, data, length, offset, &head, &tail, n)
        if rc < 0:
            return rc
    rc = storage_write(m.data, data - head, head + length + tail, m.data_offset + offset - head, 0)
    if rc < 0:
        return rc
    count(n, N_IMAGE_WRITE_BYTES, head + length + tail)
    image_set_local(m, first, last + 1, False)
    return 0


cdef int write_absent(image_t* m, uint8_t* data, uint64_t length, uint64_t offset, int flags,
        block_t* n) noexcept nogil:
    cdef uint64_t first = offset // m.block_size
    cdef uint64_t end = (min(offset + length, m.base_size) - 1) // m.block_size + 1
    cdef int rc
    if flags & WRITE_TRY:
        if not range_lock_try(&m.locks, first, end):
            return -EAGAIN
    else:
        range_lock(&m.locks, first, end)
    rc = write_locked(m, data, length, offset, flags, n)
    range_unlock(&m.locks, first, end)
    return rc


cdef int image_write(image_t* m, uint8_t* data, uint64_t length, uint64_t offset, int flags,
        block_t* n) noexcept nogil:
    cdef bint fua = (flags & WRITE_FUA) != 0
    cdef uint64_t first, end
    cdef int rc
    if m.read_only:
        return -EROFS
    if commit_fault(&m.commit):
        return -EIO
    if fua and flags & WRITE_TRY:
        return -EAGAIN
    if length == 0:
        return 0
    if load_acquire(&m.complete) or offset >= m.base_size:
        rc = write_local(m, data, length, offset, n)
    else:
        first = offset // m.block_size
        end = (min(offset + length, m.base_size) - 1) // m.block_size + 1
        if bitmap_all_present(&m.bitmap, first, end):
            rc = write_local(m, data, length, offset, n)
        else:
            rc = write_absent(m, data, length, offset, flags, n)
    # Never by a synchronous write (RWF_DSYNC): it would collect the errors of other lost pages,
    # which
    # the next flush would then not hear of. FUA shares the group commit instead.
    if rc == 0 and fua:
        rc = commit_flush(&m.commit, n)
    return rc
