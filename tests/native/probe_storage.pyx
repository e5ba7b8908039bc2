# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Stores for tests: Storage, a logging one in memory, and FileStorage, the engine's own."""
from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcmp, memcpy, memset

from fvdcore.file_storage cimport file_storage_open, file_storage_t
from fvdcore.limits cimport NEVER
from fvdcore.storage cimport (
    EXTENT_DATA, EXTENT_ZERO, storage_close, storage_flush, storage_ops_t, storage_read,
    storage_resize,
    storage_start_writeback, storage_status, storage_t, storage_write, storage_zero,
)
from fvdcore.sync cimport (
    cond_broadcast, cond_free, cond_init, cond_wait, mutex_free, mutex_init, mutex_lock,
    mutex_unlock,
)
from fvdcore.syscalls cimport EIO, ENOSPC

NAMES = ("read", "write", "flush", "zero", "status", "writeback", "resize")
cdef enum:
    GRAIN = 4096


cdef int enter(log_storage_t* s, int op, uint64_t length, uint64_t offset,
               int flags) noexcept nogil:
    """Log, wait while held, and tell the failure that was ordered. The mutex is held after 0."""
    cdef int rc = 0
    mutex_lock(&s.mutex)
    if s.logged < LOG_MAX:
        s.log[s.logged] = log_entry_t(op, flags, offset, length)
    s.logged += 1
    s.waiting[op] += 1
    cond_broadcast(&s.changed)
    while s.held[op] and s.permits[op] == 0:
        cond_wait(&s.changed, &s.mutex, NEVER)
    if s.held[op]:
        s.permits[op] -= 1
    s.waiting[op] -= 1
    if s.fail_in[op] == 0:
        rc = -s.fail_errno[op]
        if not s.fail_on[op]:
            s.fail_in[op] = -1
    elif s.fail_in[op] > 0:
        s.fail_in[op] -= 1
    if rc < 0:
        mutex_unlock(&s.mutex)
    return rc


cdef int log_read(storage_t* p, void* b, uint64_t n, uint64_t offset, int flags) noexcept nogil:
    cdef log_storage_t* s = <log_storage_t*>p
    cdef int rc = enter(s, LOG_READ, n, offset, flags)
    cdef bint bad
    if rc < 0:
        return rc
    bad = s.bad_begin < offset + n and offset < s.bad_end
    mutex_unlock(&s.mutex)
    if bad:
        return -EIO
    if s.under != NULL:
        return storage_read(s.under, b, n, offset, flags)
    if offset > p.length or n > p.length - offset:
        return -EIO
    mutex_lock(&s.mutex)
    memcpy(b, s.memory + offset, n)
    mutex_unlock(&s.mutex)
    return 0


