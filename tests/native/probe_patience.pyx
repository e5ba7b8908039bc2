# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""The engine's patient storage over a logging store, whose reads can be held, for tests."""
from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport calloc
from libc.string cimport memset

from fvdcore.patience cimport patient_interrupt, patient_open, patient_storage_t
from fvdcore.storage cimport (
    IO_NOWAIT, storage_close, storage_flush, storage_ops_t, storage_read, storage_resize,
    storage_start_writeback, storage_status, storage_t, storage_write, storage_zero,
)
from fvdcore.syscalls cimport EAGAIN
from probe_storage cimport Storage

cdef struct forward_t:
    storage_t head                     # first: a forward_t* is a storage_t*
    storage_ops_t ops
    storage_t* to
    int* cached
    int* closed


cdef int forward_read(storage_t* s, void* b, uint64_t n, uint64_t offset, int flags) noexcept nogil:
    cdef forward_t* f = <forward_t*>s
    if flags & IO_NOWAIT and not f.cached[0]:
        return -EAGAIN
    return storage_read(f.to, b, n, offset, flags)


cdef int forward_status(storage_t* s, uint64_t n, uint64_t offset, uint64_t* run) noexcept nogil:
    return storage_status((<forward_t*>s).to, n, offset, run)


cdef void forward_close(storage_t* s) noexcept nogil:
    (<forward_t*>s).closed[0] += 1


cdef class Patient:
    """Over a Storage, which has to live as long as something hangs in it."""

    cdef patient_storage_t s
    cdef Storage store
    cdef int is_cached
    cdef int closings

    def __cinit__(self, Storage store, double timeout=10.0):
        cdef forward_t* f = <forward_t*>calloc(1, sizeof(forward_t))
        self.store = store
        f.to = store.raw()
        f.cached = &self.is_cached
        f.closed = &self.closings
        f.head.length = f.to.length
        memset(&f.ops, 0, sizeof(f.ops))
        f.ops.read = forward_read
        f.ops.status = forward_status
        f.ops.close = forward_close
        f.head.ops = &f.ops
        if patient_open(&self.s, &f.head, <uint64_t>(timeout * 1e9), NULL) < 0:
            raise MemoryError

    @property
    def cached(self):
        return bool(self.is_cached)

    @cached.setter
    def cached(self, bint value):
        self.is_cached = value

    @property
    def closed(self):
        """How often what lies below was closed."""
        return self.closings

    @property
    def readers(self):
        return self.s.shared.running

    def read_into(self, uint8_t[::1] buffer, uint64_t offset, int flags=0):
        cdef int rc
        cdef uint64_t length = <uint64_t>len(buffer)
        with nogil:
            rc = storage_read(&self.s.head, &buffer[0], length, offset, flags)
        return rc

    def status(self, uint64_t length, uint64_t offset):
        """(kind, run)."""
        cdef uint64_t run = 0
        cdef int kind
        with nogil:
            kind = storage_status(&self.s.head, length, offset, &run)
        return kind, run

    def changes(self):
        """What each operation that would change something says."""
        storage_start_writeback(&self.s.head, 1, 0)
        return [storage_write(&self.s.head, b"x", 1, 0, 0), storage_zero(&self.s.head, 1, 0, 0),
                storage_resize(&self.s.head, 1), storage_flush(&self.s.head)]

    def interrupt(self):
        with nogil:
            patient_interrupt(&self.s.head)

    def close(self):
        with nogil:
            storage_close(&self.s.head)
