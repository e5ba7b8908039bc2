# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Layer 4. One NBD connection. See nbd_loop.pxd.

A batch of requests is received with one call; each that can be served without blocking is served at
once into the reply buffer; the batch's replies leave with one call. What would block goes to the
crew.

Counting is for the batch, too: its requests have one arrival and one end, so that one more costs
two additions. While a trace is taken, and where one fails or goes to the crew, it is counted alone.

End: EOF, DISC or a protocol violation stops the receiving; requests with the crew are finished (and
answered, while the socket lives) before the descriptor is closed. Parting is an end at which the
client loses nothing: the receiving stops between two messages, the socket stays open, and whoever
gets it goes on with the bytes of the next message that have arrived already."""
from libc.errno cimport errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memmove
from .atomics cimport (
    exchange_acq_rel, fetch_add_relaxed, fetch_sub_acq_rel, load_acquire, store_release,
)
from .counters cimport (
    N_RECV_CALLS, OP_DISCARD, OP_FLUSH, OP_READ, OP_STATUS, OP_WRITE,
    OP_WRITE_ZEROES, T_BUSY_SINCE, count, count_request, note_time, progress_of, progress_t,
    tally_read, tally_write,
)
from .crew cimport device_enlarge_crew
from .dispatch cimport (
    device_account, device_begin_copy, device_call_copy_off, device_changing, device_enqueue,
    device_enqueue_copies, device_mark, device_trace, device_unmark, device_unpark, device_waits,
    request_part_done, request_scarce, request_take,
)
from .limits cimport (
    INLINE_READ_MAX, NEVER, RECEIVE_BUFFER, REPLY_BUFFER, REQUEST_MAX,
    SEND_TIMEOUT_S, SOCKET_BUFFER, SPLICE_MIN,
)
from .nbd_connection cimport CONNECTION_FREE, CONNECTION_LIVE, connection_t
from .nbd_gather cimport gather_asks, gather_init, gather_note
from .nbd_pauses cimport pauses_after, pauses_before, pauses_begin, pauses_last
from .nbd_reply cimport error_chunk
from .nbd_send cimport send_batch, send_spliced
from .nbd_wire cimport (
    NBD_CHUNK_DATA, NBD_CHUNK_NONE, NBD_CMD_BLOCK_STATUS, NBD_CMD_DISC, NBD_CMD_FLUSH,
    NBD_CMD_READ, NBD_CMD_TRIM, NBD_CMD_WRITE, NBD_CMD_WRITE_ZEROES, NBD_FLAG_DF, NBD_FLAG_FUA,
    NBD_FLAG_NO_HOLE, NBD_FLAG_REQ_ONE, NBD_HEADER, NBD_REQUEST_MAGIC, nbd_chunk, nbd_error,
    nbd_parse, nbd_request_t, nbd_simple, put_be64,
)
from .read_path cimport image_lasting, image_read, image_read_plain, image_read_tallied, image_run
from .request cimport request_t
from .splice cimport splice_close, splice_fill, splice_init
from .storage cimport EXTENT_DATA, IO_NOWAIT
from .sync cimport (
    clock_now, cond_broadcast, cond_init, cond_wait, mutex_init, mutex_lock, mutex_unlock,
    thread_join, thread_start, thread_wake, thread_wake_allow,
)
from .syscalls cimport (
    EAGAIN, EDQUOT, EINTR, EINVAL, ENOMEM, ENOSPC, EPERM, ESHUTDOWN, SHUT_RD, SHUT_RDWR, c_close,
    c_recv, c_shutdown, hung_up, nap, nap_exactly, socket_setup, unread,
)
from .trace cimport trace_is_on
from .write_path cimport WRITE_FUA, WRITE_TRY, image_write

cdef enum:
    REPLY_HEAD_MAX = 32
    END_CONNECTION = -1


# -- replies -----------------------------------------------------------------------------------

cdef void reply_now(connection_t* c, const nbd_request_t* q, int op, int result) noexcept nogil:
    """A reply without body into the batch."""
    if c.reply_length + REPLY_HEAD_MAX > REPLY_BUFFER:
        send_batch(c)
    if result < 0 and c.structured and op in (OP_READ, OP_STATUS):
        c.reply_length += error_chunk(c.reply + c.reply_length, result, q.cookie)
    else:
        c.reply_length += nbd_simple(c.reply + c.reply_length, nbd_error(result), q.cookie)


# -- serving -----------------------------------------------------------------------------------

cdef int operation(int kind) noexcept nogil:
    if kind == NBD_CMD_READ:
        return OP_READ
    if kind == NBD_CMD_WRITE:
        return OP_WRITE
    if kind == NBD_CMD_FLUSH:
        return OP_FLUSH
    if kind == NBD_CMD_TRIM:
        return OP_DISCARD
    if kind == NBD_CMD_WRITE_ZEROES:
        return OP_WRITE_ZEROES
    if kind == NBD_CMD_BLOCK_STATUS:
        return OP_STATUS
    return -1


cdef int check(const connection_t* c, const nbd_request_t* q, int op) noexcept nogil:
    """What the protocol says is wrong with a request, as a negative errno, or 0."""
    cdef int allowed = NBD_FLAG_FUA
    cdef bint changes = op in (OP_WRITE, OP_DISCARD, OP_WRITE_ZEROES)
    cdef uint64_t size
    if op < 0:
        return -EINVAL
    if op == OP_WRITE_ZEROES:
        allowed |= NBD_FLAG_NO_HOLE
    elif op == OP_READ and c.structured:
        allowed |= NBD_FLAG_DF
    elif op == OP_STATUS:
        allowed |= NBD_FLAG_REQ_ONE
    if q.flags & ~allowed:
        return -EINVAL
    if changes and c.read_only:
        return -EPERM
    if op == OP_FLUSH:
        return 0
    if op == OP_STATUS and (not c.has_status or q.length == 0):
        return -EINVAL
    size = load_acquire(&c.device.image.size)
    if q.offset > size or q.length > size - q.offset:
        return -ENOSPC if op in (OP_WRITE, OP_WRITE_ZEROES) else -EINVAL
    if op == OP_READ and q.length > REQUEST_MAX:
        return -EINVAL
    return 0


cdef void copy_batch(connection_t* c) noexcept nogil:
    """Let the crew copy what the reads of the batch fetched."""
    if c.copies != NULL:
        device_enqueue_copies(c.device, c.copies, c.copies_end)
        fetch_sub_acq_rel(&c.held, c.copies_held)
        c.copies = NULL
        c.copies_held = 0


cdef request_t* to_request(connection_t* c, const nbd_request_t* q, int op) noexcept nogil:
    cdef request_t* r
    # Before it may have to wait, the client gets the answers that there are.
    if c.reply_length and request_scarce(c.device, load_acquire(&c.held)):
        send_batch(c)
    # Nor is it to wait for what waits here to be copied.
    copy_batch(c)
    r = request_take(c.device, &c.held)
    fill_request(c, q, op, r)
    return r


cdef void fill_request(connection_t* c, const nbd_request_t* q, int op,
        request_t* r) noexcept nogil:
    r.connection = c
    r.held = &c.held
    r.op = op
    r.flags = q.flags
    r.cookie = q.cookie
    r.offset = q.offset
    r.length = q.length
    r.begin_ns = c.begin_ns


cdef void hand_over(connection_t* c, request_t* r) noexcept nogil:
    mutex_lock(&c.mutex)
    store_release(&c.in_flight, c.in_flight + 1)
    fetch_add_relaxed(&c.held, 1)
    mutex_unlock(&c.mutex)
    device_enqueue(c.device, r)


cdef int read_apart(connection_t* c, const nbd_request_t* q, uint8_t* p) noexcept nogil:
    """A read whose parts lie apart, or one that is told alone."""
    cdef progress_t before
    cdef int rc
    if not c.alone:
        rc = image_read_tallied(c.device.image, p, q.length, q.offset, IO_NOWAIT, c.counters,
                                &c.tally)
        if rc == 0:
            tally_read(&c.tally, q.length)
        return rc
    before = progress_of(c.counters)
    rc = image_read(c.device.image, p, q.length, q.offset, IO_NOWAIT, c.counters)
    if rc == 0:
        device_account(c.device, c.counters, &before, OP_READ, q.offset, q.length, rc, c.begin_ns)
    return rc


cdef uint64_t read_head(const connection_t* c, const nbd_request_t* q, uint8_t* p) noexcept nogil:
    """What comes before the data of a read, at p; its length."""
    cdef uint64_t head
    if c.structured and q.length == 0:
        # A data chunk has at least one byte of data.
        return nbd_chunk(p, NBD_CHUNK_NONE, q.cookie, 0)
    if not c.structured:
        return nbd_simple(p, 0, q.cookie)
    head = nbd_chunk(p, NBD_CHUNK_DATA, q.cookie, 8 + q.length)
    put_be64(p + head, q.offset)
    return head + 8


cdef bint read_spliced(connection_t* c, const nbd_request_t* q) noexcept nogil:
    """Answer a large read with the pages of the page cache themselves. False: it was not done."""
    cdef uint8_t[REPLY_HEAD_MAX] head
    cdef uint64_t address = 0, length
    cdef int fd = image_lasting(c.device.image, q.length, q.offset, &address)
    if fd < 0:
        return False
    length = read_head(c, q, &head[0])
    if not splice_fill(&c.splice, &head[0], length, fd, q.length, address):
        return False
    # Earlier answers are counted when they leave, this one when it does.
    send_batch(c)
    tally_read(&c.tally, q.length)
    send_spliced(c, length + q.length)
    return True


cdef bint read_inline(connection_t* c, const nbd_request_t* q) noexcept nogil:
    """Serve a read from what is in memory, into the reply buffer. False: it would block."""
    cdef uint64_t head
    cdef uint8_t* p
    cdef int rc = 0
    if q.length > INLINE_READ_MAX:
        return False
    if q.length >= SPLICE_MIN and not c.alone and not c.splice.useless and read_spliced(c, q):
        return True
    if c.reply_length + REPLY_HEAD_MAX + q.length > REPLY_BUFFER:
        send_batch(c)
    p = c.reply + c.reply_length
    head = read_head(c, q, p)
    if c.alone or not image_read_plain(c.device.image, p + head, q.length, q.offset, c.counters,
                                       &rc):
        rc = read_apart(c, q, p + head)
    elif rc == 0:
        tally_read(&c.tally, q.length)
    # Also after an error: the crew tries again, and when it fails as well it knows what failed.
    if rc < 0:
        return False
    c.reply_length += head + q.length
    return True


cdef bint connection_is_gone(request_t* r) noexcept nogil:
    return hung_up((<connection_t*>r.connection).fd)


cdef bint connection_is_leaving(request_t* r) noexcept nogil:
    return load_acquire(&(<connection_t*>r.connection).leaving) != 0


cdef int write_marked(connection_t* c, const nbd_request_t* q, uint8_t* payload) noexcept nogil:
    """A write on this thread while other connections are there; see device_mark."""
    cdef int rc = -ESHUTDOWN
    c.mark.op = OP_WRITE
    c.mark.offset = q.offset
    c.mark.length = q.length
    if not device_mark(c.device, &c.mark):
        return -EAGAIN
    if not hung_up(c.fd):
        rc = image_write(c.device.image, payload, q.length, q.offset, WRITE_TRY, c.counters)
    device_unmark(c.device, &c.mark)
    return rc


cdef int write_inline(connection_t* c, const nbd_request_t* q, uint8_t* payload) noexcept nogil:
    cdef int rc
    # A full fence: whoever serves a second connection sees this write, or we see that there is one.
    exchange_acq_rel(&c.writing, 1)
    if load_acquire(&c.device.several):
        store_release(&c.writing, 0)
        return write_marked(c, q, payload)
    rc = image_write(c.device.image, payload, q.length, q.offset, WRITE_TRY, c.counters)
    store_release(&c.writing, 0)
    return rc


cdef void serve_write(connection_t* c, const nbd_request_t* q, uint8_t* payload) noexcept nogil:
    """payload lies in the receive buffer."""
    cdef request_t* r
    cdef progress_t before
    cdef int rc = -EAGAIN
    if (not q.flags & NBD_FLAG_FUA and not c.device.crew_writes and not pauses_last(&c.pauses)
            and not device_changing(c.device, q.length, q.offset)):
        pauses_before(&c.pauses)
        rc = write_inline(c, q, payload)
        if pauses_after(&c.pauses, c.device.gate):
            device_enlarge_crew(c.device)
    # What may wait for space does so with the crew.
    if rc != -EAGAIN and not (rc in (-ENOSPC, -EDQUOT) and device_waits(c.device)):
        reply_now(c, q, OP_WRITE, rc)
        if rc == 0 and not c.alone:
            tally_write(&c.tally, q.length)
        else:
            # Nothing that is written at once reads the base.
            before = progress_of(c.counters)
            device_account(c.device, c.counters, &before, OP_WRITE, q.offset, q.length, rc,
                           c.begin_ns)
        return
    r = to_request(c, q, OP_WRITE)
    memcpy(r.data, payload, q.length)
    r.touched = q.length
    hand_over(c, r)


cdef bint copies_base(const connection_t* c, const nbd_request_t* q) noexcept nogil:
    """Would a read of this range have to settle, which is the crew's?"""
    return c.device.image.copy_on_read and load_acquire(&c.device.image.complete) == 0 \
        and q.offset < c.device.image.base_size and not all_local(c, q)


