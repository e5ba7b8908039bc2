# SPDX-License-Identifier: Apache-2.0
"""Layer 5. What an owner may say to an open device beside its data: options, space."""
from libc.stdint cimport uint64_t
from .dispatch cimport device_t
from .links cimport links_t

# What happens to changes that find no space. on_full: "error" or "wait"; helped: the owner makes
# storage longer when an event asks for it.
cdef set_space_policy(device_t* d, links_t* l, str on_full, bint helped)
# How much demand reads take from a distant base, in bytes (0: what is asked), and how prefetch
# behaves beside guests. ValueError: neither can be.
cdef prepare_fetch(device_t* d, uint64_t bytes, str policy)
# Change the policy of prefetch, or what it may take of the host's budget (bytes a second; 0: no
# limit). None: as it is.
cdef control_prefetch(device_t* d, object policy, object budget)
# ValueError: it cannot run.
cdef start_prefetch(device_t* d, bint started)
# There may be space now: what waits, and prefetch that failed for want of it, is tried again. ok:
# whoever was asked for longer storage succeeded.
cdef void storage_grown(device_t* d, bint ok) noexcept nogil
# Events about space: ("parked", changes that wait) and ("grow", bytes).
cdef list space_events(device_t* d, links_t* l)
