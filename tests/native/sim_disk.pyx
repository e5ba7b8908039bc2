# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""The disk model. See sim_disk.pxd.

Execution and return are two moments: an operation waits, acts, waits again. What another thread
sees in between, and what a crash in between keeps, is as on a real disk. A long write may act in
two parts. Bytes are changed by the sector, never less."""
from libc.stdint cimport int64_t, uint8_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, memcpy, memset

from fvdcore.storage cimport (
    EXTENT_DATA, EXTENT_ZERO, IO_DSYNC, IO_NOWAIT, ZERO_HINT, ZERO_KEEP, storage_ops_t,
    storage_t,
)
from sim_gate cimport below, chance, sim_gate_t, sim_note, sim_sleep, sim_yield
from sim_pattern cimport STAMP_GARBAGE, pattern_fill

cdef enum:
    EIO = 5
    EAGAIN = 11
    ENOMEM = 12
    ENOSPC = 28
    EOPNOTSUPP = 95
    ETIMEDOUT = 110
    SECTOR = 512
    GRAIN = 4096


cdef int sim_disk_init(sim_disk_t* d, sim_gate_t* gate, uint64_t capacity) noexcept nogil:
    cdef int i
    memset(d, 0, sizeof(sim_disk_t))
    d.gate = gate
    d.capacity = (capacity + GRAIN - 1) // GRAIN * GRAIN
    d.cache = <uint8_t*>calloc(d.capacity, 1)
    d.durable = <uint8_t*>calloc(d.capacity, 1)
    d.state = <uint8_t*>calloc(d.capacity // SECTOR, 1)
    d.returned = <uint64_t*>calloc(d.capacity // SECTOR, 8)
    if d.cache == NULL or d.durable == NULL or d.state == NULL or d.returned == NULL:
        return -ENOMEM
    for i in range(DISK_OPS):
        d.faults[i].countdown = -1
    d.outage_in = -1
    d.holes = True
    d.hints = True
    d.ops = storage_ops_t(disk_read, disk_write, disk_flush, disk_zero, disk_status,
                          disk_writeback, disk_resize, disk_close)
    d.head.ops = &d.ops
    return 0


cdef void sim_disk_free(sim_disk_t* d) noexcept nogil:
    free(d.cache)
    free(d.durable)
    free(d.state)
    free(d.returned)
    memset(d, 0, sizeof(sim_disk_t))


cdef void sim_disk_load(sim_disk_t* d, const uint8_t* data, uint64_t length) noexcept nogil:
    memcpy(d.cache, data, length)
    memcpy(d.durable, data, length)
    d.head.length = length
    d.durable_length = length


cdef uint64_t sim_disk_dirty(const sim_disk_t* d) noexcept nogil:
    cdef uint64_t s, n = 0
    for s in range(d.capacity // SECTOR):
        n += d.state[s] == SECTOR_DIRTY
    return n


# -- crashes -----------------------------------------------------------------------------------

cdef void sim_disk_copy(sim_disk_t* into, const sim_disk_t* d) noexcept nogil:
    cdef uint64_t s
    memcpy(into.cache, d.cache, d.capacity)
    memcpy(into.durable, d.durable, d.capacity)
    memcpy(into.state, d.state, d.capacity // SECTOR)
    memcpy(into.returned, d.returned, d.capacity // SECTOR * 8)
    into.head.length = d.head.length
    into.durable_length = d.durable_length
    into.sequence = d.sequence + 1
    into.gave_up = d.gave_up
    # The successor's flush covers what the dead process wrote, returned or not.
    for s in range(d.capacity // SECTOR):
        if d.state[s] == SECTOR_DIRTY and d.returned[s] == 0:
            into.returned[s] = into.sequence
    settle_options(into, d)


cdef void settle_options(sim_disk_t* into, const sim_disk_t* d) noexcept nogil:
    into.border = d.border
    into.fixed = d.fixed
    into.head.grows = d.head.grows
    into.holes = d.holes
    into.hints = d.hints


cdef bint survives(int survival, bint metadata, uint64_t mask, uint64_t nth, uint64_t chosen,
        uint64_t* random) noexcept nogil:
    if survival == KEEP_NONE:
        return False
    if survival == KEEP_ALL:
        return True
    if survival == KEEP_FEW:
        return chance(random, 1, 8)
    if survival == KEEP_MOST:
        return chance(random, 7, 8)
    if survival == KEEP_METADATA:
        return metadata
    if survival == KEEP_DATA:
        return not metadata
    if survival == KEEP_ONE:
        return nth == chosen
    if survival == KEEP_ALL_BUT_ONE:
        return nth != chosen
    if survival == KEEP_MASK:
        return (mask >> (nth & 63)) & 1
    return chance(random, 1, 2)


cdef void lose(sim_disk_t* into, const sim_disk_t* d, uint64_t s, bint garbage) noexcept nogil:
    """The sector's unflushed content is gone."""
    if s * SECTOR < d.durable_length:
        memcpy(into.cache + s * SECTOR, d.durable + s * SECTOR, SECTOR)
    elif garbage:
        # Space that was new and never flushed: whatever the device held there.
        pattern_fill(into.cache + s * SECTOR, STAMP_GARBAGE, s)
    else:
        memset(into.cache + s * SECTOR, 0, SECTOR)


