# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Layer 3. The slots of prefetch. See pipeline.pxd.

Each slot's thread reads its run from the base, with as many reads in flight as there are slots, and
then waits for its turn to write. Blocks are locked for the write alone, and looked at again under
the lock: what became local meanwhile is left alone (see copy_on_read), so no guest write waits for
a base. What somebody else holds is passed over and met again on the next round, so a guest write
that failed under its lock can never be mistaken for done."""
from libc.stdint cimport uint8_t, uint64_t
from .atomics cimport fetch_add_relaxed, load_relaxed, store_relaxed, store_release
from .bitmap cimport bitmap_next_clear, bitmap_run_end
from .copy_on_read cimport image_store_copy, image_store_hole, image_trace_copy
from .counters cimport (
    BLOCK_PREFETCH, CAUSE_PREFETCH, G_PREFETCH_STATE, N_PREFETCH_BYTES,
    N_PREFETCH_PAUSES_SLOW_READ, N_PREFETCH_PAUSES_SLOW_WRITE, N_PREFETCH_ZERO_BYTES, block_t,
    count, counters_block, gauge_set,
)
from .data_area cimport data_lock_copy, data_start_writeback, data_unlock_copy
from .failures cimport OP_PREFETCH, failure_note
from .first_reads cimport first_read_t
from .image cimport image_read_base, image_t
from .limits cimport NEVER, NS_PER_MS, WRITEBACK_MIN
from .manners cimport POLICY_EAGER, POLICY_POLITE, manners_begin, manners_end, manners_piece
from .storage cimport EXTENT_ZERO, IO_ONCE, storage_status
from .sync cimport clock_now, cond_broadcast, cond_wait, mutex_lock, mutex_unlock, thread_start
from .syscalls cimport (
    EAGAIN, EDQUOT, EFBIG, ENOMEM, ENOSPC, MAP_ANONYMOUS, MAP_FAILED, MAP_NORESERVE, MAP_PRIVATE,
    PROT_READ, PROT_WRITE, c_mmap,
)
from .throttle cimport bucket_pay, meter_begin, meter_end, meter_forget, pause_drawn
from .trace cimport TRACE_PREFETCH, trace_is_on

cdef enum:
    HOLE_STEP = 67108864               # bytes of a base's hole made local in one step
    GAP_BYTES = 1048576                # between small copies that are written back together
    NARROW_MAX = 24                    # times that a piece is halved
    GOOD_PIECES = 4                    # that come before they are doubled


cdef void pipeline_set_state(prefetch_t* p, uint64_t state) noexcept nogil:
    """The caller holds the mutex."""
    if p.state == state:
        return
    store_release(&p.state, state)
    gauge_set(p.image.counters, G_PREFETCH_STATE, state)
    if p.notify != NULL:
        p.notify(p.owner)


cdef void step_back(prefetch_t* p, int reason) noexcept nogil:
    """Too slow: pause for a random time, or only forget what was measured. The mutex is held."""
    cdef uint64_t now = clock_now(p.image.commit.gate)
    cdef uint64_t limit = p.image.header.fields.prefetch_throttle_time * NS_PER_MS
    cdef uint64_t ns
    # An eager one does not care, and a polite one is slow on purpose beside a guest.
    if p.manners.policy == POLICY_EAGER or p.manners.busy:
        return
    ns = pause_drawn(&p.random, limit)
    meter_forget(&p.read_meter, now)
    meter_forget(&p.write_meter, now)
    if ns == 0 or now < p.hold_until:
        return
    p.hold_until = now + ns
    store_relaxed(&p.reason, reason)
    count(counters_block(p.image.counters, BLOCK_PREFETCH),
          N_PREFETCH_PAUSES_SLOW_READ if reason == PAUSE_SLOW_READ
          else N_PREFETCH_PAUSES_SLOW_WRITE, 1)
    cond_broadcast(&p.changed)


# -- planning ----------------------------------------------------------------------------------

cdef bint plan_step(prefetch_t* p, uint64_t first, uint64_t* end) noexcept nogil:
    """Lower *end to what one step may take from first. True: all of it is a hole of the base."""
    cdef image_t* m = p.image
    cdef uint64_t bs = m.block_size, offset = first * bs, run = 0, there
    cdef uint64_t most = min(p.step_blocks, manners_piece(&p.manners) // bs)
    cdef uint64_t limit = min(end[0], first + max(most >> load_relaxed(&p.narrow), <uint64_t>1))
    there = min(end[0] * bs, m.base_size) - offset
    if offset >= m.base.length:
        end[0] = limit
        return False
    if storage_status(m.base, min(there, m.base.length - offset), offset, &run) != EXTENT_ZERO:
        # Read up to the block in which the next hole begins.
        end[0] = min(limit, first + max((run + bs - 1) // bs, <uint64_t>1))
        return False
    # The hole's whole blocks; the last block of the base is whole where the base ends.
    if run < there and offset + run < m.base.length:
        run = run // bs * bs
    else:
        run = there
    if run == 0:
        end[0] = first + 1
        return False
    end[0] = first + (run + bs - 1) // bs
    return True


cdef inline uint64_t slot_state(const prefetch_slot_t* s) noexcept nogil:
    """A slot_state_t. Without the mutex only the lead asks, and only whether a slot is free, which
    nobody else changes."""
    return load_relaxed(&s.state)


cdef uint64_t unclaimed(prefetch_t* p, uint64_t block) noexcept nogil:
    """The first absent block from there on that no slot has; the number of blocks if none is."""
    cdef image_t* m = p.image
    cdef int i = 0
    block = bitmap_next_clear(&m.bitmap, block, m.bitmap.blocks)
    while i < p.slot_count and block < m.bitmap.blocks:
        if slot_state(&p.slots[i]) != SLOT_FREE and p.slots[i].first <= block < p.slots[i].end:
            block = bitmap_next_clear(&m.bitmap, p.slots[i].end, m.bitmap.blocks)
            i = 0
        else:
            i += 1
    return block


cdef bint next_ordered(prefetch_t* p, uint64_t* first, uint64_t* end) noexcept nogil:
    """The next run of what is to be fetched before all else. Each entry is walked once: what fails
    or is locked is met again when all the rest is walked."""
    cdef image_t* m = p.image
    cdef uint64_t bs = m.block_size, last
    cdef first_read_t* one
    while p.order_at < p.order_count:
        one = &p.order[p.order_at]
        if one.offset < m.base_size:
            last = (min(one.length, m.base_size - one.offset) + one.offset - 1) // bs + 1
            first[0] = unclaimed(p, max(one.offset // bs, p.order_block))
            if first[0] < last:
                end[0] = last
                return True
        p.order_at += 1
        p.order_block = 0
    return False


cdef int pipeline_plan(prefetch_t* p, prefetch_slot_t* s) noexcept nogil:
    """Claim the next run for a free slot. Only the lead does; the mutex is not held: other slots
    may end meanwhile, which only frees more."""
    cdef image_t* m = p.image
    cdef uint64_t first, end = m.bitmap.blocks
    cdef bint waiting = False, ordered = next_ordered(p, &first, &end)
    cdef int i
    if not ordered:
        first = unclaimed(p, p.cursor)
    if first == m.bitmap.blocks:
        first = unclaimed(p, 0)
        if first == m.bitmap.blocks:
            for i in range(p.slot_count):
                waiting = waiting or slot_state(&p.slots[i]) != SLOT_FREE
            if waiting or bitmap_next_clear(&m.bitmap, 0, m.bitmap.blocks) < m.bitmap.blocks:
                return PLAN_WAIT
            return PLAN_COMPLETE
        next_round(p)
    end = min(end, first + max(p.step_blocks, <uint64_t>HOLE_STEP // m.block_size))
    end = bitmap_run_end(&m.bitmap, first, end)
    for i in range(p.slot_count):
        if slot_state(&p.slots[i]) != SLOT_FREE and p.slots[i].first > first:
            end = min(end, p.slots[i].first)
    s.hole = plan_step(p, first, &end)
    s.first = first
    s.end = end
    # Past it also after an error: what lies behind may be readable, and the next round comes back.
    if ordered:
        p.order_block = end
    else:
        p.cursor = end
    return PLAN_CLAIMED


# -- one slot ----------------------------------------------------------------------------------

cdef void note_failure(prefetch_t* p, int rc, uint64_t first, uint64_t bytes,
        bint of_base) noexcept nogil:
    if p.failures != NULL:
        failure_note(p.failures, OP_PREFETCH, rc, first * p.image.block_size, bytes, of_base)


cdef void end_charge(prefetch_t* p, prefetch_slot_t* s, uint64_t latency, bint ok,
        uint64_t now) noexcept nogil:
    """What the slot was to read is in flight no more. The caller holds the mutex."""
    if s.charged == 0:
        return
    manners_end(&p.manners, s.charged, latency, ok, now)
    s.charged = 0
    # There may be room for another piece, though this slot still has to write.
    if p.manners.policy == POLICY_POLITE:
        cond_broadcast(&p.changed)


cdef void note_width(prefetch_t* p, const prefetch_slot_t* s, bint ok) noexcept nogil:
    """Some of what failed may be readable: the next round asks for less at a time (next_round).
    The caller holds the mutex."""
    p.good = p.good + 1 if ok else 0
    if not ok and s.end - s.first > 1:
        p.divisible = True
    elif p.good >= GOOD_PIECES and p.narrow:
        store_relaxed(&p.narrow, p.narrow - 1)
        p.good = 0


cdef void next_round(prefetch_t* p) noexcept nogil:
    """What is left is walked again, in halves where a piece failed, until what fails is one block.
    Not sooner: what nobody asked for yet is not to wait for the blocks of what fails."""
    mutex_lock(&p.mutex)
    if p.divisible:
        store_relaxed(&p.narrow, min(p.narrow + 1, <uint64_t>NARROW_MAX))
        p.divisible = False
    mutex_unlock(&p.mutex)


cdef int read_run(prefetch_t* p, prefetch_slot_t* s, uint64_t bytes, block_t* n) noexcept nogil:
    cdef uint64_t since = clock_now(p.image.commit.gate), now
    cdef bint slow
    cdef int rc
    mutex_lock(&p.mutex)
    meter_begin(&p.read_meter, since)
    mutex_unlock(&p.mutex)
    # The server's error is final for what is halved anyway.
    rc = image_read_base(p.image, s.buffer, bytes, s.first * p.image.block_size,
                         IO_ONCE if load_relaxed(&p.narrow) else 0, CAUSE_PREFETCH, n)
    mutex_lock(&p.mutex)
    note_width(p, s, rc == 0)
    now = clock_now(p.image.commit.gate)
    slow = meter_end(&p.read_meter, bytes if rc == 0 else 0, now)
    if slow and rc == 0:
        step_back(p, PAUSE_SLOW_READ)
    end_charge(p, s, now - since, rc == 0, now)
    mutex_unlock(&p.mutex)
    if rc < 0:
        note_failure(p, rc, s.first, bytes, True)
    # Only the image's own lack of space ends prefetch; the base's is one of its errors.
    return rc if rc not in (-ENOSPC, -EDQUOT, -EFBIG) else -EAGAIN


cdef void note_small(prefetch_t* p, uint64_t first, uint64_t end, uint64_t bytes) noexcept nogil:
    """Copies that are too small for a write-back of their own (image_store_copy) get one together:
    so that a guest's fsync never pays for more than a few of them. Whose turn it is calls."""
    cdef image_t* m = p.image
    cdef uint64_t gap = GAP_BYTES // m.block_size + 1
    if p.unwritten and (first > p.unwritten_end + gap or end + gap < p.unwritten_first):
        begin_writeback(p)
    p.unwritten_first = min(first, p.unwritten_first) if p.unwritten else first
    p.unwritten_end = max(end, p.unwritten_end) if p.unwritten else end
    p.unwritten += bytes
    if p.unwritten >= WRITEBACK_MIN:
        begin_writeback(p)


