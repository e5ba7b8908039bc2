# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Layer 3. An open FVD image. See image.pxd.

Order of a writable open (FORMAT.md sections 1.1 and 4): validate -> fsync what a dead predecessor
may have left in the page cache -> bitmap and journal into memory -> session (new or kept), clean =
0 and version, flushed -> if the journal or a predecessor left anything: checkpoint. Only the last
two write."""
from libc.errno cimport errno
from libc.stdint cimport int64_t, uint8_t, uint64_t
from libc.string cimport memcpy, memset
from .atomics cimport store_release
from .bitmap cimport (
    bitmap_clear_padding, bitmap_free, bitmap_init, bitmap_next_clear, bitmap_note_difference,
    bitmap_recount, bitmap_set_present, bitmap_test,
)
from .checks cimport invariant
from .commit cimport (
    commit_checkpoint, commit_fault, commit_flush, commit_flush_storage, commit_free,
    commit_init, commit_note, commit_set_fault,
)
from .counters cimport (
    BLOCK_SHARED, G_BASE_BYTES_LEFT, G_BASE_SIZE, G_COR_OUTSTANDING, G_FAULT, G_JOURNAL_EPOCH,
    G_JOURNAL_SIZE, G_JOURNAL_USED, G_PENDING_BLOCKS, G_LOCAL_BYTES, G_VIRTUAL_SIZE,
    G_BLOCK_BYTES, N_BASE_BYTES, N_BASE_ERRORS, N_BASE_REQUESTS, N_IMAGE_WRITE_BYTES,
    N_JOURNAL_REPLAYS, N_METADATA_WRITE_BYTES, N_TAKEOVERS, N_UNCLEAN_OPENS, T_BASE_ERROR,
    base_answered, block_t, count, counters_block, counters_t, gauge_add, gauge_set, note_time,
)
from .header cimport (
    header_load, header_store_clean, header_store_prefetched, header_store_session,
    header_store_version,
)
from .journal cimport journal_free, journal_init, journal_replay
from .limits cimport NS_PER_MS, PAGE, SECTOR
from .range_lock cimport range_locks_free, range_locks_init, range_locks_wait_idle
from .storage cimport IO_NOWAIT, storage_flush, storage_read, storage_t
from .sync cimport clock_now, mutex_init
from .syscalls cimport (
    EAGAIN, EINVAL, EIO, EUCLEAN, MAP_FAILED, MAP_SHARED, PROT_READ, PROT_WRITE, c_mmap,
    c_munmap, file_length,
)


cdef int map_live(image_t* m, const image_options_t* o) noexcept nogil:
    """Map the engine's part of the live file, behind the page that names what it belongs to."""
    cdef uint64_t length = 0
    cdef uint64_t bytes = live_bytes_for(m.header.fields.bitmap_size if m.has_bitmap else 0)
    cdef void* p
    cdef int rc
    if o.live_fd < 0:
        m.commit.fault = &m.private_fault
        return 0
    rc = file_length(o.live_fd, &length)
    if rc < 0:
        return rc
    if length < PAGE + bytes:
        return -EINVAL
    p = c_mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, o.live_fd, PAGE)
    if p == MAP_FAILED:
        return -errno
    m.live = p
    m.live_bytes = bytes
    if not o.takeover:
        memset(p, 0, bytes)
    m.commit.fault = <uint64_t*>p
    return 0


cdef int load_bitmap(image_t* m, const image_options_t* o) noexcept nogil:
    """The bitmap as it stands on disk into durable; replay adds to it."""
    cdef uint64_t bytes = m.header.fields.bitmap_size
    cdef uint64_t blocks = (m.base_size + m.block_size - 1) // m.block_size
    cdef void* present = NULL
    cdef int rc
    if m.live != NULL:
        present = <uint8_t*>m.live + PAGE
    rc = bitmap_init(&m.bitmap, blocks, bytes, present, o.gate)
    if rc < 0:
        return rc
    return storage_read(m.file, m.bitmap.durable, bytes, m.header.fields.bitmap_offset, 0)


