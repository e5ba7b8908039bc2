# SPDX-License-Identifier: Apache-2.0
"""What lies below the image: a raw base, or one or two images over a raw one."""
from fvdcore.storage cimport storage_t
from sim_state cimport world_t

# Open the base for a session of the device. 0 or what image_open says.
cdef int base_open(world_t* w, const char** reason) noexcept nogil
cdef void base_close(world_t* w) noexcept nogil
# Let go of it beside guests: all blocks are local.
cdef void base_end(world_t* w) noexcept nogil
# As the device reads it; NULL: there is none.
cdef storage_t* base_of(world_t* w) noexcept nogil
# As clones read it: without gate, delays and faults (base_quiet).
cdef storage_t* base_of_clones(world_t* w) noexcept nogil
cdef void base_quiet(world_t* w, bint on) noexcept nogil
cdef void base_free(world_t* w) noexcept nogil
