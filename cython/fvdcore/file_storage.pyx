# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Layer 1. storage_t over a regular file or block device.

Reads past the end of a file that shrank are errors (EIO), never zeros. Nor do they become zeros by
a write behind its end: once that was seen, by a read or a flush, nothing is written any more, and
what would give the file its length again looks first. A flush says ENODATA then. EINTR is retried;
short transfers are continued. A failed flush is reported as it is and never retried here: the
kernel marks the pages clean, so a second flush would lie (FORMAT.md, failure model)."""
from libc.errno cimport errno
from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memset
from posix.types cimport off_t
from posix.uio cimport iovec
from .atomics cimport load_acquire, store_release
from .direct_io cimport direct_close, direct_open, direct_part, direct_read, direct_write
from .limits cimport PAGE
from .storage cimport (
    EXTENT_DATA, EXTENT_ZERO, IO_DSYNC, IO_NOWAIT, ZERO_HINT, ZERO_KEEP, storage_ops_t,
    storage_t,
)
from .syscalls cimport (
    EAGAIN, EINTR, EIO, ENODATA, ENOSPC, ENXIO, EOPNOTSUPP, F_DUPFD_CLOEXEC, FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE, RWF_DSYNC, RWF_NOWAIT, SEEK_DATA, SEEK_HOLE,
    SYNC_FILE_RANGE_WRITE, c_close, c_dup_cloexec, c_fallocate, c_fdatasync, c_ftruncate, c_lseek,
    c_preadv2, c_pwritev2, c_sync_file_range, file_length, free_space, is_block_device,
)

cdef enum:
    ZEROS_STEP = 65536
    AHEAD_SHARE = 16                   # of what is free: so much of it is not taken beforehand

cdef extern from *:
    """
    static const uint8_t fvd_zeros[65536];
    """
    const uint8_t* fvd_zeros


cdef bint is_cut(file_storage_t* f) noexcept nogil:
    """Is the file shorter than it has to be? Only somebody else can have done that."""
    cdef uint64_t length = load_acquire(&f.head.length), now = 0
    if f.is_device or load_acquire(&f.cut):
        return not f.is_device
    # One that we make shorter ourselves has the lesser length before.
    if (file_length(f.fd, &now) < 0 or now >= length
            or load_acquire(&f.head.length) != length):
        return False
    store_release(&f.cut, 1)
    return True


cdef int read_cached(storage_t* s, void* buffer, uint64_t length, uint64_t offset,
        int flags) noexcept nogil:
    cdef file_storage_t* f = <file_storage_t*>s
    cdef iovec v
    cdef ssize_t n
    v.iov_base = buffer
    v.iov_len = length
    while v.iov_len:
        n = c_preadv2(f.fd, &v, 1, <off_t>offset, RWF_NOWAIT if flags & IO_NOWAIT else 0)
        if n < 0:
            if errno == EINTR:
                continue
            # A store without NOWAIT (hostfs, say) answers EOPNOTSUPP: the same as "it would
            # block".
            if flags & IO_NOWAIT and errno == EOPNOTSUPP:
                return -EAGAIN
            return -errno
        if n == 0:
            return -EIO
        if flags & IO_NOWAIT and <uint64_t>n < v.iov_len:
            return -EAGAIN
        v.iov_base = <uint8_t*>v.iov_base + n
        v.iov_len -= <size_t>n
        offset += <uint64_t>n
    return 0


cdef int file_read(storage_t* s, void* buffer, uint64_t length, uint64_t offset,
        int flags) noexcept nogil:
    cdef file_storage_t* f = <file_storage_t*>s
    cdef uint64_t part
    cdef int rc
    if f.direct.fd < 0:
        rc = read_cached(s, buffer, length, offset, flags)
    else:
        part = direct_part(&f.direct, length, offset, load_acquire(&s.length))
        if part and flags & IO_NOWAIT:
            return -EAGAIN
        rc = direct_read(&f.direct, <uint8_t*>buffer, part, offset) if part else 0
        if rc == 0 and part < length:
            rc = read_cached(s, <uint8_t*>buffer + part, length - part, offset + part, flags)
    if rc == -EIO:
        is_cut(f)                      # noted, if that is it
    return rc


cdef int write_cached(storage_t* s, const void* buffer, uint64_t length, uint64_t offset,
        int flags) noexcept nogil:
    cdef file_storage_t* f = <file_storage_t*>s
    cdef iovec v
    cdef ssize_t n
    v.iov_base = <void*>buffer
    v.iov_len = length
    while v.iov_len:
        n = c_pwritev2(f.fd, &v, 1, <off_t>offset, RWF_DSYNC if flags & IO_DSYNC else 0)
        if n < 0:
            if errno == EINTR:
                continue
            return -errno
        if n == 0:
            return -EIO
        v.iov_base = <uint8_t*>v.iov_base + n
        v.iov_len -= <size_t>n
        offset += <uint64_t>n
    return 0


cdef int file_write(storage_t* s, const void* buffer, uint64_t length, uint64_t offset,
        int flags) noexcept nogil:
    cdef file_storage_t* f = <file_storage_t*>s
    cdef uint64_t part
    cdef int rc
    if load_acquire(&f.cut):
        return -EIO
    # It would have its length again, with zeros for what it lost, and no flush would see that.
    if offset + length >= load_acquire(&s.length) and is_cut(f):
        return -EIO
    if f.direct.fd < 0:
        return write_cached(s, buffer, length, offset, flags)
    part = direct_part(&f.direct, length, offset, load_acquire(&s.length))
    rc = 0
    if part:
        rc = direct_write(&f.direct, <const uint8_t*>buffer, part, offset,
                          RWF_DSYNC if flags & IO_DSYNC else 0)
    if rc == 0 and part < length:
        rc = write_cached(s, <const uint8_t*>buffer + part, length - part, offset + part, flags)
    return rc


cdef int file_flush(storage_t* s) noexcept nogil:
    cdef file_storage_t* f = <file_storage_t*>s
    if c_fdatasync(f.fd) < 0:
        return -errno
    return -ENODATA if is_cut(f) else 0


cdef int allocate(file_storage_t* f, int mode, uint64_t length, uint64_t offset) noexcept nogil:
    while c_fallocate(f.fd, mode | FALLOC_FL_KEEP_SIZE, <off_t>offset, <off_t>length) < 0:
        if errno != EINTR:
            return -errno
    return 0


cdef int write_zeros(storage_t* s, uint64_t length, uint64_t offset) noexcept nogil:
    cdef uint64_t step
    cdef int rc
    while length:
        step = min(length, <uint64_t>ZEROS_STEP)
        rc = file_write(s, fvd_zeros, step, offset, 0)
        if rc < 0:
            return rc
        offset += step
        length -= step
    return 0


cdef int take_space(file_storage_t* f, uint64_t length, uint64_t offset) noexcept nogil:
    """Allocate a range that was never written, as long as others have plenty left."""
    cdef int rc = -ENOSPC
    if free_space(f.fd) // AHEAD_SHARE >= length:
        rc = allocate(f, 0, length, offset)
        if rc < 0:
            allocate(f, FALLOC_FL_PUNCH_HOLE, length, offset)   # what it got before it failed
    return rc


cdef int zero_whole(storage_t* s, uint64_t length, uint64_t offset, int flags) noexcept nogil:
    """Zero a range that the store can take in one piece."""
    cdef file_storage_t* f = <file_storage_t*>s
    cdef int rc
    if flags & ZERO_KEEP and flags & ZERO_HINT:
        return take_space(f, length, offset) if not f.is_device else 0
    # PUNCH_HOLE on a block device zeroes too (the kernel refuses it where it could not).
    if not flags & ZERO_KEEP and not f.no_punch:
        rc = allocate(f, FALLOC_FL_PUNCH_HOLE, length, offset)
        if rc != -EOPNOTSUPP:
            return rc
        f.no_punch = True
    if flags & ZERO_HINT:
        return 0
    rc = allocate(f, FALLOC_FL_ZERO_RANGE, length, offset)
    if rc != -EOPNOTSUPP:
        return rc
    return write_zeros(s, length, offset)


cdef int file_zero(storage_t* s, uint64_t length, uint64_t offset, int flags) noexcept nogil:
    cdef uint64_t head = 0, tail = 0
    cdef int rc
    if (<file_storage_t*>s).is_device:
        # Devices take whole (at most 4096-byte) blocks only; the edges are written.
        head = min(length, (PAGE - offset % PAGE) % PAGE)
        tail = (offset + length) % PAGE if length > head else 0
    if flags & ZERO_HINT:
        rc = 0
    else:
        rc = write_zeros(s, head, offset)
        if rc == 0:
            rc = write_zeros(s, tail, offset + length - tail)
    if rc == 0 and length > head + tail:
        rc = zero_whole(s, length - head - tail, offset + head, flags)
    return rc


cdef int file_status(storage_t* s, uint64_t length, uint64_t offset, uint64_t* run) noexcept nogil:
    cdef file_storage_t* f = <file_storage_t*>s
    cdef uint64_t now = 0
    cdef off_t p = c_lseek(f.fd, <off_t>offset, SEEK_DATA)
    if p < 0:
        run[0] = length
        # ENXIO: no data up to the end, unless the file shrank: what it lost is not zeros, and a
        # read
        # will say so. Anything else: the store cannot tell, so it is data.
        if errno == ENXIO and file_length(f.fd, &now) == 0 and now >= load_acquire(&s.length):
            return EXTENT_ZERO
        return EXTENT_DATA
    if <uint64_t>p > offset:
        run[0] = min(length, <uint64_t>p - offset)
        return EXTENT_ZERO
    p = c_lseek(f.fd, <off_t>offset, SEEK_HOLE)
    if p < 0 or <uint64_t>p <= offset:
        run[0] = length
        return EXTENT_DATA
    run[0] = min(length, <uint64_t>p - offset)
    return EXTENT_DATA


cdef void file_start_writeback(storage_t* s, uint64_t length, uint64_t offset) noexcept nogil:
    c_sync_file_range((<file_storage_t*>s).fd, <off_t>offset, <off_t>length, SYNC_FILE_RANGE_WRITE)


cdef int file_resize(storage_t* s, uint64_t length) noexcept nogil:
    cdef file_storage_t* f = <file_storage_t*>s
    cdef uint64_t now = 0, before = load_acquire(&s.length)
    cdef int rc
    if f.is_device:
        # Whoever grows a device does it from outside; here it is only looked at again.
        rc = file_length(f.fd, &now)
        if rc < 0:
            return rc
        store_release(&s.length, now)
        return 0 if now >= length else -ENOSPC
    if is_cut(f):
        return -EIO
    if length < before:
        store_release(&s.length, length)
    while c_ftruncate(f.fd, <off_t>length) < 0:
        if errno != EINTR:
            rc = -errno
            store_release(&s.length, before)
            return rc
    store_release(&s.length, length)
    return 0


cdef void file_close(storage_t* s) noexcept nogil:
    cdef file_storage_t* f = <file_storage_t*>s
    direct_close(&f.direct)
    if f.fd >= 0:
        c_close(f.fd)
        f.fd = -1


cdef int file_storage_cached(const storage_t* s) noexcept nogil:
    cdef const file_storage_t* f = <const file_storage_t*>s
    if s.ops.close != file_close or f.is_device or f.direct.fd >= 0:
        return -1
    return f.fd


cdef int file_storage_go_direct(storage_t* s, int fd, uint64_t from_) noexcept nogil:
    if s.ops.close != file_close:
        return -EOPNOTSUPP
    return direct_open(&(<file_storage_t*>s).direct, fd, from_)


cdef int file_storage_open(file_storage_t* f, int fd) noexcept nogil:
    cdef int rc
    memset(f, 0, sizeof(file_storage_t))
    f.direct.fd = -1
    f.fd = c_dup_cloexec(fd, F_DUPFD_CLOEXEC, 3)
    if f.fd < 0:
        return -errno
    rc = file_length(f.fd, &f.head.length)
    if rc < 0:
        c_close(f.fd)
        f.fd = -1
        return rc
    f.is_device = is_block_device(f.fd) == 1
    f.head.grows = not f.is_device
    f.ops = storage_ops_t(
        file_read, file_write, file_flush, file_zero, file_status, file_start_writeback,
        file_resize, file_close)
    f.head.ops = &f.ops
    return 0
