# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Layer 3. The data area. See data_area.pxd.

A chunk gets its place in this order: allocate -> zero what the write leaves out, unless the place
is known to read zeros (I9) -> write -> publish the mapping (release). So whoever sees the mapping
sees the data, and a commit that takes it flushes them first (I2)."""
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from .atomics cimport load_acquire
from .chunk_table cimport CLOSED, UNMAPPED, table_entry, table_set
from .commit cimport commit_checkpoint
from .counters cimport (
    BLOCK_SHARED, N_IMAGE_WRITE_BYTES, block_t, count, counters_block, counters_index,
)
from .image cimport image_t
from .places cimport (
    places_allocate, places_give_back, places_need_checkpoint, places_retire, places_t, places_wait,
)
from .quiescence cimport quiescence_enter, quiescence_leave
from .range_lock cimport range_lock_try, range_lock_until, range_unlock
from .storage cimport ZERO_HINT, ZERO_KEEP, storage_start_writeback, storage_write, storage_zero
from .syscalls cimport EAGAIN, EDQUOT, EFBIG, ENOSPC

cdef enum:
    FULL_TRIES = 4                     # others may take what became free


cdef bint data_find(const image_t* m, uint64_t length, uint64_t offset, uint64_t* run,
        uint64_t* address, bint* closed) noexcept nogil:
    cdef uint64_t chunk, within, next_place
    cdef uint32_t entry, first
    if not m.compact:
        run[0] = length
        address[0] = m.data_offset + offset
        return True
    chunk = offset // m.chunk_size
    within = offset - chunk * m.chunk_size
    first = table_entry(&m.table, chunk)
    run[0] = m.chunk_size - within
    if first == UNMAPPED:
        while run[0] < length and table_entry(&m.table, chunk + 1) == UNMAPPED:
            chunk += 1
            run[0] += m.chunk_size
        run[0] = min(run[0], length)
        return False
    address[0] = m.data_offset + <uint64_t>(first & ~CLOSED) * m.chunk_size + within
    next_place = <uint64_t>first + 1
    # Neighbours that lie together are one transfer. A closed chunk ends the run.
    while run[0] < length and not first & CLOSED:
        chunk += 1
        entry = table_entry(&m.table, chunk)
        if entry != next_place or entry & CLOSED:
            break
        next_place += 1
        run[0] += m.chunk_size
    run[0] = min(run[0], length)
    if closed != NULL:
        closed[0] = (first & CLOSED) != 0
    return True


cdef int data_enter(image_t* m, const block_t* n) noexcept nogil:
    if not m.compact or n == NULL:
        return -1
    return quiescence_enter(&m.quiescence, counters_index(m.counters, n))


cdef void data_leave(image_t* m, int slot) noexcept nogil:
    if slot >= 0:
        quiescence_leave(&m.quiescence, slot)


cdef int write_mapped(image_t* m, const uint8_t* data, uint64_t length, uint64_t offset,
        block_t* n) noexcept nogil:
    cdef uint64_t run = 0, address = 0
    cdef bint closed = False
    cdef int rc
    while length:
        if not data_find(m, length, offset, &run, &address, &closed) or closed:
            return -EAGAIN
        rc = storage_write(m.data, data, run, address, 0)
        if rc < 0:
            return rc
        count(n, N_IMAGE_WRITE_BYTES, run)
        data += run
        offset += run
        length -= run
    return 0


cdef int data_write_mapped(image_t* m, const uint8_t* data, uint64_t length, uint64_t offset,
        block_t* n) noexcept nogil:
    cdef int slot = data_enter(m, n)
    cdef int rc = write_mapped(m, data, length, offset, n)
    data_leave(m, slot)
    return rc


cdef bint data_all_mapped(const image_t* m, uint64_t length, uint64_t offset) noexcept nogil:
    cdef uint64_t run = 0, address = 0
    cdef bint closed = False
    while length:
        if not data_find(m, length, offset, &run, &address, &closed) or closed:
            return False
        offset += run
        length -= run
    return True


cdef void data_widen(const image_t* m, uint64_t* first, uint64_t* end) noexcept nogil:
    cdef uint64_t blocks
    if not m.compact:
        return
    blocks = m.chunk_size // m.block_size
    first[0] = first[0] // blocks * blocks
    end[0] = (end[0] + blocks - 1) // blocks * blocks


# -- giving places -----------------------------------------------------------------------------

cdef bint data_may_free(const image_t* m, int rc) noexcept nogil:
    return m.compact and rc in (-ENOSPC, -EFBIG, -EDQUOT)


cdef bint make_space(image_t* m, uint64_t released) noexcept nogil:
    """Storage was full when so many places had been released. Let a checkpoint give back what lost
    its owner; what is free but for a slow reader is no reason to fail. False: nothing is free."""
    cdef places_t* p = &m.places
    if load_acquire(&p.released) != released:
        return True
    if (places_need_checkpoint(p)
            and commit_checkpoint(&m.commit, counters_block(m.counters, BLOCK_SHARED)) < 0):
        return False
    return places_wait(p, released)


cdef int zero_rest(image_t* m, uint64_t begin, uint64_t end, uint64_t from_, uint64_t to,
        int flags) noexcept nogil:
    """Zero addresses [begin, end) but for [from_, to)."""
    cdef int rc = 0
    if begin < from_:
        rc = storage_zero(m.data, from_ - begin, begin, flags)
    if rc == 0 and to < end:
        rc = storage_zero(m.data, end - to, to, flags)
    return rc


cdef int store_new(image_t* m, const uint8_t* data, uint64_t length, uint64_t offset, int flags,
        bint may_work, uint64_t* stored) noexcept nogil:
    """Give places to the unmapped chunks at offset, as many as come together, and write the range's
    bytes of them; data NULL: zeros. *stored: the bytes dealt with."""
    cdef uint64_t chunk = offset // m.chunk_size, first = 0, i, address, begin, count_
    cdef uint64_t within = offset - chunk * m.chunk_size
    cdef uint64_t want = (within + length + m.chunk_size - 1) // m.chunk_size
    cdef bint reused = False
    cdef int64_t got = places_allocate(&m.places, want, may_work, &first, &reused)
    cdef int rc = 0
    if got < 0:
        return <int>got
    count_ = <uint64_t>got
    stored[0] = min(length, count_ * m.chunk_size - within)
    begin = m.data_offset + first * m.chunk_size
    address = begin + within
    if data == NULL:
        if reused or flags & ZERO_KEEP:
            rc = storage_zero(m.data, count_ * m.chunk_size, begin, flags)
    else:
        if reused:
            rc = zero_rest(m, begin, begin + count_ * m.chunk_size, address,
                           address + stored[0], flags)
        if rc == 0:
            rc = storage_write(m.data, data, stored[0], address, 0)
    if rc < 0:
        # What the write took of them before it found no space, say.
        storage_zero(m.data, count_ * m.chunk_size, begin, ZERO_HINT)
        places_give_back(&m.places, first, count_)
        return rc
    for i in range(count_):
        table_set(&m.table, chunk + i, <uint32_t>(first + i), reused)
    return 0


cdef int put_run(image_t* m, const uint8_t* data, uint64_t length, uint64_t offset, int flags,
        bint may_work, uint64_t* run) noexcept nogil:
    """Write what lies together at offset, or zero it where data is NULL. *run: its bytes."""
    cdef uint64_t address = 0
    if data_find(m, length, offset, run, &address, NULL):
        if data == NULL:
            return storage_zero(m.data, run[0], address, flags)
        return storage_write(m.data, data, run[0], address, 0)
    if data == NULL and not flags & ZERO_KEEP:
        return 0
    return store_new(m, data, run[0], offset, flags, may_work, run)


cdef int put(image_t* m, const uint8_t* data, uint64_t length, uint64_t offset, int flags,
        bint may_work, uint64_t* run) noexcept nogil:
    """As put_run; where storage is full, again after what lost its owner was given back."""
    cdef uint64_t released = load_acquire(&m.places.released)
    cdef int tries = FULL_TRIES
    cdef int rc = put_run(m, data, length, offset, flags, may_work, run)
    while data_may_free(m, rc) and tries:
        if not may_work:
            return -EAGAIN
        if not make_space(m, released):
            break
        released = load_acquire(&m.places.released)
        rc = put_run(m, data, length, offset, flags, may_work, run)
        tries -= 1
    return rc


cdef int data_store(image_t* m, const uint8_t* data, uint64_t length, uint64_t offset,
        bint may_work, block_t* n) noexcept nogil:
    cdef uint64_t run = 0
    cdef int rc
    while length:
        rc = put(m, data, length, offset, 0, may_work, &run)
        if rc < 0:
            return rc
        count(n, N_IMAGE_WRITE_BYTES, run)
        data += run
        offset += run
        length -= run
    return 0


cdef int data_zero(image_t* m, uint64_t length, uint64_t offset, int flags) noexcept nogil:
    cdef uint64_t run = 0
    cdef int rc
    while length:
        rc = put(m, NULL, length, offset, flags, True, &run)
        if rc < 0:
            return rc
        offset += run
        length -= run
    return 0


cdef void data_start_writeback(image_t* m, uint64_t length, uint64_t offset) noexcept nogil:
    cdef uint64_t run = 0, address = 0
    while length:
        if data_find(m, length, offset, &run, &address, NULL):
            storage_start_writeback(m.data, run, address)
        offset += run
        length -= run


cdef void data_unmap(image_t* m, uint64_t chunk) noexcept nogil:
    cdef uint32_t entry = table_entry(&m.table, chunk)
    if entry == UNMAPPED:
        return
    table_set(&m.table, chunk, UNMAPPED, False)
    places_retire(&m.places, entry & ~CLOSED)


# -- copies from the base ----------------------------------------------------------------------

cdef bint data_lock_copy(image_t* m, uint64_t first, uint64_t end) noexcept nogil:
    data_widen(m, &first, &end)
    return range_lock_try(&m.locks, first, end)


cdef bint data_lock_soon(image_t* m, uint64_t first, uint64_t end,
        uint64_t deadline_ns) noexcept nogil:
    data_widen(m, &first, &end)
    return range_lock_until(&m.locks, first, end, deadline_ns)


cdef void data_unlock_copy(image_t* m, uint64_t first, uint64_t end) noexcept nogil:
    data_widen(m, &first, &end)
    range_unlock(&m.locks, first, end)