cdef void begin_writeback(prefetch_t* p) noexcept nogil:
    cdef image_t* m = p.image
    cdef uint64_t begin = p.unwritten_first * m.block_size
    data_start_writeback(m, min(p.unwritten_end * m.block_size, m.base_size) - begin, begin)
    p.unwritten = 0


cdef int store_run(prefetch_t* p, prefetch_slot_t* s, block_t* n) noexcept nogil:
    """Make what is still absent of the slot's run local, unless somebody else holds it."""
    cdef image_t* m = p.image
    cdef uint64_t at = s.first, stop, bytes, zeros, begin
    cdef int rc = 0
    if not data_lock_copy(m, s.first, s.end):
        s.busy = True
        return 0
    while rc == 0:
        at = bitmap_next_clear(&m.bitmap, at, s.end)
        if at == s.end:
            break
        stop = bitmap_run_end(&m.bitmap, at, s.end)
        bytes = min(stop * m.block_size, m.base_size) - at * m.block_size
        zeros = bytes
        begin = clock_now(m.commit.gate) if trace_is_on(&m.counters.trace) else 0
        if s.hole:
            rc = image_store_hole(m, at, stop)
        else:
            rc = image_store_copy(m, s.buffer + (at - s.first) * m.block_size, at, stop, &zeros, n)
        if rc == 0:
            image_trace_copy(m, n, TRACE_PREFETCH, s.hole, begin, at * m.block_size, bytes)
            count(n, N_PREFETCH_BYTES, bytes)
            count(n, N_PREFETCH_ZERO_BYTES, zeros)
            fetch_add_relaxed(&p.copied, bytes)
            if zeros < bytes and (zeros or bytes < WRITEBACK_MIN):
                note_small(p, at, stop, bytes - zeros)
        else:
            note_failure(p, rc, at, bytes, False)
        at = stop
    data_unlock_copy(m, s.first, s.end)
    return rc


