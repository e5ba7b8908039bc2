# SPDX-License-Identifier: Apache-2.0
"""Layer 1. storage_t: where bytes lie, behind a table of operations.

The engine touches files, devices and bases through this table alone, so that the simulator can own
every read, write and flush, and so that an FVD image can stand as the base of another.
All operations return 0 (or a positive value where said) or a negative errno, and transfer the whole
length or fail. Offsets and lengths are bytes, of any alignment."""
from libc.stdint cimport uint64_t

cdef enum:
    IO_NOWAIT = 1                      # read: -EAGAIN rather than wait for a device
    IO_DSYNC = 2                       # write: durable when it returns
    IO_ONCE = 4                        # read: a server's error is final; who asks will ask for less
    IO_HALF = 8                        # read: waits half as long as it may for storage that is away
    ZERO_KEEP = 1                      # zero: keep the space allocated (NBD NO_HOLE)
    ZERO_HINT = 2                      # zero: only to give space back; nothing where it cannot
    # Both: only to have space beforehand for what will be written there; it reads zeros already.

cdef enum extent_kind_t:
    EXTENT_DATA = 0
    EXTENT_ZERO = 1                    # reads as zeros, no space used
    EXTENT_BASE = 2
    EXTENT_BASE_ZERO = 3               # in the base, where it is a hole

cdef struct storage_t

cdef struct storage_ops_t:
    int (*read)(storage_t* s, void* buffer, uint64_t length, uint64_t offset,
            int flags) noexcept nogil
    int (*write)(storage_t* s, const void* buffer, uint64_t length, uint64_t offset,
            int flags) noexcept nogil
    # Everything written before is on stable storage when this returns 0. Never retried after a
    # failure.
    int (*flush)(storage_t* s) noexcept nogil
    # The range reads as zeros afterwards; space is given back unless ZERO_KEEP.
    int (*zero)(storage_t* s, uint64_t length, uint64_t offset, int flags) noexcept nogil
    # Kind of the run that begins at offset: EXTENT_DATA or EXTENT_ZERO; *run <= length, > 0.
    int (*status)(storage_t* s, uint64_t length, uint64_t offset, uint64_t* run) noexcept nogil
    # Begin to write dirty pages of the range to the device; a hint.
    void (*start_writeback)(storage_t* s, uint64_t length, uint64_t offset) noexcept nogil
    # Make it length bytes long. -ENOSPC: it cannot be so long; -EOPNOTSUPP: it is as long as it is.
    int (*resize)(storage_t* s, uint64_t length) noexcept nogil
    void (*close)(storage_t* s) noexcept nogil

cdef struct storage_t:
    const storage_ops_t* ops
    uint64_t length                    # bytes at open, or after the last resize (atomic)
    bint grows                         # resize makes it longer, with zeros, and cuts it shorter

cdef inline int storage_read(storage_t* s, void* b, uint64_t n, uint64_t offset,
        int flags) noexcept nogil:
    return s.ops.read(s, b, n, offset, flags)

cdef inline int storage_write(storage_t* s, const void* b, uint64_t n, uint64_t offset,
        int flags) noexcept nogil:
    return s.ops.write(s, b, n, offset, flags)

cdef inline int storage_flush(storage_t* s) noexcept nogil:
    return s.ops.flush(s)

cdef inline int storage_zero(storage_t* s, uint64_t n, uint64_t offset, int flags) noexcept nogil:
    return s.ops.zero(s, n, offset, flags)

cdef inline int storage_status(storage_t* s, uint64_t n, uint64_t offset,
        uint64_t* run) noexcept nogil:
    return s.ops.status(s, n, offset, run)

cdef inline void storage_start_writeback(storage_t* s, uint64_t n, uint64_t offset) noexcept nogil:
    s.ops.start_writeback(s, n, offset)

cdef inline int storage_resize(storage_t* s, uint64_t length) noexcept nogil:
    return s.ops.resize(s, length)

cdef inline void storage_close(storage_t* s) noexcept nogil:
    if s.ops != NULL:
        s.ops.close(s)
