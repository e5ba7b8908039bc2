# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Layer 4. Sending. See nbd_send.pxd.

Whoever has a reply and finds nobody sending owns the write side until the list of waiting replies
is empty; others append and go on. A crew thread that finds the socket full leaves the write side to
the device's sender thread (links); only the connection's own thread waits for its client, for
SEND_TIMEOUT_S at most without progress."""
from libc.errno cimport errno
from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memset
from posix.uio cimport iovec
from .atomics cimport fetch_sub_acq_rel, load_acquire, store_release
from .counters cimport N_SEND_CALLS, count, tally_count
from .dispatch cimport device_t, request_part_done
from .limits cimport NEVER
from .nbd_reply cimport build_reply
from .splice cimport splice_close
from .sync cimport cond_broadcast, cond_wait, mutex_lock, mutex_unlock
from .syscalls cimport (
    EAGAIN, EINTR, MSG_DONTWAIT, MSG_NOSIGNAL, SHUT_RDWR, SPLICE_F_MOVE, c_sendmsg, c_shutdown,
    c_splice, msghdr,
)


cdef void kill_connection(connection_t* c) noexcept nogil:
    store_release(&c.dead, 1)
    c_shutdown(c.fd, SHUT_RDWR)


cdef bint send_all(connection_t* c, iovec* v, int n, int flags,
        uint64_t* sent_bytes) noexcept nogil:
    """Send until all is sent or the connection is dead; False: a MSG_DONTWAIT send would wait. The
    caller owns the write side. *sent_bytes grows by what was sent."""
    cdef msghdr message
    cdef ssize_t sent
    while n and not load_acquire(&c.dead):
        memset(&message, 0, sizeof(message))
        message.msg_iov = v
        message.msg_iovlen = <size_t>n
        sent = c_sendmsg(c.fd, &message, flags | MSG_NOSIGNAL)
        count(c.counters, N_SEND_CALLS, 1)
        if sent < 0:
            if errno == EINTR:
                continue
            if errno == EAGAIN and flags & MSG_DONTWAIT:
                return False
            kill_connection(c)
            return True
        sent_bytes[0] += <uint64_t>sent
        while n and <size_t>sent >= v.iov_len:
            sent -= <ssize_t>v.iov_len
            v += 1
            n -= 1
        if n:
            v.iov_base = <uint8_t*>v.iov_base + sent
            v.iov_len -= <size_t>sent
    return True


cdef bint send_reply(connection_t* c, request_t* r, int flags) noexcept nogil:
    """Send what is left of the first waiting reply."""
    cdef iovec[2] v
    cdef uint64_t skip = c.out_sent
    cdef int parts = 1 if r.body_length else 0
    # The address, not the array: a struct made from an array would copy it through the pointer.
    v[0] = iovec(&r.head[0], r.head_length)
    v[1] = iovec(r.data, r.body_length)
    if skip >= r.head_length:
        v[1] = iovec(r.data + (skip - r.head_length), r.body_length - (skip - r.head_length))
        return send_all(c, &v[1], parts, flags, &c.out_sent)
    v[0] = iovec(&r.head[0] + skip, r.head_length - skip)
    return send_all(c, &v[0], 1 + parts, flags, &c.out_sent)


cdef void begin_sending(connection_t* c) noexcept nogil:
    mutex_lock(&c.mutex)
    while c.sending:
        cond_wait(&c.changed, &c.mutex, NEVER)
    c.sending = True
    mutex_unlock(&c.mutex)


cdef void begin_answers(connection_t* c) noexcept nogil:
    """Count what was served, before anybody can have the answers, and take the write side."""
    tally_count(&c.tally, c.counters, c.begin_ns, c.device.gate)
    begin_sending(c)


cdef bint send_waiting(connection_t* c, int flags) noexcept nogil:
    """Send the crew's replies until none waits, then give up the write side. False: the socket is
    full and the write side still owned."""
    cdef device_t* d = c.device
    cdef request_t* r
    mutex_lock(&c.mutex)
    while c.out_head != NULL:
        r = c.out_head
        mutex_unlock(&c.mutex)
        if not send_reply(c, r, flags):
            return False
        mutex_lock(&c.mutex)
        c.out_sent = 0
        c.out_head = r.next
        if c.out_head == NULL:
            c.out_tail = NULL
        # Before the request is given back: whoever waits for it looks at this number.
        store_release(&c.in_flight, c.in_flight - 1)
        if not r.apart:
            fetch_sub_acq_rel(&c.held, 1)
        mutex_unlock(&c.mutex)
        request_part_done(d, r)
        mutex_lock(&c.mutex)
    c.sending = False
    cond_broadcast(&c.changed)
    mutex_unlock(&c.mutex)
    return True


cdef bint connection_resume(connection_t* c) noexcept nogil:
    return send_waiting(c, MSG_DONTWAIT)


cdef void connection_give_up(connection_t* c) noexcept nogil:
    kill_connection(c)
    send_waiting(c, MSG_DONTWAIT)


cdef void send_batch(connection_t* c) noexcept nogil:
    cdef iovec v
    cdef uint64_t sent = 0
    if c.reply_length == 0:
        return
    v = iovec(c.reply, c.reply_length)
    begin_answers(c)
    send_all(c, &v, 1, 0, &sent)
    send_waiting(c, 0)
    c.reply_length = 0


cdef void empty_pipe(connection_t* c, uint64_t length) noexcept nogil:
    """The pipe into the socket. The caller owns the write side."""
    cdef ssize_t n
    while length and not load_acquire(&c.dead):
        n = c_splice(c.splice.ends[0], NULL, c.fd, NULL, length, SPLICE_F_MOVE)
        count(c.counters, N_SEND_CALLS, 1)
        if n > 0:
            length -= <uint64_t>n
        elif n == 0 or errno != EINTR:
            kill_connection(c)
    if length:
        splice_close(&c.splice)


cdef void send_spliced(connection_t* c, uint64_t length) noexcept nogil:
    begin_answers(c)
    empty_pipe(c, length)
    send_waiting(c, 0)


cdef void connection_reply(request_t* r) noexcept nogil:
    cdef connection_t* c = <connection_t*>r.connection
    cdef bint mine
    build_reply(r, c.structured, c.status_id)
    mutex_lock(&c.mutex)
    r.next = NULL
    if c.out_tail != NULL:
        c.out_tail.next = r
    else:
        c.out_head = r
    c.out_tail = r
    mine = not c.sending
    if mine:
        c.sending = True
    mutex_unlock(&c.mutex)
    # A crew thread never waits for a client: what the socket does not take is the sender's.
    if mine and not send_waiting(c, MSG_DONTWAIT):
        c.stalled(c)
