# SPDX-License-Identifier: Apache-2.0
"""Layer 5. A device's figures of the moment as a dictionary."""
from .dispatch cimport device_t

# Bytes, seconds, states by name; connections: how many live.
cdef dict device_figures(device_t* d, int connections)
