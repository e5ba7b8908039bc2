# SPDX-License-Identifier: Apache-2.0
"""Layer 5. Requests of the Python face, run on the caller's thread."""
from libc.stdint cimport uint64_t
from .dispatch cimport device_t
from .request cimport request_t

# One request; *out stays taken until request_give.
cdef void call_take(device_t* d, int op, uint64_t offset, uint64_t length, int flags,
        request_t** out) noexcept nogil
# Run it and account for it.
cdef void call_execute(device_t* d, request_t* r) noexcept nogil
# Extents of the range as (length, name of the kind), neighbours of one kind merged. EngineFault.
cdef list call_extents(device_t* d, uint64_t offset, uint64_t length)
