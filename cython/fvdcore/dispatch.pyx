# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Layer 4. Requests, the crew and the switch on operation. See dispatch.pxd.

The crew runs what would block (base reads, copy-on-write, flushes, NOWAIT misses) to its end on one
thread: execute, reply, settle. Everything else is served on the connection's own thread, and what
that read of the base is left to the crew to be copied."""
from libc.errno cimport errno
from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset
from .atomics cimport fetch_sub_acq_rel, load_acquire, load_relaxed, store_release
from .commit cimport commit_flush
from .copy_on_read cimport copy_on_read_admit, copy_on_read_leave, copy_on_read_settle
from .counters cimport (
    G_IN_FLIGHT, OP_DISCARD, OP_FLUSH, OP_READ, OP_STATUS, OP_WRITE, OP_WRITE_ZEROES, T_IO_ERROR,
    block_t, count_request, counters_trace, gauge_add, note_time, progress_of, progress_t,
)
from .discard_path cimport image_trim, image_write_zeroes
from .execute cimport execute_read, execute_status, request_behind_distant, request_needs_base
from .failures cimport failure_note, failures_free, failures_init
from .fetch cimport fetch_free
from .first_reads cimport first_reads_free
from .image cimport image_t
from .limits cimport (
    BLOCK_MAX, CHAIN_MAX, KEEP_BYTES, NEVER, REQUEST_MAX, REQUESTS, REQUESTS_SPARED, STORES_MAX,
)
from .parking cimport (
    parking_answer, parking_ask, parking_copy, parking_ended, parking_free, parking_keep,
    parking_look, parking_next, parking_take,
)
from .storage cimport storage_close, storage_t
from .sync cimport (
    clock_now, cond_broadcast, cond_free, cond_init, cond_signal, cond_wait, gate_t, mutex_free,
    mutex_init, mutex_lock, mutex_unlock,
)
from .syscalls cimport (
    EDQUOT, EINVAL, ENOMEM, ENOSPC, EPERM, EROFS, ESHUTDOWN, MAP_ANONYMOUS, MAP_FAILED,
    MAP_NORESERVE, MAP_PRIVATE, PROT_READ, PROT_WRITE, c_mmap, c_munmap, drop_pages,
)
from .trace cimport TRACE_REQUEST, trace_is_on
from .write_path cimport WRITE_FUA, image_write

cdef enum:
    FLAG_FUA = 1
    FLAG_NO_HOLE = 2
    COPY_LATER_MAX = 65536             # a longer read is better read and answered from one buffer


cdef inline uint64_t area_bytes() noexcept nogil:
    return <uint64_t>REQUEST_MAX + 2 * <uint64_t>BLOCK_MAX


cdef int device_init(device_t* d, gate_t* gate) noexcept nogil:
    cdef void* p
    cdef int i, rc
    d.gate = gate
    rc = mutex_init(&d.mutex, gate)
    if rc == 0:
        rc = failures_init(&d.failures, gate)
    if rc == 0:
        rc = cond_init(&d.free_request, gate)
    if rc == 0:
        rc = cond_init(&d.queued, gate)
    if rc == 0:
        rc = cond_init(&d.change_done, gate)
    if rc < 0:
        return rc
    d.layers = <image_t*>calloc(CHAIN_MAX, sizeof(image_t))
    d.stores = <storage_t**>calloc(STORES_MAX, sizeof(void*))
    d.requests = <request_t*>calloc(REQUESTS, sizeof(request_t))
    if d.layers == NULL or d.stores == NULL or d.requests == NULL:
        return -ENOMEM
    d.arena_bytes = REQUESTS * area_bytes()
    p = c_mmap(NULL, d.arena_bytes, PROT_READ | PROT_WRITE,
               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    if p == MAP_FAILED:
        return -errno
    d.arena = <uint8_t*>p
    for i in range(REQUESTS):
        d.requests[i].area = d.arena + <uint64_t>i * area_bytes()
        d.requests[i].data = d.requests[i].area + BLOCK_MAX
        d.requests[i].next = d.free_list
        d.free_list = &d.requests[i]
    d.free_count = REQUESTS
    d.copies_end = &d.copies
    return 0


cdef void device_free(device_t* d) noexcept nogil:
    cdef int i
    for i in range(d.store_count):
        storage_close(d.stores[i])
        free(d.stores[i])
    free(d.stores)
    if d.arena != NULL:
        c_munmap(d.arena, d.arena_bytes)
    free(d.requests)
    free(d.layers)
    fetch_free(&d.fetch)
    first_reads_free(&d.first_reads)
    failures_free(&d.failures)
    mutex_free(&d.mutex)
    cond_free(&d.free_request)
    cond_free(&d.queued)
    cond_free(&d.change_done)
    memset(d, 0, sizeof(device_t))


# -- requests ----------------------------------------------------------------------------------

cdef inline bint scarce(const device_t* d, uint64_t held) noexcept nogil:
    return d.free_count <= REQUESTS_SPARED + <int>held


cdef bint request_scarce(device_t* d, uint64_t held) noexcept nogil:
    cdef bint answer
    mutex_lock(&d.mutex)
    answer = scarce(d, held)
    mutex_unlock(&d.mutex)
    return answer


cdef request_t* taken(device_t* d) noexcept nogil:
    """One of the pool, which has one. The caller holds the mutex."""
    cdef request_t* r = d.free_list
    d.free_list = r.next
    d.free_count -= 1
    r.next = NULL
    r.connection = NULL
    r.flags = 0
    r.result = 0
    r.read_length = 0
    r.touched = 0
    r.parked = False
    r.waited = False
    r.answered = False
    r.apart = False
    r.held = NULL
    r.head_length = 0
    r.body_length = 0
    r.parts = 1
    gauge_add(&d.counters, G_IN_FLIGHT, 1)
    return r


cdef request_t* request_take(device_t* d, const uint64_t* held) noexcept nogil:
    cdef request_t* r
    mutex_lock(&d.mutex)
    while d.free_count == 0 or (held != NULL and scarce(d, load_relaxed(held))):
        cond_wait(&d.free_request, &d.mutex, NEVER)
    r = taken(d)
    mutex_unlock(&d.mutex)
    return r


cdef request_t* request_try(device_t* d, uint64_t held) noexcept nogil:
    cdef request_t* r = NULL
    mutex_lock(&d.mutex)
    if not scarce(d, held):
        r = taken(d)
    mutex_unlock(&d.mutex)
    return r


cdef request_t* move_apart(device_t* d, request_t* r) noexcept nogil:
    """What may wait for long leaves the pool to others, as far as memory is allowed for it. The
    request as it goes on; r is somebody else's then."""
    cdef request_t* q = parking_copy(&d.parking, r)
    cdef request_t** link
    if q == NULL:
        return r
    mutex_lock(&d.mutex)
    link = &d.changes
    while link[0] != r:
        link = &link[0].next_change
    link[0] = q
    q.next_change = r.next_change      # its neighbour may have gone meanwhile
    mutex_unlock(&d.mutex)
    if q.held != NULL:
        fetch_sub_acq_rel(q.held, 1)
    gauge_add(&d.counters, G_IN_FLIGHT, 1)
    request_give(d, r)
    return q


