# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Layer 4. The crew: threads for what blocks. See crew.pxd."""
from .atomics cimport load_acquire
from .counters cimport (
    BLOCK_CREW, CAUSE_DEMAND, N_BASE_ERRORS, N_CREW_REQUESTS, T_BUSY_SINCE, block_t, count,
    counters_block, note_time, progress_of, progress_t,
)
from .dispatch cimport (
    changes_disk, crew_member_t, device_account, device_begin_change, device_execute,
    device_park_change, device_requeue, device_settle, device_t, device_unmark, device_waits,
    request_part_done,
)
from .limits cimport CREW_MAX, CREW_STARTED_MAX, NEVER
from .request cimport request_t
from .sync cimport (
    clock_now, cond_broadcast, cond_signal, cond_wait, mutex_lock, mutex_unlock, thread_join,
    thread_start,
)
from .syscalls cimport EAGAIN, EDQUOT, EIO, ENOSPC, ESHUTDOWN


cdef int start_member(device_t* d) noexcept nogil:
    """One more thread; -EAGAIN where no more is wanted. The caller holds the mutex."""
    cdef crew_member_t* member
    cdef int rc
    if d.crew_count >= d.crew_most or d.crew_stopping:
        return -EAGAIN
    member = &d.crew[d.crew_count]
    member.device = d
    member.index = d.crew_count
    rc = thread_start(&member.thread, d.gate, crew_main, member)
    if rc == 0:
        d.crew_count += 1
    return rc


cdef request_t* take_first(device_t* d) noexcept nogil:
    """The first request of the queue that may be run now. The caller holds the mutex. Those that
    overlap stay in order: what is behind one that may wait for the base is of its kind."""
    cdef request_t* before = NULL
    cdef request_t* r = d.queue_head
    while (r != NULL and r.distant and d.distant_count >= d.crew_count - d.crew_kept
            and start_member(d) < 0):
        before = r
        r = r.next
    if r == NULL:
        return NULL
    if before == NULL:
        d.queue_head = r.next
    else:
        before.next = r.next
    if d.queue_tail == r:
        d.queue_tail = before
    r.next = NULL
    d.distant_count += r.distant
    return r


cdef request_t* take_copy(device_t* d) noexcept nogil:
    """A read that is answered, to copy its data: behind all that somebody waits for. The caller
    holds the mutex."""
    cdef request_t* r = d.copies
    if r == NULL:
        return NULL
    d.copies = r.next
    if d.copies == NULL:
        d.copies_end = &d.copies
    r.next = NULL
    return r


cdef void end_distant(device_t* d, bint distant) noexcept nogil:
    """The request that was taken waits for the base no more."""
    if not distant:
        return
    mutex_lock(&d.mutex)
    d.distant_count -= 1
    cond_signal(&d.queued)
    mutex_unlock(&d.mutex)


cdef request_t* next_request(device_t* d) noexcept nogil:
    """Off the queue; NULL: the crew ends. What is parked comes back when its time is there."""
    cdef request_t* r
    mutex_lock(&d.mutex)
    while True:
        if d.parking.first != NULL and clock_now(d.gate) >= d.parking.retry_at:
            device_requeue(d)
        r = take_first(d)
        if r == NULL:
            r = take_copy(d)
        if r != NULL or d.crew_stopping:
            break
        cond_wait(&d.queued, &d.mutex, NEVER if d.parking.first == NULL else d.parking.retry_at)
    if r != NULL:
        r.parked = False
        # Somebody idle has to watch the time in our place.
        if d.parking.first != NULL:
            cond_signal(&d.queued)
    mutex_unlock(&d.mutex)
    return r


cdef void execute_in_time(device_t* d, request_t* r, block_t* n) noexcept nogil:
    """What has waited for others' turn at a base that is away shares their fate."""
    if (r.distant and not r.waited and d.base_timeout_ns
            and clock_now(d.gate) - r.begin_ns >= d.base_timeout_ns):
        count(n, N_BASE_ERRORS + CAUSE_DEMAND, 1)
        r.result = -EIO
        return
    device_execute(d, r, n)


cdef bint run_change(device_t* d, request_t** changing, block_t* n) noexcept nogil:
    """Run a request that changes the disk. False: it is parked, somebody else's from now on. It may
    become another one."""
    cdef int rc = device_begin_change(d, changing)
    cdef request_t* r = changing[0]
    if rc > 0:
        return False
    # Looked at after it was marked as a change: see device_mark.
    if rc < 0:
        r.result = rc
    elif r.connection != NULL and load_acquire(&d.several) and d.is_gone(r):
        r.result = -ESHUTDOWN
    else:
        execute_in_time(d, r, n)
        if r.result < 0 and device_park_change(d, changing):
            return False
        r = changing[0]
    # What waits for space ends with its connection, unanswered: it is sent again over another.
    if (r.result in (-ENOSPC, -EDQUOT) and device_waits(d) and r.connection != NULL
            and d.is_gone(r)):
        r.result = -ESHUTDOWN
    device_unmark(d, r)
    return True


cdef void* crew_main(void* argument) noexcept nogil:
    cdef crew_member_t* member = <crew_member_t*>argument
    cdef device_t* d = member.device
    cdef block_t* n = counters_block(&d.counters, BLOCK_CREW + member.index)
    cdef progress_t before
    cdef request_t* r
    cdef bint distant, parked = False
    while True:
        r = next_request(d)
        if r == NULL:
            return NULL
        if r.answered:
            device_settle(d, r, n)
            request_part_done(d, r)
            continue
        r.parts = 2
        distant = r.distant            # a parked one is somebody else's
        note_time(n, T_BUSY_SINCE, r.begin_ns)
        before = progress_of(n)
        if changes_disk(r):
            parked = not run_change(d, &r, n)
        else:
            execute_in_time(d, r, n)
            parked = False
        end_distant(d, distant)
        if parked:
            note_time(n, T_BUSY_SINCE, 0)
            continue
        count(n, N_CREW_REQUESTS, 1)
        device_account(d, n, &before, r.op, r.offset, r.length, r.result, r.begin_ns)
        note_time(n, T_BUSY_SINCE, 0)
        d.reply(r)
        device_settle(d, r, n)
        request_part_done(d, r)


cdef int device_start_crew(device_t* d, int threads) noexcept nogil:
    cdef int rc = 0, total = threads
    if d.base_may_hang:
        total = min(threads * 2, <int>CREW_STARTED_MAX)
    mutex_lock(&d.mutex)
    d.crew_kept = min(threads, total - total // 2)
    d.crew_most = total
    while rc == 0 and d.crew_count < total:
        rc = start_member(d)
    if d.has_remote_base:
        d.crew_most = CREW_MAX
    mutex_unlock(&d.mutex)
    return rc


cdef void device_enlarge_crew(device_t* d) noexcept nogil:
    cdef int rc = 0
    mutex_lock(&d.mutex)
    d.crew_most = max(d.crew_most, <int>CREW_STARTED_MAX)
    # Where there is no more memory for threads, those that there are do it.
    while rc == 0 and d.crew_count < CREW_STARTED_MAX:
        rc = start_member(d)
    mutex_unlock(&d.mutex)


cdef void device_stop_crew(device_t* d) noexcept nogil:
    cdef int i
    mutex_lock(&d.mutex)
    d.crew_stopping = 1
    cond_broadcast(&d.queued)
    mutex_unlock(&d.mutex)
    for i in range(d.crew_count):
        thread_join(&d.crew[i].thread)
    d.crew_count = 0
