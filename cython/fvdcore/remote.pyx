# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Layer 5. A look at an NBD export without a device: what create and open need to know of it."""
from libc.stdint cimport uint64_t
from libc.string cimport memset

from .nbd_pool cimport nbd_options_t
from .nbd_storage cimport nbd_storage_open, nbd_storage_t
from .storage cimport storage_close

from .errors import EngineFault


def export_length(str uri, double timeout, bint once=False, bint writable=False):
    """Length in bytes of the export that uri names. Raises EngineFault with the reason when it
    cannot be had within timeout seconds (ENOENT: libnbd is not installed). With once the first
    failed attempt is the last, for a server that has no reason to come up just now; with writable
    a server that takes no writes, or cannot flush them, is such a failure."""
    cdef nbd_storage_t s
    cdef nbd_options_t o
    cdef const char* reason = NULL
    cdef bytes name = uri.encode()
    cdef const char* c_name = name
    cdef int rc
    memset(&o, 0, sizeof(o))
    o.keeper_fd = -1
    o.connections = 1
    o.once = once
    o.writable = writable
    o.timeout_ns = <uint64_t>(max(timeout, 0.001) * 1e9)
    with nogil:
        rc = nbd_storage_open(&s, c_name, &o, &reason)
    if rc < 0:
        raise EngineFault(-rc, "look at the export", -1,
                          reason.decode("utf-8", "replace") if reason != NULL else "")
    length = s.head.length
    with nogil:
        storage_close(&s.head)
    return length
