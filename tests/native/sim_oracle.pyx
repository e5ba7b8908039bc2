# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""The oracle. See sim_oracle.pxd."""
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdio cimport snprintf
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, memcpy, memset

from sim_pattern cimport (
    STAMP_BASE, STAMP_GARBAGE, STAMP_POISON, STAMP_TORN, STAMP_ZERO, pattern_read,
)

cdef enum:
    SECTOR = 512
    ENOMEM = 12


cdef int oracle_init(oracle_t* o, uint64_t sectors, uint32_t op_max) noexcept nogil:
    memset(o, 0, sizeof(oracle_t))
    o.sectors = sectors
    o.op_max = op_max
    o.ops = <oracle_op_t*>calloc(op_max, sizeof(oracle_op_t))
    o.lists = <oracle_entry_t*>calloc(sectors * ORACLE_LIST, sizeof(oracle_entry_t))
    o.lengths = <uint8_t*>calloc(sectors, 1)
    o.start = <uint8_t*>calloc(sectors, SECTOR)
    if o.ops == NULL or o.lists == NULL or o.lengths == NULL or o.start == NULL:
        return -ENOMEM
    return 0


cdef void oracle_free(oracle_t* o) noexcept nogil:
    free(o.ops)
    free(o.lists)
    free(o.lengths)
    free(o.start)
    memset(o, 0, sizeof(oracle_t))


cdef void oracle_copy(oracle_t* into, const oracle_t* o) noexcept nogil:
    into.sectors = o.sectors
    into.tick = o.tick
    into.op_count = o.op_count
    into.settled = o.settled
    memcpy(into.ops, o.ops, o.op_count * sizeof(oracle_op_t))
    memcpy(into.lists, o.lists, o.sectors * ORACLE_LIST * sizeof(oracle_entry_t))
    memcpy(into.lengths, o.lengths, o.sectors)
    memcpy(into.start, o.start, o.sectors * SECTOR)


cdef void oracle_restart(oracle_t* o, const uint8_t* content) noexcept nogil:
    cdef uint64_t s
    if content != o.start:
        memcpy(o.start, content, o.sectors * SECTOR)
    if o.op_count == 0:
        o.op_count = 1
    o.ops[0].kind = KIND_START
    o.ops[0].state = OP_DONE
    o.ops[0].durable = 1
    o.ops[0].begin = o.tick
    o.tick += 1
    o.ops[0].end = o.tick
    o.tick += 1
    for s in range(o.sectors):
        o.lists[s * ORACLE_LIST].op = 0
        o.lists[s * ORACLE_LIST].after = 0
        o.lengths[s] = 1


cdef void oracle_grow(oracle_t* o, uint64_t sectors) noexcept nogil:
    cdef uint64_t s
    for s in range(o.sectors, sectors):
        memset(o.start + s * SECTOR, 0, SECTOR)
        o.lists[s * ORACLE_LIST].op = 0
        o.lists[s * ORACLE_LIST].after = 0
        o.lengths[s] = 1
    o.sectors = sectors


cdef void oracle_crash(oracle_t* o) noexcept nogil:
    cdef uint32_t i
    o.tick += 1
    for i in range(1, o.op_count):
        if o.ops[i].state == OP_RUNNING:
            o.ops[i].state = OP_MAYBE
            o.ops[i].end = o.tick


# -- which operations may stand in a sector ----------------------------------------------------

cdef bint certain(const oracle_op_t* op) noexcept nogil:
    return op.state == OP_DONE and op.kind != KIND_TRIM


cdef bint live(const oracle_t* o, uint64_t s, const oracle_entry_t* e,
        uint64_t began) noexcept nogil:
    """May a read that began at the tick show it?"""
    cdef const oracle_op_t* op = &o.ops[e.op]
    cdef const oracle_op_t* other
    cdef int i
    if e.after and e.since < began:
        return False
    if op.state == OP_RUNNING:
        return True
    for i in range(o.lengths[s]):
        other = &o.ops[o.lists[s * ORACLE_LIST + <uint64_t>i].op]
        if certain(other) and other.begin > op.end and other.end < began:
            return False
    return True


cdef bint after_power_cut(const oracle_t* o, uint64_t s, const oracle_entry_t* e) noexcept nogil:
    cdef const oracle_op_t* op = &o.ops[e.op]
    cdef const oracle_op_t* other
    cdef int i
    if e.after and o.ops[e.after - 1].durable and certain(&o.ops[e.after - 1]):
        return False
    if op.state == OP_RUNNING:
        return True
    for i in range(o.lengths[s]):
        other = &o.ops[o.lists[s * ORACLE_LIST + <uint64_t>i].op]
        if other.durable and certain(other) and other.begin > op.end:
            return False
    return True


cdef void prune(oracle_t* o, uint64_t s) noexcept nogil:
    """Forget what can be seen neither now nor after a power cut."""
    cdef int i = 0
    cdef oracle_entry_t* list_ = o.lists + s * ORACLE_LIST
    while i < o.lengths[s]:
        if not live(o, s, &list_[i], o.horizon) and not after_power_cut(o, s, &list_[i]):
            o.lengths[s] -= 1
            list_[i] = list_[o.lengths[s]]
        else:
            i += 1


