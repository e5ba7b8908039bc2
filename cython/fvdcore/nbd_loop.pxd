# SPDX-License-Identifier: Apache-2.0
"""Layer 4. One NBD connection in the transmission phase, on a thread of its own."""
from libc.stdint cimport uint8_t, uint64_t
from .nbd_connection cimport connection_t
from .request cimport request_t

# Take fd and serve it until the client leaves, beginning with what a predecessor had received. The
# struct stays the caller's until state is ENDED.
cdef int connection_start(connection_t* c, const uint8_t* received,
        uint64_t received_length) noexcept nogil
# Ask it to part; again after a while, since its thread may have been about to wait. stay: call that
# off; restart: the same where it has parted already.
cdef void connection_part(connection_t* c) noexcept nogil
cdef void connection_stay(connection_t* c) noexcept nogil
cdef int connection_restart(connection_t* c) noexcept nogil
# The socket of a parted connection, the caller's from now on; what was received is freed.
cdef int connection_give(connection_t* c) noexcept nogil
# Read no more: what was received is finished and answered, then the connection ends. now: without
# answers. The connection must have been started and not been joined.
cdef void connection_shut(connection_t* c, bint now) noexcept nogil
# device_t.is_gone, device_t.is_leaving.
cdef bint connection_is_gone(request_t* r) noexcept nogil
cdef bint connection_is_leaving(request_t* r) noexcept nogil