cdef bint all_local(const connection_t* c, const nbd_request_t* q) noexcept nogil:
    cdef uint64_t run = 0
    return q.length == 0 or (image_run(c.device.image, q.length, q.offset, &run) == EXTENT_DATA
                             and run == q.length)


cdef void refuse(connection_t* c, const nbd_request_t* q, int op, int rc) noexcept nogil:
    """Count a request that was not even begun."""
    cdef progress_t before = progress_of(c.counters)
    count_request(c.counters, &before, op, 0, rc, 0)
    device_trace(c.device, c.counters, &before, op, q.offset, q.length, rc, c.begin_ns,
                 c.begin_ns)


cdef bint read_and_copy(connection_t* c, const nbd_request_t* q) noexcept nogil:
    """Answer a read of the base now; the crew copies the data when the batch is sent. False: all of
    it is for the crew."""
    cdef request_t* r = device_begin_copy(c.device, load_acquire(&c.held), q.length, q.offset)
    if r == NULL:
        return False
    fill_request(c, q, OP_READ, r)
    if not read_inline(c, q):
        device_call_copy_off(c.device, r)
        hand_over(c, r)
        return True
    memcpy(r.data, c.reply + c.reply_length - q.length, q.length)
    if c.copies == NULL:
        c.copies_end = &c.copies
    c.copies_end[0] = r
    c.copies_end = &r.next
    # Answers may have to wait for the client before the crew gets it.
    c.copies_held += 1
    fetch_add_relaxed(&c.held, 1)
    return True


