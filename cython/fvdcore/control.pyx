# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Layer 5. What an owner may say to an open device. See control.pxd."""
from libc.stdint cimport uint64_t

from .atomics cimport exchange_acq_rel, load_acquire
from .counters cimport G_PARKED, gauge_set
from .dispatch cimport device_storage_grown, device_t
from .errors cimport fault
from .fetch cimport fetch_init
from .limits cimport FETCH_SIZE_MAX
from .links cimport links_space_changed, links_t
from .sync cimport cond_broadcast, mutex_lock, mutex_unlock


cdef set_space_policy(device_t* d, links_t* l, str on_full, bint helped):
    d.parking.image = d.image
    d.parking.waits = on_full == "wait"
    d.parking.helped = helped
    d.parking.notify = links_space_changed
    d.parking.owner = l
    # A former process may have left its number.
    gauge_set(&d.counters, G_PARKED, 0)


cdef prepare_fetch(device_t* d, uint64_t bytes):
    cdef int rc
    if bytes > FETCH_SIZE_MAX:
        raise ValueError(f"fetch_size is 0 to {FETCH_SIZE_MAX}")
    rc = fetch_init(&d.fetch, d.image, bytes if d.has_remote_base else 0, d.gate)
    if rc < 0:
        raise fault(rc, "prepare reading from the base", -1)


cdef void storage_grown(device_t* d, bint ok) noexcept nogil:
    device_storage_grown(d, ok)
    mutex_lock(&d.prefetch.mutex)
    if d.prefetch.full:
        d.prefetch.hold_until = 0
        cond_broadcast(&d.prefetch.changed)
    mutex_unlock(&d.prefetch.mutex)


cdef list space_events(device_t* d, links_t* l):
    cdef uint64_t grow
    if not exchange_acq_rel(&l.space_changed, 0):
        return []
    events = [("parked", load_acquire(&d.parking.waiting))]
    grow = exchange_acq_rel(&d.parking.to_ask, 0)
    if grow:
        events.append(("grow", grow))
    return events
