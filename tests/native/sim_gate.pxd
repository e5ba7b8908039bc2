# SPDX-License-Identifier: Apache-2.0
"""The simulator's scheduler: native threads of which exactly one runs, chosen by a seed.

It stands behind the engine's gate_t, so every lock, wait, start and look at the clock of the engine
comes here. Between two calls a thread runs alone; what it shares with others therefore needs no
lock of the simulator's own. Time is virtual: it moves a little with every step, and to the next
deadline when nobody can run."""
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from fvdcore.pthread cimport pthread_t
from fvdcore.sync cimport cond_t, gate_t, mutex_t, thread_body_t, thread_t

cdef extern from "<semaphore.h>" nogil:
    ctypedef struct sem_t:
        pass

cdef enum:
    SIM_THREADS = 192
    SIM_HELD = 256
    SIM_TRACE = 8192

cdef enum sim_state_t:
    SIM_READY = 0
    SIM_LOCKING = 1                    # waits for a mutex
    SIM_WAITING = 2                    # for a condition or a key, perhaps with a deadline
    SIM_SLEEPING = 3                   # for the clock
    SIM_JOINING = 4
    SIM_DONE = 5
    SIM_GONE = 6                       # joined; its place is free

cdef enum sim_policy_t:
    POLICY_UNIFORM = 0                 # anybody who can run
    POLICY_PRIORITY = 1                # the highest of random priorities, which change now and then
    POLICY_STICKY = 2                  # whoever runs goes on as long as it can

cdef struct sim_event_t:
    uint64_t at
    uint32_t thread
    uint32_t kind
    uint64_t a
    uint64_t b

cdef struct sim_thread_t:
    pthread_t native
    sem_t wake
    int state
    mutex_t* mutex                     # wanted, now or when the wait is over
    const void* key                    # the condition, or what sim_wait names
    uint64_t deadline
    bint timed_out
    int target                         # whom it joins
    bint left                          # nobody joins it
    uint64_t priority
    thread_body_t body
    void* argument
    sim_gate_t* gate

cdef struct sim_gate_t:
    gate_t head                        # first: a sim_gate_t* is a gate_t*
    sim_thread_t* threads              # SIM_THREADS; 0 is whoever made the gate
    int count
    int running
    uint64_t now                       # virtual nanoseconds
    uint64_t random
    uint64_t steps
    uint64_t steps_max                 # more: it is taken for a live lock
    uint64_t switches
    uint64_t digest                    # of every decision so far
    int policy
    uint32_t preempt                   # of 256 locks, how many let others go first
    uint64_t stall                     # a thread let go at a lock may stay away so long, ns
    uint32_t spurious                  # of 65536 waits, how many end for no reason
    # Atomic operations, where nobody holds a lock: on average every step_every-th lets others go
    # first, or waits until somebody changes its word. 0: none does.
    uint64_t step_every
    uint64_t step_in
    uint64_t step_stall                # it stays away so long at most, ns
    uint64_t step_random
    uint64_t stepped
    int watchers
    const bint* still                  # while it is true the simulator itself looks: no steps
    int held_count
    mutex_t** held
    int* holders
    sim_event_t* trace                 # ring of SIM_TRACE
    uint64_t traced
    # Nothing can run any more, or steps_max is exceeded. Must not return.
    void (*stuck)(void* owner, const char* why) noexcept nogil
    # Called by the running thread between steps.
    void (*observe)(void* owner) noexcept nogil
    void* owner

cdef int sim_gate_init(sim_gate_t* g, uint64_t seed) noexcept nogil
cdef void sim_gate_free(sim_gate_t* g) noexcept nogil
# Let others go first.
cdef void sim_yield(sim_gate_t* g) noexcept nogil
cdef void sim_sleep(sim_gate_t* g, uint64_t ns) noexcept nogil
# Wait for somebody's sim_wake of the key.
cdef void sim_wait(sim_gate_t* g, const void* key) noexcept nogil
cdef void sim_wake(sim_gate_t* g, const void* key) noexcept nogil
# Whose threads the engine's atomic operations belong to from now on; NULL: nobody's.
cdef void sim_own_steps(sim_gate_t* g) noexcept nogil
# What atomics.h calls (fvd_step).
cdef void sim_step(const void* word, int change) noexcept nogil
cdef void sim_note(sim_gate_t* g, uint32_t kind, uint64_t a, uint64_t b) noexcept nogil

cdef inline uint64_t next_random(uint64_t* state) noexcept nogil:
    """splitmix64: every state is good, neighbouring seeds are far apart."""
    cdef uint64_t z
    state[0] += <uint64_t>0x9E3779B97F4A7C15ULL
    z = state[0]
    z = (z ^ (z >> 30)) * <uint64_t>0xBF58476D1CE4E5B9ULL
    z = (z ^ (z >> 27)) * <uint64_t>0x94D049BB133111EBULL
    return z ^ (z >> 31)

cdef inline uint64_t below(uint64_t* state, uint64_t n) noexcept nogil:
    """A number of 0..n-1; 0 of none."""
    return next_random(state) % n if n else 0

cdef inline bint chance(uint64_t* state, uint64_t part, uint64_t whole) noexcept nogil:
    return below(state, whole) < part
