# SPDX-License-Identifier: Apache-2.0
"""The invariants of FORMAT.md section 5 as they can be seen in the bytes that a power cut left."""
from sim_disk cimport sim_disk_t
from sim_state cimport world_t

# False: world_fail was told which invariant is broken.
cdef bint check_bytes(world_t* w, const sim_disk_t* file, const sim_disk_t* data) noexcept nogil
# The same after a close: no space is kept behind the last chunk.
cdef bint check_given_back(world_t* w, const sim_disk_t* file,
        const sim_disk_t* data) noexcept nogil
