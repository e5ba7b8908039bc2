# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""commit_t with its header, bitmap and journal over a logging store."""
from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memset

from fvdcore.bitmap cimport bitmap_free, bitmap_init, bitmap_set_present, bitmap_t
from fvdcore.commit cimport (
    commit_checkpoint, commit_fault, commit_flush, commit_free, commit_init, commit_note,
    commit_start, commit_stop, commit_t,
)
from fvdcore.counters cimport (
    BLOCK_SHARED, counters_block, counters_free, counters_init, counters_sum, counters_t,
)
from fvdcore.header cimport header_load, header_t
from fvdcore.journal cimport journal_free, journal_init, journal_t
from fvdcore.limits cimport NS_PER_MS
from fvdcore.replay cimport journal_replay, journal_scope_t
from fvdcore.sync cimport mutex_lock, mutex_unlock
from probe_gate cimport Gate
from probe_storage cimport Storage


cdef void tell(void* owner) noexcept nogil:
    (<uint64_t*>owner)[0] += 1


cdef class Commit:
    """The pipeline of an image that stands in a Storage."""

    cdef commit_t c
    cdef header_t h
    cdef bitmap_t b
    cdef journal_t j
    cdef counters_t n
    cdef uint64_t fault_word
    cdef uint64_t told
    cdef Storage storage
    cdef Gate gate

    def __init__(self, Storage storage, Gate gate=None, bint with_bitmap=True):
        cdef uint64_t block, base
        cdef journal_scope_t scope
        self.storage = storage
        self.gate = gate
        memset(&self.c, 0, sizeof(commit_t))
        memset(&self.h, 0, sizeof(header_t))
        self.need(counters_init(&self.n, -1))
        self.need(header_load(&self.h, storage.raw(), storage.raw()))
        block = self.h.fields.block_size
        base = self.h.fields.base_img_size
        self.need(bitmap_init(&self.b, (base + block - 1) // block, self.h.fields.bitmap_size,
                              NULL, gate.raw() if gate is not None else NULL))
        self.need(journal_init(&self.j, storage.raw(), self.h.fields.journal_offset,
                               self.h.fields.journal_size,
                               <uint8_t*>self.h.extension.image_uuid))
        scope.stable_epoch = self.h.fields.stable_journal_epoch
        scope.trailers = True
        scope.verifies = True
        scope.writes = False
        scope.bitmap = &self.b
        scope.block_size = block
        scope.base_size = base
        scope.disk_size = base
        scope.table = NULL
        self.need(journal_replay(&self.j, &scope))
        self.c.storage = storage.raw()
        self.c.data = storage.raw()
        self.c.header = &self.h
        self.c.bitmap = &self.b if with_bitmap else NULL
        self.c.journal = &self.j
        self.c.counters = &self.n
        self.c.fault = &self.fault_word
        self.c.period_ns = self.h.fields.journal_clean_buf_period * NS_PER_MS
        self.c.buffer_bytes = self.h.fields.journal_buf_size
        self.c.notify = tell
        self.c.owner = &self.told
        self.need(commit_init(&self.c, gate.raw() if gate is not None else NULL))

    cdef need(self, int rc):
        if rc < 0:
            raise OSError(-rc, "prepare a commit")

    def free(self):
        commit_free(&self.c)
        journal_free(&self.j)
        bitmap_free(&self.b)
        counters_free(&self.n)

    def set_present(self, uint64_t first, uint64_t end, bint copied=False, bint note=True):
        with nogil:
            bitmap_set_present(&self.b, first, end, copied)
            if note:
                commit_note(&self.c)

    def flush(self):
        cdef int rc
        with nogil:
            rc = commit_flush(&self.c, counters_block(&self.n, BLOCK_SHARED))
        return rc

    def checkpoint(self):
        cdef int rc
        with nogil:
            rc = commit_checkpoint(&self.c, counters_block(&self.n, BLOCK_SHARED))
        return rc

    def start(self):
        self.need(commit_start(&self.c))

    def stop(self):
        with nogil:
            commit_stop(&self.c)

    def counter(self, int slot):
        return counters_sum(&self.n, slot)

    def durable(self):
        """Blocks that the engine takes for durable."""
        return {w * 64 + i for w in range(self.b.words) for i in range(64)
                if self.b.durable[w] >> i & 1}

    def present_bytes(self):
        return (<char*>self.b.present)[:self.b.words * 8]

    def state(self):
        """Numbers of the moment."""
        mutex_lock(&self.c.mutex)
        found = {
            "started": self.c.started, "done": self.c.done, "leading": bool(self.c.leading),
            "checkpointing": bool(self.c.checkpointing), "epoch": self.j.epoch,
            "head": self.j.head, "tail": self.j.tail, "pages": self.j.pages,
            "sequence": self.j.sequence, "keeper": self.c.keeper_state,
            "pending": self.b.pending, "fault": commit_fault(&self.c), "told": self.told,
            "stable_epoch": self.h.fields.stable_journal_epoch,
        }
        mutex_unlock(&self.c.mutex)
        return found
