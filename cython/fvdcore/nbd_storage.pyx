# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Layer 1. storage_t over an NBD server. See nbd_storage.pxd.

What fails of a read is sent again, until the call's time is over (nbd_transfer). A write is sent
once: when its connection is lost nobody knows whether the server still carries it out, and a
repetition could be overtaken by it after newer data. Then the write fails, and so does every later
flush, as it does when the lost connection had carried writes that no flush covers (I6)."""
from libc.errno cimport errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset
from .limits cimport NEVER, NS_PER_MS, NS_PER_S
from .nbd_library cimport COMMAND_FUA, COMMAND_NO_HOLE
from .nbd_pool cimport (
    NBD_CAN_FUA, NBD_CAN_STATUS, NBD_CAN_TRIM, NBD_CAN_ZERO, NBD_EXTENTS, NBD_FLUSH, NBD_KNOWN,
    NBD_READ, NBD_READY, NBD_STATUS, NBD_TRIM, NBD_WRITE, NBD_ZERO, REQUEST_RETIRED, nbd_call_begin,
    nbd_call_end, nbd_connection_t, nbd_cut, nbd_extent_t, nbd_offers, nbd_options_t,
    nbd_pool_close, nbd_pool_interrupt, nbd_pool_open, nbd_pool_pick, nbd_pool_t, nbd_pool_wait,
    nbd_request_t, nbd_send,
)
from .nbd_transfer cimport (
    NBD_PIECE, nbd_errno, nbd_prepare, nbd_run, nbd_transfer, transfer_t,
)
from .storage cimport (
    EXTENT_DATA, EXTENT_ZERO, IO_DSYNC, IO_HALF, IO_NOWAIT, IO_ONCE, ZERO_HINT, ZERO_KEEP,
    storage_ops_t, storage_t,
)
from .sync cimport (
    clock_now, cond_broadcast, cond_free, cond_init, cond_wait, mutex_free, mutex_init, mutex_lock,
    mutex_unlock,
)
from .syscalls cimport (
    EAGAIN, EIO, ENOENT, ENOMEM, ENOSPC, ENOTCONN, EROFS, F_DUPFD_CLOEXEC, c_close, c_dup_cloexec,
)

cdef enum:
    ZERO_PIECE = 33554432              # bytes of a request that carries no data
    STATUS_PIECE = 1073741824
    ZEROS_STEP = 65536
    STATUS_REST_MIN_S = 60             # block status that failed is not asked for again so soon
    STATUS_REST_MAX_S = 3600

cdef extern from *:
    """
    static const uint8_t fvd_nbd_zeros[65536];
    """
    const uint8_t* fvd_nbd_zeros


# -- operations --------------------------------------------------------------------------------

cdef inline bint outside(const nbd_storage_t* s, uint64_t length, uint64_t offset) noexcept nogil:
    return offset > s.head.length or length > s.head.length - offset


cdef inline uint64_t unit(const nbd_storage_t* s) noexcept nogil:
    """The server's smallest unit; 1 until it is known, then libnbd's own check is the guard."""
    return s.pool.align if nbd_offers(&s.pool, NBD_KNOWN) else 1


cdef int read_even(nbd_storage_t* s, void* buffer, uint64_t length, uint64_t offset,
        int flags) noexcept nogil:
    cdef transfer_t t
    nbd_prepare(&t, &s.pool, NBD_READ, buffer, length, offset)
    t.once = flags & IO_ONCE != 0
    if flags & IO_HALF:
        t.deadline -= s.pool.options.timeout_ns // 2
    return nbd_run(&t)


cdef int read_odd(nbd_storage_t* s, uint8_t* buffer, uint64_t length, uint64_t offset, int flags,
        uint64_t align) noexcept nogil:
    """Read whole units around a range that has parts of some."""
    cdef uint64_t begin = offset // align * align
    cdef uint64_t end = (offset + length + align - 1) // align * align
    cdef uint8_t* b = <uint8_t*>malloc(end - begin)
    cdef int rc
    if b == NULL:
        return -ENOMEM
    rc = read_even(s, b, end - begin, begin, flags)
    if rc == 0:
        memcpy(buffer, b + (offset - begin), length)
    free(b)
    return rc


cdef int nbd_read(storage_t* p, void* buffer, uint64_t length, uint64_t offset,
        int flags) noexcept nogil:
    cdef nbd_storage_t* s = <nbd_storage_t*>p
    cdef uint64_t align = unit(s)
    if flags & IO_NOWAIT:
        return -EAGAIN
    if outside(s, length, offset):
        return -EIO
    if (offset | length) & (align - 1):
        return read_odd(s, <uint8_t*>buffer, length, offset, flags, align)
    return read_even(s, buffer, length, offset, flags)


cdef int write_odd(nbd_storage_t* s, const uint8_t* data, uint64_t length, uint64_t offset,
        uint32_t flags, uint64_t align) noexcept nogil:
    """Write parts of units. One at a time: two writers of one unit must not undo each other."""
    cdef uint64_t begin = offset // align * align
    cdef uint64_t end = (offset + length + align - 1) // align * align
    cdef uint8_t* b = <uint8_t*>malloc(end - begin)
    cdef int rc
    if b == NULL:
        return -ENOMEM
    mutex_lock(&s.edge)
    rc = nbd_transfer(&s.pool, NBD_READ, b, align, begin, 0, NBD_PIECE)
    if rc == 0:
        rc = nbd_transfer(&s.pool, NBD_READ, b + (end - begin - align), align, end - align, 0,
                          NBD_PIECE)
    if rc == 0:
        memcpy(b + (offset - begin), data, length)
        rc = nbd_transfer(&s.pool, NBD_WRITE, b, end - begin, begin, flags, NBD_PIECE)
    mutex_unlock(&s.edge)
    free(b)
    return rc


cdef int nbd_write(storage_t* p, const void* buffer, uint64_t length, uint64_t offset,
        int flags) noexcept nogil:
    cdef nbd_storage_t* s = <nbd_storage_t*>p
    cdef uint64_t align = unit(s)
    cdef uint32_t command = 0
    cdef int rc
    if flags & IO_DSYNC and nbd_offers(&s.pool, NBD_CAN_FUA):
        command = COMMAND_FUA
    if not s.pool.options.writable:
        return -EROFS
    if outside(s, length, offset):
        return -EIO
    if length == 0:
        return 0
    if (offset | length) & (align - 1):
        rc = write_odd(s, <const uint8_t*>buffer, length, offset, command, align)
    else:
        rc = nbd_transfer(&s.pool, NBD_WRITE, <void*>buffer, length, offset, command, NBD_PIECE)
    if rc == 0 and flags & IO_DSYNC and not command:
        rc = nbd_flush(p)
    return rc


cdef nbd_connection_t* unflushed(nbd_pool_t* p) noexcept nogil:
    cdef int i
    for i in range(p.started):
        if p.connections[i].changes != p.connections[i].flushed:
            return &p.connections[i]
    return NULL


cdef int flush_through(transfer_t* t, nbd_connection_t* c) noexcept nogil:
    """One flush on this very connection. The mutex is held."""
    cdef nbd_pool_t* p = t.pool
    cdef nbd_request_t* r = &t.slots[0]
    cdef uint64_t covered = c.changes, now
    memset(r, 0, sizeof(nbd_request_t))
    r.call = &t.call
    r.op = NBD_FLUSH
    nbd_send(c, r)
    while r.state != REQUEST_RETIRED:
        now = clock_now(p.options.gate)
        if p.interrupted:
            t.deadline = min(t.deadline, p.quiet_until)
        if now >= t.deadline:
            nbd_cut(c)
            now += NS_PER_S
        cond_wait(&t.call.changed, &p.mutex, max(now, t.deadline))
    if r.error == ENOTCONN:
        return -ENOTCONN
    if r.error:
        return nbd_errno(r.error)
    # The connection may have been lost since, and be another one now.
    if p.lost:
        return -EIO
    c.flushed = max(c.flushed, covered)
    return 0


cdef int flush_all(transfer_t* t) noexcept nogil:
    """Flush through every connection that carried writes since its last flush, at least through
    one. Through each of them: were the server another process since, only they would tell."""
    cdef nbd_pool_t* p = t.pool
    cdef nbd_connection_t* c
    cdef bint flushed = False, due
    cdef uint64_t now
    cdef int rc
    while not p.lost:
        c = unflushed(p)
        if c == NULL and flushed:
            return 0
        if c != NULL and c.state != NBD_READY:
            return -EIO
        due = c != NULL
        now = clock_now(p.options.gate)
        if c == NULL:
            c = nbd_pool_pick(p)
        if c == NULL:
            if now >= t.deadline or p.interrupted:
                return -EIO
            cond_wait(&t.call.changed, &p.mutex, t.deadline)
            continue
        rc = flush_through(t, c)
        # A connection that carried nothing since its last flush takes nothing along.
        if rc == -ENOTCONN and not due and now < t.deadline:
            cond_wait(&t.call.changed, &p.mutex, now + NS_PER_MS)
            continue
        if rc < 0:
            return -EIO if rc == -ENOTCONN else rc
        flushed = True
    return -EIO


cdef int nbd_flush(storage_t* head) noexcept nogil:
    cdef nbd_storage_t* s = <nbd_storage_t*>head
    cdef transfer_t t
    cdef int rc
    if not s.pool.options.writable:
        return 0
    nbd_prepare(&t, &s.pool, NBD_FLUSH, NULL, 0, 0)
    rc = cond_init(&t.call.changed, s.pool.options.gate)
    if rc < 0:
        return rc
    mutex_lock(&s.pool.mutex)
    nbd_call_begin(&s.pool, &t.call)
    rc = flush_all(&t)
    nbd_call_end(&s.pool, &t.call)
    mutex_unlock(&s.pool.mutex)
    cond_free(&t.call.changed)
    return rc


cdef int write_zeros(nbd_storage_t* s, uint64_t length, uint64_t offset) noexcept nogil:
    cdef uint64_t step
    cdef int rc = 0
    while length and rc == 0:
        step = min(length, <uint64_t>ZEROS_STEP)
        rc = nbd_write(&s.head, fvd_nbd_zeros, step, offset, 0)
        offset += step
        length -= step
    return rc


cdef int nbd_zero(storage_t* p, uint64_t length, uint64_t offset, int flags) noexcept nogil:
    cdef nbd_storage_t* s = <nbd_storage_t*>p
    cdef uint64_t align = unit(s), head, tail, whole
    cdef int rc = 0
    if not s.pool.options.writable:
        return -EROFS
    if outside(s, length, offset):
        return -EIO
    head = min(length, (align - offset % align) % align)
    tail = (offset + length) % align if length > head else 0
    whole = length - head - tail
    if flags & ZERO_HINT:
        if whole == 0 or not nbd_offers(&s.pool, NBD_CAN_TRIM):
            return 0
        return nbd_transfer(&s.pool, NBD_TRIM, NULL, whole, offset + head, 0, ZERO_PIECE)
    if not nbd_offers(&s.pool, NBD_CAN_ZERO):
        return write_zeros(s, length, offset)
    rc = write_zeros(s, head, offset)
    if rc == 0:
        rc = write_zeros(s, tail, offset + length - tail)
    if rc == 0 and whole:
        rc = nbd_transfer(&s.pool, NBD_ZERO, NULL, whole, offset + head,
                          COMMAND_NO_HOLE if flags & ZERO_KEEP else 0, ZERO_PIECE)
    return rc


# -- block status ------------------------------------------------------------------------------

cdef bint heard_since(nbd_pool_t* p, uint64_t begin) noexcept nogil:
    """Has the server been there in the later half of the time since then?"""
    cdef bint heard
    mutex_lock(&p.mutex)
    heard = p.heard_ns > begin + (clock_now(p.options.gate) - begin) // 2
    mutex_unlock(&p.mutex)
    return heard


cdef int ask_status(nbd_storage_t* s, nbd_extent_t* extents, uint64_t length, uint64_t offset,
        uint64_t* count) noexcept nogil:
    """What the server says about a range, from its start on; it may tell less than was asked."""
    cdef uint64_t align = unit(s), begin = clock_now(s.pool.options.gate)
    cdef transfer_t t
    cdef int rc
    if begin < s.status_rest_until:
        return -EIO                    # the server is there, but cannot tell: reads shall go on
    nbd_prepare(&t, &s.pool, NBD_STATUS, extents, (length + align - 1) // align * align, offset)
    t.piece = t.offset + t.left        # one request
    t.once = True
    rc = nbd_run(&t)
    count[0] = t.slots[0].extents if rc == 0 else 0
    if rc == 0:
        s.status_rest_s = 0
    elif t.slots[0].error not in (0, ENOTCONN) or heard_since(&s.pool, begin):
        s.status_rest_s = min(max(s.status_rest_s * 2, <uint64_t>STATUS_REST_MIN_S),
                              <uint64_t>STATUS_REST_MAX_S)
        s.status_rest_until = clock_now(s.pool.options.gate) + s.status_rest_s * NS_PER_S
    return rc


cdef int extent_at(const nbd_extent_t* extents, uint64_t count, uint64_t length, uint64_t offset,
        uint64_t* run) noexcept nogil:
    """The kind of the run at offset, which lies below the last entry's end."""
    cdef uint64_t low = 0, high = count, middle
    while low < high:
        middle = (low + high) // 2
        if extents[middle].end <= offset:
            low = middle + 1
        else:
            high = middle
    run[0] = min(length, extents[low].end - offset)
    return EXTENT_ZERO if extents[low].zero else EXTENT_DATA


