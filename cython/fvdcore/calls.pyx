# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Layer 5. Requests of the Python face. See calls.pxd."""
from libc.stdint cimport uint32_t, uint64_t

from .counters cimport (
    BLOCK_SHARED, OP_STATUS, block_t, count_request, counters_block, progress_of, progress_t,
)
from .dispatch cimport device_execute, device_t, device_trace, request_give, request_take
from .errors cimport fault
from .sync cimport clock_now

_KINDS = ("data", "zero", "base", "base-zero")
_STEP = 1 << 30


cdef void call_take(device_t* d, int op, uint64_t offset, uint64_t length, int flags,
        request_t** out) noexcept nogil:
    cdef request_t* r = request_take(d, NULL)
    r.op = op
    r.offset = offset
    r.length = length
    r.flags = <unsigned short>flags
    r.begin_ns = clock_now(d.gate)
    out[0] = r


cdef void call_execute(device_t* d, request_t* r) noexcept nogil:
    cdef block_t* n = counters_block(&d.counters, BLOCK_SHARED)
    cdef progress_t before = progress_of(n)
    cdef uint64_t end
    device_execute(d, r, n)
    end = clock_now(d.gate)
    count_request(n, &before, r.op, r.length, r.result, end - r.begin_ns)
    device_trace(d, n, &before, r.op, r.offset, r.length, r.result, r.begin_ns, end)


cdef list call_extents(device_t* d, uint64_t offset, uint64_t length):
    cdef request_t* r
    cdef uint64_t at, count, step
    cdef int rc
    cdef uint32_t* pairs
    found = []
    last = None
    while length:
        step = min(length, <uint64_t>_STEP)
        with nogil:
            call_take(d, OP_STATUS, offset, step, 0, &r)
            call_execute(d, r)
            rc = r.result
        pairs = <uint32_t*>r.data
        count = r.body_length // 8
        extents = [(pairs[2 * at], pairs[2 * at + 1]) for at in range(count)] if rc == 0 else []
        with nogil:
            request_give(d, r)
        if rc < 0:
            raise fault(rc, "block status", offset)
        for run_length, kind in extents:
            if last is not None and last[1] == kind:
                last[0] += run_length
            else:
                last = [run_length, kind]
                found.append(last)
            offset += run_length
            length -= run_length
    return [(run_length, _KINDS[kind]) for run_length, kind in found]
