# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Disks and the scheduler as a scenario describes them. See sim_setup.pxd."""
from libc.stdint cimport uint8_t, uint64_t

from sim_disk cimport DISK_OPS, sim_disk_init, sim_disk_load, sim_disk_t
from sim_gate cimport next_random, sim_own_steps, sim_step
from sim_state cimport world_t

FAULT_OPS = {"read": 0, "write": 1, "flush": 2, "zero": 3, "resize": 4}

MARK_NAMES = (
    "commit", "checkpoint", "busy_checkpoint", "wrap", "takeover", "power_cut", "cut_in_recovery",
    "fault", "sticky", "no_space", "prefetched", "closed", "replay", "copy_on_read",
    "copy_on_write", "base_fault", "resized", "relocated", "trimmed", "inline", "crew", "refused",
    "updated", "outage", "chain", "verified", "flat", "ended_base",
)


cdef int make_disk(sim_disk_t* d, world_t* w, bint gated, uint64_t capacity,
        bytes content) except -1:
    if sim_disk_init(d, &w.gate if gated else NULL, max(capacity, <uint64_t>4096)) < 0:
        raise MemoryError
    if content:
        sim_disk_load(d, <const uint8_t*><char*>content, <uint64_t>len(content))
    d.random = next_random(&w.random)
    return 0


cdef tune(sim_disk_t* d, dict c):
    d.fixed = c.get("fixed", False)
    d.head.grows = not d.fixed
    d.holes = c.get("holes", True)
    d.hints = c.get("hints", True)
    d.again = c.get("again", False)
    d.writeback = c.get("writeback", 0)
    d.delay_max = c.get("delay_max", 1000)
    d.wait_chance = c.get("wait_chance", 4)


def step_address():
    """Where the function is that the engine's modules call before an atomic operation."""
    return <size_t><void*>sim_step


cdef tune_gate(world_t* w, dict c):
    w.gate.policy = c["policy"]
    w.gate.preempt = c["preempt"]
    w.gate.spurious = c["spurious"]
    w.gate.stall = c["stall"]
    w.gate.step_every = c["step_every"]
    w.gate.step_stall = c["step_stall"]
    w.gate.step_random = c["seed"] ^ 0x2545F4914F6CDD1D
    w.gate.still = &w.cloning
    sim_own_steps(&w.gate)


cdef void make_sound(sim_disk_t* d) noexcept nogil:
    cdef int i
    for i in range(DISK_OPS):
        d.faults[i].countdown = -1
        d.faults[i].chance = 0
        d.faults[i].sticky = False
    d.outage_in = -1
    d.away_until = 0