cdef inline bint kept(const nbd_storage_t* s, uint64_t offset) noexcept nogil:
    """Was it told before, of an export that does not change?"""
    return (not s.pool.options.writable and s.extents_count and s.extents_begin <= offset
            and offset < s.extents[s.extents_count - 1].end)


cdef bint learn(nbd_storage_t* s, uint64_t length, uint64_t offset) noexcept nogil:
    """Ask what lies at offset; whether that was told. The mutex is held, but not while the server
    is asked: what is known is told meanwhile. One asks at a time, and whoever waits for him shares
    his fate: a server that hangs holds up each once."""
    cdef uint64_t begin = offset // unit(s) * unit(s), ask, count = 0
    cdef uint64_t failures = s.status_failures
    cdef nbd_extent_t* answer
    cdef int rc
    while s.asking:
        cond_wait(&s.told, &s.extents_mutex, NEVER)
        if s.status_failures != failures or kept(s, offset):
            return s.status_failures == failures
    # Ahead of the range, too: one round trip then serves many questions.
    ask = length + (offset - begin)
    if not s.pool.options.writable:
        ask = max(ask, min(<uint64_t>STATUS_PIECE, s.head.length - begin))
    s.asking = True
    mutex_unlock(&s.extents_mutex)
    rc = ask_status(s, s.answer, min(ask, <uint64_t>STATUS_PIECE), begin, &count)
    mutex_lock(&s.extents_mutex)
    s.asking = False
    if rc < 0:
        s.status_failures += 1
    else:
        answer = s.answer
        s.answer = s.extents
        s.extents = answer
        s.extents_count = count
        s.extents_begin = begin
    cond_broadcast(&s.told)
    return rc == 0


