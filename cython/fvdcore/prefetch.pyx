# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Layer 3. Prefetch. See prefetch.pxd.

The thread walks the bitmap from its cursor and copies runs of absent blocks under try-locks: what
somebody else holds is passed over and met again on the next round, so a guest write that failed
under its lock can never be mistaken for done. It finishes only after a whole round found every bit
set (image_finish,     I5). Base errors are retried with back-off for ever; a full or failed image
stops it."""
from libc.errno cimport errno
from libc.stdint cimport int64_t, uint8_t, uint64_t
from libc.string cimport memset
from .atomics cimport load_acquire, load_relaxed, store_relaxed, store_release
from .bitmap cimport bitmap_next_clear, bitmap_next_set
from .commit cimport commit_fault
from .copy_on_read cimport image_store_copy, image_store_hole
from .counters cimport (
    BLOCK_PREFETCH, BLOCK_SHARED, CAUSE_PREFETCH, G_PREFETCH_RATE, G_PREFETCH_STATE,
    N_PREFETCH_BYTES, N_PREFETCH_PAUSED_NS, N_PREFETCH_PAUSES_ERROR,
    N_PREFETCH_PAUSES_MANUAL, N_PREFETCH_ZERO_BYTES,
    T_PAUSED_SINCE, T_PREFETCH_DONE, block_t, count, counters_block, gauge_set, note_time,
)
from .data_area cimport data_lock_copy, data_unlock_copy
from .failures cimport OP_PREFETCH, failure_note
from .image cimport image_finish, image_read_base, image_t
from .limits cimport NEVER, NS_PER_MS, NS_PER_S, REQUEST_MAX
from .storage cimport EXTENT_ZERO, storage_status
from .sync cimport (
    clock_now, cond_broadcast, cond_free, cond_init, cond_wait, mutex_free, mutex_init, mutex_lock,
    mutex_unlock, thread_join, thread_start,
)
from .syscalls cimport (
    EAGAIN, EDQUOT, EFBIG, ENOMEM, ENOSPC, MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ,
    PROT_WRITE, c_mmap, c_munmap,
)

cdef enum:
    BUSY_WAIT_MS = 5                   # all that is left is locked by others
    BACK_OFF_MIN_MS = 100
    BACK_OFF_MAX_MS = 30000
    HOLE_STEP = 67108864               # bytes of a base's hole made local in one step


cdef int prefetch_init(prefetch_t* p, image_t* m, int64_t delay_s) noexcept nogil:
    cdef int rc
    memset(p, 0, sizeof(prefetch_t))
    p.image = m
    rc = mutex_init(&p.mutex, m.commit.gate)
    if rc == 0:
        rc = cond_init(&p.changed, m.commit.gate)
    if rc < 0:
        return rc
    p.state = PREFETCH_DISABLED
    if load_acquire(&m.complete):
        p.state = PREFETCH_DONE
        return 0
    if m.read_only:
        return 0
    p.step_blocks = max(min(m.header.fields.bytes_per_prefetch,
        <uint64_t>REQUEST_MAX) // m.block_size,
                        <uint64_t>1)
    if delay_s >= 0:
        p.wanted = True
        p.state = PREFETCH_WAITING if delay_s else PREFETCH_RUNNING
        p.start_at = clock_now(m.commit.gate) + <uint64_t>delay_s * NS_PER_S
    return 0


cdef void prefetch_free(prefetch_t* p) noexcept nogil:
    if p.buffer != NULL:
        c_munmap(p.buffer, p.buffer_bytes)
        p.buffer = NULL
    mutex_free(&p.mutex)
    cond_free(&p.changed)


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


cdef void note_failure(prefetch_t* p, int rc, uint64_t first, uint64_t bytes,
        bint of_base) noexcept nogil:
    if p.failures != NULL:
        failure_note(p.failures, OP_PREFETCH, rc, first * p.image.block_size, bytes, of_base)


cdef int copy_step(prefetch_t* p, uint64_t first, uint64_t end, bint hole,
        block_t* n) noexcept nogil:
    """Make absent, locked blocks [first, end) local."""
    cdef image_t* m = p.image
    cdef uint64_t bytes = min(end * m.block_size,
            m.base_size) - first * m.block_size, zeros = bytes
    cdef int rc
    if hole:
        rc = image_store_hole(m, first, end)
    else:
        rc = image_read_base(m, p.buffer, bytes, first * m.block_size, 0, CAUSE_PREFETCH, n)
        if rc < 0:
            note_failure(p, rc, first, bytes, True)
            # Only the image's own lack of space ends prefetch; the base's is one of its errors.
            return rc if rc not in (-ENOSPC, -EDQUOT, -EFBIG) else -EAGAIN
        rc = image_store_copy(m, p.buffer, first, end, &zeros, n)
    if rc < 0:
        note_failure(p, rc, first, bytes, False)
    if rc == 0:
        count(n, N_PREFETCH_BYTES, bytes)
        count(n, N_PREFETCH_ZERO_BYTES, zeros)
        p.copied += bytes
    return rc


cdef int prefetch_step(prefetch_t* p, bint* busy, bint* complete, block_t* n) noexcept nogil:
    """Copy the next run. *busy: it was locked, nothing done. *complete: no block is absent."""
    cdef image_t* m = p.image
    cdef uint64_t first, end
    cdef bint hole
    cdef int rc = 0
    busy[0] = False
    complete[0] = False
    first = bitmap_next_clear(&m.bitmap, p.cursor, m.bitmap.blocks)
    if first == m.bitmap.blocks:
        p.cursor = 0
        first = bitmap_next_clear(&m.bitmap, 0, m.bitmap.blocks)
        if first == m.bitmap.blocks:
            complete[0] = True
            return 0
    end = min(m.bitmap.blocks, first + max(p.step_blocks, <uint64_t>HOLE_STEP // m.block_size))
    end = bitmap_next_set(&m.bitmap, first, end)
    hole = plan_step(p, first, &end)
    if not data_lock_copy(m, first, end):
        p.cursor = end
        busy[0] = True
        return 0
    # Somebody may have been here between the look and the lock; then look again.
    if bitmap_next_set(&m.bitmap, first, end) == end:
        rc = copy_step(p, first, end, hole, n)
        # Past it also after an error: what lies behind may be readable, and the next round comes
        # back.
        p.cursor = end
    data_unlock_copy(m, first, end)
    return rc


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
    cdef bint go
    mutex_lock(&p.mutex)
    while not p.stopping:
        if not p.wanted:
            if p.state != PREFETCH_FAILED:
                set_state(p, PREFETCH_PAUSED)
            wait_paused(p, NEVER)
        elif clock_now(p.image.commit.gate) < p.start_at:
            cond_wait(&p.changed, &p.mutex, p.start_at)
        else:
            set_state(p, PREFETCH_RUNNING)
            break
    go = not p.stopping
    mutex_unlock(&p.mutex)
    return go


cdef void pause_ms(prefetch_t* p, uint64_t ms) noexcept nogil:
    mutex_lock(&p.mutex)
    if not p.stopping:
        cond_wait(&p.changed, &p.mutex, clock_now(p.image.commit.gate) + ms * NS_PER_MS)
    mutex_unlock(&p.mutex)


cdef void back_off_ms(prefetch_t* p, uint64_t ms) noexcept nogil:
    mutex_lock(&p.mutex)
    if not p.stopping:
        wait_paused(p, clock_now(p.image.commit.gate) + ms * NS_PER_MS)
    mutex_unlock(&p.mutex)


cdef void give_up(prefetch_t* p) noexcept nogil:
    mutex_lock(&p.mutex)
    p.wanted = False
    set_state(p, PREFETCH_FAILED)
    mutex_unlock(&p.mutex)


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


cdef void* prefetch_main(void* argument) noexcept nogil:
    cdef prefetch_t* p = <prefetch_t*>argument
    cdef block_t* n = counters_block(p.image.counters, BLOCK_PREFETCH)
    cdef uint64_t back_off = BACK_OFF_MIN_MS
    cdef uint64_t since = clock_now(p.image.commit.gate), before = 0
    cdef bint busy, complete
    cdef int rc
    while wait_until_wanted(p):
        rc = prefetch_step(p, &busy, &complete, n)
        if complete:
            finish(p, n)
            if p.state == PREFETCH_DONE:
                break
        elif rc in (-ENOSPC, -EDQUOT, -EFBIG) or commit_fault(&p.image.commit):
            give_up(p)
        elif rc < 0:
            count(n, N_PREFETCH_PAUSES_ERROR, 1)
            back_off_ms(p, back_off)
            back_off = min(back_off * 2, <uint64_t>BACK_OFF_MAX_MS)
        elif busy:
            pause_ms(p, BUSY_WAIT_MS)
        else:
            back_off = BACK_OFF_MIN_MS
            measure(p, &since, &before)
    return NULL


cdef int prefetch_thread_start(prefetch_t* p) noexcept nogil:
    cdef void* b
    gauge_set(p.image.counters, G_PREFETCH_STATE, p.state)
    gauge_set(p.image.counters, G_PREFETCH_RATE, p.rate)
    if p.thread.started or not p.wanted:
        return 0
    if p.buffer == NULL:
        p.buffer_bytes = p.step_blocks * p.image.block_size
        b = c_mmap(NULL, p.buffer_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1,
            0)
        if b == MAP_FAILED:
            return -ENOMEM
        p.buffer = <uint8_t*>b
    return thread_start(&p.thread, p.image.commit.gate, prefetch_main, p)


cdef void prefetch_stop(prefetch_t* p) noexcept nogil:
    mutex_lock(&p.mutex)
    p.stopping = True
    cond_broadcast(&p.changed)
    mutex_unlock(&p.mutex)
    thread_join(&p.thread)


cdef int prefetch_run(prefetch_t* p) noexcept nogil:
    cdef int rc = 0
    mutex_lock(&p.mutex)
    if p.state != PREFETCH_DONE and not p.stopping and not p.image.read_only:
        p.wanted = True
        p.start_at = 0
        rc = prefetch_thread_start(p)
        cond_broadcast(&p.changed)
    mutex_unlock(&p.mutex)
    return rc


cdef void prefetch_pause(prefetch_t* p) noexcept nogil:
    mutex_lock(&p.mutex)
    if p.state in (PREFETCH_WAITING, PREFETCH_RUNNING):
        p.wanted = False
        count(counters_block(p.image.counters, BLOCK_SHARED), N_PREFETCH_PAUSES_MANUAL, 1)
        set_state(p, PREFETCH_PAUSED)
        cond_broadcast(&p.changed)
    mutex_unlock(&p.mutex)
