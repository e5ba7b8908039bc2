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
# All blocks of the top are local, and prefetch has ended: close everything below it, once nobody is
# inside any more. What still waits there is cut off, and answered from the image.
cdef void layers_close_bases(device_t* d) noexcept nogil
# Let what waits for a part below the top fail; for the end of the device. Unless now, answers that
# a server still owes are waited for, for a moment: some servers do not get over it otherwise.
cdef void layers_interrupt(device_t* d, bint now) noexcept nogil
