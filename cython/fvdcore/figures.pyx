# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Layer 5. Figures of a device, and its failures. See figures.pxd. Figures are atomics only: no
lock, no I/O."""
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint64_t

from .atomics cimport load_acquire, load_relaxed
from .commit cimport commit_fault
from .counters cimport (
    BLOCK_SHARED, G_IN_FLIGHT, N_ERRORS, N_READ_IMAGE, counters_block, counters_sum,
)
from .dispatch cimport device_t
from .failures cimport failure_t, failures_take
from .image cimport image_base_bytes_left, image_t
from .journal cimport journal_used
from .limits cimport PAGE
from .prefetch cimport PREFETCH_PAUSED, PREFETCH_RUNNING
from .trace cimport TRACE_EVENT_BYTES, trace_event_t, trace_take

cdef enum:
    TAKE_MAX = 4096

# In the order of pause_reason_t; what is paused for none of them is so because somebody said so.
_REASONS = ("manual", "error", "slow_read", "slow_write")
POLICIES = ("fixed", "eager", "polite")
_PREFETCH_STATES = ("disabled", "waiting", "running", "paused", "done", "failed")


cdef dict device_figures(device_t* d, int connections):
    cdef image_t* m = d.image
    cdef uint64_t left = image_base_bytes_left(m), size = load_acquire(&m.size)
    cdef uint64_t state = load_acquire(&d.prefetch.state)
    cdef uint64_t rate = load_relaxed(&d.prefetch.rate) if state == PREFETCH_RUNNING else 0
    cdef uint64_t failed = 0, reason = load_relaxed(&d.prefetch.reason)
    cdef int slot
    for slot in range(<int>N_ERRORS, <int>N_READ_IMAGE):
        failed += counters_sum(&d.counters, slot)
    return {
        "failed_requests": failed,
        "size_bytes": size,
        "base_bytes": m.header.fields.base_img_size,
        "local_bytes": size - left,
        "base_bytes_left": left,
        "read_only": bool(m.read_only),
        "copy_on_read": bool(m.copy_on_read),
        "fault_errno": commit_fault(&m.commit),
        "in_flight": load_relaxed(counters_block(&d.counters, BLOCK_SHARED) + G_IN_FLIGHT),
        "connections": connections,
        "pending_blocks": load_relaxed(&m.bitmap.pending) if m.has_bitmap else 0,
        "journal_used_bytes": journal_used(&m.journal) * PAGE,
        "journal_size_bytes": m.header.fields.journal_size,
        "epoch": load_relaxed(&m.journal.epoch),
        "clean": bool(m.header.fields.clean_shutdown),
        "parked": load_acquire(&d.parking.waiting),
        "growing_bytes": load_acquire(&d.parking.growing),
        "prefetch_state": _PREFETCH_STATES[state],
        "prefetch_bytes": load_relaxed(&d.prefetch.copied),
        "prefetch_policy": POLICIES[d.prefetch.manners.policy],
        "prefetch_rate": rate,
        "prefetch_reason": _REASONS[reason] if state == PREFETCH_PAUSED else None,
        "prefetch_window": load_relaxed(&d.prefetch.manners.window),
        "prefetch_eta": left / rate if rate else None,
    }


cdef bytes device_trace_events(device_t* d):
    cdef bytes out = PyBytes_FromStringAndSize(NULL, TAKE_MAX * TRACE_EVENT_BYTES)
    cdef trace_event_t* events = <trace_event_t*>PyBytes_AS_STRING(out)
    # With the interpreter's lock: whoever else would take waits.
    cdef Py_ssize_t taken = <Py_ssize_t>trace_take(&d.counters.trace, events, TAKE_MAX)
    return PyBytes_FromStringAndSize(<char*>events, taken * TRACE_EVENT_BYTES)


_OPERATIONS = ("read", "write", "flush", "discard", "write_zeroes", "block_status", "prefetch")


cdef list device_failures(device_t* d):
    cdef failure_t[32] taken           # FAILURES
    cdef uint64_t lost = 0
    cdef int count
    with nogil:
        count = failures_take(&d.failures, &taken[0], &lost)
    found = [
        ("failed", {
            "operation": _OPERATIONS[taken[at].op],
            "errno": taken[at].error,
            "of_base": bool(taken[at].of_base),
            "offset": taken[at].offset,
            "length": taken[at].length,
        })
        for at in range(count)
    ]
    return found + [("failures_lost", lost)] if lost else found
