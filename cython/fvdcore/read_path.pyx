# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Layer 3. Reads. See read_path.pxd.

A reader takes no lock: a bit that is set (acquire) promises data that are readable; a bit that
becomes set while the base is read belongs to a write that was not acknowledged when the read
began."""
from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memset
from .atomics cimport load_acquire, store_relaxed
from .bitmap cimport bitmap_next_clear, bitmap_run_end, bitmap_test
from .counters cimport (
    CAUSE_DEMAND, N_BASE_BYTES, N_BASE_REQUESTS, N_READ_BASE, N_READ_IMAGE, N_READ_ZERO,
    base_answered, block_t, count, counters_trace, tally_parts, tally_t,
)
from .data_area cimport data_enter, data_find, data_leave
from .file_storage cimport file_storage_cached
from .image cimport image_enter_base, image_leave_base, image_read_base, image_t
from .storage cimport (
    EXTENT_BASE, EXTENT_BASE_ZERO, EXTENT_DATA, EXTENT_ZERO, IO_NOWAIT, storage_ops_t, storage_read,
    storage_status, storage_t,
)
from .sync cimport clock_now
from .syscalls cimport EROFS, ESTALE
from .trace cimport TRACE_BASE, trace_is_on


cdef int image_run(const image_t* m, uint64_t length, uint64_t offset,
        uint64_t* run) noexcept nogil:
    cdef uint64_t block, end_block, edge, end = offset + length
    if load_acquire(&m.complete) or offset >= m.base_size:
        run[0] = length
        return EXTENT_DATA
    block = offset // m.block_size
    end_block = (min(end, m.base_size) + m.block_size - 1) // m.block_size
    if bitmap_test(&m.bitmap, block):
        edge = bitmap_next_clear(&m.bitmap, block, end_block)
        # What lies behind the base's end is local too.
        run[0] = length if edge == end_block else edge * m.block_size - offset
        return EXTENT_DATA
    edge = min(bitmap_run_end(&m.bitmap, block, end_block) * m.block_size, m.base_size)
    run[0] = min(end, edge) - offset
    return EXTENT_BASE


cdef int read_mapped(image_t* m, uint8_t* buffer, uint64_t length, uint64_t offset, int flags,
        uint64_t* zeros) noexcept nogil:
    """Read local bytes from where they lie; *zeros grows by those that lie nowhere."""
    cdef uint64_t run = 0, address = 0
    cdef int rc
    while length:
        if data_find(m, length, offset, &run, &address, NULL):
            rc = storage_read(m.data, buffer, run, address, flags)
            if rc < 0:
                return rc
        else:
            memset(buffer, 0, run)
            zeros[0] += run
        buffer += run
        offset += run
        length -= run
    return 0


cdef int image_read_local(image_t* m, uint8_t* buffer, uint64_t length, uint64_t offset,
        int flags) noexcept nogil:
    cdef uint64_t zeros = 0
    return read_mapped(m, buffer, length, offset, flags, &zeros)


cdef void count_read(uint64_t local, uint64_t zeros, uint64_t from_base,
        block_t* n) noexcept nogil:
    if local > zeros:
        count(n, N_READ_IMAGE, local - zeros)
    if zeros:
        count(n, N_READ_ZERO, zeros)
    if from_base:
        count(n, N_READ_BASE, from_base)


cdef inline bint lies_together(const image_t* m, uint64_t length, uint64_t offset,
        uint64_t* address) noexcept nogil:
    """All of it is in the image, in one piece."""
    cdef uint64_t run = 0
    if length == 0 or image_run(m, length, offset, &run) != EXTENT_DATA or run != length:
        return False
    return data_find(m, length, offset, &run, address, NULL) and run == length


cdef int read_runs(image_t* m, uint8_t* buffer, uint64_t length, uint64_t offset, int flags,
        block_t* n, tally_t* tally) noexcept nogil:
    cdef uint64_t zeros = 0
    cdef uint64_t run, local = 0, from_base = 0, base_bytes = 0, base_offset = 0
    cdef uint64_t begin, now = 0, base_ns = 0
    # An attempt that may end in EAGAIN counts nothing on the way.
    cdef block_t* n_base = NULL if flags & IO_NOWAIT else n
    cdef int kind, rc
    while length:
        kind = image_run(m, length, offset, &run)
        if kind == EXTENT_DATA:
            rc = read_mapped(m, buffer, run, offset, flags, &zeros)
            local += run
        else:
            begin = clock_now(m.commit.gate) if n_base == NULL and n != NULL else 0
            if n_base != NULL:
                store_relaxed(&m.demand_at, offset)
                store_relaxed(&m.demand_end, offset + run)
            rc = image_read_base(m, buffer, run, offset, flags, CAUSE_DEMAND, n_base)
            base_offset = offset if from_base == 0 else base_offset
            from_base += run
            if begin:
                now = clock_now(m.commit.gate)
                base_ns += now - begin
            if offset < m.base.length:
                base_bytes += min(run, m.base.length - offset)
        if rc == -ESTALE and kind == EXTENT_BASE:
            from_base -= run
            continue                   # local by now, for ever
        if rc < 0:
            return rc
        buffer += run
        offset += run
        length -= run
    if tally != NULL:
        tally_parts(tally, local, zeros, from_base)
    elif n != NULL:
        count_read(local, zeros, from_base, n)
    if n != NULL and from_base and n_base == NULL:
        count(n, N_BASE_REQUESTS + CAUSE_DEMAND, 1)
        count(n, N_BASE_BYTES + CAUSE_DEMAND, base_bytes)
        base_answered(n, CAUSE_DEMAND, now - base_ns, now)
        if trace_is_on(&m.counters.trace):
            counters_trace(m.counters, n, TRACE_BASE, CAUSE_DEMAND, now - base_ns, now,
                           base_offset, base_bytes, 0, 0)
    return 0


cdef int image_read(image_t* m, uint8_t* buffer, uint64_t length, uint64_t offset, int flags,
        block_t* n) noexcept nogil:
    return image_read_tallied(m, buffer, length, offset, flags, n, NULL)


cdef int image_read_tallied(image_t* m, uint8_t* buffer, uint64_t length, uint64_t offset,
        int flags, block_t* n, tally_t* tally) noexcept nogil:
    cdef int slot = data_enter(m, n)
    cdef int rc = read_runs(m, buffer, length, offset, flags, n, tally)
    data_leave(m, slot)
    return rc


cdef bint image_read_plain(image_t* m, uint8_t* buffer, uint64_t length, uint64_t offset,
        const block_t* n, int* rc) noexcept nogil:
    cdef uint64_t address = 0
    cdef int slot = data_enter(m, n)
    cdef bint plain = lies_together(m, length, offset, &address)
    if plain:
        rc[0] = storage_read(m.data, buffer, length, address, IO_NOWAIT)
    data_leave(m, slot)
    return plain


cdef int image_lasting(const image_t* m, uint64_t length, uint64_t offset,
        uint64_t* address) noexcept nogil:
    if (m.compact and not m.read_only) or not lies_together(m, length, offset, address):
        return -1
    return file_storage_cached(m.data)


cdef int image_status(image_t* m, uint64_t length, uint64_t offset, uint64_t* run) noexcept nogil:
    cdef uint64_t here, address = 0
    cdef int kind = image_run(m, length, offset, &here)
    if kind == EXTENT_DATA:
        if not data_find(m, here, offset, run, &address, NULL):
            return EXTENT_ZERO
        return storage_status(m.data, run[0], address, run)
    if offset >= m.base.length:
        run[0] = here
        return EXTENT_BASE_ZERO
    if not image_enter_base(m):
        return image_status(m, length, offset, run)
    kind = storage_status(m.base, min(here, m.base.length - offset), offset, run)
    image_leave_base(m)
    return EXTENT_BASE if kind == EXTENT_DATA else EXTENT_BASE_ZERO


# -- an image as a base ------------------------------------------------------------------------

cdef int layer_read(storage_t* s, void* buffer, uint64_t length, uint64_t offset,
        int flags) noexcept nogil:
    return image_read(<image_t*>s, <uint8_t*>buffer, length, offset, flags, NULL)


cdef int layer_status(storage_t* s, uint64_t length, uint64_t offset,
        uint64_t* run) noexcept nogil:
    cdef int kind = image_status(<image_t*>s, length, offset, run)
    return EXTENT_ZERO if kind in (EXTENT_ZERO, EXTENT_BASE_ZERO) else EXTENT_DATA


cdef int layer_write(storage_t* s, const void* buffer, uint64_t length, uint64_t offset,
        int flags) noexcept nogil:
    return -EROFS


cdef int layer_flush(storage_t* s) noexcept nogil:
    return 0


cdef int layer_zero(storage_t* s, uint64_t length, uint64_t offset, int flags) noexcept nogil:
    return -EROFS


cdef void layer_start_writeback(storage_t* s, uint64_t length, uint64_t offset) noexcept nogil:
    pass


cdef int layer_resize(storage_t* s, uint64_t length) noexcept nogil:
    return -EROFS


cdef void layer_close(storage_t* s) noexcept nogil:
    pass


cdef void image_become_storage(image_t* m) noexcept nogil:
    m.ops = storage_ops_t(layer_read, layer_write, layer_flush, layer_zero, layer_status,
                          layer_start_writeback, layer_resize, layer_close)
    m.head.ops = &m.ops