cdef int nbd_status(storage_t* p, uint64_t length, uint64_t offset, uint64_t* run) noexcept nogil:
    cdef nbd_storage_t* s = <nbd_storage_t*>p
    cdef int kind = EXTENT_DATA
    run[0] = length
    if not nbd_offers(&s.pool, NBD_KNOWN | NBD_CAN_STATUS) or outside(s, length, offset):
        return EXTENT_DATA
    mutex_lock(&s.extents_mutex)
    # What cannot be learned is data: reading it will tell.
    if ((kept(s, offset) or learn(s, length, offset)) and s.extents_count
            and offset < s.extents[s.extents_count - 1].end):
        kind = extent_at(s.extents, s.extents_count, length, offset, run)
    mutex_unlock(&s.extents_mutex)
    return kind


cdef void nbd_start_writeback(storage_t* p, uint64_t length, uint64_t offset) noexcept nogil:
    pass


# -- open and close ----------------------------------------------------------------------------

cdef int nbd_resize(storage_t* p, uint64_t length) noexcept nogil:
    """NBD has no such request: like a device, an export has the room that it has."""
    if not (<nbd_storage_t*>p).pool.options.writable:
        return -EROFS
    return 0 if length <= p.length else -ENOSPC


cdef void free_extents(nbd_storage_t* s) noexcept nogil:
    free(s.extents)
    free(s.answer)
    s.extents = NULL
    s.answer = NULL


