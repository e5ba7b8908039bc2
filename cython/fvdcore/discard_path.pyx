# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Layer 3. TRIM and WRITE_ZEROES. See discard_path.pxd.

Zeroing comes before the bit that exposes it (I9); the commit flushes data before it writes the
record, so the zeros are durable first. A request may cover 4 GiB: it is taken in steps, and its
length never sizes a buffer."""
from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memset
from .atomics cimport load_acquire
from .bitmap cimport bitmap_all_present
from .commit cimport commit_fault, commit_note
from .counters cimport block_t
from .data_area cimport data_find, data_unmap, data_widen, data_zero
from .image cimport image_set_local, image_t
from .limits cimport PAGE, ZERO_STEP
from .range_lock cimport range_lock, range_unlock
from .read_path cimport image_run
from .storage cimport EXTENT_DATA, ZERO_HINT, ZERO_KEEP, storage_zero
from .syscalls cimport EIO, EROFS
from .write_path cimport image_write


cdef int punch(image_t* m, uint64_t length, uint64_t offset) noexcept nogil:
    """Give back the whole pages of local bytes."""
    cdef uint64_t run = 0, address = 0, first, end
    cdef int rc
    while length:
        if data_find(m, length, offset, &run, &address, NULL):
            # Zeroing part of a page would write instead of giving back.
            first = (address + PAGE - 1) // PAGE * PAGE
            end = (address + run) // PAGE * PAGE
            if first < end:
                rc = storage_zero(m.data, end - first, first, ZERO_HINT)
                if rc < 0:
                    return rc
        offset += run
        length -= run
    return 0


cdef int trim_run(image_t* m, uint64_t length, uint64_t offset) noexcept nogil:
    """Trim local blocks; what is still in the base stays there."""
    cdef uint64_t run
    cdef int rc
    while length:
        if image_run(m, length, offset, &run) == EXTENT_DATA:
            rc = punch(m, run, offset)
            if rc < 0:
                return rc
        offset += run
        length -= run
    return 0


cdef int trim_chunk(image_t* m, uint64_t length, uint64_t offset) noexcept nogil:
    """Trim a range within one chunk: all of a local chunk loses its place."""
    cdef uint64_t chunk = offset // m.chunk_size, run
    cdef uint64_t begin = chunk * m.chunk_size
    cdef uint64_t bytes = min(m.chunk_size, load_acquire(&m.size) - begin)
    cdef uint64_t first = offset // m.block_size, end = first + 1
    cdef int rc = 0
    data_widen(m, &first, &end)
    range_lock(&m.locks, first, end)
    if (length == bytes and image_run(m, bytes, begin, &run) == EXTENT_DATA and run == bytes):
        data_unmap(m, chunk)
    else:
        rc = trim_run(m, length, offset)
    range_unlock(&m.locks, first, end)
    return rc


cdef int image_trim(image_t* m, uint64_t length, uint64_t offset, block_t* n) noexcept nogil:
    cdef uint64_t step
    cdef int rc
    if m.read_only:
        return -EROFS
    while length:
        if commit_fault(&m.commit):
            return -EIO
        if m.compact:
            step = min(length, m.chunk_size - offset % m.chunk_size)
            rc = trim_chunk(m, step, offset)
        else:
            step = min(length, <uint64_t>ZERO_STEP)
            rc = trim_run(m, step, offset)
        if rc < 0:
            return rc
        offset += step
        length -= step
    if m.compact:
        commit_note(&m.commit)
    return 0


cdef int zero_blocks(image_t* m, uint64_t length, uint64_t offset, int flags) noexcept nogil:
    """Zero a range that begins and ends at block borders, or at or behind the base's end."""
    cdef uint64_t first = offset // m.block_size
    cdef uint64_t end = (offset + length + m.block_size - 1) // m.block_size
    cdef uint64_t lock_first = first, lock_end = end
    cdef int rc
    data_widen(m, &lock_first, &lock_end)
    range_lock(&m.locks, lock_first, lock_end)
    rc = data_zero(m, length, offset, flags)
    if rc == 0 and load_acquire(&m.complete) == 0 and offset < m.base_size:
        image_set_local(m, first, min(end, m.bitmap.blocks), False)
    elif rc == 0:
        commit_note(&m.commit)
    range_unlock(&m.locks, lock_first, lock_end)
    return rc


cdef int zero_step(image_t* m, uint64_t length, uint64_t offset, int flags, uint8_t* room,
        uint64_t* did, block_t* n) noexcept nogil:
    """One step from offset; *did bytes were dealt with."""
    cdef uint64_t bs = m.block_size, whole
    did[0] = length
    if (load_acquire(&m.complete) or offset >= m.base_size
            or bitmap_all_present(&m.bitmap, offset // bs,
                                  (min(offset + length, m.base_size) - 1) // bs + 1)):
        if m.compact:
            return zero_blocks(m, length, offset, flags)
        return storage_zero(m.data, length, m.data_offset + offset, flags)
    if offset % bs or (length < bs and offset + length < m.base_size):
        # A part of a block: like any write of zeros.
        did[0] = min(length, bs - offset % bs)
        memset(room, 0, did[0])
        return image_write(m, room, did[0], offset, 0, n)
    whole = length // bs * bs
    if offset + length >= m.base_size:
        whole = length
    did[0] = whole
    return zero_blocks(m, whole, offset, flags)


cdef int image_write_zeroes(image_t* m, uint64_t length, uint64_t offset, bint keep,
        uint8_t* room, block_t* n) noexcept nogil:
    cdef uint64_t did
    cdef int rc
    if m.read_only:
        return -EROFS
    while length:
        if commit_fault(&m.commit):
            return -EIO
        rc = zero_step(m, min(length, <uint64_t>ZERO_STEP), offset, ZERO_KEEP if keep else 0,
            room, &did, n)
        if rc < 0:
            return rc
        offset += did
        length -= did
    return 0
