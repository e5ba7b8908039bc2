# SPDX-License-Identifier: Apache-2.0
"""A raw base that is read with patience: by reader threads of its own, which may hang."""
from fvdcore.storage cimport storage_t
from sim_state cimport world_t

# Let the device read the base so; 0 or a negative errno. The device's stores have it then.
cdef int base_read_with_patience(world_t* w) noexcept nogil
# Wait until no reader of any session hangs any more.
cdef void readers_come_back(world_t* w) noexcept nogil