cdef void request_give(device_t* d, request_t* r) noexcept nogil:
    gauge_add(&d.counters, G_IN_FLIGHT, -1)
    if r.apart:
        parking_free(&d.parking, r)
        return
    # One large request must not keep its pages resident for ever.
    if r.touched > KEEP_BYTES:
        drop_pages(r.area, area_bytes())
    mutex_lock(&d.mutex)
    r.next = d.free_list
    d.free_list = r
    d.free_count += 1
    # All: they wait for different numbers of free requests.
    cond_broadcast(&d.free_request)
    mutex_unlock(&d.mutex)


cdef void request_part_done(device_t* d, request_t* r) noexcept nogil:
    if fetch_sub_acq_rel(&r.parts, 1) == 1:
        request_give(d, r)


cdef bint overlaps_change(const device_t* d, uint64_t length, uint64_t offset,
        uint64_t before) noexcept nogil:
    """Does a change handed over earlier than before touch the range? The caller holds the mutex."""
    cdef const request_t* other = d.changes
    while other != NULL:
        if (other.order < before and other.offset < offset + length
                and offset < other.offset + other.length):
            return True
        other = other.next_change
    return False


cdef bint device_changing(device_t* d, uint64_t length, uint64_t offset) noexcept nogil:
    cdef bint found
    if load_acquire(&d.change_count) == 0:
        return False
    mutex_lock(&d.mutex)
    found = overlaps_change(d, length, offset, NEVER)
    mutex_unlock(&d.mutex)
    return found


cdef bint behind_parked(const device_t* d, const request_t* r) noexcept nogil:
    """Does an earlier change of the range wait for space, or for a thread to try it again? The
    caller holds the mutex."""
    cdef const request_t* other = d.changes
    while other != NULL:
        if (other.parked and other.order < r.order and other.offset < r.offset + r.length
                and r.offset < other.offset + other.length):
            return True
        other = other.next_change
    return False


cdef bint may_wait(const device_t* d, request_t* r) noexcept nogil:
    """The caller holds the mutex, so that a connection that leaves finds what is parked."""
    return (r.connection != NULL and not d.parking.closing
            and (d.is_leaving == NULL or not d.is_leaving(r)))


