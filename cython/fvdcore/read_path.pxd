# SPDX-License-Identifier: Apache-2.0
"""Layer 3. Reads: walk the runs of a range and fetch each from where it is. No locks."""
from libc.stdint cimport uint8_t, uint64_t
from .counters cimport block_t, tally_t
from .image cimport image_t

# Kind (EXTENT_DATA or EXTENT_BASE) and length of the run of [offset, offset + length) at offset.
cdef int image_run(const image_t* m, uint64_t length, uint64_t offset,
        uint64_t* run) noexcept nogil
# Read. With IO_NOWAIT: -EAGAIN, and nothing counted, when any part would block.
cdef int image_read(image_t* m, uint8_t* buffer, uint64_t length, uint64_t offset, int flags,
        block_t* n) noexcept nogil
# Read, as with IO_NOWAIT, what lies in the image in one piece. False: it lies otherwise, nothing
# was done. Nothing is counted.
cdef bint image_read_plain(image_t* m, uint8_t* buffer, uint64_t length, uint64_t offset,
        const block_t* n, int* rc) noexcept nogil
# Where what image_read_plain would read lies in a file: its descriptor and *address. -1: it lies
# otherwise, or its place may come to belong to other bytes of the disk.
cdef int image_lasting(const image_t* m, uint64_t length, uint64_t offset,
        uint64_t* address) noexcept nogil
# As image_read; zeros and bytes of the base are noted in the tally (tally_parts); its owner
# counts all in n in the end.
cdef int image_read_tallied(image_t* m, uint8_t* buffer, uint64_t length, uint64_t offset,
        int flags, block_t* n, tally_t* tally) noexcept nogil
# Read what is local, of an image that is open for reading only. Nothing is counted.
cdef int image_read_local(image_t* m, uint8_t* buffer, uint64_t length, uint64_t offset,
        int flags) noexcept nogil
# EXTENT_* and length of the run at offset, asking the stores for their holes.
cdef int image_status(image_t* m, uint64_t length, uint64_t offset, uint64_t* run) noexcept nogil
# Make an open read-only image usable as the base of the layer above it.
cdef void image_become_storage(image_t* m) noexcept nogil