cdef int write_run(prefetch_t* p, prefetch_slot_t* s, uint64_t bytes, block_t* n) noexcept nogil:
    """Wait for the turn, then store."""
    cdef bint slow
    cdef int rc
    mutex_lock(&p.mutex)
    while p.writing and not p.stopping:
        cond_wait(&p.work, &p.mutex, NEVER)
    if p.stopping:
        mutex_unlock(&p.mutex)
        return 0
    p.writing = True
    meter_begin(&p.write_meter, clock_now(p.image.commit.gate))
    mutex_unlock(&p.mutex)
    rc = store_run(p, s, n)
    mutex_lock(&p.mutex)
    slow = meter_end(&p.write_meter, bytes if rc == 0 and not s.busy else 0,
                     clock_now(p.image.commit.gate))
    if slow and rc == 0 and not s.busy:
        step_back(p, PAUSE_SLOW_WRITE)
    p.writing = False
    cond_broadcast(&p.work)
    mutex_unlock(&p.mutex)
    return rc


cdef int carry(prefetch_t* p, prefetch_slot_t* s, block_t* n) noexcept nogil:
    cdef image_t* m = p.image
    cdef uint64_t bytes = min(s.end * m.block_size, m.base_size) - s.first * m.block_size
    cdef bint writing
    cdef int rc
    s.busy = False
    if not s.hole:
        mutex_lock(&p.mutex)
        writing = p.writing            # then it may be a neighbour slot that holds the chunk
        mutex_unlock(&p.mutex)
        # What somebody holds now is not read in vain.
        if not writing:
            if not data_lock_copy(m, s.first, s.end):
                s.busy = True
                return 0
            data_unlock_copy(m, s.first, s.end)
        rc = read_run(p, s, bytes, n)
        if rc < 0:
            return rc
    return write_run(p, s, bytes, n)


