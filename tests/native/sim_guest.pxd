# SPDX-License-Identifier: Apache-2.0
"""Guests: threads that issue overlapping requests as a connection's thread does."""
from fvdcore.request cimport request_t
from sim_state cimport world_t

# A guest's thread; its argument is a guest_t.
cdef void* guest_main(void* argument) noexcept nogil
# device_t.reply: the result of a request that went to the crew.
cdef void guest_reply(request_t* r) noexcept nogil
