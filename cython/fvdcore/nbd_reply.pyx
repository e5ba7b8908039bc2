# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Layer 4. Replies of requests that the crew ran, as the wire wants them. See nbd_reply.pxd."""
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from .counters cimport OP_READ, OP_STATUS
from .nbd_wire cimport (
    NBD_CHUNK_DATA, NBD_CHUNK_ERROR, NBD_CHUNK_STATUS, NBD_STATE_HOLE, NBD_STATE_ZERO, nbd_chunk,
    nbd_error, nbd_simple, put_be32, put_be64,
)
from .request cimport request_t
from .storage cimport EXTENT_BASE_ZERO, EXTENT_ZERO


cdef uint64_t error_chunk(uint8_t* p, int result, uint64_t cookie) noexcept nogil:
    cdef uint64_t n = nbd_chunk(p, NBD_CHUNK_ERROR, cookie, 6)
    put_be32(p + n, nbd_error(result))
    p[n + 4] = 0
    p[n + 5] = 0
    return n + 6


cdef void encode_status(request_t* r, uint32_t status_id) noexcept nogil:
    """(length, kind) pairs into the wire's (context id, descriptors)."""
    cdef uint32_t* pair = <uint32_t*>r.data
    cdef uint64_t i, extents = r.body_length // 8
    cdef uint32_t kind, state
    for i in range(extents):
        kind = pair[i * 2 + 1]
        state = 0
        if kind == EXTENT_ZERO:
            state = NBD_STATE_HOLE | NBD_STATE_ZERO
        elif kind == EXTENT_BASE_ZERO:
            state = NBD_STATE_HOLE | NBD_STATE_ZERO
        put_be32(<uint8_t*>&pair[i * 2], pair[i * 2])
        put_be32(<uint8_t*>&pair[i * 2 + 1], state)
    r.head_length = nbd_chunk(r.head, NBD_CHUNK_STATUS, r.cookie, <uint32_t>(4 + r.body_length))
    put_be32(r.head + r.head_length, status_id)
    r.head_length += 4


cdef void build_reply(request_t* r, bint structured, uint32_t status_id) noexcept nogil:
    if r.result < 0:
        r.body_length = 0
        if structured and r.op in (OP_READ, OP_STATUS):
            r.head_length = error_chunk(r.head, r.result, r.cookie)
        else:
            r.head_length = nbd_simple(r.head, nbd_error(r.result), r.cookie)
    elif r.op == OP_STATUS:
        encode_status(r, status_id)
    elif r.op == OP_READ and structured:
        r.head_length = nbd_chunk(r.head, NBD_CHUNK_DATA, r.cookie, <uint32_t>(8 + r.length))
        put_be64(r.head + r.head_length, r.offset)
        r.head_length += 8
        r.body_length = r.length
    else:
        r.head_length = nbd_simple(r.head, 0, r.cookie)
        r.body_length = r.length if r.op == OP_READ else 0
