# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Layer 1. storage_t over an NBD server. See nbd_storage.pxd.

A call is cut into pieces, several of which are in flight over all connections at once. Pieces of
reads that fail are sent again, with back-off, until the call's time is over. A write is sent once:
when its connection is lost nobody knows whether the server still carries it out, and a repetition
could be overtaken by it after newer data. Then the write fails, and so does every later flush, as
it does when the lost connection had carried writes that no flush covers (I6)."""
from libc.errno cimport errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset
from .limits cimport NS_PER_MS, NS_PER_S
from .nbd_library cimport COMMAND_FUA, COMMAND_NO_HOLE
from .nbd_pool cimport (
    NBD_CAN_FUA, NBD_CAN_STATUS, NBD_CAN_TRIM, NBD_CAN_ZERO, NBD_EXTENTS, NBD_FLUSH, NBD_KNOWN,
    NBD_READ, NBD_READY, NBD_STATUS, NBD_TRIM, NBD_WRITE, NBD_ZERO, REQUEST_FREE, REQUEST_RETIRED,
    REQUEST_SENT, REQUEST_WANTED, nbd_call_begin, nbd_call_end, nbd_call_t, nbd_connection_t,
    nbd_cut, nbd_extent_t, nbd_offers, nbd_options_t, nbd_pool_close, nbd_pool_interrupt,
    nbd_pool_open, nbd_pool_pick, nbd_pool_t, nbd_pool_wait, nbd_request_t, nbd_send,
)
from .storage cimport (
    EXTENT_DATA, EXTENT_ZERO, IO_DSYNC, IO_NOWAIT, IO_ONCE, ZERO_HINT, ZERO_KEEP, storage_ops_t,
    storage_t,
)
from .sync cimport (
    clock_now, cond_free, cond_init, cond_wait, mutex_free, mutex_init, mutex_lock, mutex_unlock,
)
from .syscalls cimport (
    EAGAIN, EDQUOT, EINVAL, EIO, ENOENT, ENOMEM, ENOSPC, ENOTCONN, EPERM, EROFS,
    F_DUPFD_CLOEXEC, c_close, c_dup_cloexec,
)

cdef enum:
    PIECE = 262144                     # bytes of one request
    ZERO_PIECE = 33554432              # and of one that carries no data
    STATUS_PIECE = 1073741824
    ZEROS_STEP = 65536
    SLOTS = 8                          # pieces of one call in flight
    RETRY_MIN_MS = 20
    RETRY_MAX_MS = 2000
    STALL_MAX_S = 20                   # a connection without an answer for so long is given up
    STALL_PARTS = 3                    # or for this part of the time limit
    STATUS_REST_MIN_S = 60             # block status that failed is not asked for again so soon
    STATUS_REST_MAX_S = 3600

cdef struct transfer_t:
    nbd_call_t call
    nbd_pool_t* pool
    int op
    uint8_t* data                      # of the next piece; NULL where none is carried
    uint64_t left
    uint64_t offset
    uint64_t piece
    uint32_t flags
    bint repeats                       # failed pieces are sent again
    bint once                          # but not those that the server itself refuses
    uint64_t deadline
    int failed                         # negative errno of the first failure
    nbd_request_t[8] slots             # SLOTS

cdef extern from *:
    """
    static const uint8_t fvd_nbd_zeros[65536];
    """
    const uint8_t* fvd_nbd_zeros


# -- one call ----------------------------------------------------------------------------------

cdef int errno_of(int error) noexcept nogil:
    """A server's error as a storage error."""
    if error in (ENOSPC, EDQUOT):
        return -ENOSPC
    return -EROFS if error == EPERM else -EIO


cdef void settle(transfer_t* t, nbd_request_t* r, uint64_t now) noexcept nogil:
    """A piece is retired: done, to be sent again, or a failure."""
    cdef bint again = (t.repeats and not (t.once and r.error != ENOTCONN)) or r.refused
    if r.error == 0:
        r.state = REQUEST_FREE
    elif again and r.error not in (EINVAL, EPERM) and now < t.deadline and t.failed == 0:
        r.back_off_ns = min(max(r.back_off_ns * 2, RETRY_MIN_MS * NS_PER_MS),
                            RETRY_MAX_MS * NS_PER_MS)
        # After a lost connection it waits for another one rather than for the clock.
        r.not_before_ns = now + (NS_PER_MS if r.error == ENOTCONN else r.back_off_ns)
        r.state = REQUEST_WANTED
    else:
        r.state = REQUEST_FREE
        if t.failed == 0:
            t.failed = errno_of(r.error)


cdef void next_piece(transfer_t* t, nbd_request_t* r) noexcept nogil:
    r.state = REQUEST_WANTED
    r.call = &t.call
    r.op = t.op
    r.flags = t.flags
    r.data = t.data
    r.offset = t.offset
    # Pieces end at multiples of the piece's size, so that a server's blocks stay whole.
    r.length = min(t.left, t.piece - t.offset % t.piece)
    r.not_before_ns = 0
    r.back_off_ns = 0
    t.left -= r.length
    t.offset += r.length
    if t.data != NULL and t.op != NBD_STATUS:
        t.data += r.length


