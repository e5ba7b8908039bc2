# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Layer 1. A storage that may hang, read with patience. See patience.pxd.

What the page cache has is read by the caller itself, which costs nothing. A caller whose time is
over takes its job back: off the queue, or from the reader, which then copies to nobody."""
from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset
from .limits cimport NEVER, NS_PER_S
from .storage cimport (
    EXTENT_DATA, IO_HALF, IO_NOWAIT, storage_close, storage_ops_t, storage_read, storage_status,
    storage_t,
)
from .sync cimport (
    clock_now, cond_broadcast, cond_free, cond_init, cond_signal, cond_wait, gate_t, mutex_free,
    mutex_init, mutex_lock, mutex_unlock, thread_leave, thread_start, thread_t,
)
from .syscalls cimport EAGAIN, EIO, ENOMEM, EROFS

cdef enum:
    PIECE = 262144                     # bytes of a reader's buffer
    JOB_QUEUED = 0
    JOB_TAKEN = 1                      # a reader reads for it
    JOB_COPYING = 2                    # and writes to its caller's memory, which takes no time
    JOB_DONE = 3
    CLOSE_WAIT_S = 1                   # for readers that only happen to be reading
    READER_IDLE_S = 1                  # without work a reader ends


cdef inline uint64_t now(const patient_t* p) noexcept nogil:
    return clock_now(p.mutex.gate)


# -- readers -----------------------------------------------------------------------------------

cdef void release(patient_t* p) noexcept nogil:
    """Nobody else knows of it any more."""
    storage_close(p.under)
    free(p.under)
    cond_free(&p.work)
    cond_free(&p.ended)
    mutex_free(&p.mutex)
    free(p)


cdef void carry_out(patient_reader_t* h, bint is_status, uint64_t length,
        uint64_t offset) noexcept nogil:
    """Without the mutex, which is held before and after."""
    cdef patient_t* p = h.owner
    cdef patient_job_t* job
    cdef uint64_t run = length
    cdef int rc
    mutex_unlock(&p.mutex)
    if is_status:
        rc = storage_status(p.under, length, offset, &run)
    else:
        rc = storage_read(p.under, h.buffer, length, offset, 0)
    mutex_lock(&p.mutex)
    job = h.job
    if job == NULL:
        return
    if rc == 0 and not is_status:
        job.state = JOB_COPYING
        mutex_unlock(&p.mutex)
        memcpy(job.data, h.buffer, length)
        mutex_lock(&p.mutex)
    job.result = rc
    job.run = run
    job.state = JOB_DONE
    h.job = NULL
    cond_signal(&job.done)


cdef void* reader_main(void* argument) noexcept nogil:
    cdef patient_reader_t* h = <patient_reader_t*>argument
    cdef patient_t* p = h.owner
    cdef patient_job_t* job
    cdef bint last
    cdef int rc
    mutex_lock(&p.mutex)
    while True:
        rc = 0
        while p.first == NULL and not p.closing and rc == 0:
            p.idle += 1
            rc = cond_wait(&p.work, &p.mutex, now(p) + READER_IDLE_S * NS_PER_S)
            p.idle -= 1
        job = p.first
        if job == NULL:
            break
        p.first = job.next
        job.state = JOB_TAKEN
        job.reader = <int>(h - &p.readers[0])
        h.job = job
        carry_out(h, job.is_status, job.length, job.offset)
    free(h.buffer)
    h.buffer = NULL
    p.running -= 1
    last = p.orphaned and p.running == 0
    cond_signal(&p.ended)
    mutex_unlock(&p.mutex)
    if last:
        release(p)
    return NULL


cdef void start_reader(patient_t* p) noexcept nogil:
    """One more, if there may be one; else those that there are will do. The mutex is held."""
    cdef patient_reader_t* h = &p.readers[0]
    cdef thread_t thread
    while h.buffer != NULL:
        h += 1
    h.owner = p
    h.buffer = <uint8_t*>malloc(PIECE)
    if h.buffer == NULL:
        return
    if thread_start(&thread, p.mutex.gate, reader_main, h) < 0:
        free(h.buffer)
        h.buffer = NULL
        return
    # It cannot be waited for: it may hang in the kernel for ever.
    thread_leave(&thread)
    p.running += 1


# -- calls -------------------------------------------------------------------------------------

cdef void enqueue(patient_t* p, patient_job_t* job) noexcept nogil:
    cdef patient_job_t* other = p.first
    cdef int queued = 1
    while other != NULL:
        queued += 1
        other = other.next
    job.next = NULL
    if p.first == NULL:
        p.first = job
    else:
        p.last.next = job
    p.last = job
    if queued > p.idle and p.running < PATIENT_READERS:
        start_reader(p)
    cond_signal(&p.work)


cdef void take_back(patient_t* p, patient_job_t* job) noexcept nogil:
    """Nobody touches it any more. The mutex is held."""
    cdef patient_job_t* before = NULL
    cdef patient_job_t* at = p.first
    if job.state == JOB_TAKEN:
        p.readers[job.reader].job = NULL
        return
    while at != job:
        before = at
        at = at.next
    if before == NULL:
        p.first = job.next
    else:
        before.next = job.next
    if p.last == job:
        p.last = before


cdef int call(patient_t* p, patient_job_t* job, uint64_t deadline) noexcept nogil:
    """0: it is done, and job.result says how; -EIO: that took too long."""
    cdef int rc = cond_init(&job.done, p.mutex.gate)
    if rc < 0:
        return rc
    mutex_lock(&p.mutex)
    job.state = JOB_QUEUED
    enqueue(p, job)
    while job.state != JOB_DONE:
        if job.state != JOB_COPYING and (p.interrupted or now(p) >= deadline):
            take_back(p, job)
            rc = -EIO
            break
        cond_wait(&job.done, &p.mutex, NEVER if job.state == JOB_COPYING else deadline)
    mutex_unlock(&p.mutex)
    cond_free(&job.done)
    return rc


cdef int patient_read(storage_t* head, void* buffer, uint64_t length, uint64_t offset,
        int flags) noexcept nogil:
    cdef patient_storage_t* s = <patient_storage_t*>head
    cdef uint8_t* data = <uint8_t*>buffer
    cdef patient_job_t job
    cdef uint64_t deadline
    cdef int rc = storage_read(s.shared.under, buffer, length, offset, flags | IO_NOWAIT)
    if rc != -EAGAIN or flags & IO_NOWAIT:
        return rc
    memset(&job, 0, sizeof(job))
    deadline = now(s.shared) + (s.timeout_ns // 2 if flags & IO_HALF else s.timeout_ns)
    rc = 0
    while length and rc == 0:
        job.data = data
        job.length = min(length, <uint64_t>PIECE)
        job.offset = offset
        rc = call(s.shared, &job, deadline)
        if rc == 0:
            rc = job.result
        data += job.length
        offset += job.length
        length -= job.length
    return rc


cdef int patient_status(storage_t* head, uint64_t length, uint64_t offset,
        uint64_t* run) noexcept nogil:
    cdef patient_storage_t* s = <patient_storage_t*>head
    cdef patient_job_t job
    memset(&job, 0, sizeof(job))
    job.is_status = True
    job.length = length
    job.offset = offset
    if call(s.shared, &job, now(s.shared) + s.timeout_ns) < 0:
        run[0] = length                # what cannot be learned is data: reading it will tell
        return EXTENT_DATA
    run[0] = job.run
    return job.result


cdef int patient_write(storage_t* s, const void* buffer, uint64_t length, uint64_t offset,
        int flags) noexcept nogil:
    return -EROFS


cdef int patient_flush(storage_t* s) noexcept nogil:
    return 0


cdef int patient_zero(storage_t* s, uint64_t length, uint64_t offset, int flags) noexcept nogil:
    return -EROFS


cdef void patient_start_writeback(storage_t* s, uint64_t length, uint64_t offset) noexcept nogil:
    pass


cdef int patient_resize(storage_t* s, uint64_t length) noexcept nogil:
    return -EROFS


# -- open and close ----------------------------------------------------------------------------

cdef void patient_close(storage_t* head) noexcept nogil:
    """No call is inside."""
    cdef patient_storage_t* s = <patient_storage_t*>head
    cdef patient_t* p = s.shared
    cdef uint64_t deadline
    cdef bint orphaned
    if p == NULL:
        return
    deadline = now(p) + CLOSE_WAIT_S * NS_PER_S
    s.shared = NULL
    mutex_lock(&p.mutex)
    p.closing = True
    cond_broadcast(&p.work)
    while p.running and now(p) < deadline:
        cond_wait(&p.ended, &p.mutex, deadline)
    orphaned = p.running != 0
    p.orphaned = orphaned
    mutex_unlock(&p.mutex)
    if not orphaned:
        release(p)


cdef void patient_interrupt(storage_t* head) noexcept nogil:
    cdef patient_t* p
    cdef patient_job_t* job
    cdef int i
    if head.ops == NULL or head.ops.close != patient_close:
        return
    p = (<patient_storage_t*>head).shared
    if p == NULL:
        return
    mutex_lock(&p.mutex)
    p.interrupted = True
    for i in range(PATIENT_READERS):
        if p.readers[i].job != NULL:
            cond_signal(&p.readers[i].job.done)
    job = p.first
    while job != NULL:
        cond_signal(&job.done)
        job = job.next
    mutex_unlock(&p.mutex)


cdef int patient_open(patient_storage_t* s, storage_t* under, uint64_t timeout_ns,
        gate_t* gate) noexcept nogil:
    cdef patient_t* p = <patient_t*>calloc(1, sizeof(patient_t))
    cdef int rc
    if p == NULL:
        return -ENOMEM
    rc = mutex_init(&p.mutex, gate)
    if rc == 0:
        rc = cond_init(&p.work, gate)
    if rc == 0:
        rc = cond_init(&p.ended, gate)
    if rc < 0:
        free(p)
        return rc
    p.under = under
    memset(s, 0, sizeof(patient_storage_t))
    s.shared = p
    s.timeout_ns = timeout_ns
    s.head.length = under.length
    s.ops = storage_ops_t(patient_read, patient_write, patient_flush, patient_zero,
                          patient_status, patient_start_writeback, patient_resize, patient_close)
    s.head.ops = &s.ops
    return 0