cdef int load_metadata(image_t* m, const image_options_t* o, const char** reason,
        bint* found) noexcept nogil:
    """Bitmap and journal into memory; *found: a checkpoint should settle it."""
    cdef int replayed, rc
    found[0] = False
    if not m.has_bitmap:
        return 0
    rc = load_bitmap(m, o)
    if rc < 0:
        return rc
    rc = journal_init(&m.journal, m.file, m.header.fields.journal_offset,
                      m.header.fields.journal_size, m.header.extension.image_uuid)
    if rc < 0:
        return rc
    replayed = journal_replay(&m.journal, m.header.fields.stable_journal_epoch, &m.bitmap,
                              m.block_size, m.base_size)
    if replayed < 0:
        reason[0] = b"the journal holds a record that does not fit the image"
        return replayed
    bitmap_clear_padding(&m.bitmap)
    if not o.takeover:
        memcpy(m.bitmap.present, m.bitmap.durable, m.bitmap.words * 8)
    elif bitmap_note_difference(&m.bitmap) < 0:
        reason[0] = b"the image on disk is ahead of its live state"
        return -EUCLEAN
    bitmap_recount(&m.bitmap)
    if replayed:
        count(counters_block(m.counters, BLOCK_SHARED), N_JOURNAL_REPLAYS, 1)
    # Old records stay readable until the stable epoch moves on; a fresh ring may overwrite them,
    # so
    # whatever they said must be in the bitmap first (I3).
    found[0] = replayed > 0 or o.takeover
    return 0


cdef int begin_session(image_t* m, const image_options_t* o, bint found) noexcept nogil:
    """First writes of a writable open: session and clean = 0, durable before any change (I4)."""
    cdef block_t* n = counters_block(m.counters, BLOCK_SHARED)
    cdef int rc
    cdef uint64_t page
    if o.takeover:
        count(n, N_TAKEOVERS, 1)
    elif not m.header.fields.clean_shutdown:
        count(n, N_UNCLEAN_OPENS, 1)
    if not o.takeover or m.header.fields.clean_shutdown:
        if o.session != NULL and not o.takeover:
            memcpy(m.header.extension.open_session, o.session, 16)
        rc = header_store_session(&m.header, m.file, o.boot_id,
                                  o.takeover or o.session != NULL)
        if rc == 0:
            rc = header_store_clean(&m.header, m.file, False)
        if rc == 0:
            rc = header_store_version(&m.header, m.file)
        if rc == 0:
            rc = storage_flush(m.file)
        if rc < 0:
            return rc
        count(n, N_IMAGE_WRITE_BYTES, 3 * SECTOR)
        count(n, N_METADATA_WRITE_BYTES, 3 * SECTOR)
    if not found:
        return 0
    for page in range(m.bitmap.pages):
        m.bitmap.stale_pages[page >> 6] |= <uint64_t>1 << (page & 63)
    return commit_checkpoint(&m.commit, n)


cdef void take_geometry(image_t* m) noexcept nogil:
    m.size = m.header.fields.virtual_disk_size
    m.head.length = m.size
    m.data_offset = m.header.fields.data_offset
    m.has_bitmap = (m.header.fields.base_img_size != 0
                    and not m.header.fields.base_img_fully_prefetched)
    m.base_size = m.header.fields.base_img_size if m.has_bitmap else 0
    m.block_size = m.header.fields.block_size if m.has_bitmap else PAGE
    m.copy_on_read = m.has_bitmap and m.header.fields.copy_on_read != 0
    m.outstanding_max = max(m.header.fields.max_outstanding_copy_on_read_data, 2 * m.block_size)
    m.complete = 0 if m.has_bitmap else 1


