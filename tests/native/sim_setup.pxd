# SPDX-License-Identifier: Apache-2.0
"""Disks and the scheduler as a scenario describes them, and what happened in a run by name."""
from libc.stdint cimport uint64_t

from sim_disk cimport sim_disk_t
from sim_state cimport world_t

cdef int make_disk(sim_disk_t* d, world_t* w, bint gated, uint64_t capacity,
        bytes content) except -1
cdef tune(sim_disk_t* d, dict c)
# Its threads own the steps of the engine from now on, until the gate is freed.
cdef tune_gate(world_t* w, dict c)
# No faults, no outage.
cdef void make_sound(sim_disk_t* d) noexcept nogil
# What happened in the session that ends.
cdef void collect_marks(world_t* w) noexcept nogil
