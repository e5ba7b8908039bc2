# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Layer 1. Connections to an NBD server. See nbd_pool.pxd.

A request's buffer belongs to the library from nbd_send until the request is retired. A caller that
has waited long enough does not walk away from it: it cuts the connection, which retires it. So a
server that hangs, or answers late, can never write into memory that is somebody else's by then."""
from libc.errno cimport errno
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport getenv
from libc.string cimport memset, strlen, strncpy
from .atomics cimport store_release
from .checks cimport invariant
from .limits cimport NEVER, NS_PER_MS, NS_PER_S
from .nbd_library cimport (
    BLOCK_SIZE_MAXIMUM, BLOCK_SIZE_MINIMUM, DIRECTION_READ, DIRECTION_WRITE, TRANSPORT_TCP,
    TRANSPORT_UNIX, nbd_chunks_t, nbd_completion_t, nbd_extents_t, nbd_handle, nbd_library_load,
)
from .sync cimport (
    clock_now, cond_broadcast, cond_free, cond_init, cond_signal, cond_wait, mutex_free,
    mutex_init, mutex_lock, mutex_unlock, thread_join, thread_start,
)
from .syscalls cimport (
    EFD_CLOEXEC, EFD_NONBLOCK, EINVAL, ENOTCONN, EPROTO, ETIMEDOUT, EUCLEAN, POLLIN, POLLOUT,
    c_close, c_eventfd, c_getrandom, c_poll, c_read, c_write, pollfd,
)

cdef enum:
    BACK_OFF_MIN_MS = 50
    BACK_OFF_MAX_MS = 3000
    CONNECT_MAX_S = 10                 # one attempt to connect and negotiate
    STATUS_ZERO = 2                    # base:allocation, NBD_STATE_ZERO


# -- requests ----------------------------------------------------------------------------------

cdef int on_chunk(void* argument, const void* data, size_t count, uint64_t offset,
        unsigned int status, int* error) noexcept nogil:
    """Keep how much a server has told; the library wants no server to tell everything. An error
    is a part without length, and fails the request by itself."""
    cdef nbd_request_t* r = <nbd_request_t*>argument
    r.told += count
    r.told_squares += count * (2 * (offset - r.offset) + count)
    return 0


cdef int on_completion(void* argument, int* error) noexcept nogil:
    # Only this thread writes it until on_retired has run.
    cdef nbd_request_t* r = <nbd_request_t*>argument
    r.error = error[0]
    if (r.op == NBD_READ and r.error == 0
            and (r.told != r.length or r.told_squares != r.length * r.length)):
        r.error = EPROTO               # what is missing in the buffer are zeros of the library's
    return 1


cdef int on_extents(void* argument, const char* context, uint64_t offset, uint32_t* entries,
        size_t count, int* error) noexcept nogil:
    """Keep the runs of a block status, merged; a server's lies are cut to the range asked for."""
    cdef nbd_request_t* r = <nbd_request_t*>argument
    cdef nbd_extent_t* kept = <nbd_extent_t*>r.data
    cdef uint64_t at = r.offset, end = r.offset + r.length
    cdef size_t i
    cdef bint zero
    r.extents = 0
    if offset != r.offset:
        return 0
    for i in range(0, count - count % 2, 2):
        if at >= end or entries[i] == 0:
            break
        at += min(<uint64_t>entries[i], end - at)
        zero = entries[i + 1] & STATUS_ZERO != 0
        if r.extents and kept[r.extents - 1].zero == zero:
            kept[r.extents - 1].end = at
        elif r.extents == NBD_EXTENTS:
            break
        else:
            kept[r.extents].end = at
            kept[r.extents].zero = zero
            r.extents += 1
    return 0


cdef void on_retired(void* argument) noexcept nogil:
    """The library's last touch of a request and its data."""
    cdef nbd_request_t* r = <nbd_request_t*>argument
    cdef nbd_connection_t* c = r.connection
    cdef nbd_pool_t* p = c.pool
    mutex_lock(&p.mutex)
    c.in_flight -= 1
    if r.error != ENOTCONN:
        c.progress_ns = clock_now(p.options.gate)
        p.heard_ns = c.progress_ns
    r.state = REQUEST_RETIRED
    cond_signal(&r.call.changed)
    mutex_unlock(&p.mutex)


