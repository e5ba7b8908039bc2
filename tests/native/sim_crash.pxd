# SPDX-License-Identifier: Apache-2.0
"""Crash clones: copies of the world as a crash leaves it, reopened, checked, dropped."""
from libc.stdint cimport uint64_t

from sim_disk cimport sim_disk_t
from sim_state cimport world_t

# Report what is wrong; the first report counts. The run goes on to its end.
cdef void world_fail(world_t* w, const char* what, const char* detail,
        long long number) noexcept nogil
# Make and check one clone of the present moment.
cdef void crash_clone(world_t* w, int kind, int survival, uint64_t mask) noexcept nogil
# Keep the present moment as the start of the next session.
cdef void crash_adopt(world_t* w) noexcept nogil
# Is a clone due? Called between the steps of the scheduler and after the disks' operations.
cdef void crash_observe(void* owner) noexcept nogil
cdef void crash_executed(void* owner, sim_disk_t* d, int op, uint64_t offset) noexcept nogil