cdef void serve_one(connection_t* c, const nbd_request_t* q, uint8_t* payload) noexcept nogil:
    cdef int op = operation(q.type)
    cdef int rc = check(c, q, op)
    if rc < 0:
        reply_now(c, q, op, rc)
        refuse(c, q, op if op >= 0 else OP_STATUS, rc)
    elif op == OP_WRITE:
        serve_write(c, q, payload)
    elif op == OP_READ and (read_and_copy(c, q) if copies_base(c, q) else read_inline(c, q)):
        pass
    else:
        hand_over(c, to_request(c, q, op))


# -- receiving ---------------------------------------------------------------------------------

cdef ssize_t receive_some(connection_t* c, uint8_t* p, uint64_t n) noexcept nogil:
    cdef ssize_t got
    while True:
        got = c_recv(c.fd, p, n, 0)
        count(c.counters, N_RECV_CALLS, 1)
        if got >= 0 or errno != EINTR:
            return got


cdef bint receive_large(connection_t* c, const nbd_request_t* q, const uint8_t* have,
        uint64_t got) noexcept nogil:
    """A write larger than the receive buffer: its payload goes straight to a request's buffer."""
    cdef request_t* r
    cdef ssize_t n
    cdef int rc = check(c, q, OP_WRITE)
    send_batch(c)
    r = to_request(c, q, OP_WRITE)
    r.touched = q.length
    memcpy(r.data, have, got)
    while got < q.length:
        n = receive_some(c, r.data + got, q.length - got)
        if n <= 0:
            request_part_done(c.device, r)
            return False
        got += <uint64_t>n
    if rc == 0:
        hand_over(c, r)
        return True
    reply_now(c, q, OP_WRITE, rc)
    refuse(c, q, OP_WRITE, rc)
    request_part_done(c.device, r)
    return True