cdef int64_t issue(nbd_pool_t* p, nbd_handle* h, nbd_request_t* r) noexcept nogil:
    cdef nbd_completion_t done
    cdef nbd_extents_t extents
    cdef nbd_chunks_t chunks
    done.callback = on_completion
    done.free = on_retired
    done.user_data = r
    if r.op == NBD_READ:
        chunks.callback = on_chunk
        chunks.user_data = r
        chunks.free = NULL
        return p.lib.aio_pread_structured(h, r.data, r.length, r.offset, chunks, done, 0)
    if r.op == NBD_WRITE:
        return p.lib.aio_pwrite(h, r.data, r.length, r.offset, done, r.flags)
    if r.op == NBD_ZERO:
        return p.lib.aio_zero(h, r.length, r.offset, done, r.flags)
    if r.op == NBD_TRIM:
        return p.lib.aio_trim(h, r.length, r.offset, done, r.flags)
    if r.op == NBD_FLUSH:
        return p.lib.aio_flush(h, done, 0)
    extents.callback = on_extents
    extents.user_data = r
    extents.free = NULL
    return p.lib.aio_block_status(h, r.length, r.offset, extents, done, 0)


cdef void wake(nbd_connection_t* c) noexcept nogil:
    cdef uint64_t one = 1
    c_write(c.event_fd, &one, 8)


cdef void nbd_send(nbd_connection_t* c, nbd_request_t* r) noexcept nogil:
    cdef nbd_pool_t* p = c.pool
    cdef nbd_handle* h = c.handle
    cdef int why = 0
    cdef int64_t cookie
    invariant(c.state == NBD_READY)
    c.users += 1
    r.connection = c
    r.state = REQUEST_SENT
    r.error = ENOTCONN
    r.refused = False
    r.told = 0
    r.told_squares = 0
    r.sent_ns = clock_now(p.options.gate)
    if c.in_flight == 0:
        c.progress_ns = r.sent_ns
    c.in_flight += 1
    if r.op in (NBD_WRITE, NBD_ZERO, NBD_TRIM):
        c.changes += 1
    mutex_unlock(&p.mutex)
    # From here on, r may be retired at any time, but the caller cannot leave: it is us.
    cookie = issue(p, h, r)
    if cookie < 0:
        why = p.lib.get_errno()
    elif p.lib.aio_get_direction(h) != DIRECTION_READ:
        wake(c)                        # the socket took only a part, or the connection died
    mutex_lock(&p.mutex)
    if cookie < 0:
        r.refused = True
        if r.op in (NBD_WRITE, NBD_ZERO, NBD_TRIM):
            c.changes -= 1
        if why == EINVAL and not over(p, h):
            r.error = EINVAL           # not a matter of this connection, which lives
        else:
            nbd_cut(c)
    c.users -= 1
    if c.users == 0:
        cond_broadcast(&c.unused)


cdef void nbd_cut(nbd_connection_t* c) noexcept nogil:
    if c.state == NBD_READY:
        c.state = NBD_DOWN
        c.pool.ready -= 1
        c.cut = True
        wake(c)


cdef nbd_connection_t* nbd_pool_pick(nbd_pool_t* p) noexcept nogil:
    cdef nbd_connection_t* best = NULL
    cdef nbd_connection_t* c
    cdef int i
    for i in range(p.started):
        c = &p.connections[i]
        if c.state == NBD_READY and (best == NULL or c.in_flight < best.in_flight):
            best = c
    return best


cdef void nbd_call_begin(nbd_pool_t* p, nbd_call_t* call) noexcept nogil:
    call.previous = NULL
    call.next = p.calls
    if p.calls != NULL:
        p.calls.previous = call
    p.calls = call


cdef void nbd_call_end(nbd_pool_t* p, nbd_call_t* call) noexcept nogil:
    if call.next != NULL:
        call.next.previous = call.previous
    if call.previous != NULL:
        call.previous.next = call.next
    else:
        p.calls = call.next


# -- one connection ----------------------------------------------------------------------------

cdef void note(nbd_pool_t* p, const char* text) noexcept nogil:
    """Keep why something failed. The mutex is held."""
    if text != NULL and not p.stopping:
        strncpy(&p.error[0], text, NBD_TEXT - 1)
        p.error[NBD_TEXT - 1] = 0