cdef void sim_disk_cut(sim_disk_t* into, const sim_disk_t* d, int survival, uint64_t mask,
        uint64_t* random) noexcept nogil:
    cdef uint64_t s, nth = 0, chosen = 0
    cdef bint keep = False, garbage = chance(random, 1, 2)
    memcpy(into.cache, d.cache, d.capacity)
    if survival in (KEEP_ONE, KEEP_ALL_BUT_ONE):
        chosen = below(random, max(sim_disk_dirty(d), <uint64_t>1))
    for s in range(d.capacity // SECTOR):
        if d.state[s] == SECTOR_CLEAN:
            continue
        if d.state[s] == SECTOR_LOST:
            memcpy(into.cache + s * SECTOR, d.durable + s * SECTOR, SECTOR)
            continue
        if survival != KEEP_PAGES or nth == 0 or s % (GRAIN // SECTOR) == 0:
            keep = survives(survival, s * SECTOR < d.border, mask, nth, chosen, random)
        nth += 1
        if not keep:
            lose(into, d, s, garbage)
    memset(into.state, SECTOR_CLEAN, d.capacity // SECTOR)
    memset(into.returned, 0, d.capacity // SECTOR * 8)
    into.head.length = d.head.length
    if d.durable_length != d.head.length and survival != KEEP_ALL:
        if survival in (KEEP_NONE, KEEP_METADATA) or chance(random, 1, 2):
            into.head.length = d.durable_length
    # What lies behind the end is no content at all, should the file grow again.
    if into.head.length < d.capacity:
        memset(into.cache + into.head.length, 0, d.capacity - into.head.length)
    memcpy(into.durable, into.cache, d.capacity)
    into.durable_length = into.head.length
    into.sequence = 0
    into.gave_up = False
    settle_options(into, d)


# -- waiting and failing -----------------------------------------------------------------------

cdef void delay(sim_disk_t* d) noexcept nogil:
    cdef uint64_t ns
    if d.gate == NULL or d.silent or not chance(&d.random, d.wait_chance, 16):
        return
    ns = 1 + below(&d.random, d.delay_max)
    if chance(&d.random, 1, 64):
        ns *= 50
    if chance(&d.random, 1, 3):
        sim_yield(d.gate)
    else:
        sim_sleep(d.gate, ns)


cdef int fault(sim_disk_t* d, int op) noexcept nogil:
    """0, or the negative errno with which this operation fails."""
    cdef disk_fault_t* f = &d.faults[op]
    if d.silent:
        return 0
    d.counts[op] += 1
    if f.countdown == 0:
        if not f.sticky:
            f.countdown = -1
    elif f.countdown > 0:
        f.countdown -= 1
        return 0
    elif not f.chance or not chance(&d.random, f.chance, 65536):
        return 0
    d.failures += 1
    if d.gate != NULL:
        sim_note(d.gate, 16 + <unsigned>op, d.counts[op], <uint64_t>f.error)
    return -f.error


cdef int outage(sim_disk_t* d) noexcept nogil:
    """0, or -ETIMEDOUT after waiting in vain for a disk that is away."""
    if d.silent or d.gate == NULL:
        return 0
    if d.outage_in == 0:
        d.away_until = d.gate.now + d.outage_ns
        d.outages += 1
    d.outage_in = max(d.outage_in - 1, <int64_t>-1)
    if d.gate.now >= d.away_until:
        return 0
    if d.patience_ns:
        sim_sleep(d.gate, min(d.away_until - d.gate.now, d.patience_ns))
    if d.gate.now >= d.away_until:
        return 0
    d.failures += 1
    return -ETIMEDOUT


cdef void after(sim_disk_t* d, int op, uint64_t offset, uint64_t length) noexcept nogil:
    if d.gate != NULL and not d.silent:
        sim_note(d.gate, <unsigned>op, offset, length)
    if d.executed != NULL and not d.silent:
        d.executed(d.owner, d, op, offset)


cdef bint outside(const sim_disk_t* d, uint64_t length, uint64_t offset) noexcept nogil:
    return offset > d.head.length or length > d.head.length - offset


# -- sectors -----------------------------------------------------------------------------------

cdef void write_back(sim_disk_t* d, uint64_t s) noexcept nogil:
    memcpy(d.durable + s * SECTOR, d.cache + s * SECTOR, SECTOR)
    d.state[s] = SECTOR_CLEAN
    d.returned[s] = 0


cdef void write_back_some(sim_disk_t* d) noexcept nogil:
    """What a kernel does on its own: a few neighbours go to the disk early."""
    cdef uint64_t s, first
    if d.gate == NULL or d.silent or not chance(&d.random, d.writeback, 256):
        return
    first = below(&d.random, d.durable_length // SECTOR)
    for s in range(first, min(first + 1 + below(&d.random, 256), d.durable_length // SECTOR)):
        if d.state[s] == SECTOR_DIRTY and chance(&d.random, 3, 4):
            write_back(d, s)


cdef void put(sim_disk_t* d, const uint8_t* data, uint64_t length, uint64_t offset) noexcept nogil:
    """Change the cache; data NULL: zeros."""
    if length == 0:
        return
    if data == NULL:
        memset(d.cache + offset, 0, length)
    else:
        memcpy(d.cache + offset, data, length)
    memset(d.state + offset // SECTOR, SECTOR_DIRTY,
           (offset + length + SECTOR - 1) // SECTOR - offset // SECTOR)


cdef void mark_returned(sim_disk_t* d, uint64_t length, uint64_t offset) noexcept nogil:
    cdef uint64_t s
    d.sequence += 1
    for s in range(offset // SECTOR, (offset + length + SECTOR - 1) // SECTOR):
        if d.state[s] == SECTOR_DIRTY and d.returned[s] == 0:
            d.returned[s] = d.sequence


cdef void put_in_parts(sim_disk_t* d, const uint8_t* data, uint64_t length,
        uint64_t offset) noexcept nogil:
    """A long write acts in two parts now and then, with others in between."""
    cdef uint64_t first = length
    if d.gate != NULL and not d.silent and length > SECTOR and chance(&d.random, 1, 4):
        first = min((1 + below(&d.random, length // SECTOR)) * SECTOR, length)
    put(d, data, first, offset)
    if first == length:
        return
    sim_yield(d.gate)
    # The other part, unless the file was cut meanwhile.
    if not outside(d, length, offset):
        put(d, data + first if data != NULL else NULL, length - first, offset + first)


cdef void put_some(sim_disk_t* d, const uint8_t* data, uint64_t length,
        uint64_t offset) noexcept nogil:
    """A write that fails may have written any of its sectors."""
    cdef uint64_t at = 0
    if offset % SECTOR or length % SECTOR or outside(d, length, offset):
        return
    while at < length:
        if chance(&d.random, 1, 2):
            put(d, data + at if data != NULL else NULL, SECTOR, offset + at)
        at += SECTOR


# -- storage_t ---------------------------------------------------------------------------------

cdef int disk_read(storage_t* p, void* b, uint64_t n, uint64_t offset, int flags) noexcept nogil:
    cdef sim_disk_t* d = <sim_disk_t*>p
    cdef int rc
    if outside(d, n, offset):
        return -EIO
    if flags & IO_NOWAIT:
        if d.again and chance(&d.random, 1, 3):
            return -EAGAIN
        if d.gate != NULL and not d.silent and d.gate.now < d.away_until:
            return -EAGAIN
        memcpy(b, d.cache + offset, n)
        return 0
    rc = fault(d, DISK_READ)
    if rc == 0:
        rc = outage(d)
    delay(d)
    if rc < 0:
        # It may have brought a part before it failed.
        memcpy(b, d.cache + offset, n // 2 if not outside(d, n, offset) else 0)
        return rc
    if outside(d, n, offset):
        return -EIO
    memcpy(b, d.cache + offset, n)
    after(d, DISK_READ, offset, n)
    delay(d)
    return 0


cdef int change(sim_disk_t* d, int op, const uint8_t* data, uint64_t n,
        uint64_t offset) noexcept nogil:
    cdef int rc = fault(d, op)
    delay(d)
    if outside(d, n, offset):
        return -EIO
    if rc < 0:
        put_some(d, data, n, offset)
        after(d, op, offset, n)
        # What did arrive is in the cache like any other write.
        mark_returned(d, n, offset)
        return rc
    put_in_parts(d, data, n, offset)
    after(d, op, offset, n)
    delay(d)
    if not outside(d, n, offset):
        mark_returned(d, n, offset)
    write_back_some(d)
    return 0


cdef int disk_write(storage_t* p, const void* b, uint64_t n, uint64_t offset,
                    int flags) noexcept nogil:
    cdef sim_disk_t* d = <sim_disk_t*>p
    cdef uint64_t s
    cdef int rc = change(d, DISK_WRITE, <const uint8_t*>b, n, offset)
    if rc == 0 and flags & IO_DSYNC:
        for s in range(offset // SECTOR, (offset + n + SECTOR - 1) // SECTOR):
            if d.state[s] == SECTOR_DIRTY:
                write_back(d, s)
    return rc


cdef int disk_zero(storage_t* p, uint64_t n, uint64_t offset, int flags) noexcept nogil:
    cdef sim_disk_t* d = <sim_disk_t*>p
    if flags & ZERO_HINT and flags & ZERO_KEEP and not outside(d, n, offset):
        # Space for what will be written there. A file system keeps what it finds; nothing must be.
        d.ahead += 1
        d.spoiled = d.spoiled or not is_zero(d.cache + offset, n)
    if flags & ZERO_HINT and not d.hints:
        return 0
    return change(d, DISK_ZERO, NULL, n, offset)


cdef void give_up_dirty(sim_disk_t* d) noexcept nogil:
    """A failed flush: some sectors arrive, the others are forgotten, though the cache goes on
    showing them."""
    cdef uint64_t s
    d.gave_up = True
    if d.durable_length < d.head.length:
        grow_durable(d, d.head.length)
    for s in range(d.head.length // SECTOR):
        if d.state[s] != SECTOR_DIRTY:
            continue
        if chance(&d.random, 1, 2):
            write_back(d, s)
            continue
        d.state[s] = SECTOR_LOST
        d.returned[s] = 0


cdef int disk_flush(storage_t* p) noexcept nogil:
    cdef sim_disk_t* d = <sim_disk_t*>p
    cdef uint64_t s, covered = d.sequence, length = d.head.length
    cdef bint more = chance(&d.random, 1, 2)
    cdef int rc = fault(d, DISK_FLUSH)
    delay(d)
    if rc < 0:
        give_up_dirty(d)
        after(d, DISK_FLUSH, 0, 0)
        return rc
    # Its length when the flush began, unless it was cut since.
    length = min(length, d.head.length)
    if d.durable_length < length:
        grow_durable(d, length)
    elif d.durable_length > d.head.length:
        d.durable_length = d.head.length
    for s in range(d.durable_length // SECTOR):
        if d.state[s] == SECTOR_DIRTY and (
                (d.returned[s] and d.returned[s] <= covered) or (more and chance(&d.random, 1, 2))):
            write_back(d, s)
    after(d, DISK_FLUSH, 0, covered)
    delay(d)
    return 0


cdef void grow_durable(sim_disk_t* d, uint64_t length) noexcept nogil:
    """The length is durable; what was not written in the new part reads zeros."""
    cdef uint64_t s
    for s in range(d.durable_length // SECTOR, length // SECTOR):
        if d.state[s] != SECTOR_CLEAN:
            memset(d.durable + s * SECTOR, 0, SECTOR)
    d.durable_length = length


cdef bint is_zero(const uint8_t* p, uint64_t n) noexcept nogil:
    return p[0] == 0 and (n == 1 or memcmp(p, p + 1, n - 1) == 0)


cdef int disk_status(storage_t* p, uint64_t n, uint64_t offset, uint64_t* run) noexcept nogil:
    cdef sim_disk_t* d = <sim_disk_t*>p
    cdef uint64_t at = offset, end = offset + n, step
    cdef bint zero = False, here
    if not d.holes:
        run[0] = n
        return EXTENT_DATA
    while at < end:
        step = min(GRAIN - at % GRAIN, end - at)
        here = is_zero(d.cache + at, step)
        if at == offset:
            zero = here
        elif here != zero:
            break
        at += step
    run[0] = at - offset
    return EXTENT_ZERO if zero else EXTENT_DATA


cdef void disk_writeback(storage_t* p, uint64_t n, uint64_t offset) noexcept nogil:
    cdef sim_disk_t* d = <sim_disk_t*>p
    cdef uint64_t s
    for s in range(offset // SECTOR, (offset + n) // SECTOR):
        if s * SECTOR < d.durable_length and d.state[s] == SECTOR_DIRTY and chance(
                &d.random, 1, 2):
            write_back(d, s)


cdef int disk_resize(storage_t* p, uint64_t length) noexcept nogil:
    cdef sim_disk_t* d = <sim_disk_t*>p
    cdef uint64_t s, old
    cdef int rc
    if d.fixed:
        return 0 if length <= p.length else -ENOSPC
    if length > d.capacity:
        return -ENOSPC
    rc = fault(d, DISK_RESIZE)
    delay(d)
    if rc < 0:
        return rc
    old = p.length
    for s in range(old // SECTOR, length // SECTOR):
        memset(d.cache + s * SECTOR, 0, SECTOR)
        # Where the old content is still durable, the zeros must reach the disk like a write.
        if s * SECTOR < d.durable_length:
            d.state[s] = SECTOR_DIRTY
        elif d.state[s] == SECTOR_CLEAN:
            memset(d.durable + s * SECTOR, 0, SECTOR)
    for s in range(length // SECTOR, old // SECTOR):
        d.state[s] = SECTOR_CLEAN
        d.returned[s] = 0
    p.length = length
    # Who sees the length may rely on it, as with a file, whose length is told when it is so.
    if length > old:
        mark_returned(d, length - old, old)
    if length < d.durable_length and chance(&d.random, 1, 2):
        d.durable_length = length
    after(d, DISK_RESIZE, old, length)
    delay(d)
    return 0


cdef void disk_close(storage_t* p) noexcept nogil:
    pass
