# SPDX-License-Identifier: Apache-2.0
"""Layer 4. The write side of an NBD connection: batches of replies, and those of the crew."""
from libc.stdint cimport uint64_t
from .nbd_connection cimport connection_t
from .request cimport request_t

# Count what of the batch is served, and send its replies. Only the connection's own thread.
cdef void send_batch(connection_t* c) noexcept nogil
# Send so many bytes from the pipe; the batch has been sent. Only the connection's own thread.
cdef void send_spliced(connection_t* c, uint64_t length) noexcept nogil
# For the sender, who owns the write side of a stalled connection. resume: True when nothing waits
# any
# more and the write side is given up. give_up: the client took nothing for too long.
cdef bint connection_resume(connection_t* c) noexcept nogil
cdef void connection_give_up(connection_t* c) noexcept nogil
# The crew's way to answer (device_t.reply).
cdef void connection_reply(request_t* r) noexcept nogil