cdef void* slot_main(void* argument) noexcept nogil:
    cdef prefetch_slot_t* s = <prefetch_slot_t*>argument
    cdef prefetch_t* p = s.prefetch
    cdef block_t* n = counters_block(p.image.counters, BLOCK_PREFETCH)
    mutex_lock(&p.mutex)
    while not p.stopping and p.state != PREFETCH_DONE:
        if slot_state(s) != SLOT_CLAIMED:
            cond_wait(&p.work, &p.mutex, NEVER)
            continue
        mutex_unlock(&p.mutex)
        s.rc = carry(p, s, n)
        mutex_lock(&p.mutex)
        end_charge(p, s, 0, False, 0)
        store_relaxed(&s.state, SLOT_ENDED)
        cond_broadcast(&p.changed)
    mutex_unlock(&p.mutex)
    return NULL


# -- for the lead thread ------------------------------------------------------------------------

cdef void pipeline_claim(prefetch_t* p, prefetch_slot_t* s) noexcept nogil:
    cdef image_t* m = p.image
    cdef uint64_t now = clock_now(m.commit.gate)
    mutex_lock(&p.mutex)
    s.charged = 0 if s.hole else min(s.end * m.block_size, m.base_size) - s.first * m.block_size
    # Paid before it is asked for: many pieces are under way before a distant base answers.
    bucket_pay(&p.read_cap, s.charged, now)
    bucket_pay(&p.write_cap, s.charged, now)
    bucket_pay(&p.budget, s.charged, now)
    manners_begin(&p.manners, s.charged, now)
    store_relaxed(&s.state, SLOT_CLAIMED)
    cond_broadcast(&p.work)
    mutex_unlock(&p.mutex)


