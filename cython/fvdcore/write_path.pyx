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
from .commit cimport commit_fault, commit_flush, commit_note
from .counters cimport (
    CAUSE_COW, N_COW_FILL_BYTES, N_COW_FILLS, block_t, count,
)
from .data_area cimport (
    data_all_mapped, data_may_free, data_store, data_widen, data_write_mapped,
)
from .image cimport image_read_base, image_set_local, image_t
from .range_lock cimport range_lock, range_lock_try, range_unlock
from .syscalls cimport EAGAIN, EIO, EROFS, ESTALE


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
    """The blocks are locked by us, and so are the chunks where one has no place."""
    cdef uint64_t bs = m.block_size, end = offset + length
    cdef uint64_t first = offset // bs, last = 0, block_end
    cdef uint64_t head = 0, tail = 0
    cdef bint over_base = load_acquire(&m.complete) == 0 and offset < m.base_size
    cdef int rc
    if over_base:
        last = (min(end, m.base_size) - 1) // bs
        block_end = min((last + 1) * bs, m.base_size)
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
    rc = data_store(m, data - head, head + length + tail, offset - head,
                    not flags & WRITE_TRY, n)
    if rc < 0:
        return rc
    if over_base:
        image_set_local(m, first, last + 1, False)
    else:
        commit_note(&m.commit)
    return 0


cdef int write_absent(image_t* m, uint8_t* data, uint64_t length, uint64_t offset, int flags,
        block_t* n) noexcept nogil:
    """Some block is not local, or some chunk has no place."""
    cdef uint64_t first = offset // m.block_size
    cdef uint64_t end = (offset + length - 1) // m.block_size + 1
    cdef bint mapped = data_all_mapped(m, length, offset)
    cdef int rc
    if not mapped:
        data_widen(m, &first, &end)
    if flags & WRITE_TRY:
        if not range_lock_try(&m.locks, first, end):
            return -EAGAIN
    else:
        range_lock(&m.locks, first, end)
    # A chunk may have lost its place before we had the lock, which then is too narrow.
    if mapped and not data_all_mapped(m, length, offset):
        rc = -ESTALE
    else:
        rc = write_locked(m, data, length, offset, flags, n)
    range_unlock(&m.locks, first, end)
    return rc


cdef inline bint all_local(const image_t* m, uint64_t length, uint64_t offset) noexcept nogil:
    if load_acquire(&m.complete) or offset >= m.base_size:
        return True
    return bitmap_all_present(&m.bitmap, offset // m.block_size,
                              (min(offset + length, m.base_size) - 1) // m.block_size + 1)


cdef int image_write(image_t* m, uint8_t* data, uint64_t length, uint64_t offset, int flags,
        block_t* n) noexcept nogil:
    cdef bint fua = (flags & WRITE_FUA) != 0
    cdef int rc
    if m.read_only:
        return -EROFS
    if commit_fault(&m.commit):
        return -EIO
    if fua and flags & WRITE_TRY:
        return -EAGAIN
    if length == 0:
        return 0
    rc = -EAGAIN
    if all_local(m, length, offset):
        rc = data_write_mapped(m, data, length, offset, n)
    if rc == -EAGAIN or data_may_free(m, rc):
        rc = -ESTALE
        while rc == -ESTALE:
            rc = write_absent(m, data, length, offset, flags, n)
    # Never by a synchronous write (RWF_DSYNC): it would collect the errors of other lost pages,
    # which the next flush would then not hear of. FUA shares the group commit instead.
    if rc == 0 and fua:
        rc = commit_flush(&m.commit, n)
    return rc
