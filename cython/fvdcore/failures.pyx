# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Layer 1. The last failed requests. See failures.pxd."""
from libc.stdint cimport uint64_t
from libc.string cimport memcpy, memset
from .sync cimport gate_t, mutex_free, mutex_init, mutex_lock, mutex_unlock


cdef int failures_init(failures_t* f, gate_t* gate) noexcept nogil:
    memset(f, 0, sizeof(failures_t))
    return mutex_init(&f.mutex, gate)


cdef void failures_free(failures_t* f) noexcept nogil:
    mutex_free(&f.mutex)


cdef void failure_note(failures_t* f, int op, int result, uint64_t offset, uint64_t length,
        bint of_base) noexcept nogil:
    cdef failure_t* one
    mutex_lock(&f.mutex)
    if f.filled < FAILURES:
        one = &f.ring[f.filled]
        f.filled += 1
        one.op = op
        one.error = -result
        one.of_base = of_base
        one.offset = offset
        one.length = length
    else:
        f.lost += 1
    mutex_unlock(&f.mutex)
    if f.notify != NULL:
        f.notify(f.owner)


cdef int failures_take(failures_t* f, failure_t* out, uint64_t* lost) noexcept nogil:
    cdef int count
    mutex_lock(&f.mutex)
    count = f.filled
    memcpy(out, &f.ring[0], <size_t>count * sizeof(failure_t))
    lost[0] = f.lost
    f.filled = 0
    f.lost = 0
    mutex_unlock(&f.mutex)
    return count