cdef int64_t serve_batch(connection_t* c, uint64_t have) noexcept nogil:
    """Serve the complete requests among the bytes received; bytes used, or END_CONNECTION."""
    cdef nbd_request_t q
    cdef uint64_t at = 0, need
    c.begin_ns = clock_now(c.device.gate)
    pauses_begin(&c.pauses, c.begin_ns)
    c.alone = trace_is_on(&c.device.counters.trace)
    # A kernel that gave this connection up re-sends on another one what it had sent here; to run it
    # now could be to run it after newer data. Nobody can read the answers anyway.
    if load_acquire(&c.device.several) and hung_up(c.fd):
        return END_CONNECTION
    note_time(c.counters, T_BUSY_SINCE, c.begin_ns)
    while have - at >= NBD_HEADER:
        q = nbd_parse(c.receive + at)
        if q.magic != NBD_REQUEST_MAGIC or q.type == NBD_CMD_DISC:
            return END_CONNECTION
        need = NBD_HEADER
        if q.type == NBD_CMD_WRITE:
            # Nothing of ours takes so much: the stream cannot be trusted any further.
            if q.length > REQUEST_MAX:
                return END_CONNECTION
            need += q.length
        if need > RECEIVE_BUFFER:
            if not receive_large(c, &q, c.receive + at + NBD_HEADER, have - at - NBD_HEADER):
                return END_CONNECTION
            return <int64_t>have
        if have - at < need:
            break
        serve_one(c, &q, c.receive + at + NBD_HEADER)
        at += need
        c.batch += 1
    return <int64_t>at