cdef uint64_t image_base_bytes_left(const image_t* m) noexcept nogil:
    cdef uint64_t left
    if not m.has_bitmap:
        return 0
    left = (m.bitmap.blocks - m.bitmap.local) * m.block_size
    # The last block may be partial.
    if not bitmap_test(&m.bitmap, m.bitmap.blocks - 1):
        left -= m.bitmap.blocks * m.block_size - m.base_size
    return left


cdef void image_set_local(image_t* m, uint64_t first, uint64_t end, bint copied) noexcept nogil:
    cdef bint with_last = end == m.bitmap.blocks and not bitmap_test(&m.bitmap, end - 1)
    cdef uint64_t fresh = bitmap_set_present(&m.bitmap, first, end, copied)
    cdef uint64_t bytes = fresh * m.block_size
    if bytes == 0:
        return
    if with_last:
        bytes -= m.bitmap.blocks * m.block_size - m.base_size
    gauge_add(m.counters, G_LOCAL_BYTES, <int64_t>bytes)
    gauge_add(m.counters, G_BASE_BYTES_LEFT, -<int64_t>bytes)
    gauge_add(m.counters, G_PENDING_BLOCKS, <int64_t>fresh)
    commit_note(&m.commit)


cdef int image_read_base(image_t* m, uint8_t* buffer, uint64_t length, uint64_t offset, int flags,
        int cause, block_t* n) noexcept nogil:
    cdef uint64_t there = 0, begin = 0
    cdef int rc = 0
    if offset < m.base.length:
        there = min(length, m.base.length - offset)
    if n != NULL and not flags & IO_NOWAIT:
        begin = clock_now(m.commit.gate)
    if there:
        rc = storage_read(m.base, buffer, there, offset, flags)
    # The base may end within its last sector.
    if rc == 0 and there < length:
        memset(buffer + there, 0, length - there)
    if n == NULL or rc == -EAGAIN:
        return rc
    count(n, N_BASE_REQUESTS + cause, 1)
    if rc < 0:
        count(n, N_BASE_ERRORS + cause, 1)
        note_time(n, T_BASE_ERROR, clock_now(m.commit.gate))
        return rc
    count(n, N_BASE_BYTES + cause, there)
    if begin:
        base_answered(n, cause, begin, clock_now(m.commit.gate))
    return 0


cdef void set_gauges(image_t* m) noexcept nogil:
    cdef uint64_t base = m.header.fields.base_img_size
    cdef uint64_t left = image_base_bytes_left(m)
    # What a dead predecessor left in the stats page is not ours.
    gauge_set(m.counters, G_COR_OUTSTANDING, 0)
    gauge_set(m.counters, G_JOURNAL_USED, 0)
    gauge_set(m.counters, G_PENDING_BLOCKS, m.bitmap.pending)
    gauge_set(m.counters, G_BLOCK_BYTES, m.block_size)
    gauge_set(m.counters, G_VIRTUAL_SIZE, m.size)
    gauge_set(m.counters, G_BASE_SIZE, base)
    gauge_set(m.counters, G_BASE_BYTES_LEFT, left)
    gauge_set(m.counters, G_LOCAL_BYTES, m.size - left)
    gauge_set(m.counters, G_JOURNAL_SIZE, m.header.fields.journal_size)
    gauge_set(m.counters, G_JOURNAL_EPOCH, m.journal.epoch)
    gauge_set(m.counters, G_FAULT, <uint64_t>commit_fault(&m.commit))


