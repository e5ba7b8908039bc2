# SPDX-License-Identifier: Apache-2.0
"""Layer 3. owners_t: all layers below the top of a chain as one storage.

A read of a chain need not ask layer after layer: the layers below the top never change while they
are open, so a map remembers which of them owns a unit of the disk. It is filled by use, a group of
units at a time, so that opening costs nothing and memory only what is read."""
from libc.stdint cimport uint8_t, uint64_t
from .image cimport image_t
from .storage cimport storage_ops_t, storage_t

cdef struct owners_t:
    storage_t head                     # first: an owners_t* is a storage_t*
    storage_ops_t ops
    image_t* layers                    # the images below the top, uppermost first
    int count
    storage_t* bottom                  # what the last of them lies over; NULL: nothing
    uint8_t* map                       # an owner a unit; NULL: no memory, every read looks it up
    uint64_t map_bytes
    uint64_t unit                      # bytes, a power of two
    int shift                          # of unit

# Over images that are open for reading only and stay open until it is closed.
cdef int owners_open(owners_t* o, image_t* layers, int count, storage_t* bottom) noexcept nogil
