# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Disks and the scheduler as a scenario describes them. See sim_setup.pxd."""
from libc.stdint cimport uint8_t, uint64_t

from fvdcore.commit cimport commit_fault
from fvdcore.counters cimport (
    N_COR_BYTES, N_COW_FILLS, N_JOURNAL_CHECKPOINTS, N_JOURNAL_COMMITS, N_JOURNAL_REPLAYS,
    counters_sum,
)
from fvdcore.dispatch cimport device_t
from sim_crash cimport world_fail
from sim_disk cimport DISK_OPS, sim_disk_init, sim_disk_load, sim_disk_t
from sim_gate cimport next_random, sim_own_steps, sim_step
from sim_state cimport (
    MARK_AHEAD, MARK_BASE_FAULT, MARK_CHAIN, MARK_CHECKPOINT, MARK_COMMIT, MARK_COPY_ON_READ,
    MARK_COPY_ON_WRITE, MARK_FAULT, MARK_OUTAGE, MARK_PREFETCHED, MARK_REPLAY, MARK_STICKY,
    MARK_WRAP, world_t,
)

FAULT_OPS = {"read": 0, "write": 1, "flush": 2, "zero": 3, "resize": 4}

MARK_NAMES = (
    "commit", "checkpoint", "busy_checkpoint", "wrap", "takeover", "power_cut", "cut_in_recovery",
    "fault", "sticky", "no_space", "prefetched", "closed", "replay", "copy_on_read",
    "copy_on_write", "base_fault", "resized", "relocated", "trimmed", "inline", "crew", "refused",
    "updated", "outage", "chain", "verified", "flat", "ended_base", "ahead", "patient", "given_up",
    "left", "copy_later",
)
cdef world_t* some_world = NULL
assert sizeof(some_world.marks) == len(MARK_NAMES) * sizeof(uint64_t)


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


cdef void collect_marks(world_t* w) noexcept nogil:
    cdef device_t* d = &w.device
    w.marks[MARK_COMMIT] += counters_sum(&d.counters, N_JOURNAL_COMMITS)
    w.marks[MARK_CHECKPOINT] += counters_sum(&d.counters, N_JOURNAL_CHECKPOINTS)
    w.marks[MARK_REPLAY] += counters_sum(&d.counters, N_JOURNAL_REPLAYS)
    w.marks[MARK_COPY_ON_READ] += counters_sum(&d.counters, N_COR_BYTES)
    w.marks[MARK_COPY_ON_WRITE] += counters_sum(&d.counters, N_COW_FILLS)
    w.marks[MARK_FAULT] += w.file.failures + w.data.failures
    w.marks[MARK_BASE_FAULT] += w.base.failures + w.below.failures
    w.marks[MARK_OUTAGE] += w.base.outages
    w.marks[MARK_CHAIN] += w.has_below
    w.marks[MARK_AHEAD] += w.file.ahead + w.data.ahead
    w.file.ahead = w.data.ahead = 0
    w.base.outages = 0
    if d.image.has_bitmap and d.image.complete:
        w.marks[MARK_PREFETCHED] += 1
    if d.image.journal.head > d.image.journal.pages:
        w.marks[MARK_WRAP] += 1
    if commit_fault(&d.image.commit):
        w.marks[MARK_STICKY] += 1
    if (w.file.spoiled or w.data.spoiled or w.clone_file.spoiled or w.clone_data.spoiled
            or w.second_file.spoiled or w.second_data.spoiled):
        world_fail(w, b"space ahead", b"was taken where something lies", 0)
