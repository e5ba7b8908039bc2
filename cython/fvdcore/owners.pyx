# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Layer 3. The lower layers of a chain as one storage. See owners.pxd.

The map holds a byte a unit: not yet known, the place of the layer in the chain, zeros (behind the
end of a layer that everything below it is cut at), or mixed: such a unit is looked up each time.
Threads fill it without a lock, since all of them find the same."""
from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memset
from .atomics cimport ctz64, load_relaxed8, store_relaxed8
from .data_area cimport data_find
from .image cimport image_t
from .limits cimport OWNERS_MAX
from .read_path cimport image_read_local, image_run
from .storage cimport (
    EXTENT_DATA, EXTENT_ZERO, storage_ops_t, storage_read, storage_status, storage_t,
)
from .syscalls cimport (
    EROFS, MAP_ANONYMOUS, MAP_FAILED, MAP_NORESERVE, MAP_PRIVATE, PROT_READ, PROT_WRITE, c_mmap,
    c_munmap,
)

cdef enum:
    UNKNOWN = 0
    FIRST = 1                          # the image layers[0]; those below it follow
    BOTTOM = 253
    ZEROS = 254
    MIXED = 255
    GROUP = 64                         # units that are looked up together


cdef int look_up(const owners_t* o, uint64_t length, uint64_t offset, uint64_t* run) noexcept nogil:
    """Who owns the run of [offset, offset + length) at offset: one question to each layer from the
    uppermost down."""
    cdef const image_t* m
    cdef uint64_t here = 0
    cdef int at
    for at in range(o.count):
        m = &o.layers[at]
        if offset >= m.head.length:
            run[0] = length
            return ZEROS
        length = min(length, m.head.length - offset)
        if image_run(m, length, offset, &here) == EXTENT_DATA:
            run[0] = here
            return FIRST + at
        length = here
    if o.bottom == NULL or offset >= o.bottom.length:
        run[0] = length
        return ZEROS
    run[0] = min(length, o.bottom.length - offset)
    return BOTTOM


cdef void fill_group(owners_t* o, uint64_t unit) noexcept nogil:
    """Learn the owners of the group that the unit is in."""
    cdef uint64_t at = unit // GROUP * GROUP
    cdef uint64_t end = min((at + GROUP) << o.shift, o.head.length)
    cdef uint64_t offset, run = 0, whole
    cdef int owner
    while at << o.shift < end:
        offset = at << o.shift
        owner = look_up(o, end - offset, offset, &run)
        whole = (run + o.unit - 1) >> o.shift if offset + run == end else run >> o.shift
        if whole == 0:
            owner = MIXED
            whole = 1
        while whole:
            store_relaxed8(o.map + at, <uint8_t>owner)
            at += 1
            whole -= 1


cdef int find_owner(owners_t* o, uint64_t length, uint64_t offset, uint64_t* run) noexcept nogil:
    cdef uint64_t unit = offset >> o.shift, end
    cdef uint8_t owner
    if o.map == NULL:
        return look_up(o, length, offset, run)
    owner = load_relaxed8(o.map + unit)
    if owner == UNKNOWN:
        fill_group(o, unit)
        owner = load_relaxed8(o.map + unit)
    unit += 1
    end = unit << o.shift
    if owner == MIXED:
        return look_up(o, min(length, end - offset), offset, run)
    # Neighbours of one owner are one transfer, also where other layers have borders there.
    while end < offset + length and load_relaxed8(o.map + unit) == owner:
        unit += 1
        end = unit << o.shift
    run[0] = min(length, end - offset)
    return owner


# -- as storage --------------------------------------------------------------------------------

cdef int owners_read(storage_t* s, void* buffer, uint64_t length, uint64_t offset,
        int flags) noexcept nogil:
    cdef owners_t* o = <owners_t*>s
    cdef uint8_t* p = <uint8_t*>buffer
    cdef uint64_t run = 0
    cdef int owner, rc = 0
    while length and rc == 0:
        owner = find_owner(o, length, offset, &run)
        if owner == ZEROS:
            memset(p, 0, run)
        elif owner == BOTTOM:
            rc = storage_read(o.bottom, p, run, offset, flags)
        else:
            rc = image_read_local(&o.layers[owner - FIRST], p, run, offset, flags)
        p += run
        offset += run
        length -= run
    return rc


cdef int owners_status(storage_t* s, uint64_t length, uint64_t offset,
        uint64_t* run) noexcept nogil:
    """The layers tell long runs at once, so the map is not asked."""
    cdef owners_t* o = <owners_t*>s
    cdef uint64_t here = 0, address = 0
    cdef int owner = look_up(o, length, offset, &here)
    cdef image_t* m
    run[0] = here
    if owner == ZEROS:
        return EXTENT_ZERO
    if owner == BOTTOM:
        return storage_status(o.bottom, here, offset, run)
    m = &o.layers[owner - FIRST]
    if not data_find(m, here, offset, run, &address, NULL):
        return EXTENT_ZERO
    return storage_status(m.data, run[0], address, run)


cdef int owners_write(storage_t* s, const void* buffer, uint64_t length, uint64_t offset,
        int flags) noexcept nogil:
    return -EROFS


cdef int owners_flush(storage_t* s) noexcept nogil:
    return 0


cdef int owners_zero(storage_t* s, uint64_t length, uint64_t offset, int flags) noexcept nogil:
    return -EROFS


cdef void owners_start_writeback(storage_t* s, uint64_t length, uint64_t offset) noexcept nogil:
    pass


cdef int owners_resize(storage_t* s, uint64_t length) noexcept nogil:
    return -EROFS


cdef void owners_close(storage_t* s) noexcept nogil:
    cdef owners_t* o = <owners_t*>s
    if o.map != NULL:
        c_munmap(o.map, o.map_bytes)
        o.map = NULL


cdef uint64_t choose_unit(const owners_t* o) noexcept nogil:
    """The largest power of two that fits the blocks of all layers; larger where the map would not
    be bounded, at the price of mixed units."""
    cdef uint64_t all_sizes = 0, unit
    cdef int at
    for at in range(o.count):
        all_sizes |= o.layers[at].block_size
    unit = <uint64_t>1 << ctz64(all_sizes)
    while o.head.length // unit >= OWNERS_MAX:
        unit *= 2
    return unit


cdef int owners_open(owners_t* o, image_t* layers, int count, storage_t* bottom) noexcept nogil:
    cdef void* p
    memset(o, 0, sizeof(owners_t))
    o.layers = layers
    o.count = count
    o.bottom = bottom
    o.head.length = layers[0].head.length
    o.unit = choose_unit(o)
    o.shift = ctz64(o.unit)
    o.map_bytes = o.head.length // o.unit + 1
    # Only what is read of the disk is ever touched of it.
    p = c_mmap(NULL, o.map_bytes, PROT_READ | PROT_WRITE,
               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    o.map = NULL if p == MAP_FAILED else <uint8_t*>p
    o.ops = storage_ops_t(owners_read, owners_write, owners_flush, owners_zero, owners_status,
                          owners_start_writeback, owners_resize, owners_close)
    o.head.ops = &o.ops
    return 0