cdef void nbd_close(storage_t* p) noexcept nogil:
    cdef nbd_storage_t* s = <nbd_storage_t*>p
    if not s.opened:
        return
    s.opened = False
    nbd_pool_close(&s.pool)
    mutex_free(&s.edge)
    mutex_free(&s.extents_mutex)
    cond_free(&s.told)
    if s.keeper_fd >= 0:
        c_close(s.keeper_fd)
    free_extents(s)


cdef void nbd_storage_interrupt(storage_t* p, uint64_t quiet_ns) noexcept nogil:
    cdef nbd_storage_t* s = <nbd_storage_t*>p
    # A data file still has to take what is being written.
    if p.ops != NULL and p.ops.close == nbd_close and s.opened and not s.pool.options.writable:
        nbd_pool_interrupt(&s.pool, quiet_ns)


cdef int wait_for_server(nbd_storage_t* s, const char** reason) noexcept nogil:
    cdef uint64_t deadline = clock_now(s.pool.options.gate) + s.pool.options.timeout_ns
    cdef int rc
    mutex_lock(&s.pool.mutex)
    rc = nbd_pool_wait(&s.pool, deadline)
    mutex_unlock(&s.pool.mutex)
    if rc < 0:
        reason[0] = &s.pool.error[0]
    else:
        s.head.length = s.pool.length
    return rc