cdef bint advance(transfer_t* t, uint64_t now) noexcept nogil:
    """Settle, fill and send. Whether anything is still to come. The mutex is held, but not while
    a piece is being sent; so everything is looked at again afterwards."""
    cdef nbd_request_t* r
    cdef nbd_connection_t* c
    cdef bint busy = False
    cdef int i
    for i in range(SLOTS):
        r = &t.slots[i]
        if r.state == REQUEST_RETIRED:
            settle(t, r, now)
        if r.state == REQUEST_FREE and t.left and t.failed == 0:
            next_piece(t, r)
        if r.state == REQUEST_WANTED and (t.failed < 0 or now >= t.deadline or t.pool.interrupted):
            r.state = REQUEST_FREE
            if t.failed == 0:
                t.failed = -EIO
        if r.state == REQUEST_WANTED and now >= r.not_before_ns:
            c = nbd_pool_pick(t.pool)
            if c != NULL:
                nbd_send(c, r)
        if r.state != REQUEST_FREE:
            busy = True
    return busy


cdef uint64_t stall_ns(const nbd_pool_t* p) noexcept nogil:
    return min(<uint64_t>STALL_MAX_S * NS_PER_S, p.options.timeout_ns // STALL_PARTS)


cdef void cut_stalled(nbd_pool_t* p, uint64_t since) noexcept nogil:
    """Give up every connection that has had no answer since then: what silenced one of them may
    have silenced all."""
    cdef int i
    for i in range(p.started):
        if p.connections[i].state == NBD_READY and p.connections[i].progress_ns <= since:
            nbd_cut(&p.connections[i])


cdef uint64_t look_after(transfer_t* t, uint64_t now) noexcept nogil:
    """Cut connections that keep this call waiting too long; when to look again."""
    cdef nbd_request_t* r
    cdef nbd_connection_t* c
    cdef uint64_t wake = t.deadline if now < t.deadline else now + NS_PER_S
    cdef uint64_t stalled
    cdef int i
    for i in range(SLOTS):
        r = &t.slots[i]
        if r.state == REQUEST_RETIRED:
            return now
        if r.state == REQUEST_WANTED and r.not_before_ns > now:
            wake = min(wake, r.not_before_ns)
        if r.state != REQUEST_SENT:
            continue
        c = r.connection
        stalled = max(c.progress_ns, r.sent_ns) + stall_ns(t.pool)
        if now >= t.deadline:
            nbd_cut(c)
        elif now >= stalled:
            nbd_cut(c)
            cut_stalled(t.pool, r.sent_ns)
        else:
            wake = min(wake, stalled)
    return wake


cdef int run(transfer_t* t) noexcept nogil:
    """Carry a call to its end. Returns with no piece in flight."""
    cdef nbd_pool_t* p = t.pool
    cdef uint64_t now, wake
    cdef int rc = cond_init(&t.call.changed, p.options.gate)
    if rc < 0:
        return rc
    mutex_lock(&p.mutex)
    if p.request_max and t.op in (NBD_READ, NBD_WRITE):
        t.piece = min(t.piece, p.request_max)
    nbd_call_begin(p, &t.call)
    while True:
        now = clock_now(p.options.gate)
        if p.interrupted:
            t.deadline = min(t.deadline, p.quiet_until)
        if not advance(t, now):
            break
        wake = look_after(t, now)
        if wake > now:
            cond_wait(&t.call.changed, &p.mutex, wake)
    nbd_call_end(p, &t.call)
    mutex_unlock(&p.mutex)
    cond_free(&t.call.changed)
    return t.failed


cdef void prepare(transfer_t* t, nbd_storage_t* s, int op, void* data, uint64_t length,
        uint64_t offset) noexcept nogil:
    memset(t, 0, sizeof(transfer_t))
    t.pool = &s.pool
    t.op = op
    t.data = <uint8_t*>data
    t.left = length
    t.offset = offset
    t.piece = PIECE
    t.repeats = op in (NBD_READ, NBD_STATUS)
    t.deadline = clock_now(s.pool.options.gate) + s.pool.options.timeout_ns


cdef int simple(nbd_storage_t* s, int op, void* data, uint64_t length, uint64_t offset,
        uint32_t flags, uint64_t piece) noexcept nogil:
    cdef transfer_t t
    prepare(&t, s, op, data, length, offset)
    t.flags = flags
    t.piece = piece
    return run(&t)


# -- operations --------------------------------------------------------------------------------

cdef inline bint outside(const nbd_storage_t* s, uint64_t length, uint64_t offset) noexcept nogil:
    return offset > s.head.length or length > s.head.length - offset


cdef inline uint64_t unit(const nbd_storage_t* s) noexcept nogil:
    """The server's smallest unit; 1 until it is known, then libnbd's own check is the guard."""
    return s.pool.align if nbd_offers(&s.pool, NBD_KNOWN) else 1


cdef int read_odd(nbd_storage_t* s, uint8_t* buffer, uint64_t length, uint64_t offset,
        uint64_t align) noexcept nogil:
    """Read whole units around a range that has parts of some."""
    cdef uint64_t begin = offset // align * align
    cdef uint64_t end = (offset + length + align - 1) // align * align
    cdef uint8_t* b = <uint8_t*>malloc(end - begin)
    cdef int rc
    if b == NULL:
        return -ENOMEM
    rc = simple(s, NBD_READ, b, end - begin, begin, 0, PIECE)
    if rc == 0:
        memcpy(buffer, b + (offset - begin), length)
    free(b)
    return rc


cdef int nbd_read(storage_t* p, void* buffer, uint64_t length, uint64_t offset,
        int flags) noexcept nogil:
    cdef nbd_storage_t* s = <nbd_storage_t*>p
    cdef uint64_t align = unit(s)
    cdef transfer_t t
    if flags & IO_NOWAIT:
        return -EAGAIN
    if outside(s, length, offset):
        return -EIO
    if (offset | length) & (align - 1):
        return read_odd(s, <uint8_t*>buffer, length, offset, align)
    prepare(&t, s, NBD_READ, buffer, length, offset)
    t.once = flags & IO_ONCE != 0
    return run(&t)


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
    rc = simple(s, NBD_READ, b, align, begin, 0, PIECE)
    if rc == 0:
        rc = simple(s, NBD_READ, b + (end - begin - align), align, end - align, 0, PIECE)
    if rc == 0:
        memcpy(b + (offset - begin), data, length)
        rc = simple(s, NBD_WRITE, b, end - begin, begin, flags, PIECE)
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
        rc = simple(s, NBD_WRITE, <void*>buffer, length, offset, command, PIECE)
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
        return errno_of(r.error)
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
    prepare(&t, s, NBD_FLUSH, NULL, 0, 0)
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
        return simple(s, NBD_TRIM, NULL, whole, offset + head, 0, ZERO_PIECE)
    if not nbd_offers(&s.pool, NBD_CAN_ZERO):
        return write_zeros(s, length, offset)
    rc = write_zeros(s, head, offset)
    if rc == 0:
        rc = write_zeros(s, tail, offset + length - tail)
    if rc == 0 and whole:
        rc = simple(s, NBD_ZERO, NULL, whole, offset + head,
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
    prepare(&t, s, NBD_STATUS, extents, (length + align - 1) // align * align, offset)
    t.piece = t.offset + t.left        # one request
    t.once = True
    rc = run(&t)
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


cdef int nbd_status(storage_t* p, uint64_t length, uint64_t offset, uint64_t* run) noexcept nogil:
    cdef nbd_storage_t* s = <nbd_storage_t*>p
    cdef uint64_t begin, ask
    cdef int kind = EXTENT_DATA
    run[0] = length
    if not nbd_offers(&s.pool, NBD_KNOWN | NBD_CAN_STATUS) or outside(s, length, offset):
        return EXTENT_DATA
    mutex_lock(&s.extents_mutex)
    if (s.pool.options.writable or s.extents_count == 0 or offset < s.extents_begin
            or offset >= s.extents[s.extents_count - 1].end):
        begin = offset // unit(s) * unit(s)
        # Ahead of the range, too: one round trip then serves many questions.
        ask = length + (offset - begin)
        if not s.pool.options.writable:
            ask = max(ask, min(<uint64_t>STATUS_PIECE, s.head.length - begin))
        ask = min(ask, <uint64_t>STATUS_PIECE)
        s.extents_count = 0
        s.extents_begin = begin
        ask_status(s, s.extents, ask, begin, &s.extents_count)
    # What cannot be learned is data: reading it will tell.
    if s.extents_count and offset < s.extents[s.extents_count - 1].end:
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


cdef void nbd_close(storage_t* p) noexcept nogil:
    cdef nbd_storage_t* s = <nbd_storage_t*>p
    if not s.opened:
        return
    s.opened = False
    nbd_pool_close(&s.pool)
    mutex_free(&s.edge)
    mutex_free(&s.extents_mutex)
    if s.keeper_fd >= 0:
        c_close(s.keeper_fd)
    free(s.extents)
    s.extents = NULL


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
    if s.extents == NULL:
        return -ENOMEM
    if o.keeper_fd >= 0:
        s.keeper_fd = c_dup_cloexec(o.keeper_fd, F_DUPFD_CLOEXEC, 3)
        if s.keeper_fd < 0:
            return -errno
    rc = mutex_init(&s.edge, o.gate)
    if rc == 0:
        rc = mutex_init(&s.extents_mutex, o.gate)
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
        free(s.extents)
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
