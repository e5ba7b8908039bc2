# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Layer 3. Changing how an open image is run. See settings.pxd.

Every value stands in one sector, and those that bound each other in the same one. Where several
sectors change, the backup copy and a bit say so first: whoever opens the image after a crash in
between finds all of the values or none (fvdengine/intent.py)."""
from libc.stdint cimport uint64_t
from .atomics cimport store_relaxed
from .commit cimport commit_fault, commit_flush_metadata
from .counters cimport N_IMAGE_WRITE_BYTES, N_METADATA_WRITE_BYTES, block_t, count
from .header cimport (
    HEADER_SECTORS, header_former_values, header_must_stage, header_store_backup,
    header_store_staged, header_store_staged_bit, header_store_values, header_value_t,
)
from .image cimport image_t
from .limits cimport HEADER_BYTES, HEADER_VALUES_MAX, NS_PER_MS, SECTOR
from .prefetch cimport prefetch_t, prefetch_take_rates
from .sync cimport cond_broadcast, cond_signal, mutex_lock, mutex_unlock
from .syscalls cimport EIO, EROFS


cdef int flush(image_t* m, uint64_t written, block_t* n) noexcept nogil:
    count(n, N_IMAGE_WRITE_BYTES, written)
    count(n, N_METADATA_WRITE_BYTES, written)
    return commit_flush_metadata(&m.commit, n)


cdef int store(image_t* m, const header_value_t* values, int count_, block_t* n) noexcept nogil:
    """Sector by sector, each durable before the next."""
    cdef int sector, rc
    for sector in range(HEADER_SECTORS):
        rc = header_store_values(&m.header, m.file, sector, values, count_)
        if rc == 0:
            continue
        if rc > 0:
            rc = flush(m, SECTOR, n)
        if rc < 0:
            return rc
    return 0


cdef int set_staged(image_t* m, bint staged, block_t* n) noexcept nogil:
    cdef int rc = header_store_staged_bit(&m.header, m.file, staged)
    return flush(m, SECTOR, n) if rc == 0 else rc


cdef int store_staged(image_t* m, const header_value_t* values, int count_,
        block_t* n) noexcept nogil:
    cdef header_value_t[HEADER_VALUES_MAX] former
    cdef int rc, taken_back
    header_former_values(&m.header, values, &former[0], count_)
    rc = header_store_staged(&m.header, m.file, values, count_)
    if rc == 0:
        rc = flush(m, HEADER_BYTES, n)
    if rc < 0:
        return rc
    rc = set_staged(m, True, n)
    if rc == 0:
        rc = store(m, values, count_, n)
    # As far as the disk still takes writes. Where it does not, what is staged stays: who opens the
    # image next finds all of it, not a part.
    if rc < 0 and store(m, &former[0], count_, n) < 0:
        return rc
    taken_back = set_staged(m, False, n)
    return taken_back if rc == 0 else rc


cdef int store_all(image_t* m, const header_value_t* values, int count_,
        block_t* n) noexcept nogil:
    cdef int rc
    if header_must_stage(&m.header, values, count_):
        return store_staged(m, values, count_, n)
    rc = store(m, values, count_, n)
    if rc == 0:
        # Who opens the image compares none of these fields; a crash before it is durable leaves
        # an older copy.
        header_store_backup(&m.header, m.file)
        count(n, N_IMAGE_WRITE_BYTES, HEADER_BYTES)
        count(n, N_METADATA_WRITE_BYTES, HEADER_BYTES)
    return rc


cdef void apply_journal(image_t* m) noexcept nogil:
    mutex_lock(&m.commit.mutex)
    m.commit.period_ns = m.header.fields.journal_clean_buf_period * NS_PER_MS
    store_relaxed(&m.commit.buffer_bytes, m.header.fields.journal_buf_size)
    # The keeper may sleep by the former period.
    cond_signal(&m.commit.keeper_wake)
    mutex_unlock(&m.commit.mutex)


cdef void apply_prefetch(image_t* m, prefetch_t* p) noexcept nogil:
    mutex_lock(&p.mutex)
    if p.slot_count:
        prefetch_take_rates(p)
        # It may wait for a cap that is no more.
        cond_broadcast(&p.changed)
    mutex_unlock(&p.mutex)


cdef void apply(image_t* m, prefetch_t* p, bint keep_copy_on_read) noexcept nogil:
    apply_journal(m)
    apply_prefetch(m, p)
    if m.compact:
        mutex_lock(&m.places.mutex)
        m.places.grow_unit = max(m.header.fields.storage_grow_unit, m.chunk_size)
        mutex_unlock(&m.places.mutex)
    m.outstanding_max = max(m.header.fields.max_outstanding_copy_on_read_data, 2 * m.block_size)
    if not keep_copy_on_read:
        m.copy_on_read = m.has_bitmap and m.header.fields.copy_on_read != 0


cdef int settings_change(image_t* m, prefetch_t* p, const header_value_t* values, int count_,
        bint keep_copy_on_read, block_t* n) noexcept nogil:
    cdef int rc
    if m.read_only:
        return -EROFS
    # The sizes of the header are changed under the same lock.
    mutex_lock(&m.resizing)
    rc = -EIO if commit_fault(&m.commit) else store_all(m, values, count_, n)
    if rc == 0:
        apply(m, p, keep_copy_on_read)
    mutex_unlock(&m.resizing)
    return rc
