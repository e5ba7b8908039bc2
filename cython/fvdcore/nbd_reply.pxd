# SPDX-License-Identifier: Apache-2.0
"""Layer 4. The replies of NBD requests: header and chunks in front of the data."""
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from .request cimport request_t

# Write an error chunk of a structured reply at p; its length.
cdef uint64_t error_chunk(uint8_t* p, int result, uint64_t cookie) noexcept nogil
# Header into r.head; the body, if any, stays in r.data. status_id: of the context base:allocation.
cdef void build_reply(request_t* r, bint structured, uint32_t status_id) noexcept nogil