cdef int set_up(nbd_pool_t* p, nbd_handle* h) noexcept nogil:
    """What has to be said before connecting. Files come from the environment, never from a URI."""
    cdef const char* value
    p.lib.set_uri_allow_transports(h, TRANSPORT_TCP | TRANSPORT_UNIX)
    p.lib.set_uri_allow_local_file(h, False)
    value = getenv(b"FVD_NBD_TLS_CERTIFICATES")
    if value != NULL and p.lib.set_tls_certificates(h, value) < 0:
        return -1
    value = getenv(b"FVD_NBD_TLS_PSK_FILE")
    if value != NULL and p.lib.set_tls_psk_file(h, value) < 0:
        return -1
    value = getenv(b"FVD_NBD_TLS_USERNAME")
    if value != NULL and p.lib.set_tls_username(h, value) < 0:
        return -1
    if p.lib.add_meta_context(h, b"base:allocation") < 0:
        return -1
    return p.lib.aio_connect_uri(h, &p.uri[0])


cdef bint over(nbd_pool_t* p, nbd_handle* h) noexcept nogil:
    return p.lib.aio_is_dead(h) != 0 or p.lib.aio_is_closed(h) != 0


cdef void drive(nbd_connection_t* c, nbd_handle* h, int timeout_ms) noexcept nogil:
    """Wait for the socket or the event once, and let the library do what is due."""
    cdef nbd_pool_t* p = c.pool
    cdef pollfd[2] fds
    cdef uint64_t got
    cdef unsigned int direction = p.lib.aio_get_direction(h)
    memset(fds, 0, sizeof(fds))
    fds[0].fd = p.lib.aio_get_fd(h)
    if direction & DIRECTION_READ:
        fds[0].events |= POLLIN
    if direction & DIRECTION_WRITE:
        fds[0].events |= POLLOUT
    fds[1].fd = c.event_fd
    fds[1].events = POLLIN
    if c_poll(&fds[0], 2, timeout_ms) <= 0:
        return
    if fds[1].revents:
        c_read(c.event_fd, &got, 8)
    # The direction may have changed meanwhile: a sender has run the state machine.
    direction = p.lib.aio_get_direction(h)
    if fds[0].revents & ~POLLOUT and direction & DIRECTION_READ:
        p.lib.aio_notify_read(h)
    elif fds[0].revents and direction & DIRECTION_WRITE:
        p.lib.aio_notify_write(h)


cdef bint told_to_end(nbd_connection_t* c) noexcept nogil:
    cdef bint end
    mutex_lock(&c.pool.mutex)
    end = c.pool.stopping or c.cut
    mutex_unlock(&c.pool.mutex)
    return end