cdef int prepare_storage(nbd_storage_t* s, const char* uri, const nbd_options_t* o) noexcept nogil:
    cdef int rc
    s.extents = <nbd_extent_t*>malloc(NBD_EXTENTS * sizeof(nbd_extent_t))
    s.answer = <nbd_extent_t*>malloc(NBD_EXTENTS * sizeof(nbd_extent_t))
    if s.extents == NULL or s.answer == NULL:
        return -ENOMEM
    if o.keeper_fd >= 0:
        s.keeper_fd = c_dup_cloexec(o.keeper_fd, F_DUPFD_CLOEXEC, 3)
        if s.keeper_fd < 0:
            return -errno
    rc = mutex_init(&s.edge, o.gate)
    if rc == 0:
        rc = mutex_init(&s.extents_mutex, o.gate)
    if rc == 0:
        rc = cond_init(&s.told, o.gate)
    if rc == 0:
        rc = nbd_pool_open(&s.pool, uri, o)
    return rc


cdef int nbd_storage_open(nbd_storage_t* s, const char* uri, const nbd_options_t* o,
        const char** reason) noexcept nogil:
    cdef int rc
    memset(s, 0, sizeof(nbd_storage_t))
    s.keeper_fd = -1
    rc = prepare_storage(s, uri, o)
    if rc < 0:
        if rc == -ENOENT:
            reason[0] = b"libnbd is not installed (Debian package libnbd0)"
        if s.keeper_fd >= 0:
            c_close(s.keeper_fd)
        free_extents(s)
        return rc
    s.opened = True
    s.head.length = o.length
    if o.length == 0 or o.writable:
        rc = wait_for_server(s, reason)
        if rc < 0:
            nbd_close(&s.head)
            return rc
    s.ops = storage_ops_t(nbd_read, nbd_write, nbd_flush, nbd_zero, nbd_status,
                          nbd_start_writeback, nbd_resize, nbd_close)
    s.head.ops = &s.ops
    return 0
