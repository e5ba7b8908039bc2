# SPDX-License-Identifier: Apache-2.0
"""Layer 1. A storage that may hang, read with patience: storage_t over a file of a base.

A read that a network file system or a suspended device holds up cannot be called back: its thread
stays in the kernel until the answer comes, and so does its buffer. So what is not in memory is read
by reader threads into buffers of their own, and whoever wants it waits for them, at most so long.
Readers that hang are left behind at the end; the last one closes what they read from."""
from libc.stdint cimport uint8_t, uint64_t
from .storage cimport storage_ops_t, storage_t
from .sync cimport cond_t, gate_t, mutex_t

cdef enum:
    PATIENT_READERS = 32

cdef struct patient_t

# A call that waits; it lies on its caller's stack.
cdef struct patient_job_t:
    patient_job_t* next
    cond_t done
    int state
    int reader                         # that works at it
    bint is_status
    uint8_t* data                      # a read's; written only while the caller is there
    uint64_t length
    uint64_t offset
    uint64_t run                       # a status's
    int result

cdef struct patient_reader_t:
    patient_t* owner
    uint8_t* buffer                    # NULL: there is no such reader
    patient_job_t* job                 # NULL: none, or its caller waits no more

# What readers share, and what outlives the storage as long as one of them hangs.
cdef struct patient_t:
    storage_t* under
    mutex_t mutex                      # guards all that follows
    cond_t work
    cond_t ended
    patient_job_t* first
    patient_job_t* last
    patient_reader_t[32] readers       # PATIENT_READERS
    int running
    int idle
    bint closing
    bint orphaned                      # the last reader frees it
    bint interrupted                   # calls wait for nothing any more

cdef struct patient_storage_t:
    storage_t head                     # first: a patient_storage_t* is a storage_t*
    storage_ops_t ops
    patient_t* shared                  # NULL: closed
    uint64_t timeout_ns

# Read under, which is one block of calloc and belongs to s from now on, waiting at most timeout_ns
# for each call. On failure the caller keeps it.
cdef int patient_open(patient_storage_t* s, storage_t* under, uint64_t timeout_ns,
        gate_t* gate) noexcept nogil
# For the end: what waits fails at once. Other stores are left alone.
cdef void patient_interrupt(storage_t* s) noexcept nogil
