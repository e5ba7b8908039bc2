# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Layer 4. Pages into a pipe. See splice.pxd.

A reply begins to leave only when all of it is in the pipe: an error of the storage is met before
its header has been sent. splice() waits for a device where a page is missing, so the page cache is
asked first; what is dropped from it in between costs one wait."""
from libc.errno cimport errno
from libc.stdint cimport int64_t, uint8_t, uint64_t
from .limits cimport PAGE, SPLICE_MIN, SPLICE_PIPE
from .syscalls cimport (
    EAGAIN, EINTR, SPLICE_F_MOVE, SPLICE_F_NONBLOCK, c_close, c_splice, c_write, cached_pages,
    pipe_open,
)


cdef void splice_init(splice_t* s) noexcept nogil:
    s.ends[0] = -1
    s.ends[1] = -1
    s.bytes = 0
    s.useless = False


cdef void splice_close(splice_t* s) noexcept nogil:
    """Whatever is in the pipe is gone."""
    if s.ends[0] >= 0:
        c_close(s.ends[0])
        c_close(s.ends[1])
    s.ends[0] = -1
    s.ends[1] = -1
    s.bytes = 0


cdef bint have_pipe(splice_t* s) noexcept nogil:
    cdef int rc
    if s.bytes:
        return True
    rc = pipe_open(&s.ends[0], SPLICE_PIPE)
    # None at all, or (a user has so many pages of pipes only) too small for the least of reads,
    # which may touch a page more, beside the header's.
    if rc < SPLICE_MIN + 2 * PAGE:
        splice_close(s)
        s.useless = True
        return False
    s.bytes = rc
    return True


cdef bint fill(splice_t* s, int fd, uint64_t length, uint64_t address) noexcept nogil:
    cdef int64_t at = <int64_t>address
    cdef ssize_t n
    while length:
        n = c_splice(fd, &at, s.ends[1], NULL, length, SPLICE_F_MOVE | SPLICE_F_NONBLOCK)
        if n > 0:
            length -= <uint64_t>n
        elif n == 0 or errno != EINTR:
            # A store that cannot do it at all is not asked again; the next way tells errors.
            s.useless = n < 0 and errno != EAGAIN
            return False
    return True


cdef bint splice_fill(splice_t* s, const uint8_t* head, uint64_t head_length, int fd,
        uint64_t length, uint64_t address) noexcept nogil:
    cdef uint64_t first = address // PAGE
    cdef uint64_t pages = (address + length + PAGE - 1) // PAGE - first
    cdef uint64_t have = 0
    cdef int rc
    if s.useless or not have_pipe(s) or (pages + 1) * PAGE > <uint64_t>s.bytes:
        return False
    rc = cached_pages(fd, first * PAGE, pages * PAGE, &have)
    if rc < 0 or have < pages:
        s.useless = rc < 0
        return False
    if c_write(s.ends[1], head, head_length) != <ssize_t>head_length or not fill(s, fd, length,
                                                                              address):
        splice_close(s)
        return False
    return True