cdef bint wait_or_behind(device_t* d, const request_t* r) noexcept nogil:
    """Wait for earlier changes of the range. True: one is parked. The caller holds the mutex."""
    while not behind_parked(d, r):
        if not overlaps_change(d, r.length, r.offset, r.order):
            return False
        cond_wait(&d.change_done, &d.mutex, NEVER)
    return True


cdef int device_begin_change(device_t* d, request_t** changing) noexcept nogil:
    """Wait for earlier changes of the range. 1: it is parked behind one; -ENOSPC: it would be, and
    may not. The request may become another one (move_apart).

    Only those that are not parked are waited for: they are on some thread, because the queue is in
    order. A thread that waited for a parked one might be the last."""
    cdef request_t* r = changing[0]
    cdef int rc = 0
    mutex_lock(&d.mutex)
    if wait_or_behind(d, r) and may_wait(d, r):
        mutex_unlock(&d.mutex)
        r = changing[0] = move_apart(d, r)
        mutex_lock(&d.mutex)
    if wait_or_behind(d, r):
        rc = 1 if may_wait(d, r) else -ENOSPC
    if rc == 1:
        parking_keep(&d.parking, r, clock_now(d.gate))
        cond_broadcast(&d.change_done)
    r.growths = d.parking.growths
    mutex_unlock(&d.mutex)
    return rc


cdef bint device_park_change(device_t* d, request_t** changing) noexcept nogil:
    """A change that failed: let it wait for space, if that is what it lacks and it may. The request
    may become another one."""
    cdef request_t* r = changing[0]
    cdef bint parked
    if not device_waits(d) or (r.result != -ENOSPC and r.result != -EDQUOT):
        return False
    r = changing[0] = move_apart(d, r)
    mutex_lock(&d.mutex)
    parked = may_wait(d, r) and parking_take(&d.parking, r, clock_now(d.gate))
    if parked:
        cond_broadcast(&d.change_done)
    mutex_unlock(&d.mutex)
    return parked


cdef void device_requeue(device_t* d) noexcept nogil:
    cdef request_t** link = &d.queue_head
    cdef request_t* r
    if d.parking.first == NULL:
        return
    while d.parking.first != NULL:
        r = parking_next(&d.parking)
        while link[0] != NULL and link[0].parked and link[0].order < r.order:
            link = &link[0].next
        r.next = link[0]
        link[0] = r
        if r.next == NULL:
            d.queue_tail = r
    cond_broadcast(&d.queued)


cdef void device_unpark(device_t* d) noexcept nogil:
    mutex_lock(&d.mutex)
    device_requeue(d)
    mutex_unlock(&d.mutex)


cdef void device_stop_waiting(device_t* d) noexcept nogil:
    mutex_lock(&d.mutex)
    d.parking.closing = True
    device_requeue(d)
    mutex_unlock(&d.mutex)


cdef void device_ask_growth(device_t* d) noexcept nogil:
    mutex_lock(&d.mutex)
    parking_ask(&d.parking, clock_now(d.gate))
    mutex_unlock(&d.mutex)


cdef void device_storage_grown(device_t* d, bint ok) noexcept nogil:
    # It asks the kernel, which is not done under the mutex.
    parking_look(&d.parking)
    mutex_lock(&d.mutex)
    parking_answer(&d.parking, ok, clock_now(d.gate))
    device_requeue(d)
    mutex_unlock(&d.mutex)


cdef void forget_change(device_t* d, request_t* r) noexcept nogil:
    cdef request_t** link
    mutex_lock(&d.mutex)
    link = &d.changes
    while link[0] != r:
        link = &link[0].next_change
    link[0] = r.next_change
    store_release(&d.change_count, d.change_count - 1)
    # There may be space for others, too, and what is behind it need not wait any more.
    if r.waited:
        parking_ended(&d.parking)
    if r.waited or r.op != OP_WRITE:
        device_requeue(d)
    cond_broadcast(&d.change_done)
    mutex_unlock(&d.mutex)


cdef void add_change(device_t* d, request_t* r) noexcept nogil:
    """The caller holds the mutex."""
    r.order = d.next_order
    d.next_order += 1
    r.next_change = d.changes
    d.changes = r
    store_release(&d.change_count, d.change_count + 1)


cdef bint device_mark(device_t* d, request_t* r) noexcept nogil:
    cdef bint free_to_go
    mutex_lock(&d.mutex)
    free_to_go = not overlaps_change(d, r.length, r.offset, NEVER)
    if free_to_go:
        add_change(d, r)
    mutex_unlock(&d.mutex)
    return free_to_go


cdef void device_unmark(device_t* d, request_t* r) noexcept nogil:
    forget_change(d, r)


