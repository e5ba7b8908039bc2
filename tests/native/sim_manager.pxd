# SPDX-License-Identifier: Apache-2.0
"""The manager: a thread that grows the disk, updates fields and steers prefetch beside guests."""
from fvdcore.image cimport image_t
from sim_disk cimport sim_disk_t
from sim_state cimport world_t

# The manager's thread; its argument is the world.
cdef void* manager_main(void* argument) noexcept nogil
# The oracle learns that the disk is larger; what is new is zero.
cdef void manager_follow(world_t* w, const image_t* m) noexcept nogil
# What the header says is what the next updates start from.
cdef void manager_restart(world_t* w, const sim_disk_t* file) noexcept nogil
# Updates are made or not made: False: world_fail was told.
cdef bint manager_check(world_t* w, const sim_disk_t* file) noexcept nogil
# Finish an update that was cut short, as fvdengine does before the engine opens an image.
cdef void manager_settle(world_t* w, sim_disk_t* file) noexcept nogil
