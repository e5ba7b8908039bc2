# SPDX-License-Identifier: Apache-2.0
"""Layer 5. Opening an image chain from what Python hands over."""
from .counters cimport counters_t
from .dispatch cimport device_t
from .image cimport image_options_t
from .nbd_pool cimport nbd_options_t

# What Device.open says of remote parts; raises ValueError.
cdef take_remote_options(nbd_options_t* o, double timeout, int connections)
# Raise ValueError unless layers has the form that layers_open takes.
cdef check_layers(object layers)
# Open a chain, top layer first; options hold for the top, all below it are only read. What was
# opened belongs to d, also after an error. nbd: connections and time limit of remote parts. Raises
# EngineFault.
cdef layers_open(device_t* d, object layers, counters_t* lower, const image_options_t* options,
        const nbd_options_t* nbd)
# Let what waits for a remote part fail at once; for the end of the device.
cdef void layers_interrupt(device_t* d) noexcept nogil
