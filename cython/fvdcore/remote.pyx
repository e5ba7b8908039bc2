# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Layer 5. An NBD export without a device: what create and open need to know of it, and to do."""
from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcmp, memset

from .errors cimport fault

from .nbd_pool cimport nbd_options_t
from .nbd_storage cimport nbd_storage_open, nbd_storage_t
from .storage cimport (
    EXTENT_ZERO, storage_close, storage_flush, storage_read, storage_status, storage_t,
    storage_zero,
)

from .errors import EngineFault


cdef enum:
    ROOM_BYTES = 1048576
    LOOK_BYTES = 67108864              # of what may be written zeros


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


cdef bint all_zero(const uint8_t* data, uint64_t length) noexcept nogil:
    return data[0] == 0 and memcmp(data, data + 1, length - 1) == 0


cdef bint holds_data(storage_t* s, uint8_t* room) noexcept nogil:
    """Zeros that were written look like data: so much of them is read."""
    cdef uint64_t offset = 0, run = 0, step, left = LOOK_BYTES
    while True:
        offset = next_data(s, offset, s.length, &run)
        if offset == s.length:
            return False
        step = min(run, <uint64_t>ROOM_BYTES)
        if left < step or storage_read(s, room, step, offset, 0) < 0 or not all_zero(room, step):
            return True
        left -= step
        offset += step


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
    """Does the export read as anything but zeros? Where the server does not say so, 64 MiB are
    read; what has more is taken to hold data. Raises EngineFault."""
    cdef nbd_storage_t s
    cdef uint8_t* room = NULL
    cdef bint found
    connect(&s, uri, timeout, True, True)
    with nogil:
        room = <uint8_t*>malloc(ROOM_BYTES)
        found = room == NULL or holds_data(&s.head, room)
        free(room)
        storage_close(&s.head)
    return found


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
