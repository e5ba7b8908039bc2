# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Layer 2. Allocation of places. See places.pxd."""
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memset
from .atomics cimport ctz64, fetch_add_relaxed, load_acquire, store_relaxed, store_release
from .checks cimport invariant
from .chunk_table cimport CLOSED, PLACES_MAX, UNMAPPED, chunk_table_t, table_entry
from .counters cimport G_STORE_USED, gauge_set
from .limits cimport NS_PER_MS, SPACE_WAIT_MS
from .quiescence cimport quiescence_stamp, quiescence_t, quiescent
from .storage cimport (
    EXTENT_DATA, ZERO_HINT, ZERO_KEEP, storage_resize, storage_status, storage_t, storage_zero,
)
from .sync cimport (
    clock_now, cond_broadcast, cond_free, cond_init, cond_wait, gate_t, mutex_free, mutex_init,
    mutex_lock, mutex_unlock,
)
from .syscalls cimport EAGAIN, ENOMEM, ENOSPC, EUCLEAN

cdef enum:
    WORDS_FIRST = 1024                 # of used, before it has to be made larger
    RELEASE_STEP = 64                  # places given back to storage between two looks
    WAIT_STEP_MS = 10                  # between two looks whether a place's last reader is gone
    AHEAD_MIN = 8388608                # a growth by less, or by more, is never allocated ahead
    AHEAD_MAX = 1073741824
    AHEAD_LOOKS = 64                   # at what the last growth brought


cdef int places_init(places_t* p, storage_t* data, quiescence_t* q, uint64_t offset,
        uint64_t chunk_size, uint64_t grow_unit, gate_t* gate) noexcept nogil:
    cdef int rc
    memset(p, 0, sizeof(places_t))
    p.data = data
    p.quiescence = q
    p.offset = offset
    p.chunk_size = chunk_size
    p.grow_unit = max(grow_unit, chunk_size)
    p.ahead_min = AHEAD_MIN            # a simulation has less
    p.used = <uint64_t*>calloc(WORDS_FIRST, 8)
    if p.used == NULL:
        return -ENOMEM
    p.used_words = WORDS_FIRST
    rc = mutex_init(&p.mutex, gate)
    if rc == 0:
        rc = cond_init(&p.freed, gate)
    if rc < 0:
        free(p.used)
        p.used = NULL
    return rc


cdef void places_free(places_t* p) noexcept nogil:
    if p.used == NULL:
        return
    free(p.used)
    free(p.retired)
    mutex_free(&p.mutex)
    cond_free(&p.freed)
    memset(p, 0, sizeof(places_t))


cdef inline bint is_used(const places_t* p, uint64_t place) noexcept nogil:
    return place >> 6 < p.used_words and (p.used[place >> 6] >> (place & 63)) & 1


cdef int make_room(places_t* p, uint64_t end) noexcept nogil:
    """Let used have a bit for every place below end."""
    cdef uint64_t words = p.used_words
    cdef uint64_t* larger
    while words * 64 < end:
        words *= 2
    if words == p.used_words:
        return 0
    larger = <uint64_t*>realloc(p.used, words * 8)
    if larger == NULL:
        return -ENOMEM
    memset(larger + p.used_words, 0, (words - p.used_words) * 8)
    p.used = larger
    p.used_words = words
    return 0