cdef int log_write(storage_t* p, const void* b, uint64_t n, uint64_t offset,
                   int flags) noexcept nogil:
    cdef log_storage_t* s = <log_storage_t*>p
    cdef int rc = enter(s, LOG_WRITE, n, offset, flags)
    if rc == -ENOSPC and s.under == NULL and offset + n <= p.length:
        # As file systems do: there was room for the beginning.
        mutex_lock(&s.mutex)
        memcpy(s.memory + offset, b, n // 2)
        mutex_unlock(&s.mutex)
    if rc < 0:
        return rc
    if s.under != NULL:
        mutex_unlock(&s.mutex)
        return storage_write(s.under, b, n, offset, flags)
    if offset > p.length or n > p.length - offset:
        rc = -EIO
    else:
        memcpy(s.memory + offset, b, n)
    mutex_unlock(&s.mutex)
    return rc


cdef int log_flush(storage_t* p) noexcept nogil:
    cdef log_storage_t* s = <log_storage_t*>p
    cdef int rc = enter(s, LOG_FLUSH, 0, 0, 0)
    if rc < 0:
        return rc
    if s.under != NULL:
        mutex_unlock(&s.mutex)
        return storage_flush(s.under)
    memcpy(s.durable, s.memory, p.length)
    mutex_unlock(&s.mutex)
    return 0


cdef int log_zero(storage_t* p, uint64_t n, uint64_t offset, int flags) noexcept nogil:
    cdef log_storage_t* s = <log_storage_t*>p
    cdef int rc = enter(s, LOG_ZERO, n, offset, flags)
    if rc < 0:
        return rc
    if s.under != NULL:
        mutex_unlock(&s.mutex)
        return storage_zero(s.under, n, offset, flags)
    if offset > p.length or n > p.length - offset:
        rc = -EIO
    else:
        memset(s.memory + offset, 0, n)
    mutex_unlock(&s.mutex)
    return rc


cdef bint grain_is_zero(const uint8_t* p, uint64_t n) noexcept nogil:
    return p[0] == 0 and (n == 1 or memcmp(p, p + 1, n - 1) == 0)


cdef int log_status(storage_t* p, uint64_t n, uint64_t offset, uint64_t* run) noexcept nogil:
    """Zeros, in whole grains, are holes."""
    cdef log_storage_t* s = <log_storage_t*>p
    cdef uint64_t at = offset, end = offset + n, step
    cdef bint zero = False, here
    cdef int rc = enter(s, LOG_STATUS, n, offset, 0)
    if rc < 0:
        return rc
    mutex_unlock(&s.mutex)
    if s.under != NULL:
        return storage_status(s.under, n, offset, run)
    mutex_lock(&s.mutex)
    while at < end:
        step = min(GRAIN - at % GRAIN, end - at)
        here = grain_is_zero(s.memory + at, step)
        if at == offset:
            zero = here
        elif here != zero:
            break
        at += step
    mutex_unlock(&s.mutex)
    run[0] = at - offset
    return EXTENT_ZERO if zero else EXTENT_DATA


cdef void log_writeback(storage_t* p, uint64_t n, uint64_t offset) noexcept nogil:
    cdef log_storage_t* s = <log_storage_t*>p
    if enter(s, LOG_WRITEBACK, n, offset, 0) == 0:
        mutex_unlock(&s.mutex)


cdef int log_resize(storage_t* p, uint64_t length) noexcept nogil:
    """Up to the memory it began with; what is cut off and grown again reads as zeros."""
    cdef log_storage_t* s = <log_storage_t*>p
    cdef int rc = enter(s, LOG_RESIZE, 0, length, 0)
    if rc < 0:
        return rc
    if length > s.room:
        rc = -ENOSPC
    else:
        if length > p.length:
            memset(s.memory + p.length, 0, length - p.length)
        p.length = length
    mutex_unlock(&s.mutex)
    return rc


cdef void log_close(storage_t* p) noexcept nogil:
    pass


cdef class Storage:
    """A logging store that begins with the given bytes."""

    def __cinit__(self, content, uint64_t room=0, bint grows=False):
        """room: bytes that it may be made long by resize, where more than the content; grows: it
        says so of itself, as a file does."""
        cdef bytes start = bytes(content)
        cdef int op
        memset(&self.s, 0, sizeof(log_storage_t))
        self.s.head.length = len(start)
        self.s.head.grows = grows
        self.s.room = max(room, <uint64_t>len(start))
        self.s.memory = <uint8_t*>calloc(self.s.room + 1, 1)
        self.s.durable = <uint8_t*>calloc(self.s.room + 1, 1)
        self.s.log = <log_entry_t*>calloc(LOG_MAX, sizeof(log_entry_t))
        memcpy(self.s.memory, <char*>start, len(start))
        memcpy(self.s.durable, <char*>start, len(start))
        mutex_init(&self.s.mutex, NULL)
        cond_init(&self.s.changed, NULL)
        self.s.ops = storage_ops_t(log_read, log_write, log_flush, log_zero, log_status,
                                   log_writeback, log_resize, log_close)
        self.s.head.ops = &self.s.ops
        for op in range(LOG_OPS):
            self.s.fail_in[op] = -1

    def __dealloc__(self):
        free(self.s.memory)
        free(self.s.durable)
        free(self.s.log)
        mutex_free(&self.s.mutex)
        cond_free(&self.s.changed)

    cdef storage_t* raw(self):
        return &self.s.head

    def log(self, *kinds):
        """What was done since the last forget(): (kind, offset, length, flags)."""
        mutex_lock(&self.s.mutex)
        found = [(self.s.log[i].op, self.s.log[i].offset, self.s.log[i].length,
                  self.s.log[i].flags) for i in range(min(self.s.logged, <uint64_t>LOG_MAX))]
        mutex_unlock(&self.s.mutex)
        wanted = kinds or ("write", "flush", "zero")
        return [(NAMES[op], *rest) for op, *rest in found if NAMES[op] in wanted]

    def forget(self):
        mutex_lock(&self.s.mutex)
        self.s.logged = 0
        mutex_unlock(&self.s.mutex)

    def content(self):
        mutex_lock(&self.s.mutex)
        data = (<char*>self.s.memory)[:self.s.head.length]
        mutex_unlock(&self.s.mutex)
        return data

    def durable(self):
        """What a power loss would leave."""
        mutex_lock(&self.s.mutex)
        data = (<char*>self.s.durable)[:self.s.head.length]
        mutex_unlock(&self.s.mutex)
        return data

    def fail(self, kind, int error, int after=0, bint always=False):
        """Let an operation of the kind fail, the next one or one after so many."""
        cdef int op = NAMES.index(kind)
        mutex_lock(&self.s.mutex)
        self.s.fail_errno[op] = error
        self.s.fail_on[op] = always
        self.s.fail_in[op] = after if error else -1
        mutex_unlock(&self.s.mutex)

    def spoil(self, uint64_t offset, uint64_t length):
        """From now on nobody can read these bytes; no length: all can be read again."""
        mutex_lock(&self.s.mutex)
        self.s.bad_begin = offset
        self.s.bad_end = offset + length
        mutex_unlock(&self.s.mutex)

    def hold(self, kind):
        """Let operations of the kind wait until release(kind)."""
        self.set_held(NAMES.index(kind), True)

    def pass_one(self, kind):
        """Let one operation of a held kind go on."""
        mutex_lock(&self.s.mutex)
        self.s.permits[<int>NAMES.index(kind)] += 1
        cond_broadcast(&self.s.changed)
        mutex_unlock(&self.s.mutex)

    def release(self, kind):
        self.set_held(NAMES.index(kind), False)

    def set_held(self, int op, bint held):
        mutex_lock(&self.s.mutex)
        self.s.held[op] = held
        cond_broadcast(&self.s.changed)
        mutex_unlock(&self.s.mutex)

    def waiting(self, kind):
        """How many operations of the kind wait."""
        cdef int op = NAMES.index(kind)
        return self.s.waiting[op]


cdef class FileStorage:
    """The engine's storage over a file."""

    def __cinit__(self, int fd):
        cdef int rc = file_storage_open(&self.f, fd)
        if rc < 0:
            raise OSError(-rc, "file_storage_open")

    cdef storage_t* raw(self):
        return &self.f.head

    @property
    def length(self):
        return self.f.head.length

    @property
    def no_punch(self):
        return bool(self.f.no_punch)

    @no_punch.setter
    def no_punch(self, bint value):
        self.f.no_punch = value

    @property
    def fd(self):
        return self.f.fd

    def read(self, uint64_t length, uint64_t offset, int flags=0):
        """The bytes, or a negative errno."""
        cdef uint8_t* b = <uint8_t*>malloc(length + 1)
        cdef int rc
        with nogil:
            rc = storage_read(&self.f.head, b, length, offset, flags)
        found = (<char*>b)[:length] if rc == 0 else rc
        free(b)
        return found

    def write(self, bytes data, uint64_t offset, int flags=0):
        cdef const char* b = data
        cdef uint64_t length = len(data)
        cdef int rc
        with nogil:
            rc = storage_write(&self.f.head, b, length, offset, flags)
        return rc

    def flush(self):
        return storage_flush(&self.f.head)

    def zero(self, uint64_t length, uint64_t offset, int flags=0):
        return storage_zero(&self.f.head, length, offset, flags)

    def status(self, uint64_t length, uint64_t offset):
        """(kind, run)."""
        cdef uint64_t run = 0
        cdef int kind = storage_status(&self.f.head, length, offset, &run)
        return kind, run

    def start_writeback(self, uint64_t length, uint64_t offset):
        storage_start_writeback(&self.f.head, length, offset)

    def resize(self, uint64_t length):
        return storage_resize(&self.f.head, length)

    def close(self):
        storage_close(&self.f.head)
