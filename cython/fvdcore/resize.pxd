# SPDX-License-Identifier: Apache-2.0
"""Layer 3. Growing the disk of an open image (FORMAT.md section 6)."""
from libc.stdint cimport uint64_t
from .counters cimport block_t
from .image cimport image_t

# Make the disk size bytes long; what is new reads zeros. Requests go on meanwhile. -EINVAL: not
# larger, or no multiple of 512; -EFBIG: beyond what the table or the format can hold; -ENOSPC: no
# room for it; -EBUSY: requests held places that the table needs for a minute; others: as storage
# says. After an error the image is as it was, but for room in table and storage that is not used.
cdef int image_grow(image_t* m, uint64_t size, block_t* n) noexcept nogil