cdef prefetch_slot_t* pipeline_slot(prefetch_t* p, uint64_t state) noexcept nogil:
    cdef int i
    for i in range(p.slot_count):
        if slot_state(&p.slots[i]) == state:
            return &p.slots[i]
    return NULL


cdef int pipeline_collect(prefetch_t* p, bint* busy, bint* done) noexcept nogil:
    """Free the slots that have ended. The worst of their results: a full image before an error."""
    cdef prefetch_slot_t* s
    cdef int i, worst = 0
    busy[0] = False
    done[0] = False
    mutex_lock(&p.mutex)
    for i in range(p.slot_count):
        s = &p.slots[i]
        if slot_state(s) != SLOT_ENDED:
            continue
        store_relaxed(&s.state, SLOT_FREE)
        if s.rc in (-ENOSPC, -EDQUOT, -EFBIG) or (s.rc < 0 and worst == 0):
            worst = s.rc
        busy[0] = busy[0] or s.busy
        done[0] = done[0] or (s.rc == 0 and not s.busy)
    mutex_unlock(&p.mutex)
    return worst


cdef int pipeline_start(prefetch_t* p) noexcept nogil:
    """Buffers and threads of the slots, the first time."""
    cdef uint64_t bytes = p.step_blocks * p.image.block_size
    cdef void* b
    cdef int i, rc = 0
    if p.buffer == NULL:
        p.buffer_bytes = bytes * <uint64_t>p.slot_count
        b = c_mmap(NULL, p.buffer_bytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        if b == MAP_FAILED:
            return -ENOMEM
        p.buffer = <uint8_t*>b
    for i in range(p.slot_count):
        p.slots[i].prefetch = p
        p.slots[i].buffer = p.buffer + bytes * <uint64_t>i
        if rc == 0 and not p.slots[i].thread.started:
            rc = thread_start(&p.slots[i].thread, p.image.commit.gate, slot_main, &p.slots[i])
    return rc