cdef bint receive_loop(connection_t* c) noexcept nogil:
    """Until the client leaves, or (True) until it is asked to part: then c.have bytes of the next
    message are in the buffer."""
    cdef uint64_t have = c.have
    cdef int64_t used
    cdef ssize_t n
    cdef bint fresh = have > 0         # bytes that a predecessor received
    gather_init(&c.gather)
    nap_exactly()
    while True:
        if not fresh:
            if load_acquire(&c.parting):
                c.have = have
                return True
            if c.gather.nap_ns:
                nap(c.gather.nap_ns)
            n = c_recv(c.fd, c.receive + have, RECEIVE_BUFFER - have, 0)
            count(c.counters, N_RECV_CALLS, 1)
            if n < 0 and errno == EINTR:
                continue
            if n <= 0:
                return False
            have += <uint64_t>n
        fresh = False
        c.batch = 0
        used = serve_batch(c, have)
        # Is the client still reading answers, at the moment when it gets more?
        gather_note(&c.gather, c.batch, gather_asks(&c.gather) and unread(c.fd) == 0)
        note_time(c.counters, T_BUSY_SINCE, 0)
        send_batch(c)
        copy_batch(c)
        if used < 0 or load_acquire(&c.dead):
            return False
        have -= <uint64_t>used
        if have and used:
            memmove(c.receive, c.receive + used, have)


