# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Layer 5. An NBD export without a device: what create and open need to know of it, and to do."""
from libc.stdint cimport uint64_t
from libc.string cimport memset

from .errors cimport fault

from .nbd_pool cimport nbd_options_t
from .nbd_storage cimport nbd_storage_open, nbd_storage_t
from .storage cimport (
    EXTENT_ZERO, storage_close, storage_flush, storage_status, storage_t, storage_zero,
)

from .errors import EngineFault


cdef int connect(nbd_storage_t* s, str uri, double timeout, bint once, bint writable) except -1:
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
        rc = nbd_storage_open(s, c_name, &o, &reason)
    if rc < 0:
        raise EngineFault(-rc, "look at the export", -1,
                          reason.decode("utf-8", "replace") if reason != NULL else "")
    return 0


cdef uint64_t next_data(storage_t* s, uint64_t offset, uint64_t end, uint64_t* run) noexcept nogil:
    """Where data begin at or after offset, or end; *run: how much of it there is."""
    run[0] = 0
    while offset < end and storage_status(s, end - offset, offset, run) == EXTENT_ZERO:
        offset += run[0]
    return offset


cdef int zero_data(storage_t* s, uint64_t offset, uint64_t end) noexcept nogil:
    cdef uint64_t run = 0
    cdef int rc = 0
    while rc == 0:
        offset = next_data(s, offset, end, &run)
        if offset == end:
            break
        rc = storage_zero(s, run, offset, 0)
        offset += run
    return rc


def export_length(str uri, double timeout, bint once=False, bint writable=False):
    """Length in bytes of the export that uri names. Raises EngineFault with the reason when it
    cannot be had within timeout seconds (ENOENT: libnbd is not installed). With once the first
    failed attempt is the last, for a server that has no reason to come up just now; with writable
    a server that takes no writes, or cannot flush them, is such a failure."""
    cdef nbd_storage_t s
    connect(&s, uri, timeout, once, writable)
    length = s.head.length
    with nogil:
        storage_close(&s.head)
    return length


def export_holds_data(str uri, double timeout):
    """Does the server say that the export reads as anything but zeros? One that cannot tell is
    taken to. Raises EngineFault."""
    cdef nbd_storage_t s
    cdef uint64_t run, at
    connect(&s, uri, timeout, True, True)
    with nogil:
        at = next_data(&s.head, 0, s.head.length, &run)
        storage_close(&s.head)
    return at < s.head.length


def zero_export(str uri, double timeout, parts):
    """Make the parts (offset, length) in bytes read as zeros, durably; where they do already,
    nothing is written. timeout: seconds for each request. Raises EngineFault."""
    cdef nbd_storage_t s
    cdef uint64_t begin, end
    cdef int rc = 0
    connect(&s, uri, timeout, True, True)
    for offset, length in parts:
        begin = offset
        end = offset + length
        with nogil:
            if rc == 0:
                rc = zero_data(&s.head, begin, end)
    with nogil:
        if rc == 0:
            rc = storage_flush(&s.head)
        storage_close(&s.head)
    if rc < 0:
        raise fault(rc, "zero the export", -1)
