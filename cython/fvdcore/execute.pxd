# SPDX-License-Identifier: Apache-2.0
"""Layer 4. Reads and block status of one request, blocking."""
from .counters cimport block_t
from .fetch cimport fetch_t
from .image cimport image_t
from .request cimport request_t

# Read into the request's buffer, with more around it where copy-on-read keeps it: read_offset and
# read_length say what the buffer holds then.
cdef int execute_read(image_t* m, fetch_t* f, request_t* r, block_t* n) noexcept nogil
# Pairs of (u32 length, u32 EXTENT_*), neighbours of one kind merged.
cdef int execute_status(image_t* m, request_t* r) noexcept nogil
# May it have to wait for the base? Bits only go from 0 to 1: a no is for ever.
cdef bint request_needs_base(const image_t* m, const request_t* r) noexcept nogil
# Must it wait for one of these earlier changes (a list by next_change) that may wait for the base?
# In a compact image those of one chunk wait for each other.
cdef bint request_behind_distant(const image_t* m, const request_t* r,
        const request_t* changes) noexcept nogil
