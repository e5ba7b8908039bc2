# SPDX-License-Identifier: Apache-2.0
"""A gate whose clock stands still until a test moves it, and which counts who waits."""
from libc.stdint cimport uint64_t

from fvdcore.sync cimport cond_t, gate_t, mutex_t

cdef enum:
    SLEEPERS = 64

cdef struct sleeper_t:
    cond_t* cond
    mutex_t* mutex
    uint64_t deadline

cdef struct clock_gate_t:
    gate_t head                        # first: a clock_gate_t* is a gate_t*
    mutex_t mutex                      # its own has no gate
    uint64_t now
    uint64_t waits                     # waits begun, ever
    sleeper_t[64] sleepers

cdef class Gate:
    cdef clock_gate_t g
    cdef gate_t* raw(self)
