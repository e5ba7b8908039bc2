# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Layer 3. Windows of demand reads. See fetch.pxd.

What was absent when it was looked at may be local when the read comes: then the read takes it from
the image, and copy-on-read passes it over. So nothing here has to be exact."""
from libc.stdint cimport uint64_t
from libc.string cimport memset
from .bitmap cimport bitmap_run_end, bitmap_test
from .image cimport image_t
from .limits cimport BLOCK_MAX
from .sync cimport gate_t, mutex_free, mutex_init, mutex_lock, mutex_unlock

cdef enum:
    GROWTH = 8                         # windows of a sequential reader, at most
    OUTSTANDING_PART = 4               # of what copy-on-read may hold, for one window


cdef int fetch_init(fetch_t* f, const image_t* m, uint64_t bytes, gate_t* gate) noexcept nogil:
    cdef uint64_t bs = m.block_size
    memset(f, 0, sizeof(fetch_t))
    # A window that copy-on-read has no room for would be fetched in vain.
    f.longest = min(bytes * GROWTH, <uint64_t>BLOCK_MAX, m.outstanding_max // OUTSTANDING_PART)
    f.longest = f.longest // bs * bs
    f.bytes = min(bytes, f.longest) // bs * bs
    return mutex_init(&f.mutex, gate)


cdef void fetch_free(fetch_t* f) noexcept nogil:
    mutex_free(&f.mutex)


cdef uint64_t stream_bytes(fetch_t* f, uint64_t begin, bint* grown) noexcept nogil:
    """The size of the window of a read from begin; whether it goes on where another ended. The
    stream with this size takes the place of that other one, or of the oldest."""
    cdef int i, at = 0
    f.uses += 1
    grown[0] = False
    for i in range(<int>FETCH_STREAMS):
        if f.streams[i].bytes and f.streams[i].next == begin:
            at = i
            grown[0] = True
            break
        if f.streams[i].used < f.streams[at].used:
            at = i
    f.streams[at].bytes = min(f.streams[at].bytes * 2, f.longest) if grown[0] else f.bytes
    f.streams[at].used = f.uses
    f.streams[at].next = begin         # fetch_begin knows better soon
    return f.streams[at].bytes


cdef void note_end(fetch_t* f, uint64_t end) noexcept nogil:
    """The stream used last goes on there."""
    cdef int i
    for i in range(<int>FETCH_STREAMS):
        if f.streams[i].used == f.uses:
            f.streams[i].next = end


cdef bint keep_apart(fetch_t* f, uint64_t begin, uint64_t end, uint64_t* low,
        uint64_t* high) noexcept nogil:
    """Cut [low, high) around [begin, end) where other windows are. False: one lies in it."""
    cdef int i
    for i in range(<int>FETCH_WINDOWS):
        if f.windows[i].end == 0:
            continue
        if f.windows[i].begin < end and begin < f.windows[i].end:
            return False
        if f.windows[i].end <= begin:
            low[0] = max(low[0], f.windows[i].end)
        else:
            high[0] = min(high[0], f.windows[i].begin)
    return True


cdef void extend(const image_t* m, uint64_t low, uint64_t high, uint64_t* begin,
        uint64_t* end) noexcept nogil:
    """Widen to absent neighbours within [low, high)."""
    cdef uint64_t bs = m.block_size, first = begin[0] // bs, last = (end[0] - 1) // bs
    cdef uint64_t stop
    if not bitmap_test(&m.bitmap, first):
        while first * bs > low and not bitmap_test(&m.bitmap, first - 1):
            first -= 1
        begin[0] = min(begin[0], max(first * bs, low))
    if end[0] < high and not bitmap_test(&m.bitmap, last):
        stop = bitmap_run_end(&m.bitmap, last, (high + bs - 1) // bs)
        end[0] = max(end[0], min(stop * bs, high))


cdef int free_place(const fetch_t* f) noexcept nogil:
    cdef int i
    for i in range(<int>FETCH_WINDOWS):
        if f.windows[i].end == 0:
            return i
    return -1


cdef int fetch_begin(fetch_t* f, const image_t* m, uint64_t* begin, uint64_t* end) noexcept nogil:
    cdef uint64_t limit = min(m.base_size, m.base.length), low = 0, high = limit, bytes, from_
    cdef uint64_t bs = m.block_size, first = begin[0] // bs, room = BLOCK_MAX - bs
    cdef bint grown = False
    cdef int place = -1
    if f.bytes == 0 or end[0] > limit or end[0] <= begin[0]:
        return -1
    if bitmap_test(&m.bitmap, first) and bitmap_test(&m.bitmap, (end[0] - 1) // bs):
        return -1
    mutex_lock(&f.mutex)
    if keep_apart(f, begin[0], end[0], &low, &high):
        place = free_place(f)
    if place >= 0:
        bytes = stream_bytes(f, begin[0], &grown)
        # A reader that goes on needs nothing behind it.
        from_ = begin[0] if grown else begin[0] // bytes * bytes
        low = max(low, max(from_, begin[0] - min(begin[0], room)))
        high = min(high, min(max(from_ + bytes, end[0]), end[0] + room))
        extend(m, low, high, begin, end)
        f.windows[place].begin = begin[0]
        f.windows[place].end = end[0]
        note_end(f, end[0])
    mutex_unlock(&f.mutex)
    return place


cdef void fetch_end(fetch_t* f, int place) noexcept nogil:
    mutex_lock(&f.mutex)
    f.windows[place].end = 0
    mutex_unlock(&f.mutex)
