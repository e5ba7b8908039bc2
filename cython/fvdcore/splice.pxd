# SPDX-License-Identifier: Apache-2.0
"""Layer 4. A pipe through which pages of the page cache get into a socket without being copied.

The socket then refers to the pages themselves: what the client receives is what they hold when it
receives it. So this is for bytes whose pages never come to hold anything but these bytes of the
disk (image_lasting)."""
from libc.stdint cimport uint8_t, uint64_t

cdef struct splice_t:
    int[2] ends                        # of the pipe
    int bytes                          # of its buffer; 0: there is none yet
    bint useless                       # the kernel, or the storage, cannot do it

cdef void splice_init(splice_t* s) noexcept nogil
cdef void splice_close(splice_t* s) noexcept nogil
# Fill the pipe with head and then a range of a file that is in memory as a whole. False: it is not,
# or does not fit; the pipe is empty.
cdef bint splice_fill(splice_t* s, const uint8_t* head, uint64_t head_length, int fd,
        uint64_t length, uint64_t address) noexcept nogil
