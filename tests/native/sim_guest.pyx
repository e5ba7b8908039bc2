# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Guests. See sim_guest.pxd.

A request is served inline where a connection's thread would (nbd_loop): local writes, reads that do
not block; all else is handed to the crew, several at once. Every answer is told to the oracle."""
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy

from fvdcore.atomics cimport load_acquire
from fvdcore.commit cimport commit_fault
from fvdcore.counters cimport (
    BLOCK_CONNECTION, OP_DISCARD, OP_FLUSH, OP_READ, OP_STATUS, OP_WRITE, OP_WRITE_ZEROES,
    block_t, counters_block,
)
from fvdcore.dispatch cimport (
    device_begin_copy, device_call_copy_off, device_changing, device_enqueue,
    device_enqueue_copies, device_t, request_part_done, request_take,
)
from fvdcore.image cimport image_t
from fvdcore.read_path cimport image_read, image_run
from fvdcore.request cimport request_t
from fvdcore.storage cimport EXTENT_DATA, IO_NOWAIT
from fvdcore.write_path cimport WRITE_TRY, image_write
from sim_crash cimport world_fail
from sim_manager cimport manager_follow
from sim_gate cimport below, chance, sim_note, sim_sleep, sim_wait, sim_wake
from sim_oracle cimport (
    KIND_TRIM, KIND_WRITE, KIND_ZERO, MOMENT_EITHER, MOMENT_LIVE, oracle_begin, oracle_check,
    oracle_end, oracle_flushed,
)
from sim_pattern cimport pattern_fill
from sim_state cimport (
    MARK_COPY_LATER, MARK_CREW, MARK_INLINE, MARK_NO_SPACE, MARK_TRIMMED, PENDING_MAX, guest_t,
    pending_t, world_t,
)

cdef enum:
    SECTOR = 512
    FLAG_FUA = 1
    FLAG_NO_HOLE = 2
    ENOSPC = 28
    EAGAIN = 11


cdef struct plan_t:
    int op
    uint32_t flags
    uint64_t first                     # sectors
    uint64_t count


# -- what to ask -------------------------------------------------------------------------------

cdef int draw_op(world_t* w) noexcept nogil:
    cdef uint64_t total = 0, at
    cdef int i
    for i in range(6):
        total += w.weights[i]
    at = below(&w.random, total)
    for i in range(6):
        if at < w.weights[i]:
            return i
        at -= w.weights[i]
    return OP_READ


cdef void draw_range(world_t* w, plan_t* q) noexcept nogil:
    cdef uint64_t sectors = w.oracle.sectors
    cdef uint64_t block = max(w.device.image.block_size // SECTOR, <uint64_t>1)
    cdef uint64_t how = below(&w.random, 100), room = w.hot if w.hot else sectors
    # Whole chunks are what TRIM unmaps.
    if w.device.image.compact and chance(&w.random, 1, 2):
        block = w.device.image.chunk_size // SECTOR
    q.first = below(&w.random, min(room, sectors))
    if chance(&w.random, 1, 8):
        q.first = below(&w.random, sectors)
    if how < 45:
        q.count = 1 + below(&w.random, 8)
    elif how < 75:
        q.first -= q.first % block
        q.count = block * (1 + below(&w.random, 3))
    elif how < 95:
        q.count = 1 + below(&w.random, w.length_max)
    else:
        q.count = 1 + below(&w.random, w.length_max * 4)
    q.count = min(q.count, sectors - q.first)


cdef void draw(world_t* w, plan_t* q) noexcept nogil:
    q.op = draw_op(w)
    q.flags = 0
    q.first = 0
    q.count = 0
    if q.op != OP_FLUSH:
        draw_range(w, q)
    if q.op in (OP_WRITE, OP_WRITE_ZEROES, OP_DISCARD) and chance(&w.random, w.fua, 256):
        q.flags |= FLAG_FUA
    if q.op == OP_WRITE_ZEROES and chance(&w.random, 1, 2):
        q.flags |= FLAG_NO_HOLE


cdef inline int kind_of(int op) noexcept nogil:
    return KIND_WRITE if op == OP_WRITE else KIND_ZERO if op == OP_WRITE_ZEROES else KIND_TRIM


# -- what came back ----------------------------------------------------------------------------

cdef void judge_read(world_t* w, const unsigned char* data, uint64_t first, uint64_t count,
        uint64_t began) noexcept nogil:
    cdef int moment = MOMENT_EITHER if w.file.gave_up or w.data.gave_up else MOMENT_LIVE
    if not oracle_check(&w.oracle, data, first, count, began, moment, moment == MOMENT_LIVE):
        world_fail(w, b"a guest's read", w.oracle.failure, 0)


cdef void judge_error(world_t* w, int op, int result) noexcept nogil:
    """An error needs a cause."""
    if result == -ENOSPC:
        w.marks[MARK_NO_SPACE] += 1
        if w.full_expected:
            return
    if w.faulty_start:
        return
    if w.file.failures + w.data.failures + w.base.failures + w.below.failures == 0:
        world_fail(w, b"a request failed though no I/O did", b"operation and errno",
                   op * 1000 - result)


cdef void finish(world_t* w, int op, uint32_t flags, int result, uint32_t number,
        uint64_t began) noexcept nogil:
    """Tell the oracle how a change or a flush ended."""
    if result < 0:
        judge_error(w, op, result)
    if number:
        oracle_end(&w.oracle, number, result == 0, (flags & FLAG_FUA) != 0)
        if op == OP_DISCARD:
            w.marks[MARK_TRIMMED] += 1
    elif op == OP_FLUSH and result == 0:
        oracle_flushed(&w.oracle, began)
    w.completed += 1
    sim_wake(&w.gate, &w.actions[0])


cdef void guest_reply(request_t* r) noexcept nogil:
    cdef guest_t* g = <guest_t*>r.connection
    cdef world_t* w = g.world
    cdef pending_t* p = &w.pending[r.cookie]
    sim_note(&w.gate, 8, r.cookie, <uint64_t>(<unsigned>-r.result))
    if r.op == OP_READ and r.result == 0:
        judge_read(w, r.data, r.offset // SECTOR, r.length // SECTOR, p.began)
    if r.op in (OP_FLUSH, OP_WRITE) and r.result == 0 and p.faulty:
        world_fail(w, b"a write or flush", b"succeeded on an image with a sticky fault", r.op)
    finish(w, r.op, r.flags, r.result, p.op, p.began)
    p.guest = -1
    g.outstanding -= 1
    g.held -= 1
    sim_wake(&w.gate, g)
    request_part_done(&w.device, r)


# -- asking ------------------------------------------------------------------------------------

cdef bint try_inline(guest_t* g, const plan_t* q, uint32_t number, uint64_t began) noexcept nogil:
    """As nbd_loop serves one request; False: it has to be handed over."""
    cdef world_t* w = g.world
    cdef device_t* d = &w.device
    cdef image_t* m = d.image
    cdef block_t* n = counters_block(&d.counters, BLOCK_CONNECTION + g.index)
    cdef uint64_t length = q.count * SECTOR, offset = q.first * SECTOR, run = 0
    cdef request_t* r = NULL
    cdef int rc = -EAGAIN
    if not chance(&w.random, w.inline_, 256):
        return False
    if q.op == OP_WRITE and not q.flags & FLAG_FUA and not device_changing(d, length, offset):
        rc = image_write(m, g.buffer, length, offset, WRITE_TRY, n)
    elif q.op == OP_READ:
        if (m.copy_on_read and load_acquire(&m.complete) == 0 and offset < m.base_size
                and not (image_run(m, length, offset, &run) == EXTENT_DATA and run == length)):
            r = device_begin_copy(d, g.held, length, offset)
            if r == NULL:
                return False
        rc = image_read(m, g.buffer, length, offset, IO_NOWAIT, n)
    if rc < 0 and r != NULL:
        device_call_copy_off(d, r)
        request_part_done(d, r)
        return False
    if rc == -EAGAIN:
        return False
    w.marks[MARK_INLINE] += 1
    sim_note(&w.gate, 9, q.first, <uint64_t>(<unsigned>-rc))
    if q.op == OP_READ and rc == 0:
        judge_read(w, g.buffer, q.first, q.count, began)
    finish(w, q.op, q.flags, rc, number, began)
    if r != NULL:
        memcpy(r.data, g.buffer, length)
        w.marks[MARK_COPY_LATER] += 1
        device_enqueue_copies(d, r, &r.next)
    return True


cdef void hand_over(guest_t* g, const plan_t* q, uint32_t number, uint64_t began) noexcept nogil:
    cdef world_t* w = g.world
    cdef request_t* r
    cdef uint64_t slot = 0
    r = request_take(&w.device, &g.held)
    while w.pending[slot].guest >= 0:
        slot += 1
        if slot == PENDING_MAX:
            world_fail(w, b"the simulator", b"has no free slot", 0)
            slot = 0
            break
    w.pending[slot].guest = g.index
    w.pending[slot].op = number
    w.pending[slot].began = began
    w.pending[slot].faulty = commit_fault(&w.device.image.commit) != 0
    r.connection = g
    r.op = q.op
    r.flags = <unsigned short>q.flags
    r.cookie = slot
    r.offset = q.first * SECTOR
    r.length = q.count * SECTOR
    r.begin_ns = w.gate.now
    r.touched = 0
    if q.op == OP_WRITE:
        memcpy(r.data, g.buffer, q.count * SECTOR)
        r.touched = q.count * SECTOR
    w.marks[MARK_CREW] += 1
    g.outstanding += 1
    g.held += 1
    device_enqueue(&w.device, r)


cdef uint64_t horizon(const world_t* w) noexcept nogil:
    """When the oldest read under way began."""
    cdef uint64_t first = w.oracle.tick
    cdef int i
    for i in range(PENDING_MAX):
        if w.pending[i].guest >= 0 and w.pending[i].op == 0:
            first = min(first, w.pending[i].began)
    for i in range(w.guest_count):
        if w.guests[i].began:
            first = min(first, w.guests[i].began)
    return first


cdef void one_request(guest_t* g) noexcept nogil:
    cdef world_t* w = g.world
    cdef plan_t q
    cdef uint32_t number = 0
    cdef uint64_t i, began
    manager_follow(w, w.device.image)
    draw(w, &q)
    if q.op in (OP_WRITE, OP_WRITE_ZEROES, OP_DISCARD):
        w.oracle.horizon = horizon(w)
        number = oracle_begin(&w.oracle, kind_of(q.op), q.first, q.count)
        if number == 0:
            q.op = OP_FLUSH            # too much is unflushed to keep track of
            q.flags = 0
            q.first = 0
            q.count = 0
    w.oracle.tick += 1
    began = w.oracle.tick
    g.began = began                    # others may run before it is answered or handed over
    if q.op == OP_WRITE:
        for i in range(q.count):
            pattern_fill(g.buffer + i * SECTOR, number, q.first + i)
    sim_note(&w.gate, 10 + (q.flags << 8) + (<unsigned>q.op << 16), q.first, q.count)
    if not try_inline(g, &q, number, began):
        hand_over(g, &q, number, began)
    g.began = 0


cdef void* guest_main(void* argument) noexcept nogil:
    cdef guest_t* g = <guest_t*>argument
    cdef world_t* w = g.world
    while w.issued < w.requests and not w.failed and not w.adopted:
        if g.outstanding >= w.depth:
            sim_wait(&w.gate, g)
            continue
        w.issued += 1
        one_request(g)
        if w.think_ns and chance(&w.random, 1, 4):
            sim_sleep(&w.gate, below(&w.random, w.think_ns))
    while g.outstanding:
        sim_wait(&w.gate, g)
    w.guests_left -= 1
    sim_wake(&w.gate, &w.actions[0])
    return NULL
