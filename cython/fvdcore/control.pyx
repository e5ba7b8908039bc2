# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Layer 5. What an owner may say to an open device. See control.pxd."""
from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport free, malloc

from .atomics cimport exchange_acq_rel, load_acquire
from .counters cimport G_PARKED, gauge_set
from .dispatch cimport device_storage_grown, device_t
from .errors cimport fault
from .file_storage cimport file_storage_go_direct
from .fetch cimport fetch_init
from .first_reads cimport first_read_t, first_reads_init, first_reads_t
from .layers cimport layers_close_bases
from .limits cimport FETCH_SIZE_MAX, PREFETCH_REMOTE_BYTES
from .links cimport links_fault_set, links_prefetch_changed, links_space_changed, links_t
from .prefetch cimport (
    PREFETCH_DONE, prefetch_init, prefetch_run, prefetch_set_budget, prefetch_set_order,
    prefetch_set_policy, prefetch_widen,
)
from .sync cimport cond_broadcast, mutex_lock, mutex_unlock
from .syscalls cimport ENOMEM

from .figures import POLICIES


cdef set_space_policy(device_t* d, links_t* l, str on_full, bint helped):
    d.parking.image = d.image
    d.parking.waits = on_full == "wait"
    d.parking.helped = helped
    d.parking.notify = links_space_changed
    d.parking.owner = l
    # A former process may have left its number.
    gauge_set(&d.counters, G_PARKED, 0)


cdef check_cache(str cache, int direct_fd):
    if cache not in ("writeback", "writethrough", "none"):
        raise ValueError("cache is writeback, writethrough or none")
    if (cache == "none") != (direct_fd >= 0):
        raise ValueError("cache none, and no other, takes a descriptor for direct I/O")


cdef set_cache(device_t* d, str cache, int direct_fd):
    cdef int rc
    d.write_through = cache == "writethrough"
    d.crew_writes = cache != "writeback"
    if cache == "none":
        rc = file_storage_go_direct(d.image.data, direct_fd, d.image.data_offset)
        if rc < 0:
            raise fault(rc, "go past the page cache", -1)


cdef int policy_number(object policy) except -1:
    if policy not in POLICIES:
        raise ValueError(f"prefetch_policy is one of {', '.join(POLICIES)}")
    return POLICIES.index(policy)


cdef control_prefetch(device_t* d, object policy, object budget):
    cdef int number = policy_number(policy) if policy is not None else -1
    cdef uint64_t rate = 0
    cdef bint has_budget = budget is not None
    if has_budget:
        if not 0 <= budget < 1 << 62:
            raise ValueError("budget is a rate in bytes a second, or 0")
        rate = budget
    with nogil:
        mutex_lock(&d.prefetch.mutex)
        if d.prefetch.slot_count:
            if number >= 0:
                prefetch_set_policy(&d.prefetch, number, d.has_remote_base)
            if has_budget:
                prefetch_set_budget(&d.prefetch, rate)
            cond_broadcast(&d.prefetch.changed)
        mutex_unlock(&d.prefetch.mutex)


cdef prepare_profile(device_t* d, bint record, object order):
    cdef first_read_t* entries
    cdef uint64_t at = 0
    cdef int rc = first_reads_init(&d.first_reads, d.gate) if record else 0
    if rc < 0:
        raise fault(rc, "prepare a profile", -1)
    if record:
        d.image.first_reads = &d.first_reads
    if not order:
        return
    entries = <first_read_t*>malloc(len(order) * sizeof(first_read_t))
    if entries == NULL:
        raise fault(-ENOMEM, "follow a profile", -1)
    try:
        for offset, length in order:
            # Beyond any disk there is nothing to fetch, and nothing to overflow.
            if 0 <= offset < 1 << 62 and 0 < length < 1 << 62:
                entries[at] = first_read_t(offset, length)
                at += 1
        rc = prefetch_set_order(&d.prefetch, entries, at)
    finally:
        free(entries)
    if rc < 0:
        raise fault(rc, "follow a profile", -1)


cdef list profile_reads(device_t* d):
    cdef first_reads_t* f = &d.first_reads
    cdef uint64_t at, count
    if f.reads == NULL:
        return []
    mutex_lock(&f.mutex)
    count = f.count
    mutex_unlock(&f.mutex)
    # Entries below count change no more, but for the last one's length.
    return [(f.reads[at].offset, f.reads[at].length) for at in range(count)]


cdef end_base(device_t* d):
    if load_acquire(&d.prefetch.state) != PREFETCH_DONE:
        raise ValueError("the base is needed until prefetch is done")
    with nogil:
        layers_close_bases(d)


cdef start_prefetch(device_t* d, bint started):
    cdef int rc
    if not started:
        raise ValueError("start() the device before its prefetch")
    if d.image.read_only:
        raise ValueError("a device that is read-only cannot prefetch")
    with nogil:
        rc = prefetch_run(&d.prefetch)
    if rc < 0:
        raise fault(rc, "start prefetch", -1)


cdef prepare_prefetch(device_t* d, links_t* l, object delay, str policy):
    cdef int64_t seconds = d.image.header.fields.prefetch_start_delay if delay is None else delay
    cdef int rc = prefetch_init(&d.prefetch, d.image, seconds)
    if rc < 0:
        raise fault(rc, "prepare prefetch", -1)
    if d.has_remote_base:
        prefetch_widen(&d.prefetch, PREFETCH_REMOTE_BYTES)
    control_prefetch(d, policy, None)
    d.prefetch.notify = links_prefetch_changed
    d.prefetch.owner = l
    d.prefetch.failures = &d.failures
    d.image.commit.notify = links_fault_set
    d.image.commit.owner = l


cdef prepare_base(device_t* d, uint64_t bytes, bint record, object order):
    cdef int rc
    if bytes > FETCH_SIZE_MAX:
        raise ValueError(f"fetch_size is 0 to {FETCH_SIZE_MAX}")
    rc = fetch_init(&d.fetch, d.image, bytes if d.has_remote_base else 0, d.gate)
    if rc < 0:
        raise fault(rc, "prepare reading from the base", -1)
    prepare_profile(d, record, order)


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
