# SPDX-License-Identifier: Apache-2.0
"""Layer 5. What a device has to tell, as Python values."""
from .dispatch cimport device_t

# Bytes, seconds, states by name; connections: how many live.
cdef dict device_figures(device_t* d, int connections)
# Events of a trace, TRACE_EVENT_BYTES each, the oldest first; as many as there are, or TAKE_MAX.
cdef bytes device_trace_events(device_t* d)
# Events of what failed since the last call: ("failed", request), ("failures_lost", number).
cdef list device_failures(device_t* d)
