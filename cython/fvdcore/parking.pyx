# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Layer 4. Changes that wait for space. See parking.pxd."""
from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memcpy
from .atomics cimport fetch_add_relaxed, fetch_sub_acq_rel, load_acquire, store_release
from .counters cimport (
    BLOCK_SHARED, G_PARKED, N_GROWTH_BYTES, N_GROWTH_ERRORS, N_GROWTHS, N_PARKINGS, OP_WRITE,
    OP_WRITE_ZEROES, block_t, count, counters_block, gauge_set,
)
from .image cimport image_t
from .limits cimport (
    APART_BYTES, APART_REQUESTS, BLOCK_MAX, GROW_AGAIN_MS, NS_PER_MS, PAGE, PARK_RETRY_MS,
)
from .places cimport places_look_again
from .request cimport request_t
from .syscalls cimport (
    EDQUOT, ENOSPC, MAP_ANONYMOUS, MAP_FAILED, MAP_NORESERVE, MAP_PRIVATE, PROT_READ, PROT_WRITE,
    c_mmap, c_munmap,
)


cdef inline uint64_t payload(const request_t* r) noexcept nogil:
    return r.length if r.op == OP_WRITE else 0


cdef inline uint64_t copy_bytes(const request_t* r) noexcept nogil:
    """The request itself, its payload, and the rooms beside that."""
    return PAGE + 3 * <uint64_t>BLOCK_MAX + payload(r)


cdef void leave_apart(parking_t* p, const request_t* r) noexcept nogil:
    fetch_sub_acq_rel(&p.apart_count, 1)
    fetch_sub_acq_rel(&p.apart_bytes, payload(r))


cdef request_t* parking_copy(parking_t* p, const request_t* r) noexcept nogil:
    cdef request_t* q
    cdef void* memory = MAP_FAILED
    cdef uint64_t count, bytes, before
    if r.apart:
        return NULL
    count = fetch_add_relaxed(&p.apart_count, 1)
    bytes = fetch_add_relaxed(&p.apart_bytes, payload(r))
    if count < APART_REQUESTS and bytes + payload(r) <= APART_BYTES:
        memory = c_mmap(NULL, copy_bytes(r), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    if memory == MAP_FAILED:
        leave_apart(p, r)
        return NULL
    q = <request_t*>memory
    # All but its place among the changes: neighbours write to that, and the caller settles it.
    before = <uint64_t>(<uint8_t*>&r.next_change - <uint8_t*>r)
    memcpy(q, r, before)
    memcpy(&q.next_change + 1, &r.next_change + 1,
           sizeof(request_t) - before - sizeof(request_t*))
    q.apart = True
    q.area = <uint8_t*>memory + PAGE
    q.data = q.area + BLOCK_MAX
    memcpy(q.data, r.data, payload(r))
    return q


cdef void parking_free(parking_t* p, request_t* r) noexcept nogil:
    leave_apart(p, r)
    c_munmap(r, copy_bytes(r))


cdef void set_waiting(parking_t* p, uint64_t waiting) noexcept nogil:
    cdef bint changed = (waiting == 0) != (p.waiting == 0)
    store_release(&p.waiting, waiting)
    gauge_set(p.image.counters, G_PARKED, waiting)
    if changed and p.notify != NULL:
        p.notify(p.owner)


cdef void parking_keep(parking_t* p, request_t* r, uint64_t now) noexcept nogil:
    cdef request_t** link = &p.first
    if p.first == NULL:
        p.retry_at = now + PARK_RETRY_MS * NS_PER_MS
    while link[0] != NULL and link[0].order < r.order:
        link = &link[0].next
    r.next = link[0]
    link[0] = r
    r.parked = True
    if not r.waited:
        r.waited = True
        count(counters_block(p.image.counters, BLOCK_SHARED), N_PARKINGS, 1)
        set_waiting(p, p.waiting + 1)


cdef void parking_ended(parking_t* p) noexcept nogil:
    set_waiting(p, p.waiting - 1)


cdef request_t* parking_next(parking_t* p) noexcept nogil:
    cdef request_t* r = p.first
    p.first = r.next
    return r


cdef void parking_ask(parking_t* p, uint64_t now) noexcept nogil:
    cdef const image_t* m = p.image
    cdef uint64_t length, unit
    if not p.helped or p.growing or p.closing or now < p.ask_at:
        return
    if not m.compact or m.data.grows:
        return
    length = load_acquire(&m.data.length)
    p.wanted = load_acquire(&m.places.lacking)
    if p.wanted <= length:
        return
    p.grown_from = length
    unit = m.places.grow_unit
    store_release(&p.growing, (p.wanted - length + unit - 1) // unit * unit)
    store_release(&p.to_ask, p.growing)
    if p.notify != NULL:
        p.notify(p.owner)


cdef bint parking_take(parking_t* p, request_t* r, uint64_t now) noexcept nogil:
    cdef bint more = r.growths != p.growths
    if (r.op != OP_WRITE and r.op != OP_WRITE_ZEROES) or p.closing:
        return False
    if r.result != -ENOSPC and r.result != -EDQUOT:
        return False
    if not more:
        parking_ask(p, now)
    if not (more or p.growing or p.waits):
        return False
    parking_keep(p, r, now)
    # Storage became longer while it was tried.
    if more:
        p.retry_at = now
    return True


cdef void parking_look(parking_t* p) noexcept nogil:
    if p.image.compact and not p.image.data.grows:
        places_look_again(&p.image.places)


cdef void count_growth(parking_t* p, bint ok, uint64_t length) noexcept nogil:
    cdef block_t* n = counters_block(p.image.counters, BLOCK_SHARED)
    count(n, N_GROWTHS if ok else N_GROWTH_ERRORS, 1)
    if length > p.grown_from:
        count(n, N_GROWTH_BYTES, length - p.grown_from)


cdef void parking_answer(parking_t* p, bint ok, uint64_t now) noexcept nogil:
    cdef uint64_t length = load_acquire(&p.image.data.length)
    # What was asked for counts: others may have used it up by now, and lack more.
    cdef bint enough = ok and length >= p.wanted
    if p.growing:
        count_growth(p, enough, length)
    if enough:
        p.growths += 1
        p.ask_at = 0
    elif p.growing:
        p.ask_at = now + GROW_AGAIN_MS * NS_PER_MS
    store_release(&p.growing, 0)
