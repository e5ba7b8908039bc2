# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Layer 3. Prefetch. See prefetch.pxd.

The lead thread walks the bitmap from its cursor and gives runs of absent blocks to the slots; each
slot's thread reads its run from the base, with as many reads in flight as there are slots, and then
waits for its turn to write. Blocks are locked for the write alone, and looked at again under the
lock: what became local meanwhile is left alone (see copy_on_read), so no guest write waits for a
base. What somebody else holds is passed over and met again on the next round, so a guest write that
failed under its lock can never be mistaken for done. It finishes only after a whole round found
every bit set (image_finish, I5). Base errors are retried with back-off for ever, a full image every
half minute; a failed one stops it. Caps and the rule of the measured minimum: throttle.pxd."""
from libc.errno cimport errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset
from .atomics cimport fetch_add_relaxed, load_acquire, store_relaxed, store_release
from .bitmap cimport bitmap_next_clear, bitmap_next_set
from .commit cimport commit_fault
from .copy_on_read cimport image_store_copy, image_store_hole, image_trace_copy
from .counters cimport (
    BLOCK_PREFETCH, BLOCK_SHARED, CAUSE_PREFETCH, G_PREFETCH_RATE, G_PREFETCH_STATE,
    N_PREFETCH_BYTES, N_PREFETCH_PAUSED_NS, N_PREFETCH_PAUSES_ERROR, N_PREFETCH_PAUSES_MANUAL,
    N_PREFETCH_PAUSES_SLOW_READ, N_PREFETCH_PAUSES_SLOW_WRITE, N_PREFETCH_ZERO_BYTES,
    T_PAUSED_SINCE, T_PREFETCH_DONE, block_t, count, counters_block, gauge_set, note_time,
)
from .data_area cimport data_lock_copy, data_unlock_copy
from .failures cimport OP_PREFETCH, failure_note
from .image cimport image_finish, image_read_base, image_t
from .limits cimport NEVER, NS_PER_MS, NS_PER_S, PREFETCH_SLOTS_MAX, REQUEST_MAX
from .storage cimport EXTENT_ZERO, storage_status
from .sync cimport (
    clock_now, cond_broadcast, cond_free, cond_init, cond_wait, mutex_free, mutex_init, mutex_lock,
    mutex_unlock, thread_join, thread_start,
)
from .throttle cimport (
    bucket_init, bucket_pay, cap_of, meter_begin, meter_end, meter_forget, meter_init, pause_drawn,
)
from .syscalls cimport (
    EAGAIN, EDQUOT, EFBIG, ENOMEM, ENOSPC, MAP_ANONYMOUS, MAP_FAILED, MAP_NORESERVE, MAP_PRIVATE,
    PROT_READ, PROT_WRITE, c_mmap, c_munmap,
)
from .trace cimport TRACE_PREFETCH, trace_is_on

cdef enum:
    BUSY_WAIT_MS = 5                   # all that is left is locked by others
    BACK_OFF_MIN_MS = 100
    BACK_OFF_MAX_MS = 30000
    HOLE_STEP = 67108864               # bytes of a base's hole made local in one step
    PLAN_CLAIMED = 0
    PLAN_WAIT = 1                      # all that is absent is in the slots
    PLAN_COMPLETE = 2


cdef void prefetch_take_rates(prefetch_t* p) noexcept nogil:
    """Caps and minima of the header."""
    cdef image_t* m = p.image
    bucket_init(&p.read_cap, cap_of(m.header.fields.prefetch_max_read_throughput))
    bucket_init(&p.write_cap, cap_of(m.header.fields.prefetch_max_write_throughput))
    meter_init(&p.read_meter, m.header.fields.prefetch_min_read_throughput * 1024,
               m.header.fields.prefetch_read_throughput_measure_time * NS_PER_MS)
    meter_init(&p.write_meter, m.header.fields.prefetch_min_write_throughput * 1024,
               m.header.fields.prefetch_write_throughput_measure_time * NS_PER_MS)
    # The image and its session: one sequence for each clone, the same again in a simulation.
    memcpy(&p.random, m.header.extension.open_session, 8)
    p.random |= 1


cdef int prefetch_init(prefetch_t* p, image_t* m, int64_t delay_s) noexcept nogil:
    cdef int rc
    memset(p, 0, sizeof(prefetch_t))
    p.image = m
    rc = mutex_init(&p.mutex, m.commit.gate)
    if rc == 0:
        rc = cond_init(&p.changed, m.commit.gate)
    if rc == 0:
        rc = cond_init(&p.work, m.commit.gate)
    if rc < 0:
        return rc
    p.state = PREFETCH_DISABLED
    if load_acquire(&m.complete):
        p.state = PREFETCH_DONE
        return 0
    if m.read_only:
        return 0
    p.step_blocks = max(min(m.header.fields.bytes_per_prefetch,
                            <uint64_t>REQUEST_MAX) // m.block_size, <uint64_t>1)
    p.slot_count = <int>max(min(m.header.fields.num_prefetch_slots, <uint32_t>PREFETCH_SLOTS_MAX),
                            <uint32_t>1)
    p.back_off_ms = BACK_OFF_MIN_MS
    prefetch_take_rates(p)
    if delay_s >= 0:
        p.wanted = True
        p.state = PREFETCH_WAITING if delay_s else PREFETCH_RUNNING
        p.start_at = clock_now(m.commit.gate) + <uint64_t>delay_s * NS_PER_S
    return 0


cdef void prefetch_widen(prefetch_t* p, uint64_t bytes) noexcept nogil:
    cdef uint64_t step = p.step_blocks * p.image.block_size
    if step:
        p.slot_count = <int>min(max(<uint64_t>p.slot_count, bytes // step),
                                <uint64_t>PREFETCH_SLOTS_MAX)


cdef void prefetch_free(prefetch_t* p) noexcept nogil:
    if p.buffer != NULL:
        c_munmap(p.buffer, p.buffer_bytes)
        p.buffer = NULL
    mutex_free(&p.mutex)
    cond_free(&p.changed)
    cond_free(&p.work)


cdef void set_state(prefetch_t* p, uint64_t state) noexcept nogil:
    """The caller holds the mutex."""
    if p.state == state:
        return
    store_release(&p.state, state)
    gauge_set(p.image.counters, G_PREFETCH_STATE, state)
    if p.notify != NULL:
        p.notify(p.owner)


# -- one step ----------------------------------------------------------------------------------

cdef bint plan_step(prefetch_t* p, uint64_t first, uint64_t* end) noexcept nogil:
    """Lower *end to what one step may take from first. True: all of it is a hole of the base."""
    cdef image_t* m = p.image
    cdef uint64_t bs = m.block_size, offset = first * bs, run = 0, there
    cdef uint64_t limit = min(end[0], first + p.step_blocks)
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


# -- one slot ----------------------------------------------------------------------------------

cdef void note_failure(prefetch_t* p, int rc, uint64_t first, uint64_t bytes,
        bint of_base) noexcept nogil:
    if p.failures != NULL:
        failure_note(p.failures, OP_PREFETCH, rc, first * p.image.block_size, bytes, of_base)


cdef int read_run(prefetch_t* p, prefetch_slot_t* s, uint64_t bytes, block_t* n) noexcept nogil:
    cdef bint slow
    cdef int rc
    mutex_lock(&p.mutex)
    meter_begin(&p.read_meter, clock_now(p.image.commit.gate))
    mutex_unlock(&p.mutex)
    rc = image_read_base(p.image, s.buffer, bytes, s.first * p.image.block_size, 0,
                         CAUSE_PREFETCH, n)
    mutex_lock(&p.mutex)
    slow = meter_end(&p.read_meter, bytes if rc == 0 else 0, clock_now(p.image.commit.gate))
    bucket_pay(&p.read_cap, bytes, clock_now(p.image.commit.gate))
    if slow and rc == 0:
        step_back(p, PAUSE_SLOW_READ)
    mutex_unlock(&p.mutex)
    if rc < 0:
        note_failure(p, rc, s.first, bytes, True)
    # Only the image's own lack of space ends prefetch; the base's is one of its errors.
    return rc if rc not in (-ENOSPC, -EDQUOT, -EFBIG) else -EAGAIN


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
        stop = bitmap_next_set(&m.bitmap, at, s.end)
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
    if not s.hole:
        bucket_pay(&p.write_cap, bytes, clock_now(p.image.commit.gate))
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
        if s.state != SLOT_CLAIMED:
            cond_wait(&p.work, &p.mutex, NEVER)
            continue
        mutex_unlock(&p.mutex)
        s.rc = carry(p, s, n)
        mutex_lock(&p.mutex)
        s.state = SLOT_ENDED
        cond_broadcast(&p.changed)
    mutex_unlock(&p.mutex)
    return NULL


# -- planning ----------------------------------------------------------------------------------

cdef uint64_t unclaimed(prefetch_t* p, uint64_t block) noexcept nogil:
    """The first absent block from there on that no slot has; the number of blocks if none is."""
    cdef image_t* m = p.image
    cdef int i = 0
    block = bitmap_next_clear(&m.bitmap, block, m.bitmap.blocks)
    while i < p.slot_count and block < m.bitmap.blocks:
        if p.slots[i].state != SLOT_FREE and p.slots[i].first <= block < p.slots[i].end:
            block = bitmap_next_clear(&m.bitmap, p.slots[i].end, m.bitmap.blocks)
            i = 0
        else:
            i += 1
    return block


cdef int plan(prefetch_t* p, prefetch_slot_t* s) noexcept nogil:
    """Claim the next run for a free slot. Only the lead does; the mutex is not held: other slots
    may end meanwhile, which only frees more."""
    cdef image_t* m = p.image
    cdef uint64_t first = unclaimed(p, p.cursor), end
    cdef bint waiting = False
    cdef int i
    if first == m.bitmap.blocks:
        first = unclaimed(p, 0)
        if first == m.bitmap.blocks:
            for i in range(p.slot_count):
                waiting = waiting or p.slots[i].state != SLOT_FREE
            if waiting or bitmap_next_clear(&m.bitmap, 0, m.bitmap.blocks) < m.bitmap.blocks:
                return PLAN_WAIT
            return PLAN_COMPLETE
    end = min(m.bitmap.blocks, first + max(p.step_blocks, <uint64_t>HOLE_STEP // m.block_size))
    end = bitmap_next_set(&m.bitmap, first, end)
    for i in range(p.slot_count):
        if p.slots[i].state != SLOT_FREE and p.slots[i].first > first:
            end = min(end, p.slots[i].first)
    s.hole = plan_step(p, first, &end)
    s.first = first
    s.end = end
    # Past it also after an error: what lies behind may be readable, and the next round comes back.
    p.cursor = end
    return PLAN_CLAIMED


# -- the thread --------------------------------------------------------------------------------

cdef void wait_paused(prefetch_t* p, uint64_t deadline) noexcept nogil:
    """A wait that counts as pause. The caller holds the mutex."""
    cdef block_t* n = counters_block(p.image.counters, BLOCK_PREFETCH)
    cdef uint64_t begin = clock_now(p.image.commit.gate)
    note_time(n, T_PAUSED_SINCE, begin)
    cond_wait(&p.changed, &p.mutex, deadline)
    note_time(n, T_PAUSED_SINCE, 0)
    count(n, N_PREFETCH_PAUSED_NS, clock_now(p.image.commit.gate) - begin)


cdef void step_back(prefetch_t* p, int reason) noexcept nogil:
    """Too slow: pause for a random time, or only forget what was measured. The mutex is held."""
    cdef uint64_t now = clock_now(p.image.commit.gate)
    cdef uint64_t limit = p.image.header.fields.prefetch_throttle_time * NS_PER_MS
    cdef uint64_t ns = pause_drawn(&p.random, limit)
    meter_forget(&p.read_meter, now)
    meter_forget(&p.write_meter, now)
    if ns == 0 or now < p.hold_until:
        return
    p.hold_until = now + ns
    p.reason = reason
    count(counters_block(p.image.counters, BLOCK_PREFETCH),
          N_PREFETCH_PAUSES_SLOW_READ if reason == PAUSE_SLOW_READ
          else N_PREFETCH_PAUSES_SLOW_WRITE, 1)
    cond_broadcast(&p.changed)


cdef bint wait_until_wanted(prefetch_t* p) noexcept nogil:
    """Wait for the start delay and while paused. False: stop."""
    cdef uint64_t now
    cdef bint go
    mutex_lock(&p.mutex)
    while not p.stopping:
        now = clock_now(p.image.commit.gate)
        if not p.wanted:
            if p.state != PREFETCH_FAILED:
                set_state(p, PREFETCH_PAUSED)
            wait_paused(p, NEVER)
        elif now < p.start_at:
            cond_wait(&p.changed, &p.mutex, p.start_at)
        elif now < p.hold_until:
            if p.reason != PAUSE_ERROR:
                set_state(p, PREFETCH_PAUSED)
            wait_paused(p, p.hold_until)
        else:
            if p.reason:
                p.reason = PAUSE_NONE
                meter_forget(&p.read_meter, now)
                meter_forget(&p.write_meter, now)
            p.full = False
            set_state(p, PREFETCH_RUNNING)
            break
    go = not p.stopping
    mutex_unlock(&p.mutex)
    return go


cdef void pause_ms(prefetch_t* p, uint64_t ms) noexcept nogil:
    cdef uint64_t deadline = clock_now(p.image.commit.gate) + ms * NS_PER_MS
    mutex_lock(&p.mutex)
    # Another slot's end does not shorten it: two slots that find all busy would wake each other.
    while not p.stopping and p.wanted and clock_now(p.image.commit.gate) < deadline:
        cond_wait(&p.changed, &p.mutex, deadline)
    mutex_unlock(&p.mutex)


cdef void back_off(prefetch_t* p, block_t* n) noexcept nogil:
    """The base failed: pause, longer each time."""
    count(n, N_PREFETCH_PAUSES_ERROR, 1)
    mutex_lock(&p.mutex)
    p.hold_until = clock_now(p.image.commit.gate) + p.back_off_ms * NS_PER_MS
    p.reason = PAUSE_ERROR
    p.back_off_ms = min(p.back_off_ms * 2, <uint64_t>BACK_OFF_MAX_MS)
    mutex_unlock(&p.mutex)


cdef void give_up(prefetch_t* p, bint full) noexcept nogil:
    cdef bint busy, done
    mutex_lock(&p.mutex)
    p.full = p.wanted = full and p.wanted
    if p.full:
        p.reason = PAUSE_ERROR         # as after an error, but it says "failed"
        p.hold_until = clock_now(p.image.commit.gate) + BACK_OFF_MAX_MS * NS_PER_MS
    # What the others find now says nothing about the time when there is space again.
    while not p.stopping and slot_in(p, SLOT_CLAIMED) != NULL:
        cond_wait(&p.changed, &p.mutex, NEVER)
    set_state(p, PREFETCH_FAILED)
    mutex_unlock(&p.mutex)
    collect(p, &busy, &done)


cdef void measure(prefetch_t* p, uint64_t* since, uint64_t* before) noexcept nogil:
    """Moving average of the rate, 0.8 old + 0.2 new, over windows of at least 100 ms."""
    cdef uint64_t now = clock_now(p.image.commit.gate), sample
    if now - since[0] < 100 * NS_PER_MS:
        return
    sample = (p.copied - before[0]) * 1000 // ((now - since[0]) // NS_PER_MS)
    store_relaxed(&p.rate, sample if p.rate == 0 else (p.rate * 4 + sample) // 5)
    gauge_set(p.image.counters, G_PREFETCH_RATE, p.rate)
    since[0] = now
    before[0] = p.copied


cdef void finish(prefetch_t* p, block_t* n) noexcept nogil:
    cdef int rc = image_finish(p.image, n)
    mutex_lock(&p.mutex)
    p.wanted = False
    set_state(p, PREFETCH_DONE if rc == 0 else PREFETCH_FAILED)
    store_relaxed(&p.rate, 0)
    gauge_set(p.image.counters, G_PREFETCH_RATE, 0)
    if rc == 0:
        note_time(n, T_PREFETCH_DONE, clock_now(p.image.commit.gate))
    mutex_unlock(&p.mutex)


cdef int collect(prefetch_t* p, bint* busy, bint* done) noexcept nogil:
    """Free the slots that have ended. The worst of their results: a full image before an error."""
    cdef prefetch_slot_t* s
    cdef int i, worst = 0
    busy[0] = False
    done[0] = False
    mutex_lock(&p.mutex)
    for i in range(p.slot_count):
        s = &p.slots[i]
        if s.state != SLOT_ENDED:
            continue
        s.state = SLOT_FREE
        if s.rc in (-ENOSPC, -EDQUOT, -EFBIG) or (s.rc < 0 and worst == 0):
            worst = s.rc
        busy[0] = busy[0] or s.busy
        done[0] = done[0] or (s.rc == 0 and not s.busy)
    mutex_unlock(&p.mutex)
    return worst


cdef prefetch_slot_t* slot_in(prefetch_t* p, int state) noexcept nogil:
    cdef int i
    for i in range(p.slot_count):
        if p.slots[i].state == state:
            return &p.slots[i]
    return NULL


cdef void wait_for_slots(prefetch_t* p) noexcept nogil:
    """Until one has ended, or somebody wants something else."""
    mutex_lock(&p.mutex)
    while not p.stopping and p.wanted and slot_in(p, SLOT_ENDED) == NULL:
        cond_wait(&p.changed, &p.mutex, NEVER)
    mutex_unlock(&p.mutex)


cdef bint wait_for_caps(prefetch_t* p) noexcept nogil:
    """Wait until the caps let a step begin. Whether it had to wait."""
    cdef uint64_t until, now = clock_now(p.image.commit.gate)
    cdef bint waited = False
    mutex_lock(&p.mutex)
    until = max(p.read_cap.ready_ns, p.write_cap.ready_ns)
    if now < until and not p.stopping:
        waited = True
        cond_wait(&p.changed, &p.mutex, until)
    mutex_unlock(&p.mutex)
    return waited


cdef void begin(prefetch_t* p, block_t* n) noexcept nogil:
    """Give the next run to a free slot, or wait for what the slots do, or finish."""
    cdef prefetch_slot_t* s = slot_in(p, SLOT_FREE)
    cdef int what
    if s == NULL:
        wait_for_slots(p)
        return
    if wait_for_caps(p):
        return
    what = plan(p, s)
    if what == PLAN_COMPLETE:
        finish(p, n)
    elif what == PLAN_WAIT:
        wait_for_slots(p)
    else:
        mutex_lock(&p.mutex)
        s.state = SLOT_CLAIMED
        cond_broadcast(&p.work)
        mutex_unlock(&p.mutex)


cdef void* prefetch_main(void* argument) noexcept nogil:
    cdef prefetch_t* p = <prefetch_t*>argument
    cdef block_t* n = counters_block(p.image.counters, BLOCK_PREFETCH)
    cdef uint64_t since = clock_now(p.image.commit.gate), before = 0
    cdef bint busy, done
    cdef int rc
    while p.state != PREFETCH_DONE and wait_until_wanted(p):
        rc = collect(p, &busy, &done)
        if rc in (-ENOSPC, -EDQUOT, -EFBIG) or commit_fault(&p.image.commit):
            give_up(p, commit_fault(&p.image.commit) == 0)
        elif rc < 0:
            back_off(p, n)
        else:
            if done:
                p.back_off_ms = BACK_OFF_MIN_MS
            if busy:
                pause_ms(p, BUSY_WAIT_MS)
            measure(p, &since, &before)
            begin(p, n)
    mutex_lock(&p.mutex)
    cond_broadcast(&p.work)
    mutex_unlock(&p.mutex)
    return NULL


cdef int start_slots(prefetch_t* p) noexcept nogil:
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


cdef int prefetch_thread_start(prefetch_t* p) noexcept nogil:
    cdef int rc
    gauge_set(p.image.counters, G_PREFETCH_STATE, p.state)
    gauge_set(p.image.counters, G_PREFETCH_RATE, p.rate)
    if p.thread.started or not p.wanted:
        return 0
    rc = start_slots(p)
    if rc < 0:
        return rc
    return thread_start(&p.thread, p.image.commit.gate, prefetch_main, p)


cdef void prefetch_stop(prefetch_t* p) noexcept nogil:
    cdef int i
    mutex_lock(&p.mutex)
    p.stopping = True
    cond_broadcast(&p.changed)
    cond_broadcast(&p.work)
    mutex_unlock(&p.mutex)
    thread_join(&p.thread)
    for i in range(PREFETCH_SLOTS_MAX):
        thread_join(&p.slots[i].thread)


cdef int prefetch_run(prefetch_t* p) noexcept nogil:
    cdef int rc = 0
    mutex_lock(&p.mutex)
    if p.state != PREFETCH_DONE and not p.stopping and not p.image.read_only:
        p.wanted = True
        p.start_at = 0
        p.hold_until = 0
        rc = prefetch_thread_start(p)
        cond_broadcast(&p.changed)
    mutex_unlock(&p.mutex)
    return rc


cdef void prefetch_pause(prefetch_t* p) noexcept nogil:
    mutex_lock(&p.mutex)
    if p.wanted and p.state not in (PREFETCH_DISABLED, PREFETCH_DONE):
        p.wanted = False
        count(counters_block(p.image.counters, BLOCK_SHARED), N_PREFETCH_PAUSES_MANUAL, 1)
        set_state(p, PREFETCH_PAUSED)
        cond_broadcast(&p.changed)
    mutex_unlock(&p.mutex)
