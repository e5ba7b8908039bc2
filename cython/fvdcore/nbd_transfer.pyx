# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Layer 1. One call over an NBD server. See nbd_transfer.pxd."""
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memset
from .limits cimport NS_PER_MS, NS_PER_S
from .nbd_pool cimport (
    NBD_READ, NBD_READY, NBD_STATUS, NBD_WRITE, REQUEST_FREE, REQUEST_RETIRED, REQUEST_SENT,
    REQUEST_WANTED, nbd_call_begin, nbd_call_end, nbd_connection_t, nbd_cut, nbd_pool_pick,
    nbd_pool_t, nbd_request_t, nbd_send,
)
from .sync cimport clock_now, cond_free, cond_init, cond_wait, mutex_lock, mutex_unlock
from .syscalls cimport EDQUOT, EINVAL, EIO, ENOSPC, ENOTCONN, EPERM, EROFS

cdef enum:
    RETRY_MIN_MS = 20
    RETRY_MAX_MS = 2000
    STALL_MAX_S = 20                   # a connection without an answer for so long is given up
    STALL_PARTS = 3                    # or for this part of the time limit


cdef int nbd_errno(int error) noexcept nogil:
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
            t.failed = nbd_errno(r.error)


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
    for i in range(NBD_SLOTS):
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
    for i in range(NBD_SLOTS):
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


cdef int nbd_run(transfer_t* t) noexcept nogil:
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


cdef void nbd_prepare(transfer_t* t, nbd_pool_t* p, int op, void* data, uint64_t length,
        uint64_t offset) noexcept nogil:
    memset(t, 0, sizeof(transfer_t))
    t.pool = p
    t.op = op
    t.data = <uint8_t*>data
    t.left = length
    t.offset = offset
    t.piece = NBD_PIECE
    t.repeats = op in (NBD_READ, NBD_STATUS)
    t.deadline = clock_now(p.options.gate) + p.options.timeout_ns


cdef int nbd_transfer(nbd_pool_t* p, int op, void* data, uint64_t length, uint64_t offset,
        uint32_t flags, uint64_t piece) noexcept nogil:
    cdef transfer_t t
    nbd_prepare(&t, p, op, data, length, offset)
    t.flags = flags
    t.piece = piece
    return nbd_run(&t)
