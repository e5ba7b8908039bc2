# SPDX-License-Identifier: Apache-2.0
"""Layer 5. What an owner may say to an open device beside its data: options, space."""
from libc.stdint cimport uint64_t
from .dispatch cimport device_t
from .links cimport links_t

# ValueError: it is no cache mode, or lacks what it needs.
cdef check_cache(str cache, int direct_fd)
# "writeback"; "writethrough"; "none": direct_fd has the data's file open with O_DIRECT. Before any
# thread runs. Raises EngineFault.
cdef set_cache(device_t* d, str cache, int direct_fd)
# What happens to changes that find no space. on_full: "error" or "wait"; helped: the owner makes
# storage longer when an event asks for it.
cdef set_space_policy(device_t* d, links_t* l, str on_full, bint helped)
# Prefetch, before its threads start: seconds of its start delay (None: as the header says, -1: off)
# and its policy, by name.
cdef prepare_prefetch(device_t* d, links_t* l, object delay, str policy)
# How much demand reads take from a distant base, in bytes (0: what is asked). record: note the
# order of reads; order: pairs (offset, length) in bytes of what prefetch fetches before all else.
# ValueError: it cannot be so.
cdef prepare_base(device_t* d, uint64_t bytes, bint record, object order)
# What was noted: pairs (offset, length).
cdef list profile_reads(device_t* d)
# Change the policy of prefetch, or what it may take of the host's budget (bytes a second; 0: no
# limit). None: as it is.
cdef control_prefetch(device_t* d, object policy, object budget)
# Close everything below the image, which prefetch has made complete. ValueError: it has not.
cdef end_base(device_t* d)
# ValueError: it cannot run.
cdef start_prefetch(device_t* d, bint started)
# There may be space now: what waits, and prefetch that failed for want of it, is tried again. ok:
# whoever was asked for longer storage succeeded.
cdef void storage_grown(device_t* d, bint ok) noexcept nogil
# Events about space: ("parked", changes that wait) and ("grow", bytes).
cdef list space_events(device_t* d, links_t* l)
