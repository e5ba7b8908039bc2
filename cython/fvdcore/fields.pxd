# SPDX-License-Identifier: Apache-2.0
"""Layer 5. Changes of an open image that stand in its header: its size, and how it is run."""
from .dispatch cimport device_t

# ValueError for a size that is not larger or no multiple of 512; EngineFault.
cdef int grow_disk(device_t* d, object size) except -1
# Values by name; ValueError names what may not change or does not fit its field; EngineFault.
cdef int change_fields(device_t* d, object values, bint keep_copy_on_read) except -1
