# SPDX-License-Identifier: Apache-2.0
"""Layer 3. Fields of the header that only say how an image is run, changed while it is open."""
from libc.stdint cimport uint64_t
from .counters cimport block_t
from .header cimport header_value_t
from .image cimport image_t
from .prefetch cimport prefetch_t

# Store the values durably, then let those that can take effect do so: not prefetch_start_delay,
# num_prefetch_slots and bytes_per_prefetch, which the next open takes; and not copy_on_read where
# it was decided when the image was opened. The values fit together: see fvdengine.update. On an
# error the former ones stay, on disk as far as it still takes writes.
cdef int settings_change(image_t* m, prefetch_t* p, const header_value_t* values, int count,
        bint keep_copy_on_read, block_t* n) noexcept nogil
