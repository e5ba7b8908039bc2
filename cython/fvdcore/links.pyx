# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Layer 4. Connections of a device and their events. See links.pxd.

Lock order: links, then a connection's own. A connection's last act is to tell its end here; its
thread is joined by the owner, never by itself."""
from libc.errno cimport errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset
from .atomics cimport exchange_acq_rel, load_acquire, store_release
from .counters cimport BLOCK_CONNECTION, G_CONNECTIONS, counters_block, gauge_set
from .dispatch cimport device_ask_growth, device_stop_waiting
from .limits cimport CONNECTIONS_MAX, NEVER, NS_PER_MS, NS_PER_S, SECOND_WAIT_S, SEND_TIMEOUT_S
from .nbd_connection cimport (
    CONNECTION_ENDED, CONNECTION_FREE, CONNECTION_LIVE, connection_t,
)
from .nbd_loop cimport (
    connection_give, connection_is_gone, connection_is_leaving, connection_part,
    connection_restart, connection_shut, connection_start, connection_stay,
)
from .nbd_send cimport connection_give_up, connection_reply, connection_resume
from .sync cimport (
    clock_now, cond_broadcast, cond_free, cond_init, cond_wait, mutex_free, mutex_init, mutex_lock,
    mutex_unlock, thread_join, thread_start, thread_wake_prepare,
)
from .syscalls cimport (
    EBUSY, EFD_CLOEXEC, EFD_NONBLOCK, EMFILE, ENOMEM, POLLIN, POLLOUT, c_close, c_eventfd,
    c_poll, c_read,
    c_write, pollfd,
)


cdef int links_init(links_t* l, device_t* d) noexcept nogil:
    cdef int rc
    memset(l, 0, sizeof(links_t))
    l.device = d
    l.next_id = 1
    l.event_fd = -1
    l.sender_fd = -1
    d.reply = connection_reply
    d.is_gone = connection_is_gone
    d.failures.notify = wake
    d.failures.owner = l
    d.is_leaving = connection_is_leaving
    rc = mutex_init(&l.mutex, d.gate)
    if rc == 0:
        rc = cond_init(&l.changed, d.gate)
    if rc < 0:
        return rc
    l.slots = <connection_t*>calloc(CONNECTIONS_MAX, sizeof(connection_t))
    if l.slots == NULL:
        return -ENOMEM
    l.event_fd = c_eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
    if l.event_fd < 0:
        return -errno
    l.sender_fd = c_eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
    return -errno if l.sender_fd < 0 else 0


cdef void links_free(links_t* l) noexcept nogil:
    if l.device == NULL:
        return
    if l.event_fd >= 0:
        c_close(l.event_fd)
    if l.sender_fd >= 0:
        c_close(l.sender_fd)
    free(l.slots)
    mutex_free(&l.mutex)
    cond_free(&l.changed)
    memset(l, 0, sizeof(links_t))
    l.event_fd = -1
    l.sender_fd = -1


# -- the sender --------------------------------------------------------------------------------

cdef void on_stalled(connection_t* c) noexcept nogil:
    cdef links_t* l = <links_t*>c.owner
    cdef uint64_t one = 1
    cdef stall_t* stall = &l.stalls[c - l.slots]
    mutex_lock(&l.mutex)
    stall.waits = True
    stall.sent = c.out_sent
    stall.deadline_ns = clock_now(NULL) + SEND_TIMEOUT_S * NS_PER_S
    mutex_unlock(&l.mutex)
    c_write(l.sender_fd, &one, 8)


cdef void sender_turn(links_t* l, int slot, bint ready, uint64_t now) noexcept nogil:
    """One stalled connection: send what its socket takes, or give it up after its time."""
    cdef connection_t* c = &l.slots[slot]
    cdef stall_t* stall = &l.stalls[slot]
    cdef bint over
    if not ready and now < stall.deadline_ns:
        return
    # Taken off first: with its last reply gone the connection may end and the slot be used again.
    mutex_lock(&l.mutex)
    stall.waits = False
    mutex_unlock(&l.mutex)
    if now >= stall.deadline_ns:
        connection_give_up(c)
        return
    over = connection_resume(c)
    if over:
        return
    mutex_lock(&l.mutex)
    stall.waits = True
    if c.out_sent != stall.sent:
        stall.sent = c.out_sent
        stall.deadline_ns = now + SEND_TIMEOUT_S * NS_PER_S
    mutex_unlock(&l.mutex)


cdef int sender_poll(links_t* l, pollfd* polled, int* slots) noexcept nogil:
    """Wait until a stalled socket has room, a connection stalls, or a deadline. Entries polled."""
    cdef uint64_t now = clock_now(NULL), deadline = NEVER
    cdef int i, n = 1
    polled[0] = pollfd(l.sender_fd, POLLIN, 0)
    mutex_lock(&l.mutex)
    for i in range(CONNECTIONS_MAX):
        if l.stalls[i].waits:
            polled[n] = pollfd(l.slots[i].fd, POLLOUT, 0)
            slots[n] = i
            deadline = min(deadline, l.stalls[i].deadline_ns)
            n += 1
    mutex_unlock(&l.mutex)
    c_poll(polled, <unsigned long>n,
           -1 if deadline == NEVER else <int>((max(deadline, now) - now) // NS_PER_MS) + 1)
    return n


cdef void* sender_main(void* argument) noexcept nogil:
    cdef links_t* l = <links_t*>argument
    cdef pollfd[65] polled             # CONNECTIONS_MAX + 1
    cdef int[65] slots
    cdef uint64_t got
    cdef int i, n
    while not load_acquire(&l.sender_stopping):
        n = sender_poll(l, polled, slots)
        c_read(l.sender_fd, &got, 8)
        for i in range(1, n):
            sender_turn(l, slots[i], polled[i].revents != 0, clock_now(NULL))
    return NULL


cdef int links_start(links_t* l) noexcept nogil:
    cdef int rc = thread_wake_prepare()
    if rc < 0:
        return rc
    return thread_start(&l.sender, l.device.gate, sender_main, l)


cdef void links_stop(links_t* l) noexcept nogil:
    cdef uint64_t one = 1
    store_release(&l.sender_stopping, 1)
    c_write(l.sender_fd, &one, 8)
    thread_join(&l.sender)


# -- connections -------------------------------------------------------------------------------

cdef void wake(void* owner) noexcept nogil:
    cdef uint64_t one = 1
    c_write((<links_t*>owner).event_fd, &one, 8)


cdef void on_ended(connection_t* c) noexcept nogil:
    cdef links_t* l = <links_t*>c.owner
    mutex_lock(&l.mutex)
    if not c.parted:
        if l.ended_count < ENDED_EVENTS:
            l.ended[l.ended_count] = c.id
            l.ended_count += 1
        wake(l)
    # Last: after this the slot may be joined and used again.
    store_release(&c.state, CONNECTION_ENDED)
    cond_broadcast(&l.changed)
    mutex_unlock(&l.mutex)


cdef void links_prefetch_changed(void* owner) noexcept nogil:
    cdef links_t* l = <links_t*>owner
    store_release(&l.prefetch_changed, 1)
    # It may have found no space.
    device_ask_growth(l.device)
    wake(l)


cdef void links_space_changed(void* owner) noexcept nogil:
    cdef links_t* l = <links_t*>owner
    store_release(&l.space_changed, 1)
    wake(l)


cdef void links_fault_set(void* owner) noexcept nogil:
    cdef links_t* l = <links_t*>owner
    store_release(&l.fault_changed, 1)
    wake(l)


cdef void free_slot(connection_t* c) noexcept nogil:
    thread_join(&c.thread)
    mutex_free(&c.mutex)
    cond_free(&c.changed)
    store_release(&c.state, CONNECTION_FREE)


cdef void links_reap(links_t* l) noexcept nogil:
    cdef int i
    cdef connection_t* c
    for i in range(CONNECTIONS_MAX):
        c = &l.slots[i]
        if load_acquire(&c.state) == CONNECTION_ENDED and not c.parted:
            free_slot(c)


cdef int links_live(const links_t* l) noexcept nogil:
    cdef int i, live = 0
    for i in range(CONNECTIONS_MAX):
        if load_acquire(&l.slots[i].state) == CONNECTION_LIVE:
            live += 1
    gauge_set(&l.device.counters, G_CONNECTIONS, <uint64_t>live)
    return live


cdef bint become_several(links_t* l) noexcept nogil:
    """From now on writes are marked; those that are not are waited for. False: they take too long,
    and what a second connection brings could overtake them."""
    cdef uint64_t deadline = clock_now(l.device.gate) + SECOND_WAIT_S * NS_PER_S
    cdef int i
    if load_acquire(&l.device.several):
        return True
    exchange_acq_rel(&l.device.several, 1)
    mutex_lock(&l.mutex)
    for i in range(CONNECTIONS_MAX):
        while (load_acquire(&l.slots[i].state) == CONNECTION_LIVE
                and load_acquire(&l.slots[i].writing)):
            if clock_now(l.device.gate) >= deadline:
                store_release(&l.device.several, 0)
                mutex_unlock(&l.mutex)
                return False
            cond_wait(&l.changed, &l.mutex, clock_now(l.device.gate) + NS_PER_MS)
    mutex_unlock(&l.mutex)
    return True


cdef int64_t links_serve(links_t* l, int fd, bint structured, bint read_only, bint has_status,
        uint32_t status_id, const uint8_t* received, uint64_t received_length) noexcept nogil:
    cdef connection_t* c
    cdef int i, rc
    links_reap(l)
    for i in range(CONNECTIONS_MAX):
        if load_acquire(&l.slots[i].state) == CONNECTION_FREE:
            break
    else:
        c_close(fd)
        return -EMFILE
    c = &l.slots[i]
    memset(c, 0, sizeof(connection_t))
    c.device = l.device
    c.id = l.next_id
    l.next_id += 1
    c.fd = fd
    c.structured = structured
    c.read_only = read_only or l.device.image.read_only
    c.has_status = has_status
    c.status_id = status_id
    c.counters = counters_block(&l.device.counters, BLOCK_CONNECTION + i)
    c.ended = on_ended
    c.stalled = on_stalled
    c.owner = l
    if links_live(l) > 0 and not become_several(l):
        c_close(fd)
        return -EBUSY
    rc = connection_start(c, received, received_length)
    if rc < 0:
        c_close(fd)
        return rc
    links_live(l)
    return <int64_t>c.id


cdef bint links_shut(links_t* l, bint now, uint64_t deadline_ns) noexcept nogil:
    cdef int i
    cdef bint live
    device_stop_waiting(l.device)
    mutex_lock(&l.mutex)
    for i in range(CONNECTIONS_MAX):
        if load_acquire(&l.slots[i].state) == CONNECTION_LIVE:
            connection_shut(&l.slots[i], now)
    while True:
        live = links_live(l) > 0
        if not live or clock_now(l.device.gate) >= deadline_ns:
            break
        cond_wait(&l.changed, &l.mutex, deadline_ns)
    mutex_unlock(&l.mutex)
    return not live


# -- parting -----------------------------------------------------------------------------------

cdef bint parted_all(links_t* l, uint64_t deadline_ns) noexcept nogil:
    """Ask again and again: a thread may be about to wait when it is asked. The mutex is held."""
    cdef uint64_t now
    cdef int i
    while links_live(l) > 0:
        now = clock_now(l.device.gate)
        if now >= deadline_ns:
            return False
        for i in range(CONNECTIONS_MAX):
            if load_acquire(&l.slots[i].state) == CONNECTION_LIVE:
                connection_part(&l.slots[i])
        cond_wait(&l.changed, &l.mutex, min(deadline_ns, now + NS_PER_MS))
    return True


cdef bint parting_still(const links_t* l) noexcept nogil:
    """Is a connection on its way out that had parted before it was called off?"""
    cdef int i
    for i in range(CONNECTIONS_MAX):
        if load_acquire(&l.slots[i].state) == CONNECTION_LIVE and l.slots[i].parted:
            return True
    return False


cdef bint links_part(links_t* l, uint64_t deadline_ns) noexcept nogil:
    cdef bint done
    cdef int i
    mutex_lock(&l.mutex)
    done = parted_all(l, deadline_ns)
    if not done:
        for i in range(CONNECTIONS_MAX):
            if load_acquire(&l.slots[i].state) == CONNECTION_LIVE:
                connection_stay(&l.slots[i])
        while parting_still(l):
            cond_wait(&l.changed, &l.mutex, NEVER)
    mutex_unlock(&l.mutex)
    if done:
        return True
    for i in range(CONNECTIONS_MAX):
        if load_acquire(&l.slots[i].state) == CONNECTION_ENDED and l.slots[i].parted:
            restart(l, &l.slots[i])
    return False


cdef void restart(links_t* l, connection_t* c) noexcept nogil:
    if connection_restart(c) == 0:
        return
    # No thread for it: the client sees the end of the connection, and comes back.
    c_close(connection_give(c))
    on_ended(c)


cdef int links_give(links_t* l, int slot) noexcept nogil:
    cdef connection_t* c = &l.slots[slot]
    cdef int fd
    if load_acquire(&c.state) != CONNECTION_ENDED or not c.parted:
        return -1
    fd = connection_give(c)
    free_slot(c)
    return fd
