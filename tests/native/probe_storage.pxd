# SPDX-License-Identifier: Apache-2.0
"""A store in memory that logs what is done to it, keeps apart what is durable, fails on order."""
from libc.stdint cimport int64_t, uint8_t, uint64_t

from fvdcore.file_storage cimport file_storage_t
from fvdcore.storage cimport storage_ops_t, storage_t
from fvdcore.sync cimport cond_t, mutex_t

cdef enum:
    LOG_MAX = 65536

cdef enum log_op_t:
    LOG_READ = 0
    LOG_WRITE = 1
    LOG_FLUSH = 2
    LOG_ZERO = 3
    LOG_STATUS = 4
    LOG_WRITEBACK = 5
    LOG_RESIZE = 6
    LOG_OPS = 7

cdef struct log_entry_t:
    int op
    int flags
    uint64_t offset
    uint64_t length

cdef struct log_storage_t:
    storage_t head                     # first: a log_storage_t* is a storage_t*
    storage_ops_t ops
    storage_t* under                   # where the bytes lie instead of memory, or NULL
    uint64_t room                      # bytes of memory
    uint8_t* memory                    # what a read returns
    uint8_t* durable                   # what survives power loss: memory as of the last flush
    mutex_t mutex
    cond_t changed
    log_entry_t* log
    uint64_t logged
    int64_t[7] fail_in                 # operations until one fails; -1: never
    int[7] fail_errno
    bint[7] fail_on                    # every later one fails too
    uint64_t bad_begin                 # reads of these bytes fail
    uint64_t bad_end
    bint[7] held                       # operations of the kind wait
    uint64_t[7] permits            # of them, how many may go on all the same
    uint64_t[7] waiting

cdef class Storage:
    cdef log_storage_t s
    cdef object keep
    cdef storage_t* raw(self)

cdef class FileStorage:
    cdef file_storage_t f
    cdef storage_t* raw(self)