cdef uint32_t oracle_begin(oracle_t* o, int kind, uint64_t first, uint64_t count) noexcept nogil:
    cdef uint64_t s
    cdef uint32_t n = o.op_count
    cdef oracle_entry_t* e
    if n == o.op_max:
        return 0
    for s in range(first, first + count):
        if o.lengths[s] > ORACLE_LIST // 2:
            prune(o, s)
            if o.lengths[s] == ORACLE_LIST:
                return 0
    memset(&o.ops[n], 0, sizeof(oracle_op_t))
    o.tick += 1
    o.ops[n].begin = o.tick
    o.ops[n].end = ~<uint64_t>0
    o.ops[n].kind = <uint8_t>kind
    o.ops[n].first = first
    o.ops[n].count = count
    o.op_count = n + 1
    for s in range(first, first + count):
        e = &o.lists[s * ORACLE_LIST + o.lengths[s]]
        e.op = n
        e.after = 0
        e.since = 0
        o.lengths[s] += 1
    return n


cdef void oracle_end(oracle_t* o, uint32_t op, bint ok, bint durable) noexcept nogil:
    o.tick += 1
    o.ops[op].end = o.tick
    o.ops[op].state = OP_DONE if ok else OP_MAYBE
    if ok and durable:
        o.ops[op].durable = 1


cdef void oracle_flushed(oracle_t* o, uint64_t began) noexcept nogil:
    cdef uint32_t i
    o.tick += 1
    while o.settled < o.op_count and (o.ops[o.settled].durable
                                      or o.ops[o.settled].state == OP_MAYBE):
        o.settled += 1
    for i in range(o.settled, o.op_count):
        if o.ops[i].state == OP_DONE and o.ops[i].end < began:
            o.ops[i].durable = 1


# -- checking ----------------------------------------------------------------------------------

cdef bint shows(const oracle_t* o, uint64_t s, uint32_t op, const uint8_t* data,
        uint32_t stamp, uint64_t place) noexcept nogil:
    """Is the content that of the operation?"""
    cdef int kind = o.ops[op].kind
    if kind == KIND_WRITE:
        return stamp == op and place == s
    if kind == KIND_START:
        return memcmp(data, o.start + s * SECTOR, SECTOR) == 0
    return stamp == STAMP_ZERO


cdef void learn_order(oracle_t* o, uint64_t s, uint32_t shown, uint64_t began) noexcept nogil:
    """What had ended before the read began came before what it shows."""
    cdef int i
    cdef oracle_entry_t* e
    if o.ops[shown].kind == KIND_TRIM:
        return
    for i in range(o.lengths[s]):
        e = &o.lists[s * ORACLE_LIST + <uint64_t>i]
        if e.op != shown and e.after == 0 and o.ops[e.op].end < began:
            e.after = shown + 1
            e.since = o.tick


cdef const char* oracle_name(uint32_t stamp) noexcept nogil:
    if stamp == STAMP_BASE:
        return b"the base"
    if stamp == STAMP_POISON:
        return b"storage that nobody wrote"
    if stamp == STAMP_GARBAGE:
        return b"garbage of lost new storage"
    if stamp == STAMP_ZERO:
        return b"zeros"
    if stamp == STAMP_TORN:
        return b"a mixture"
    return b"operation"


cdef void describe(oracle_t* o, uint64_t s, uint32_t stamp, uint64_t place,
        int moment) noexcept nogil:
    cdef char[300] wanted
    cdef int i, at = 0, n
    cdef const oracle_entry_t* e
    if o.failure[0]:
        return
    wanted[0] = 0
    for i in range(o.lengths[s]):
        e = &o.lists[s * ORACLE_LIST + <uint64_t>i]
        n = snprintf(&wanted[at], <size_t>(300 - at), b" %u%s%s%s%s", e.op,
                     <const char*>(b"T" if o.ops[e.op].kind == KIND_TRIM else
                                   b"Z" if o.ops[e.op].kind == KIND_ZERO else b"w"),
                     <const char*>(b"" if o.ops[e.op].state == OP_DONE else b"?"),
                     <const char*>(b"!" if o.ops[e.op].durable else b""),
                     <const char*>(b"<" if e.after else b""))
        if n < 0 or at + n >= 290:
            break
        at += n
    snprintf(o.failure, 512, b"sector %llu %s shows %s %lld (of sector %llu); known operations:%s",
             <unsigned long long>s,
             <const char*>(b"read" if moment == MOMENT_LIVE else b"after a power cut"
                           if moment == MOMENT_POWER else b"of a failed device"),
             oracle_name(stamp), <long long>(stamp if stamp < STAMP_BASE else 0),
             <unsigned long long>place, &wanted[0])


cdef bint check_sector(oracle_t* o, const uint8_t* data, uint64_t s, uint64_t began, int moment,
        bint learn) noexcept nogil:
    cdef uint64_t place
    cdef uint32_t stamp = pattern_read(data, &place), shown = 0
    cdef const oracle_entry_t* e
    cdef int i, found = 0
    cdef bint may
    for i in range(o.lengths[s]):
        e = &o.lists[s * ORACLE_LIST + <uint64_t>i]
        if not shows(o, s, e.op, data, stamp, place):
            continue
        may = moment != MOMENT_POWER and live(o, s, e, began)
        if not may and moment != MOMENT_LIVE:
            may = after_power_cut(o, s, e)
        if may:
            found += 1
            shown = e.op
    if found == 0:
        describe(o, s, stamp, place, moment)
        return False
    # Zeros may come from more than one operation: then they teach nothing.
    if learn and found == 1:
        learn_order(o, s, shown, began)
    return True


cdef bint oracle_check(oracle_t* o, const uint8_t* data, uint64_t first, uint64_t count,
        uint64_t began, int moment, bint learn) noexcept nogil:
    cdef uint64_t i
    for i in range(count):
        if not check_sector(o, data + i * SECTOR, first + i, began, moment, learn):
            return False
    return True