cdef void device_enqueue(device_t* d, request_t* r) noexcept nogil:
    r.next = NULL
    r.distant = d.base_may_hang and request_needs_base(d.image, r)
    mutex_lock(&d.mutex)
    if changes_disk(r):
        if d.base_may_hang and not r.distant:
            r.distant = request_behind_distant(d.image, r, d.changes)
        add_change(d, r)
    if d.queue_tail != NULL:
        d.queue_tail.next = r
    else:
        d.queue_head = r
    d.queue_tail = r
    cond_signal(&d.queued)
    mutex_unlock(&d.mutex)


cdef request_t* device_begin_copy(device_t* d, uint64_t held, uint64_t length,
        uint64_t offset) noexcept nogil:
    cdef image_t* m = d.image
    cdef uint64_t bs = m.block_size, end = offset + length
    cdef request_t* r
    if (length > COPY_LATER_MAX or d.fetch.bytes or offset % bs or (end % bs and end < m.base_size)
            or not copy_on_read_admit(m, length, True)):
        return NULL
    r = request_try(d, held)
    if r == NULL:
        copy_on_read_leave(m, length)
        return NULL
    r.op = OP_READ
    r.offset = r.read_offset = offset
    r.length = r.read_length = length
    r.touched = length
    r.answered = True
    return r


cdef void device_call_copy_off(device_t* d, request_t* r) noexcept nogil:
    copy_on_read_leave(d.image, r.read_length)
    r.answered = False
    r.read_length = 0


cdef void device_enqueue_copies(device_t* d, request_t* first, request_t** end) noexcept nogil:
    mutex_lock(&d.mutex)
    d.copies_end[0] = first
    d.copies_end = end
    # One of the crew is enough: nobody waits for it.
    cond_signal(&d.queued)
    mutex_unlock(&d.mutex)


# -- the switch --------------------------------------------------------------------------------

cdef void device_execute(device_t* d, request_t* r, block_t* n) noexcept nogil:
    cdef bint fua = (r.flags & FLAG_FUA) != 0 or d.write_through
    cdef int rc
    if r.op == OP_READ:
        rc = execute_read(d.image, &d.fetch, r, n)
    elif r.op == OP_WRITE:
        # The rooms beside the payload, too: copy-on-write fills them.
        r.touched = r.length + 2 * d.image.block_size
        rc = image_write(d.image, r.data, r.length, r.offset, WRITE_FUA if fua else 0, n)
        fua = False
    elif r.op == OP_FLUSH:
        rc = commit_flush(&d.image.commit, n) if not d.image.read_only else 0
    elif r.op == OP_DISCARD:
        rc = image_trim(d.image, r.length, r.offset, n)
    elif r.op == OP_WRITE_ZEROES:
        r.touched = 3 * d.image.block_size
        rc = image_write_zeroes(d.image, r.length, r.offset, (r.flags & FLAG_NO_HOLE) != 0,
            r.data, n)
    elif r.op == OP_STATUS:
        rc = execute_status(d.image, r)
        fua = False
    else:
        rc = -EINVAL
    if rc == 0 and fua and r.op in (OP_DISCARD, OP_WRITE_ZEROES):
        rc = commit_flush(&d.image.commit, n)
    r.result = rc


cdef void device_settle(device_t* d, request_t* r, block_t* n) noexcept nogil:
    if r.op == OP_READ and r.result == 0 and d.image.copy_on_read and not d.image.read_only:
        copy_on_read_settle(d.image, r.data - (r.offset - r.read_offset), r.read_length,
                            r.read_offset, r.answered, n)
    if r.answered:
        copy_on_read_leave(d.image, r.read_length)


cdef void device_trace(device_t* d, block_t* n, const progress_t* before, int op, uint64_t offset,
        uint64_t length, int result, uint64_t begin_ns, uint64_t end_ns) noexcept nogil:
    cdef progress_t after
    cdef int source = 0
    if not trace_is_on(&d.counters.trace):
        return
    if op == OP_READ:
        after = progress_of(n)
        source = ((1 if after.image_bytes != before.image_bytes else 0)
                  | (2 if after.base_bytes != before.base_bytes else 0)
                  | (4 if after.zero_bytes != before.zero_bytes else 0))
    counters_trace(&d.counters, n, TRACE_REQUEST, op, begin_ns, end_ns, offset, length, result,
                   source)


cdef void device_account(device_t* d, block_t* n, const progress_t* before, int op, uint64_t offset,
        uint64_t length, int result, uint64_t begin_ns) noexcept nogil:
    cdef uint64_t end = clock_now(d.gate)
    count_request(n, before, op, length, result, end - begin_ns)
    device_trace(d, n, before, op, offset, length, result, begin_ns, end)
    # Nobody waits any more for what a lost connection had asked for.
    if result < 0 and result != -ESHUTDOWN:
        if result not in (-EINVAL, -EPERM, -EROFS):
            note_time(n, T_IO_ERROR, end)
        failure_note(&d.failures, op, result, offset, length,
                     progress_of(n).base_errors != before.base_errors)
