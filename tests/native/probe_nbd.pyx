# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""The engine's storage over an NBD server, and its connections, for tests."""
from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset

from fvdcore.nbd_pool cimport NBD_READY, nbd_options_t
from fvdcore.nbd_storage cimport nbd_storage_interrupt, nbd_storage_open, nbd_storage_t
from fvdcore.storage cimport (
    storage_close, storage_flush, storage_read, storage_resize, storage_start_writeback,
    storage_status, storage_write, storage_zero,
)
from fvdcore.sync cimport mutex_lock, mutex_unlock
from probe_gate cimport Gate


cdef class NbdStorage:
    """Open an export; OSError with the reason where that fails."""

    cdef nbd_storage_t s
    cdef Gate gate
    cdef bint is_open

    def __cinit__(self, str uri, *, bint writable=False, int connections=4, double timeout=10.0,
                  uint64_t length=0, bint exact=False, Gate gate=None):
        cdef nbd_options_t o
        cdef const char* reason = NULL
        cdef bytes name = uri.encode()
        cdef const char* c_name = name
        cdef int rc
        memset(&o, 0, sizeof(o))
        o.keeper_fd = -1
        o.writable = writable
        o.connections = connections
        o.timeout_ns = <uint64_t>(timeout * 1e9)
        o.length = length
        o.exact = exact
        self.gate = gate
        o.gate = gate.raw() if gate is not None else NULL
        with nogil:
            rc = nbd_storage_open(&self.s, c_name, &o, &reason)
        if rc < 0:
            raise OSError(-rc, reason.decode() if reason != NULL else "nbd_storage_open")
        self.is_open = True

    def __dealloc__(self):
        self.close()

    def close(self):
        if self.is_open:
            self.is_open = False
            with nogil:
                storage_close(&self.s.head)

    @property
    def length(self):
        return self.s.head.length

    def figures(self):
        """What the pool counts, read at one moment."""
        cdef int i
        mutex_lock(&self.s.pool.mutex)
        found = {
            "ready": self.s.pool.ready, "started": self.s.pool.started,
            "attempts": self.s.pool.attempts, "losses": self.s.pool.losses,
            "lost": bool(self.s.pool.lost), "unfit": bool(self.s.pool.unfit),
            "align": self.s.pool.align, "error": (<char*>self.s.pool.error).decode(),
            "in_flight": [self.s.pool.connections[i].in_flight
                          for i in range(self.s.pool.started)
                          if self.s.pool.connections[i].state == NBD_READY],
        }
        mutex_unlock(&self.s.pool.mutex)
        return found

    def read(self, uint64_t length, uint64_t offset, int flags=0):
        """The bytes, or a negative errno."""
        cdef uint8_t* b = <uint8_t*>malloc(length + 1)
        cdef int rc
        with nogil:
            rc = storage_read(&self.s.head, b, length, offset, flags)
        data = (<char*>b)[:length] if rc == 0 else rc
        free(b)
        return data

    def write(self, bytes data, uint64_t offset, int flags=0):
        cdef const char* b = data
        cdef uint64_t length = len(data)
        cdef int rc
        with nogil:
            rc = storage_write(&self.s.head, b, length, offset, flags)
        return rc

    def flush(self):
        cdef int rc
        with nogil:
            rc = storage_flush(&self.s.head)
        return rc

    def zero(self, uint64_t length, uint64_t offset, int flags=0):
        cdef int rc
        with nogil:
            rc = storage_zero(&self.s.head, length, offset, flags)
        return rc

    def status(self, uint64_t length, uint64_t offset):
        """(kind, run)."""
        cdef uint64_t run = 0
        cdef int kind
        with nogil:
            kind = storage_status(&self.s.head, length, offset, &run)
        return kind, run

    def resize(self, uint64_t length):
        return storage_resize(&self.s.head, length)

    def start_writeback(self):
        storage_start_writeback(&self.s.head, 1, 0)

    def interrupt(self, double quiet=0.0):
        nbd_storage_interrupt(&self.s.head, <uint64_t>(quiet * 1e9))
