# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Layer 1. The order of first reads. See first_reads.pxd."""
from libc.stdint cimport uint64_t
from libc.stdlib cimport free, malloc
from .sync cimport gate_t, mutex_free, mutex_init, mutex_lock, mutex_unlock
from .syscalls cimport ENOMEM


cdef int first_reads_init(first_reads_t* f, gate_t* gate) noexcept nogil:
    cdef int rc = mutex_init(&f.mutex, gate)
    if rc == 0:
        f.count = 0
        f.reads = <first_read_t*>malloc(FIRST_READS_MAX * sizeof(first_read_t))
    return -ENOMEM if rc == 0 and f.reads == NULL else rc


cdef void first_reads_free(first_reads_t* f) noexcept nogil:
    free(f.reads)
    f.reads = NULL
    mutex_free(&f.mutex)


cdef void first_reads_note(first_reads_t* f, uint64_t offset, uint64_t length) noexcept nogil:
    cdef first_read_t* last
    mutex_lock(&f.mutex)
    last = &f.reads[f.count - 1] if f.count else NULL
    if last != NULL and last.offset + last.length == offset:
        last.length += length
    elif f.count < FIRST_READS_MAX:
        f.reads[f.count] = first_read_t(offset, length)
        f.count += 1
    mutex_unlock(&f.mutex)
