# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Layer 3. Prefetch. See prefetch.pxd.

The lead thread walks the bitmap from its cursor and gives runs of absent blocks to the slots
(pipeline.pxd). It finishes only after a whole round found every bit set (image_finish, I5). Base
errors are retried with back-off for ever, a full image every half minute; a failed one stops it.
Caps and the rule of the measured minimum: throttle.pxd."""
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset
from .atomics cimport load_acquire, load_relaxed, store_relaxed
from .commit cimport commit_fault
from .counters cimport (
    BLOCK_PREFETCH, BLOCK_SHARED, G_IN_FLIGHT, G_PREFETCH_RATE, G_PREFETCH_READ_RATE,
    G_PREFETCH_STATE, G_PREFETCH_WINDOW, G_PREFETCH_WRITE_RATE, N_PREFETCH_PAUSED_NS,
    N_PREFETCH_PAUSES_BUDGET, N_PREFETCH_PAUSES_ERROR, N_PREFETCH_PAUSES_FOREGROUND,
    N_PREFETCH_PAUSES_MANUAL, T_PAUSED_SINCE, T_PREFETCH_DONE, block_t, count, counters_block,
    gauge_set, note_time,
)
from .first_reads cimport first_read_t
from .image cimport image_finish, image_t
from .limits cimport NEVER, NS_PER_MS, NS_PER_S, PREFETCH_SLOTS_MAX, REQUEST_MAX
from .manners cimport (
    POLICY_FIXED, manners_init, manners_look, manners_may, manners_meter, manners_ready,
)
from .pipeline cimport (
    PLAN_COMPLETE, PLAN_WAIT, pipeline_claim, pipeline_collect, pipeline_plan, pipeline_set_state,
    pipeline_slot, pipeline_start,
)
from .sync cimport (
    clock_now, cond_broadcast, cond_free, cond_init, cond_wait, mutex_free, mutex_init, mutex_lock,
    mutex_unlock, thread_join, thread_start,
)
from .syscalls cimport EDQUOT, EFBIG, ENOMEM, ENOSPC, c_munmap
from .throttle cimport bucket_init, cap_of, meter_forget, meter_init, pause_about

cdef enum:
    BUSY_WAIT_MS = 5                   # all that is left is locked by others
    YIELD_POLL_MS = 1                  # guests are looked at so often while it waits for them
    LEAST_PIECE = 8192                 # of a polite one
    FOLLOWED = 8388608                 # bytes of a profile around those at hand, for guests near by
    FOLLOWED_ENTRIES = 4096
    BACK_OFF_MIN_MS = 100
    BACK_OFF_MAX_MS = 30000


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
    prefetch_set_policy(p, POLICY_FIXED, False)
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


cdef void prefetch_set_policy(prefetch_t* p, int policy, bint distant) noexcept nogil:
    cdef uint64_t bs = p.image.block_size, step = p.step_blocks * bs, charged = p.manners.in_flight
    manners_init(&p.manners, policy, distant, max(LEAST_PIECE // bs * bs, bs), step,
                 step * <uint64_t>p.slot_count)
    p.manners.in_flight = charged


cdef void prefetch_set_budget(prefetch_t* p, uint64_t rate) noexcept nogil:
    bucket_init(&p.budget, rate)


cdef int prefetch_set_order(prefetch_t* p, const first_read_t* order,
        uint64_t count_) noexcept nogil:
    cdef first_read_t* copy = <first_read_t*>malloc((count_ + 1) * sizeof(first_read_t))
    if copy == NULL:
        return -ENOMEM
    memcpy(copy, order, count_ * sizeof(first_read_t))
    free(p.order)
    p.order = copy
    p.order_count = count_
    return 0


cdef void prefetch_free(prefetch_t* p) noexcept nogil:
    free(p.order)
    p.order = NULL
    if p.buffer != NULL:
        c_munmap(p.buffer, p.buffer_bytes)
        p.buffer = NULL
    mutex_free(&p.mutex)
    cond_free(&p.changed)
    cond_free(&p.work)


# -- the thread --------------------------------------------------------------------------------

cdef void wait_paused(prefetch_t* p, uint64_t deadline) noexcept nogil:
    """A wait that counts as pause. The caller holds the mutex."""
    cdef block_t* n = counters_block(p.image.counters, BLOCK_PREFETCH)
    cdef uint64_t begin = clock_now(p.image.commit.gate)
    note_time(n, T_PAUSED_SINCE, begin)
    cond_wait(&p.changed, &p.mutex, deadline)
    note_time(n, T_PAUSED_SINCE, 0)
    count(n, N_PREFETCH_PAUSED_NS, clock_now(p.image.commit.gate) - begin)


cdef bint wait_until_wanted(prefetch_t* p) noexcept nogil:
    """Wait for the start delay and while paused. False: stop."""
    cdef uint64_t now
    cdef bint go
    mutex_lock(&p.mutex)
    while not p.stopping:
        now = clock_now(p.image.commit.gate)
        if not p.wanted:
            if p.state != PREFETCH_FAILED:
                pipeline_set_state(p, PREFETCH_PAUSED)
            wait_paused(p, NEVER)
        elif now < p.start_at:
            cond_wait(&p.changed, &p.mutex, p.start_at)
        elif now < p.hold_until:
            if p.reason != PAUSE_ERROR:
                pipeline_set_state(p, PREFETCH_PAUSED)
            wait_paused(p, p.hold_until)
        else:
            if p.reason:
                store_relaxed(&p.reason, PAUSE_NONE)
                meter_forget(&p.read_meter, now)
                meter_forget(&p.write_meter, now)
            p.full = False
            pipeline_set_state(p, PREFETCH_RUNNING)
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
    p.hold_until = (clock_now(p.image.commit.gate)
                    + pause_about(&p.random, p.back_off_ms * NS_PER_MS))
    store_relaxed(&p.reason, PAUSE_ERROR)
    # It has neither a rate nor an end now.
    store_relaxed(&p.rate, 0)
    gauge_set(p.image.counters, G_PREFETCH_RATE, 0)
    p.back_off_ms = min(p.back_off_ms * 2, <uint64_t>BACK_OFF_MAX_MS)
    mutex_unlock(&p.mutex)


cdef void give_up(prefetch_t* p, bint full) noexcept nogil:
    cdef bint busy, done
    mutex_lock(&p.mutex)
    p.full = p.wanted = full and p.wanted
    if p.full:
        store_relaxed(&p.reason, PAUSE_ERROR)         # as after an error, but it says "failed"
        p.hold_until = clock_now(p.image.commit.gate) + BACK_OFF_MAX_MS * NS_PER_MS
    # What the others find now says nothing about the time when there is space again.
    while not p.stopping and pipeline_slot(p, SLOT_CLAIMED) != NULL:
        cond_wait(&p.changed, &p.mutex, NEVER)
    pipeline_set_state(p, PREFETCH_FAILED)
    mutex_unlock(&p.mutex)
    pipeline_collect(p, &busy, &done)


cdef void measure(prefetch_t* p, uint64_t* since, uint64_t* before) noexcept nogil:
    """Moving average of the rate, 0.8 old + 0.2 new, over windows of at least 100 ms."""
    cdef uint64_t now = clock_now(p.image.commit.gate), copied = load_relaxed(&p.copied), sample
    if now - since[0] < 100 * NS_PER_MS:
        return
    sample = (copied - before[0]) * 1000 // ((now - since[0]) // NS_PER_MS)
    store_relaxed(&p.rate, sample if p.rate == 0 else (p.rate * 4 + sample) // 5)
    gauge_set(p.image.counters, G_PREFETCH_RATE, p.rate)
    gauge_set(p.image.counters, G_PREFETCH_READ_RATE, load_relaxed(&p.read_meter.average))
    gauge_set(p.image.counters, G_PREFETCH_WRITE_RATE, load_relaxed(&p.write_meter.average))
    gauge_set(p.image.counters, G_PREFETCH_WINDOW, load_relaxed(&p.manners.window))
    since[0] = now
    before[0] = copied


cdef void finish(prefetch_t* p, block_t* n) noexcept nogil:
    cdef int rc = image_finish(p.image, n)
    mutex_lock(&p.mutex)
    p.wanted = False
    pipeline_set_state(p, PREFETCH_DONE if rc == 0 else PREFETCH_FAILED)
    store_relaxed(&p.rate, 0)
    gauge_set(p.image.counters, G_PREFETCH_RATE, 0)
    if rc == 0:
        note_time(n, T_PREFETCH_DONE, clock_now(p.image.commit.gate))
    mutex_unlock(&p.mutex)


cdef void wait_for_slots(prefetch_t* p) noexcept nogil:
    """Until one has ended, or somebody wants something else."""
    mutex_lock(&p.mutex)
    while not p.stopping and p.wanted and pipeline_slot(p, SLOT_ENDED) == NULL:
        cond_wait(&p.changed, &p.mutex, NEVER)
    mutex_unlock(&p.mutex)


cdef inline uint64_t entry_end(const first_read_t* one) noexcept nogil:
    return one.offset + min(one.length, NEVER - one.offset)


cdef bint guest_follows(const prefetch_t* p) noexcept nogil:
    """Was the last read of the base by a guest near to what the profile names at hand? Then that is
    what he waits for, or is about to read. Only the lead, whose the order is, may ask."""
    cdef uint64_t begin = load_relaxed(&p.image.demand_at), end = load_relaxed(&p.image.demand_end)
    cdef uint64_t here = p.order_block * p.image.block_size, left = FOLLOWED, low, high, i
    if p.order_at == p.order_count:
        return False
    for i in range(p.order_at, min(p.order_count, p.order_at + FOLLOWED_ENTRIES)):
        low = max(p.order[i].offset, here)
        high = min(entry_end(&p.order[i]), low + min(left, NEVER - low))
        if low < end and begin < high:
            return True
        left -= max(high, low) - low
        if left == 0:
            break
        here = 0
    here = p.order_block * p.image.block_size
    left = FOLLOWED
    for i in range(min(p.order_at + 1, <uint64_t>FOLLOWED_ENTRIES)):
        low = p.order[p.order_at - i].offset
        high = entry_end(&p.order[p.order_at - i])
        if i == 0:
            high = min(high, here)
        low = max(low, high - min(high, left))
        if low < end and begin < high:
            return True
        left -= max(high, low) - low
        if left == 0:
            break
    return False


cdef bint wait_for_guests(prefetch_t* p, block_t* n) noexcept nogil:
    """Wait, for milliseconds, where manners demand it. Whether it had to."""
    cdef image_t* m = p.image
    cdef uint64_t now = clock_now(m.commit.gate), requests = 0, demand = 0, demand_ns = 0
    cdef bint waited = False, yielded
    # What a profile names is what a guest is about to read that follows it: nobody waits for that
    # in vain. One that reads elsewhere is no less in its way than without a profile.
    if not guest_follows(p):
        requests = load_relaxed(counters_block(m.counters, BLOCK_SHARED) + G_IN_FLIGHT)
        demand = load_relaxed(&m.demand)
        demand_ns = load_relaxed(&m.demand_ns)
    mutex_lock(&p.mutex)
    manners_meter(&p.manners, load_relaxed(&m.demand_bytes), now)
    yielded = p.manners.yield_ns != 0
    if manners_look(&p.manners, demand, demand_ns, requests, now):
        waited = True
        if not yielded:
            count(n, N_PREFETCH_PAUSES_FOREGROUND, 1)
        if not p.stopping:
            wait_paused(p, now + YIELD_POLL_MS * NS_PER_MS)
    elif not manners_may(&p.manners):
        waited = True
        if not p.stopping and p.wanted:
            cond_wait(&p.changed, &p.mutex, NEVER)
    elif now < manners_ready(&p.manners):
        waited = True
        if not p.stopping and p.wanted:
            cond_wait(&p.changed, &p.mutex, manners_ready(&p.manners))
    mutex_unlock(&p.mutex)
    return waited


cdef bint wait_for_caps(prefetch_t* p, block_t* n) noexcept nogil:
    """Wait until the caps let a step begin. Whether it had to wait."""
    cdef uint64_t until, now = clock_now(p.image.commit.gate)
    cdef bint waited = False
    mutex_lock(&p.mutex)
    until = max(p.read_cap.ready_ns, p.write_cap.ready_ns)
    if now < p.budget.ready_ns and until < p.budget.ready_ns:
        until = p.budget.ready_ns
        count(n, N_PREFETCH_PAUSES_BUDGET, 1)
    if now < until and not p.stopping:
        waited = True
        cond_wait(&p.changed, &p.mutex, until)
    mutex_unlock(&p.mutex)
    return waited


cdef void begin(prefetch_t* p, block_t* n) noexcept nogil:
    """Give the next run to a free slot, or wait for what the slots do, or finish."""
    cdef prefetch_slot_t* s = pipeline_slot(p, SLOT_FREE)
    cdef int what
    if s == NULL:
        wait_for_slots(p)
        return
    if wait_for_caps(p, n) or wait_for_guests(p, n):
        return
    what = pipeline_plan(p, s)
    if what == PLAN_COMPLETE:
        finish(p, n)
    elif what == PLAN_WAIT:
        wait_for_slots(p)
    else:
        pipeline_claim(p, s)


cdef void* prefetch_main(void* argument) noexcept nogil:
    cdef prefetch_t* p = <prefetch_t*>argument
    cdef block_t* n = counters_block(p.image.counters, BLOCK_PREFETCH)
    cdef uint64_t since = clock_now(p.image.commit.gate), before = 0
    cdef bint busy, done
    cdef int rc
    while load_relaxed(&p.state) != PREFETCH_DONE and wait_until_wanted(p):
        rc = pipeline_collect(p, &busy, &done)
        if done:
            p.back_off_ms = BACK_OFF_MIN_MS
        if rc in (-ENOSPC, -EDQUOT, -EFBIG) or commit_fault(&p.image.commit):
            give_up(p, commit_fault(&p.image.commit) == 0)
        elif rc < 0:
            back_off(p, n)
        else:
            if busy:
                pause_ms(p, BUSY_WAIT_MS)
            measure(p, &since, &before)
            begin(p, n)
    mutex_lock(&p.mutex)
    cond_broadcast(&p.work)
    mutex_unlock(&p.mutex)
    return NULL


cdef int prefetch_thread_start(prefetch_t* p) noexcept nogil:
    cdef int rc
    gauge_set(p.image.counters, G_PREFETCH_STATE, p.state)
    gauge_set(p.image.counters, G_PREFETCH_RATE, load_relaxed(&p.rate))
    if p.thread.started or not p.wanted:
        return 0
    rc = pipeline_start(p)
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
        store_relaxed(&p.reason, PAUSE_NONE)
        count(counters_block(p.image.counters, BLOCK_SHARED), N_PREFETCH_PAUSES_MANUAL, 1)
        pipeline_set_state(p, PREFETCH_PAUSED)
        cond_broadcast(&p.changed)
    mutex_unlock(&p.mutex)
