# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Layer 1. O_DIRECT. See direct_io.pxd.

What is not aligned goes through a buffer on the stack. A write of parts of units reads these first:
it runs alone, lest it write back what another write has replaced meanwhile. The file's last,
partial unit is always cached: it cannot be transferred otherwise."""
from libc.errno cimport errno
from libc.stdint cimport uint8_t, uint64_t, uintptr_t
from libc.string cimport memcpy
from posix.types cimport off_t
from posix.uio cimport iovec
from .limits cimport NEVER, PAGE
from .sync cimport (
    cond_broadcast, cond_free, cond_init, cond_wait, mutex_free, mutex_init, mutex_lock,
    mutex_unlock,
)
from .syscalls cimport (
    EINTR, EIO, F_DUPFD_CLOEXEC, c_close, c_dup_cloexec, c_preadv2, c_pwritev2, direct_alignment,
)

cdef enum:
    BOUNCE = 65536


cdef int direct_open(direct_io_t* d, int fd, uint64_t from_) noexcept nogil:
    cdef int rc
    d.unit = <uint64_t>direct_alignment(fd)
    if d.unit > PAGE or from_ % d.unit:
        d.unit = PAGE
    d.from_ = from_
    d.users = 0
    d.alone = False
    rc = mutex_init(&d.mutex, NULL)
    if rc == 0:
        rc = cond_init(&d.changed, NULL)
    if rc < 0:
        return rc
    d.fd = c_dup_cloexec(fd, F_DUPFD_CLOEXEC, 3)
    return -errno if d.fd < 0 else 0


cdef void direct_close(direct_io_t* d) noexcept nogil:
    if d.fd < 0:
        return
    c_close(d.fd)
    d.fd = -1
    mutex_free(&d.mutex)
    cond_free(&d.changed)


cdef uint64_t direct_part(const direct_io_t* d, uint64_t length, uint64_t offset,
        uint64_t file_length) noexcept nogil:
    cdef uint64_t end = file_length // d.unit * d.unit
    if offset < d.from_ or offset >= end:
        return 0
    return min(length, end - offset)


cdef inline bint is_aligned(const direct_io_t* d, const void* buffer, uint64_t length,
        uint64_t offset) noexcept nogil:
    return ((<uint64_t><uintptr_t>buffer | length | offset) & (d.unit - 1)) == 0


cdef inline uint8_t* align(uint8_t* p) noexcept nogil:
    return <uint8_t*>((<uintptr_t>p + PAGE - 1) // PAGE * PAGE)


cdef int transfer(direct_io_t* d, bint writes, uint8_t* p, uint64_t length, uint64_t offset,
        int flags) noexcept nogil:
    cdef iovec v
    cdef ssize_t n
    while length:
        v.iov_base = p
        v.iov_len = length
        if writes:
            n = c_pwritev2(d.fd, &v, 1, <off_t>offset, flags)
        else:
            n = c_preadv2(d.fd, &v, 1, <off_t>offset, 0)
        if n < 0 and errno == EINTR:
            continue
        if n < 0:
            return -errno
        # The next transfer would not be aligned; a file that shrank ends so, too.
        if n == 0 or (<uint64_t>n < length and <uint64_t>n % d.unit):
            return -EIO
        p += n
        offset += <uint64_t>n
        length -= <uint64_t>n
    return 0


cdef int direct_read(direct_io_t* d, uint8_t* buffer, uint64_t length,
        uint64_t offset) noexcept nogil:
    cdef uint8_t[BOUNCE + PAGE] room
    cdef uint8_t* p = align(&room[0])
    cdef uint64_t begin, end, part
    cdef int rc = 0
    if is_aligned(d, buffer, length, offset):
        return transfer(d, False, buffer, length, offset, 0)
    while length and rc == 0:
        begin = offset // d.unit * d.unit
        part = min(length, BOUNCE - (offset - begin))
        end = (offset + part + d.unit - 1) // d.unit * d.unit
        rc = transfer(d, False, p, end - begin, begin, 0)
        if rc == 0:
            memcpy(buffer, p + (offset - begin), part)
        buffer += part
        offset += part
        length -= part
    return rc


cdef void begin_write(direct_io_t* d, bint alone) noexcept nogil:
    mutex_lock(&d.mutex)
    while d.alone:
        cond_wait(&d.changed, &d.mutex, NEVER)
    if alone:
        d.alone = True                 # from here on nobody else begins
        while d.users:
            cond_wait(&d.changed, &d.mutex, NEVER)
    else:
        d.users += 1
    mutex_unlock(&d.mutex)


cdef void end_write(direct_io_t* d, bint alone) noexcept nogil:
    mutex_lock(&d.mutex)
    if alone:
        d.alone = False
    else:
        d.users -= 1
    if d.alone or alone:
        cond_broadcast(&d.changed)
    mutex_unlock(&d.mutex)


cdef int write_bounced(direct_io_t* d, const uint8_t* buffer, uint64_t length, uint64_t offset,
        int flags) noexcept nogil:
    """Through the buffer on the stack; what of its units is not written is read before."""
    cdef uint8_t[BOUNCE + PAGE] room
    cdef uint8_t* p = align(&room[0])
    cdef uint64_t begin, end, part
    cdef int rc = 0
    while length and rc == 0:
        begin = offset // d.unit * d.unit
        part = min(length, BOUNCE - (offset - begin))
        end = (offset + part + d.unit - 1) // d.unit * d.unit
        if begin < offset:
            rc = transfer(d, False, p, d.unit, begin, 0)
        if rc == 0 and end > offset + part and (end - begin > d.unit or begin == offset):
            rc = transfer(d, False, p + (end - d.unit - begin), d.unit, end - d.unit, 0)
        if rc == 0:
            memcpy(p + (offset - begin), buffer, part)
            rc = transfer(d, True, p, end - begin, begin, flags)
        buffer += part
        offset += part
        length -= part
    return rc


cdef int direct_write(direct_io_t* d, const uint8_t* buffer, uint64_t length, uint64_t offset,
        int flags) noexcept nogil:
    cdef bint partial = ((length | offset) & (d.unit - 1)) != 0
    cdef int rc
    begin_write(d, partial)
    if is_aligned(d, buffer, length, offset):
        rc = transfer(d, True, <uint8_t*>buffer, length, offset, flags)
    else:
        rc = write_bounced(d, buffer, length, offset, flags)
    end_write(d, partial)
    return rc