cdef void release_buffers(connection_t* c) noexcept nogil:
    free(c.receive)
    free(c.reply)
    c.receive = NULL
    c.reply = NULL
    splice_close(&c.splice)


cdef void* connection_main(void* argument) noexcept nogil:
    cdef connection_t* c = <connection_t*>argument
    cdef bint parted
    thread_wake_allow()
    while True:
        parted = receive_loop(c)
        if not parted:
            store_release(&c.leaving, 1)
            device_unpark(c.device)
        mutex_lock(&c.mutex)
        while (c.in_flight or c.sending) and (not parted or load_acquire(&c.parting)):
            cond_wait(&c.changed, &c.mutex, NEVER)
        if not parted or load_acquire(&c.parting):
            break
        mutex_unlock(&c.mutex)         # the parting was called off
    parted = parted and not load_acquire(&c.dead)
    c.parted = parted
    if not parted:
        c_shutdown(c.fd, SHUT_RDWR)
        c_close(c.fd)
        c.fd = -1
    mutex_unlock(&c.mutex)
    if not parted:
        release_buffers(c)
    c.ended(c)
    return NULL


cdef int connection_start(connection_t* c, const uint8_t* received,
        uint64_t received_length) noexcept nogil:
    cdef int rc = socket_setup(c.fd, SOCKET_BUFFER, SEND_TIMEOUT_S)
    if rc < 0:
        return rc
    if received_length > RECEIVE_BUFFER:
        return -EINVAL
    splice_init(&c.splice)
    c.receive = <uint8_t*>malloc(RECEIVE_BUFFER)
    c.reply = <uint8_t*>malloc(REPLY_BUFFER)
    if c.receive == NULL or c.reply == NULL:
        rc = -ENOMEM
    if rc == 0 and received_length:
        memcpy(c.receive, received, received_length)
        c.have = received_length
    if rc == 0:
        rc = mutex_init(&c.mutex, c.device.gate)
    if rc == 0:
        rc = cond_init(&c.changed, c.device.gate)
    if rc == 0:
        c.state = CONNECTION_LIVE
        rc = thread_start(&c.thread, c.device.gate, connection_main, c)
    if rc < 0:
        free(c.receive)
        free(c.reply)
        c.state = CONNECTION_FREE
    return rc


cdef void connection_part(connection_t* c) noexcept nogil:
    store_release(&c.parting, 1)
    thread_wake(&c.thread)


cdef void connection_stay(connection_t* c) noexcept nogil:
    mutex_lock(&c.mutex)
    store_release(&c.parting, 0)
    cond_broadcast(&c.changed)
    mutex_unlock(&c.mutex)


cdef int connection_restart(connection_t* c) noexcept nogil:
    thread_join(&c.thread)
    c.parted = False
    store_release(&c.parting, 0)
    store_release(&c.state, CONNECTION_LIVE)
    return thread_start(&c.thread, c.device.gate, connection_main, c)


cdef int connection_give(connection_t* c) noexcept nogil:
    cdef int fd = c.fd
    c.fd = -1
    c.parted = False
    release_buffers(c)
    return fd


cdef void connection_shut(connection_t* c, bint now) noexcept nogil:
    mutex_lock(&c.mutex)
    if c.fd >= 0:
        c_shutdown(c.fd, SHUT_RDWR if now else SHUT_RD)
        if now:
            store_release(&c.dead, 1)
    mutex_unlock(&c.mutex)