cdef int places_take_table(places_t* p, const chunk_table_t* t, const char** reason) noexcept nogil:
    cdef uint64_t chunk, place, room, used = 0
    cdef uint32_t entry
    cdef int rc
    room = 0
    if p.data.length > p.offset:
        room = min((p.data.length - p.offset) // p.chunk_size, PLACES_MAX)
    for chunk in range(t.chunks):
        entry = table_entry(t, chunk)
        if entry == UNMAPPED:
            continue
        place = entry & ~CLOSED
        if place >= room:
            reason[0] = b"a chunk lies outside storage"
            return -EUCLEAN
        if p.reserved_first <= place < p.reserved_end:
            reason[0] = b"a chunk lies under the chunk table"
            return -EUCLEAN
        rc = make_room(p, place + 1)
        if rc < 0:
            return rc
        if is_used(p, place):
            reason[0] = b"two chunks lie at the same place"
            return -EUCLEAN
        p.used[place >> 6] |= <uint64_t>1 << (place & 63)
        p.fresh = max(p.fresh, place + 1)
        used += 1
    p.free_below_fresh = p.fresh - used
    if p.reserved_first < p.fresh:
        p.free_below_fresh -= min(p.reserved_end, p.fresh) - p.reserved_first
    return 0


cdef uint64_t places_mapped_end(const places_t* p, const chunk_table_t* t) noexcept nogil:
    cdef uint64_t chunk, end = p.reserved_end
    cdef uint32_t entry
    for chunk in range(t.chunks):
        entry = table_entry(t, chunk)
        if entry != UNMAPPED:
            end = max(end, <uint64_t>(entry & ~CLOSED) + 1)
    return p.offset + end * p.chunk_size


cdef uint64_t places_used(const places_t* p) noexcept nogil:
    cdef uint64_t places = p.fresh - p.free_below_fresh, seen = max(p.fresh, p.reserved_first)
    if p.reserved_end > seen:
        places += p.reserved_end - seen
    return p.offset + places * p.chunk_size


cdef inline void tell_used(places_t* p) noexcept nogil:
    """The caller holds the mutex."""
    if p.counters != NULL:
        gauge_set(p.counters, G_STORE_USED, places_used(p))


cdef inline bint is_reserved(const places_t* p, uint64_t place) noexcept nogil:
    return p.reserved_first <= place < p.reserved_end


cdef void places_reserve(places_t* p, uint64_t table_offset, uint64_t table_bytes) noexcept nogil:
    cdef uint64_t end = table_offset + table_bytes, first = 0, last, at
    if end <= p.offset:
        return
    if table_offset > p.offset:
        first = (table_offset - p.offset) // p.chunk_size
    last = (end - p.offset + p.chunk_size - 1) // p.chunk_size
    mutex_lock(&p.mutex)
    for at in range(first, min(last, p.fresh)):
        if not is_used(p, at) and not is_reserved(p, at):
            p.free_below_fresh -= 1
    p.reserved_first = first
    p.reserved_end = last
    tell_used(p)
    mutex_unlock(&p.mutex)


cdef uint64_t places_reserved_owned(places_t* p) noexcept nogil:
    cdef uint64_t at, owned = 0
    mutex_lock(&p.mutex)
    for at in range(p.reserved_first, min(p.reserved_end, p.fresh)):
        owned += is_used(p, at)
    for at in range(p.retired_count):
        owned -= is_reserved(p, p.retired[at].place)
    mutex_unlock(&p.mutex)
    return owned


cdef bint places_is_reserved(const places_t* p, uint64_t place) noexcept nogil:
    return is_reserved(p, place)


cdef uint64_t take_run(places_t* p, uint64_t first, uint64_t want) noexcept nogil:
    """Mark free places from first on as used, as many as lie together below fresh."""
    cdef uint64_t at = first
    while at < p.fresh and at - first < want and not is_used(p, at) and not is_reserved(p, at):
        p.used[at >> 6] |= <uint64_t>1 << (at & 63)
        at += 1
    p.free_below_fresh -= at - first
    p.hint = at
    return at - first


cdef uint64_t find_free(const places_t* p) noexcept nogil:
    """First free place from the hint on, or fresh."""
    cdef uint64_t at = p.hint, bits
    while at < p.fresh:
        bits = ~p.used[at >> 6] & (~<uint64_t>0 << (at & 63))
        if bits == 0:
            at = (at | 63) + 1
            continue
        at = (at & ~<uint64_t>63) + <uint64_t>ctz64(bits)
        if not is_reserved(p, at):
            break
        at = p.reserved_end
    return min(at, p.fresh)


cdef void allocate_ahead(places_t* p, uint64_t old) noexcept nogil:
    """Storage grew from old on. Let it have the space of it now, which makes writes cheaper, if as
    much before it is in use for the most part. Otherwise what is written lies scattered, and its
    chunks would take much more space than it does. (What was only read of space that was allocated
    ahead looks as if it were in use; that is too much by at most as much as there is.)"""
    cdef uint64_t grown = p.data.length - old, run = 0, i
    cdef uint64_t used = 0
    if not p.ahead_min <= grown <= AHEAD_MAX or old < p.offset + grown:
        return
    for i in range(AHEAD_LOOKS):
        used += storage_status(p.data, 1, old - grown + i * (grown // AHEAD_LOOKS),
                               &run) == EXTENT_DATA
    if used * 2 > AHEAD_LOOKS:
        storage_zero(p.data, grown, old, ZERO_KEEP | ZERO_HINT)


cdef int grow_storage(places_t* p, uint64_t need) noexcept nogil:
    """Make storage at least need bytes long: by the unit where that is possible."""
    cdef uint64_t old = p.data.length
    cdef uint64_t units = (need - old + p.grow_unit - 1) // p.grow_unit
    cdef int rc = -ENOSPC
    store_release(&p.lacking, need)
    if p.data.grows and old + units * p.grow_unit < <uint64_t>1 << 62:
        rc = storage_resize(p.data, old + units * p.grow_unit)
        if rc == 0:
            allocate_ahead(p, old)
    return storage_resize(p.data, need) if rc < 0 else rc


cdef int places_look_again(places_t* p) noexcept nogil:
    cdef int rc
    mutex_lock(&p.mutex)
    rc = storage_resize(p.data, p.data.length)
    mutex_unlock(&p.mutex)
    return rc


cdef int64_t take_fresh(places_t* p, uint64_t want, bint may_work, uint64_t* first) noexcept nogil:
    cdef uint64_t at = p.fresh, there, i
    cdef int rc
    if is_reserved(p, at):
        at = p.reserved_end
    if at < p.reserved_first:
        want = min(want, p.reserved_first - at)
    if at >= PLACES_MAX:
        return -ENOSPC
    want = min(want, PLACES_MAX - at)
    there = 0
    if p.data.length > p.offset + at * p.chunk_size:
        there = (p.data.length - p.offset) // p.chunk_size - at
    if there == 0:
        if not may_work:
            return -EAGAIN
        rc = grow_storage(p, p.offset + (at + 1) * p.chunk_size)
        if rc < 0:
            return rc
        there = (p.data.length - p.offset) // p.chunk_size - at
    want = min(want, there)
    rc = make_room(p, at + want)
    if rc < 0:
        return rc
    for i in range(at, at + want):
        p.used[i >> 6] |= <uint64_t>1 << (i & 63)
    # A reserved range that was stepped over is no free place.
    p.fresh = at + want
    first[0] = at
    return <int64_t>want


cdef int64_t places_allocate(places_t* p, uint64_t want, bint may_work, uint64_t* first,
        bint* reused) noexcept nogil:
    cdef int64_t got = 0
    cdef uint64_t at
    mutex_lock(&p.mutex)
    reused[0] = not p.data.grows
    if p.free_below_fresh and may_work:
        at = find_free(p)
        if at == p.fresh:
            p.hint = 0
            at = find_free(p)
        got = <int64_t>take_run(p, at, want)
        if got:
            first[0] = at
            reused[0] = True
    if got == 0:
        # A device's fresh places have to be zeroed as well.
        got = -EAGAIN if reused[0] and not may_work else take_fresh(p, want, may_work, first)
    tell_used(p)
    mutex_unlock(&p.mutex)
    return got


cdef void places_give_back(places_t* p, uint64_t first, uint64_t count) noexcept nogil:
    cdef uint64_t at
    mutex_lock(&p.mutex)
    for at in range(first, first + count):
        invariant(is_used(p, at))
        p.used[at >> 6] &= ~(<uint64_t>1 << (at & 63))
    p.free_below_fresh += count
    p.hint = min(p.hint, first)
    tell_used(p)
    cond_broadcast(&p.freed)
    mutex_unlock(&p.mutex)


cdef int places_retire(places_t* p, uint64_t place) noexcept nogil:
    cdef uint64_t room
    cdef retired_t* larger
    cdef int rc = 0
    mutex_lock(&p.mutex)
    if p.retired_count == p.retired_room:
        room = max(p.retired_room * 2, <uint64_t>64)
        larger = <retired_t*>realloc(p.retired, room * sizeof(retired_t))
        if larger == NULL:
            rc = -ENOMEM               # nobody's until the next open finds it
        else:
            p.retired = larger
            p.retired_room = room
    if rc == 0:
        p.retired[p.retired_count].place = place
        p.retired[p.retired_count].stamp = quiescence_stamp(p.quiescence)
        p.retired[p.retired_count].checkpoint = p.checkpoints + 1
        store_relaxed(&p.retired_count, p.retired_count + 1)
    mutex_unlock(&p.mutex)
    return rc


cdef uint64_t places_checkpoint_begins(places_t* p) noexcept nogil:
    cdef uint64_t number
    mutex_lock(&p.mutex)
    p.checkpoints += 1
    number = p.checkpoints
    mutex_unlock(&p.mutex)
    return number


cdef int take_retired(places_t* p, uint64_t checkpoint, uint64_t* found) noexcept nogil:
    """Up to RELEASE_STEP places that may be freed, off the list."""
    cdef uint64_t at = 0
    cdef int n = 0
    mutex_lock(&p.mutex)
    while at < p.retired_count and n < RELEASE_STEP:
        if (p.retired[at].checkpoint <= checkpoint
                and quiescent(p.quiescence, p.retired[at].stamp)):
            found[n] = p.retired[at].place
            n += 1
            store_relaxed(&p.retired_count, p.retired_count - 1)
            p.retired[at] = p.retired[p.retired_count]
        else:
            at += 1
    mutex_unlock(&p.mutex)
    return n


cdef uint64_t places_release(places_t* p, uint64_t checkpoint) noexcept nogil:
    cdef uint64_t[64] found
    cdef uint64_t freed = 0
    cdef int i, n
    mutex_lock(&p.mutex)
    p.settled = max(p.settled, checkpoint)
    mutex_unlock(&p.mutex)
    while True:
        n = take_retired(p, checkpoint, &found[0])
        if n == 0:
            return freed
        for i in range(n):
            if is_reserved(p, found[i]):
                mutex_lock(&p.mutex)
                p.used[found[i] >> 6] &= ~(<uint64_t>1 << (found[i] & 63))
                mutex_unlock(&p.mutex)
                continue
            storage_zero(p.data, p.chunk_size, p.offset + found[i] * p.chunk_size, ZERO_HINT)
            places_give_back(p, found[i], 1)
            fetch_add_relaxed(&p.released, 1)
            freed += 1


cdef void places_return(places_t* p) noexcept nogil:
    cdef uint64_t first, end = 0
    while end < p.fresh:
        p.hint = end
        first = find_free(p)
        end = first
        while end < p.fresh and not is_used(p, end) and not is_reserved(p, end):
            end += 1
        if first < end:
            storage_zero(p.data, (end - first) * p.chunk_size, p.offset + first * p.chunk_size,
                         ZERO_HINT)
    p.hint = 0


cdef bint kept_by_readers(const places_t* p) noexcept nogil:
    """Is a place left out of a durable checkpoint, and not free yet? The caller holds the mutex."""
    cdef uint64_t at
    for at in range(p.retired_count):
        if p.retired[at].checkpoint <= p.settled:
            return True
    return False


cdef bint places_need_checkpoint(places_t* p) noexcept nogil:
    cdef uint64_t at
    cdef bint needed = False
    mutex_lock(&p.mutex)
    for at in range(p.retired_count):
        needed = needed or p.retired[at].checkpoint > p.settled
    mutex_unlock(&p.mutex)
    return needed


cdef bint places_wait(places_t* p, uint64_t released) noexcept nogil:
    cdef uint64_t now = clock_now(p.mutex.gate), deadline = now + SPACE_WAIT_MS * NS_PER_MS
    cdef bint kept
    while now < deadline and load_acquire(&p.released) == released:
        mutex_lock(&p.mutex)
        kept = kept_by_readers(p)
        if kept:
            cond_wait(&p.freed, &p.mutex, now + WAIT_STEP_MS * NS_PER_MS)
        mutex_unlock(&p.mutex)
        if not kept:
            break
        places_release(p, p.settled)
        now = clock_now(p.mutex.gate)
    return load_acquire(&p.released) != released
