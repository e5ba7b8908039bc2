# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""bitmap_t and range_locks_t as Python objects."""
from libc.stdint cimport uint64_t

from fvdcore.bitmap cimport (
    bitmap_all_present, bitmap_clear_padding, bitmap_free, bitmap_init, bitmap_next_clear,
    bitmap_note_difference, bitmap_recount, bitmap_run_end, bitmap_set_durable,
    bitmap_set_present, bitmap_t, bitmap_test,
)
from fvdcore.range_lock cimport (
    range_lock, range_lock_try, range_lock_until, range_locks_free, range_locks_init, range_locks_t,
    range_locks_wait_idle, range_unlock,
)
from fvdcore.sync cimport clock_now, mutex_lock, mutex_unlock


cdef object number(const uint64_t* words, uint64_t count):
    """The bits as one integer."""
    return int.from_bytes((<const char*>words)[:count * 8], "little")


cdef class Bitmap:
    """A bitmap_t over private memory."""

    cdef bitmap_t b

    def __init__(self, uint64_t blocks, uint64_t bytes):
        cdef int rc = bitmap_init(&self.b, blocks, bytes, NULL, NULL)
        if rc < 0:
            raise OSError(-rc, "bitmap_init")

    def __dealloc__(self):
        bitmap_free(&self.b)

    def test(self, uint64_t block):
        return bool(bitmap_test(&self.b, block))

    def next_clear(self, uint64_t first, uint64_t end):
        return bitmap_next_clear(&self.b, first, end)

    def run_end(self, uint64_t block, uint64_t end):
        return bitmap_run_end(&self.b, block, end)

    def all_present(self, uint64_t first, uint64_t end):
        return bool(bitmap_all_present(&self.b, first, end))

    def set_present(self, uint64_t first, uint64_t end, bint copied=False):
        cdef uint64_t fresh
        with nogil:
            fresh = bitmap_set_present(&self.b, first, end, copied)
        return fresh

    def set_durable(self, uint64_t first, uint64_t end):
        bitmap_set_durable(&self.b, first, end)

    def note_difference(self):
        return bitmap_note_difference(&self.b)

    def clear_padding(self):
        bitmap_clear_padding(&self.b)

    def recount(self):
        bitmap_recount(&self.b)

    def load(self, bytes present, bytes durable):
        """Set the words of both arrays, as reading them from a file would."""
        cdef uint64_t w
        for w in range(self.b.words):
            self.b.present[w] = int.from_bytes(present[w * 8:w * 8 + 8], "little")
            self.b.durable[w] = int.from_bytes(durable[w * 8:w * 8 + 8], "little")

    def present(self):
        return number(self.b.present, self.b.words)

    def durable(self):
        return number(self.b.durable, self.b.words)

    def marks(self):
        """(words of present marked dirty, groups of these, stale pages)."""
        return (number(self.b.dirty_words, self.b.words // 64 + 1),
                number(self.b.dirty_groups, self.b.words // 4096 + 1),
                number(self.b.stale_pages, self.b.pages // 64 + 1))

    def counts(self):
        """(local, pending, of these copied)."""
        return self.b.local, self.b.pending, self.b.pending_copied


cdef class RangeLocks:
    """A range_locks_t; lock and wait_idle block without the interpreter's lock."""

    cdef range_locks_t r

    def __init__(self):
        cdef int rc = range_locks_init(&self.r, NULL)
        if rc < 0:
            raise OSError(-rc, "range_locks_init")

    def __dealloc__(self):
        range_locks_free(&self.r)

    def lock(self, uint64_t first, uint64_t end):
        with nogil:
            range_lock(&self.r, first, end)

    def try_lock(self, uint64_t first, uint64_t end):
        cdef bint got
        with nogil:
            got = range_lock_try(&self.r, first, end)
        return bool(got)

    def lock_within(self, uint64_t first, uint64_t end, double seconds):
        cdef bint got
        cdef uint64_t deadline = clock_now(NULL) + <uint64_t>(seconds * 1e9)
        with nogil:
            got = range_lock_until(&self.r, first, end, deadline)
        return bool(got)

    @property
    def patient(self):
        mutex_lock(&self.r.mutex)
        n = self.r.patient
        mutex_unlock(&self.r.mutex)
        return n

    def unlock(self, uint64_t first, uint64_t end):
        with nogil:
            range_unlock(&self.r, first, end)

    def wait_idle(self):
        with nogil:
            range_locks_wait_idle(&self.r)

    @property
    def waiting(self):
        mutex_lock(&self.r.mutex)
        n = self.r.waiting
        mutex_unlock(&self.r.mutex)
        return n

    def held(self):
        mutex_lock(&self.r.mutex)
        found = sorted((self.r.first[i], self.r.end[i]) for i in range(self.r.used))
        mutex_unlock(&self.r.mutex)
        return found

    def guard(self, uint64_t[::1] counter, uint64_t first, uint64_t end, int rounds):
        """Lock, add 1 to each word of the range by an unprotected read and write, unlock."""
        cdef uint64_t at, seen
        cdef volatile_t* words = <volatile_t*>&counter[0]
        cdef int i
        with nogil:
            for i in range(rounds):
                range_lock(&self.r, first, end)
                for at in range(first, end):
                    seen = words[at]
                    words[at] = seen + 1
                range_unlock(&self.r, first, end)

cdef extern from *:
    """
    typedef volatile uint64_t fvd_volatile_t;
    """
    ctypedef uint64_t volatile_t "fvd_volatile_t"