cdef const char* connect(nbd_connection_t* c, nbd_handle* h) noexcept nogil:
    """Connect and negotiate. NULL, or why not."""
    cdef nbd_pool_t* p = c.pool
    cdef uint64_t now = clock_now(p.options.gate), deadline
    deadline = now + min(<uint64_t>CONNECT_MAX_S * NS_PER_S, p.options.timeout_ns)
    if set_up(p, h) < 0:
        return p.lib.get_error()
    while p.lib.aio_is_connecting(h) > 0:
        if told_to_end(c):
            return b"the device is being closed"
        now = clock_now(p.options.gate)
        if now >= deadline:
            return b"the server does not answer"
        drive(c, h, <int>((deadline - now) // NS_PER_MS) + 1)
    if over(p, h):
        return p.lib.get_error()
    return NULL


cdef const char* learn(nbd_pool_t* p, nbd_handle* h) noexcept nogil:
    """Take what the server offers, or compare it with what it offered before. NULL, or why the
    export is unfit. The mutex is not held; only the thread of connection 0 runs while not known."""
    cdef int64_t length = p.lib.get_size(h), least, most
    cdef bint known = nbd_offers(p, NBD_KNOWN)
    cdef uint64_t offers, expected = p.length if known else p.options.length
    cdef bint exact = p.options.exact and not known
    if length < 0:
        return b"the server tells no length"
    if <uint64_t>length < expected:
        return b"the export is shorter than expected"
    if exact and expected and <uint64_t>length != expected:
        return b"the export has another length than expected"
    if p.options.writable and p.lib.is_read_only(h) != 0:
        return b"the server allows no writes"
    if p.options.writable and p.lib.can_flush(h) <= 0:
        return b"the server cannot flush"
    least = p.lib.get_block_size(h, BLOCK_SIZE_MINIMUM)
    most = p.lib.get_block_size(h, BLOCK_SIZE_MAXIMUM)
    least = 1 if least <= 0 else least
    if least > 65536 or least & (least - 1) or (most > 0 and most < least):
        return b"the server's block sizes make no sense"
    if known and <uint64_t>least > p.align:
        return b"the server takes larger blocks only than before"
    offers = ((NBD_CAN_FUA if p.lib.can_fua(h) > 0 else 0)
              | (NBD_CAN_ZERO if p.lib.can_zero(h) > 0 else 0)
              | (NBD_CAN_TRIM if p.lib.can_trim(h) > 0 else 0)
              | (NBD_CAN_STATUS if p.lib.can_meta_context(h, b"base:allocation") > 0 else 0))
    mutex_lock(&p.mutex)
    if not known:
        p.length = <uint64_t>length
        p.align = <uint64_t>least
    if most > 0 and (p.request_max == 0 or <uint64_t>most < p.request_max):
        p.request_max = <uint64_t>most // p.align * p.align
    # Whoever sees that it is known sees its unit, too.
    store_release(&p.offers, offers | p.offers & NBD_KNOWN)
    mutex_unlock(&p.mutex)
    return NULL


cdef void come_up(nbd_connection_t* c, nbd_handle* h) noexcept nogil:
    """The connection is good: let calls use it, and start the others when the first one is."""
    cdef nbd_pool_t* p = c.pool
    cdef nbd_call_t* call
    cdef bint several = p.lib.can_multi_conn(h) > 0
    mutex_lock(&p.mutex)
    store_release(&p.offers, p.offers | NBD_KNOWN)
    p.unfit = False
    c.handle = h
    c.state = NBD_READY
    c.in_flight = 0
    c.progress_ns = clock_now(p.options.gate)
    p.heard_ns = c.progress_ns
    p.ready += 1
    call = p.calls
    while call != NULL:
        cond_signal(&call.changed)
        call = call.next
    cond_broadcast(&p.progress)
    while several and not p.stopping and p.started < p.options.connections:
        if thread_start(&p.connections[p.started].thread, p.options.gate, connection_main,
                        &p.connections[p.started]) < 0:
            break                      # fewer will do
        p.started += 1
    mutex_unlock(&p.mutex)


cdef void go_down(nbd_connection_t* c, nbd_handle* h) noexcept nogil:
    """The connection is lost or given up: retire what is in flight and forget it."""
    cdef nbd_pool_t* p = c.pool
    mutex_lock(&p.mutex)
    if c.state == NBD_READY:
        c.state = NBD_DOWN
        p.ready -= 1
    if not p.stopping:
        p.losses += 1
    # The server may have died with what it had not yet made durable.
    if c.changes != c.flushed:
        p.lost = True
    c.flushed = c.changes
    while c.users:
        cond_wait(&c.unused, &p.mutex, NEVER)
    c.handle = NULL
    mutex_unlock(&p.mutex)
    if not over(p, h):
        p.lib.aio_disconnect(h, 0)
    p.lib.close(h)


cdef void note_failure(nbd_pool_t* p, const char* why, bint unfit) noexcept nogil:
    mutex_lock(&p.mutex)
    note(p, why)
    p.attempts += 1
    if unfit:
        p.unfit = True
    cond_broadcast(&p.progress)
    mutex_unlock(&p.mutex)


cdef uint64_t spread(uint64_t ns) noexcept nogil:
    """A quarter less or more, by chance: clones that lost one server at once shall not all come
    back at once."""
    cdef uint64_t drawn = 0
    c_getrandom(&drawn, 8, 0)
    return ns - ns // 4 + drawn % (ns // 2 + 1)


cdef bint wait_to_retry(nbd_connection_t* c) noexcept nogil:
    """Wait, a little longer each time. False: the pool is being closed."""
    cdef nbd_pool_t* p = c.pool
    cdef uint64_t until
    cdef bint go_on
    mutex_lock(&p.mutex)
    c.cut = False
    until = clock_now(p.options.gate) + spread(c.back_off_ns)
    c.back_off_ns = min(c.back_off_ns * 2, BACK_OFF_MAX_MS * NS_PER_MS)
    while not p.stopping and clock_now(p.options.gate) < until:
        cond_wait(&p.progress, &p.mutex, until)
    go_on = not p.stopping
    mutex_unlock(&p.mutex)
    return go_on


cdef void serve(nbd_connection_t* c, nbd_handle* h) noexcept nogil:
    """From ready to lost."""
    cdef nbd_pool_t* p = c.pool
    cdef uint64_t begin = clock_now(p.options.gate)
    come_up(c, h)
    while not told_to_end(c) and not over(p, h):
        drive(c, h, -1)
    mutex_lock(&p.mutex)
    note(p, b"the connection was given up" if c.cut else b"the server ended the connection")
    mutex_unlock(&p.mutex)
    # A server that ends every connection soon is not asked in a tight loop.
    if clock_now(p.options.gate) - begin > NS_PER_S:
        c.back_off_ns = BACK_OFF_MIN_MS * NS_PER_MS
    go_down(c, h)


cdef void attempt(nbd_connection_t* c) noexcept nogil:
    """Connect; if that works, serve until the connection is lost."""
    cdef nbd_pool_t* p = c.pool
    cdef nbd_handle* h = p.lib.create()
    cdef const char* why
    if h == NULL:
        note_failure(p, p.lib.get_error(), False)
        return
    why = connect(c, h)
    if why != NULL:
        note_failure(p, why, False)
    else:
        why = learn(p, h)
        if why == NULL:
            serve(c, h)
            return
        note_failure(p, why, True)
    p.lib.close(h)


cdef void* connection_main(void* argument) noexcept nogil:
    cdef nbd_connection_t* c = <nbd_connection_t*>argument
    c.back_off_ns = BACK_OFF_MIN_MS * NS_PER_MS
    attempt(c)
    while wait_to_retry(c):
        attempt(c)
    return NULL


# -- the pool ----------------------------------------------------------------------------------

cdef int prepare(nbd_pool_t* p) noexcept nogil:
    cdef nbd_connection_t* c
    cdef int i, rc
    rc = mutex_init(&p.mutex, p.options.gate)
    if rc == 0:
        rc = cond_init(&p.progress, p.options.gate)
    for i in range(NBD_CONNECTIONS_MAX):
        c = &p.connections[i]
        c.pool = p
        c.index = i
        c.event_fd = -1
        if rc == 0:
            rc = cond_init(&c.unused, p.options.gate)
        if rc == 0 and i < p.options.connections:
            c.event_fd = c_eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
            if c.event_fd < 0:
                rc = -errno
    return rc


cdef int nbd_pool_open(nbd_pool_t* p, const char* uri, const nbd_options_t* o) noexcept nogil:
    cdef int rc
    memset(p, 0, sizeof(nbd_pool_t))
    p.options = o[0]
    if (strlen(uri) >= sizeof(p.uri) or o.timeout_ns == 0
            or not 1 <= o.connections <= NBD_CONNECTIONS_MAX):
        return -EINVAL
    strncpy(&p.uri[0], uri, sizeof(p.uri) - 1)
    rc = nbd_library_load(&p.lib)
    if rc < 0:
        return rc
    rc = prepare(p)
    if rc == 0:
        p.started = 1
        rc = thread_start(&p.connections[0].thread, o.gate, connection_main, &p.connections[0])
    if rc < 0:
        nbd_pool_close(p)
    return rc


cdef void nbd_pool_close(nbd_pool_t* p) noexcept nogil:
    cdef int i
    invariant(p.calls == NULL)
    mutex_lock(&p.mutex)
    p.stopping = True
    cond_broadcast(&p.progress)
    for i in range(p.started):
        wake(&p.connections[i])
    mutex_unlock(&p.mutex)
    # No thread starts another one any more.
    for i in range(NBD_CONNECTIONS_MAX):
        thread_join(&p.connections[i].thread)
        if p.connections[i].event_fd >= 0:
            c_close(p.connections[i].event_fd)
            p.connections[i].event_fd = -1
        cond_free(&p.connections[i].unused)
    cond_free(&p.progress)
    mutex_free(&p.mutex)


cdef void nbd_pool_interrupt(nbd_pool_t* p, uint64_t quiet_ns) noexcept nogil:
    cdef uint64_t until = clock_now(p.options.gate) + quiet_ns
    cdef nbd_call_t* call
    mutex_lock(&p.mutex)
    p.quiet_until = min(p.quiet_until, until) if p.interrupted else until
    p.interrupted = True
    call = p.calls
    while call != NULL:
        cond_signal(&call.changed)
        call = call.next
    mutex_unlock(&p.mutex)


cdef int nbd_pool_wait(nbd_pool_t* p, uint64_t deadline_ns) noexcept nogil:
    while not nbd_offers(p, NBD_KNOWN):
        if p.unfit:
            return -EUCLEAN
        if p.options.once and p.attempts:
            return -ETIMEDOUT
        if cond_wait(&p.progress, &p.mutex, deadline_ns) < 0 and not nbd_offers(p, NBD_KNOWN):
            if p.error[0] == 0:
                note(p, b"the server does not answer")
            return -ETIMEDOUT
    return 0
