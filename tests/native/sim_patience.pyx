# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Reading a base with patience. See sim_patience.pxd.

Two stores stand around the engine's patient one. The one below is what readers read from: the base
as a network file system shows it, of which little is in memory, and whose reads hang as long as the
base is away. The engine frees it, perhaps sessions later. The one above judges each call: it must
end in time, and must not give up before."""
from libc.stdint cimport uint64_t
from libc.stdlib cimport calloc, free

from fvdcore.limits cimport NS_PER_S
from fvdcore.patience cimport patient_open, patient_storage_t
from fvdcore.storage cimport (
    IO_HALF, IO_NOWAIT, storage_flush, storage_ops_t, storage_read, storage_resize,
    storage_start_writeback, storage_status, storage_t, storage_write, storage_zero,
)
from fvdcore.syscalls cimport EAGAIN, EIO, ENOMEM
from sim_crash cimport world_fail
from sim_gate cimport (
    SIM_DONE, SIM_GONE, SIM_THREADS, chance, sim_sleep, sim_wait, sim_wake, sim_yield,
)
from sim_state cimport MARK_GIVEN_UP, MARK_PATIENT, UNLIMITED_S, judged_t, world_t

cdef enum:
    SLACK_S = 60                       # in which a thread whose time has come does run

cdef struct hanging_t:
    storage_t head                     # first: a hanging_t* is a storage_t*
    storage_ops_t ops
    world_t* world


# -- below: what readers read ------------------------------------------------------------------

cdef int hanging_read(storage_t* s, void* b, uint64_t n, uint64_t offset, int flags) noexcept nogil:
    cdef world_t* w = (<hanging_t*>s).world
    if not flags & IO_NOWAIT:
        w.marks[MARK_PATIENT] += 1
    elif chance(&w.base.random, 3, 4):
        return -EAGAIN
    return storage_read(&w.base.head, b, n, offset, flags)


cdef int hanging_status(storage_t* s, uint64_t n, uint64_t offset, uint64_t* run) noexcept nogil:
    cdef world_t* w = (<hanging_t*>s).world
    if w.gate.now < w.base.away_until and not w.base.silent:
        sim_sleep(&w.gate, w.base.away_until - w.gate.now)
    return storage_status(&w.base.head, n, offset, run)


cdef void hanging_close(storage_t* s) noexcept nogil:
    cdef world_t* w = (<hanging_t*>s).world
    w.hanging -= 1
    sim_wake(&w.gate, &w.hanging)


cdef void readers_come_back(world_t* w) noexcept nogil:
    cdef int i
    while w.hanging:
        sim_wait(&w.gate, &w.hanging)
    # Nobody joins them, and the gate is about to go.
    for i in range(1, SIM_THREADS):
        while i < w.gate.count and w.gate.threads[i].state not in (SIM_DONE, SIM_GONE):
            sim_yield(&w.gate)


# -- above: what the device sees ---------------------------------------------------------------

cdef inline bint interrupted(const judged_t* j) noexcept nogil:
    return j.s.shared == NULL or j.s.shared.interrupted


cdef void judge(judged_t* j, int rc, uint64_t began, uint64_t failures,
        uint64_t patience) noexcept nogil:
    """A call has ended."""
    cdef world_t* w = j.world
    cdef uint64_t ns = w.gate.now - began
    if rc == -EIO and w.base.failures == failures and not interrupted(j):
        w.base.failures += 1
        w.marks[MARK_GIVEN_UP] += 1
        if ns < patience:
            world_fail(w, b"a patient read", b"gave up early, after ns", <long long>ns)
    if ns > min(w.base_timeout + SLACK_S * NS_PER_S + 10 * w.gate.stall,
                <uint64_t>UNLIMITED_S // 2 * NS_PER_S):
        world_fail(w, b"a patient read", b"hung, for ns", <long long>ns)


cdef int judged_read(storage_t* s, void* b, uint64_t n, uint64_t offset, int flags) noexcept nogil:
    cdef judged_t* j = <judged_t*>s
    cdef uint64_t began = j.world.gate.now, failures = j.world.base.failures
    cdef uint64_t patience = j.world.base_timeout // (2 if flags & IO_HALF else 1)
    cdef int rc = storage_read(&j.s.head, b, n, offset, flags)
    if rc != -EAGAIN:
        judge(j, rc, began, failures, patience)
    return rc


cdef int judged_status(storage_t* s, uint64_t n, uint64_t offset, uint64_t* run) noexcept nogil:
    cdef judged_t* j = <judged_t*>s
    cdef uint64_t began = j.world.gate.now
    cdef int kind = storage_status(&j.s.head, n, offset, run)
    judge(j, kind, began, 0, j.world.base_timeout)
    return kind


cdef int judged_write(storage_t* s, const void* b, uint64_t n, uint64_t offset,
        int flags) noexcept nogil:
    return storage_write(&(<judged_t*>s).s.head, b, n, offset, flags)


cdef int judged_flush(storage_t* s) noexcept nogil:
    return storage_flush(&(<judged_t*>s).s.head)


cdef int judged_zero(storage_t* s, uint64_t n, uint64_t offset, int flags) noexcept nogil:
    return storage_zero(&(<judged_t*>s).s.head, n, offset, flags)


cdef void judged_writeback(storage_t* s, uint64_t n, uint64_t offset) noexcept nogil:
    storage_start_writeback(&(<judged_t*>s).s.head, n, offset)


cdef int judged_resize(storage_t* s, uint64_t length) noexcept nogil:
    return storage_resize(&(<judged_t*>s).s.head, length)


cdef void judged_close(storage_t* s) noexcept nogil:
    pass


# -- open --------------------------------------------------------------------------------------

cdef int base_read_with_patience(world_t* w) noexcept nogil:
    cdef hanging_t* h = <hanging_t*>calloc(1, sizeof(hanging_t))
    cdef patient_storage_t* s = <patient_storage_t*>calloc(1, sizeof(patient_storage_t))
    cdef int rc = -ENOMEM
    if h != NULL and s != NULL:
        h.world = w
        h.ops.read = hanging_read
        h.ops.status = hanging_status
        h.ops.close = hanging_close
        h.head.ops = &h.ops
        h.head.length = w.base.head.length
        rc = patient_open(s, &h.head, w.base_timeout, &w.gate.head)
    if rc < 0:
        free(h)
        free(s)
        return rc
    w.hanging += 1
    w.device.stores[0] = &s.head       # the device's to free
    w.device.store_count = 1
    w.judged.world = w
    w.judged.s = s
    w.judged.ops = storage_ops_t(judged_read, judged_write, judged_flush, judged_zero,
                                 judged_status, judged_writeback, judged_resize, judged_close)
    w.judged.head.ops = &w.judged.ops
    w.judged.head.length = w.base.head.length
    return 0