cdef int open_steps(image_t* m, storage_t* base, const image_options_t* o,
        const char** reason) noexcept nogil:
    cdef bint found = False
    cdef int rc
    rc = mutex_init(&m.header.mutex, o.gate)
    if rc < 0:
        return rc
    # A predecessor's writes may be in the page cache only: what is read below must be durable to
    # count as durable.
    if not o.read_only:
        rc = storage_flush(m.file)
        if rc < 0:
            return rc
    rc = header_load(&m.header, m.file)
    if rc < 0:
        reason[0] = m.header.reason
        return rc
    take_geometry(m)
    if m.has_bitmap:
        if base == NULL:
            reason[0] = b"the image needs a base and none was given"
            return -EINVAL
        # base_img_size is rounded up to whole sectors; the base itself need not be.
        if base.length + SECTOR - 1 < m.base_size:
            reason[0] = b"the base is shorter than the image expects"
            return -EUCLEAN
        m.base = base
    rc = map_live(m, o)
    if rc < 0:
        return rc
    rc = load_metadata(m, o, reason, &found)
    if rc < 0:
        return rc
    m.commit.storage = m.file
    m.commit.header = &m.header
    m.commit.bitmap = &m.bitmap if m.has_bitmap else NULL
    m.commit.journal = &m.journal
    m.commit.counters = m.counters
    m.commit.period_ns = m.header.fields.journal_clean_buf_period * NS_PER_MS
    m.commit.buffer_bytes = m.header.fields.journal_buf_size
    rc = commit_init(&m.commit, o.gate)
    if rc == 0:
        rc = range_locks_init(&m.locks, o.gate)
    if rc < 0:
        return rc
    m.opened = True
    set_gauges(m)
    if o.read_only or commit_fault(&m.commit):
        return 0
    return begin_session(m, o, found)


cdef int image_open(image_t* m, storage_t* file, storage_t* data, storage_t* base,
        counters_t* counters, const image_options_t* o, const char** reason) noexcept nogil:
    cdef int rc
    memset(m, 0, sizeof(image_t))
    m.file = file
    m.data = data
    m.counters = counters
    m.read_only = o.read_only
    reason[0] = NULL
    rc = open_steps(m, base, o, reason)
    if rc < 0:
        image_free(m)
    return rc


cdef int image_close(image_t* m, block_t* n) noexcept nogil:
    cdef uint8_t[16] nobody
    cdef int rc
    if m.read_only:
        return 0
    if commit_fault(&m.commit):
        return -EIO                    # the image stays unclean; what is on disk is consistent
    rc = commit_flush(&m.commit, n)
    if rc == 0 and m.has_bitmap and m.complete == 0:
        rc = commit_checkpoint(&m.commit, n)
    if rc < 0:
        return rc
    memset(nobody, 0, 16)
    # Clean before nobody: a process that dies between leaves what a takeover accepts.
    rc = header_store_clean(&m.header, m.file, True)
    if rc == 0:
        rc = header_store_session(&m.header, m.file, nobody, True)
    if rc < 0:
        commit_set_fault(&m.commit, rc)
        return rc
    count(n, N_IMAGE_WRITE_BYTES, 2 * SECTOR)
    count(n, N_METADATA_WRITE_BYTES, 2 * SECTOR)
    return commit_flush_storage(&m.commit, n)


cdef void image_free(image_t* m) noexcept nogil:
    if m.opened:
        commit_free(&m.commit)
        range_locks_free(&m.locks)
        m.opened = False
    journal_free(&m.journal)
    if m.bitmap.present != NULL:
        bitmap_free(&m.bitmap)
    if m.live != NULL:
        c_munmap(m.live, m.live_bytes)
        m.live = NULL


cdef int image_finish(image_t* m, block_t* n) noexcept nogil:
    cdef int rc
    invariant(bitmap_next_clear(&m.bitmap, 0, m.bitmap.blocks) == m.bitmap.blocks)
    # A write or copy that still holds a lock may be between its data and its bit (I5).
    range_locks_wait_idle(&m.locks)
    rc = commit_flush(&m.commit, n)
    if rc == 0:
        rc = commit_checkpoint(&m.commit, n)
    if rc < 0:
        return rc
    rc = header_store_prefetched(&m.header, m.file)
    if rc < 0:
        commit_set_fault(&m.commit, rc)
        return rc
    count(n, N_IMAGE_WRITE_BYTES, SECTOR)
    count(n, N_METADATA_WRITE_BYTES, SECTOR)
    rc = commit_flush_storage(&m.commit, n)
    if rc == 0:
        store_release(&m.complete, 1)
    return rc
