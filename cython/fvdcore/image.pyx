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
from .atomics cimport (
    exchange_acq_rel, fence, fetch_add_relaxed, fetch_sub_acq_rel, fetch_sub_relaxed, load_acquire,
    load_relaxed, store_relaxed, store_release,
)
from .bitmap cimport (
    bitmap_clear_padding, bitmap_free, bitmap_init, bitmap_next_clear, bitmap_note_difference,
    bitmap_recount, bitmap_set_present, bitmap_test,
)
from .checks cimport invariant
from .chunk_table cimport (
    chunk_table_t, table_free, table_init, table_note_difference, table_settle_load,
)
from .commit cimport (
    commit_checkpoint, commit_fault, commit_flush, commit_flush_data, commit_flush_metadata,
    commit_free, commit_init, commit_note, commit_set_fault,
)
from .counters cimport (
    BLOCK_SHARED, CAUSE_PREFETCH, G_BASE_BYTES_LEFT, G_BASE_SIZE, G_COR_OUTSTANDING, G_FAULT,
    G_JOURNAL_EPOCH, G_JOURNAL_SIZE, G_JOURNAL_USED, G_PENDING_BLOCKS, G_LOCAL_BYTES,
    G_STORE_USED, G_VIRTUAL_SIZE, G_BLOCK_BYTES, N_BASE_BYTES, N_BASE_ERRORS, N_BASE_REQUESTS,
    N_IMAGE_WRITE_BYTES, N_JOURNAL_REPLAYS, N_METADATA_WRITE_BYTES, N_TAKEOVERS, N_UNCLEAN_OPENS,
    T_BASE_ERROR,
    base_answered, block_t, count, counters_block, counters_t, counters_trace, gauge_add,
    gauge_set, note_time,
)
from .first_reads cimport first_reads_note
from .header cimport (
    header_load, header_renew_extension, header_store_clean, header_store_prefetched,
    header_store_session, header_store_version,
)
from .journal cimport journal_erase, journal_free, journal_init, journal_reseed
from .layout cimport FVD_VERSION
from .limits cimport NS_PER_MS, PAGE, SECTOR
from .places cimport (
    places_free, places_init, places_mapped_end, places_reserve, places_return, places_take_table,
    places_used,
)
from .quiescence cimport quiescence_free, quiescence_init
from .range_lock cimport range_locks_free, range_locks_init, range_locks_wait_idle
from .replay cimport journal_replay, journal_scope_t
from .storage cimport IO_NOWAIT, storage_flush, storage_read, storage_resize, storage_t
from .sync cimport clock_now, gate_t, mutex_init
from .syscalls cimport (
    EAGAIN, EINVAL, EIO, EOVERFLOW, ESTALE, EUCLEAN, F_DUPFD_CLOEXEC, MAP_FAILED, MAP_SHARED,
    PROT_READ, PROT_WRITE, c_close, c_dup_cloexec, c_mmap, c_munmap, file_length,
)
from .trace cimport TRACE_BASE, trace_is_on


cdef uint64_t used_bitmap(const image_t* m) noexcept nogil:
    """Bytes of the bitmap that have a bit of a block, in whole pages: a section may be longer."""
    cdef uint64_t blocks = (m.base_size + m.block_size - 1) // m.block_size
    return (blocks + 8 * PAGE - 1) // (8 * PAGE) * PAGE


cdef int map_live(image_t* m, const image_options_t* o) noexcept nogil:
    """Map state and bitmap of the live file, behind the page that names what it belongs to. The
    chunk table maps its part itself."""
    cdef uint64_t length = 0, bytes
    cdef void* p
    cdef int rc
    if o.live_fd < 0:
        m.commit.fault = &m.private_fault
        return 0
    rc = file_length(o.live_fd, &length)
    if rc < 0:
        return rc
    bytes = live_bytes_for(m.header.fields.bitmap_size, 0)
    if length < PAGE + bytes + m.header.fields.table_size:
        return -EINVAL
    m.live_fd = c_dup_cloexec(o.live_fd, F_DUPFD_CLOEXEC, 3)
    if m.live_fd < 0:
        return -errno
    p = c_mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, o.live_fd, PAGE)
    if p == MAP_FAILED:
        return -errno
    m.live = p
    m.live_bytes = bytes
    if not o.takeover:
        memset(p, 0, PAGE + used_bitmap(m))
    m.commit.fault = <uint64_t*>p
    return 0


cdef void keep_fault(const image_options_t* o, int error) noexcept nogil:
    """The kernel has forgotten which pages it lost: the next successor must not take its fsync for
    the truth."""
    cdef void* p = c_mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, o.live_fd, PAGE)
    if p != MAP_FAILED:
        if (<uint64_t*>p)[0] == 0:
            (<uint64_t*>p)[0] = <uint64_t>(-error)
        c_munmap(p, PAGE)


cdef uint64_t image_live_table(const image_t* m) noexcept nogil:
    return PAGE + live_bytes_for(m.header.fields.bitmap_size, 0)


cdef int load_bitmap(image_t* m, const image_options_t* o) noexcept nogil:
    """The bitmap as it stands on disk into durable; replay adds to it."""
    cdef uint64_t bytes = used_bitmap(m)
    cdef uint64_t blocks = (m.base_size + m.block_size - 1) // m.block_size
    cdef void* present = NULL
    cdef int rc
    if m.live != NULL:
        present = <uint8_t*>m.live + PAGE
    rc = bitmap_init(&m.bitmap, blocks, bytes, present, o.gate)
    if rc < 0:
        return rc
    return storage_read(m.file, m.bitmap.durable, bytes, m.header.fields.bitmap_offset, 0)


cdef int load_table(image_t* m, chunk_table_t* t, int live_fd, bint read,
        gate_t* gate) noexcept nogil:
    """A table of the image's geometry, with the content that stands on disk or in live memory."""
    cdef uint64_t bytes = m.header.fields.table_size
    cdef int rc = table_init(t, (m.size + m.chunk_size - 1) // m.chunk_size, bytes, live_fd,
                             image_live_table(m), gate)
    if rc == 0 and read:
        rc = storage_read(m.file, t.present, bytes, m.header.fields.table_offset, 0)
    return rc


cdef int replay(image_t* m, chunk_table_t* t, const char** reason) noexcept nogil:
    """What the journal says on top of bitmap and table. Sectors that counted."""
    cdef journal_scope_t scope
    cdef int rc = journal_init(&m.journal, m.file, m.header.fields.journal_offset,
                               m.header.fields.journal_size, m.header.extension.image_uuid)
    if rc < 0:
        return rc
    scope.stable_epoch = m.header.fields.stable_journal_epoch
    scope.trailers = m.header.trailers
    scope.verifies = m.header.readable
    scope.bitmap = &m.bitmap if m.has_bitmap else NULL
    scope.block_size = m.header.fields.block_size
    scope.base_size = m.header.fields.base_img_size
    scope.disk_size = m.size
    scope.writes = not m.read_only
    scope.table = t
    rc = journal_replay(&m.journal, &scope)
    if rc == -EOVERFLOW:
        reason[0] = b"the numbers of its journal are used up: check --repair begins them anew"
    if rc == -EUCLEAN:
        reason[0] = b"the journal holds a record that does not fit the image"
        if not m.header.readable:
            reason[0] = b"the header's extension is damaged and the journal cannot be verified"
    return rc


cdef int settle_bitmap(image_t* m, const image_options_t* o, const char** reason) noexcept nogil:
    """After replay: what is present."""
    bitmap_clear_padding(&m.bitmap)
    if not o.takeover:
        memcpy(m.bitmap.present, m.bitmap.durable, m.bitmap.words * 8)
    elif bitmap_note_difference(&m.bitmap) < 0:
        reason[0] = b"the image on disk is ahead of its live state"
        return -EUCLEAN
    bitmap_recount(&m.bitmap)
    return 0


cdef int load_compact(image_t* m, const image_options_t* o, const char** reason,
        int* replayed) noexcept nogil:
    """The table with the journal upon it; at a takeover, live memory's and how the disk differs."""
    cdef chunk_table_t disk
    cdef uint64_t w
    cdef int rc
    if not o.takeover:
        rc = load_table(m, &m.table, m.live_fd, True, o.gate)
        if rc == 0:
            rc = replay(m, &m.table, reason)
        replayed[0] = rc
        if rc < 0:
            return rc
        table_settle_load(&m.table)
        return 0
    rc = load_table(m, &m.table, m.live_fd, False, o.gate)
    if rc < 0:
        return rc
    table_settle_load(&m.table)
    rc = load_table(m, &disk, -1, True, o.gate)
    if rc == 0:
        rc = replay(m, &disk, reason)
    if rc >= 0:
        replayed[0] = rc
        rc = 0
        table_settle_load(&disk)
        table_note_difference(&m.table, disk.present)
        for w in range(disk.pages // 64 + 1):
            m.table.stale_pages[w] |= disk.stale_pages[w]
    table_free(&disk)
    return rc


cdef int load_places(image_t* m, const image_options_t* o, const char** reason) noexcept nogil:
    cdef int rc = quiescence_init(&m.quiescence, o.gate)
    if rc == 0:
        rc = places_init(&m.places, m.data, &m.quiescence, m.data_offset, m.chunk_size,
                         m.header.fields.storage_grow_unit, o.gate)
    if rc < 0:
        return rc
    m.places.counters = m.counters
    if m.data == m.file:
        places_reserve(&m.places, m.header.fields.table_offset, m.header.fields.table_size)
    return places_take_table(&m.places, &m.table, reason)


cdef int load_metadata(image_t* m, const image_options_t* o, const char** reason,
        bint* found) noexcept nogil:
    """Bitmap, table and journal into memory; *found: a checkpoint should settle it."""
    cdef int replayed = 0, rc = 0
    found[0] = False
    if m.has_bitmap:
        rc = load_bitmap(m, o)
    if rc == 0 and m.compact:
        rc = load_compact(m, o, reason, &replayed)
    elif rc == 0 and m.has_bitmap:
        replayed = replay(m, NULL, reason)
        rc = min(replayed, 0)
    if rc == 0 and m.has_bitmap:
        rc = settle_bitmap(m, o, reason)
    if rc == 0 and m.compact:
        rc = load_places(m, o, reason)
    if rc < 0:
        return rc
    if replayed:
        count(counters_block(m.counters, BLOCK_SHARED), N_JOURNAL_REPLAYS, 1)
    # Old records stay readable until the stable epoch moves on; a fresh ring may overwrite them,
    # so whatever they said must be in bitmap and table first (I3).
    found[0] = (replayed > 0 or o.takeover) and (m.has_bitmap or m.compact)
    return 0


cdef int store_session(image_t* m, const image_options_t* o, block_t* n) noexcept nogil:
    """Session, clean = 0 and version, durable before any change (I4)."""
    # A version that is not older needs no write.
    cdef uint64_t sectors = 3 if m.header.fields.last_open_version < FVD_VERSION else 2
    cdef int rc
    if o.session != NULL and not o.takeover:
        memcpy(m.header.extension.open_session, o.session, 16)
    rc = header_store_session(&m.header, m.file, o.boot_id, o.takeover or o.session != NULL)
    if rc == 0:
        rc = header_store_clean(&m.header, m.file, False)
    if rc == 0:
        rc = header_store_version(&m.header, m.file)
    if rc == 0:
        rc = storage_flush(m.file)
    count(n, N_IMAGE_WRITE_BYTES, sectors * SECTOR)
    count(n, N_METADATA_WRITE_BYTES, sectors * SECTOR)
    return rc


cdef int adopt_older(image_t* m, const image_options_t* o, block_t* n) noexcept nogil:
    """An older writer's image becomes ours (FORMAT.md section 2.1): what its journal says goes into
    place, the journal is zeroed, and only then do extension and version say who writes now."""
    cdef int rc = header_store_clean(&m.header, m.file, False)
    if rc == 0:
        rc = storage_flush(m.file)
    if rc == 0:
        rc = commit_checkpoint(&m.commit, n)
    if rc == 0:
        rc = journal_erase(&m.journal)
    if rc == 0:
        rc = commit_flush_metadata(&m.commit, n)
    if rc == 0:
        rc = header_renew_extension(&m.header)
    if rc < 0:
        return rc
    if o.session != NULL:
        memcpy(m.header.extension.open_session, o.session, 16)
    journal_reseed(&m.journal, m.header.extension.image_uuid)
    rc = header_store_session(&m.header, m.file, o.boot_id, o.session != NULL)
    if rc == 0:
        rc = commit_flush_metadata(&m.commit, n)
    if rc == 0:
        rc = header_store_version(&m.header, m.file)
    if rc == 0:
        rc = commit_flush_metadata(&m.commit, n)
    m.header.trusted = True
    m.header.trailers = True
    return rc


cdef int cut_storage(image_t* m) noexcept nogil:
    """Behind the last chunk nothing is known; a file is cut there and reads zeros when it grows
    (I9)."""
    cdef uint64_t end
    cdef int rc
    if not m.compact or not m.data.grows:
        return 0
    end = places_mapped_end(&m.places, &m.table)
    if m.data.length <= end:
        return 0
    rc = storage_resize(m.data, end)
    m.commit.durable_length = min(m.commit.durable_length, end)
    return rc


cdef int begin_session(image_t* m, const image_options_t* o, bint found) noexcept nogil:
    """First writes of a writable open."""
    cdef block_t* n = counters_block(m.counters, BLOCK_SHARED)
    cdef int rc = 0
    cdef uint64_t page
    if o.takeover:
        count(n, N_TAKEOVERS, 1)
    elif not m.header.fields.clean_shutdown:
        count(n, N_UNCLEAN_OPENS, 1)
    if found and m.has_bitmap:
        for page in range(m.bitmap.pages):
            m.bitmap.stale_pages[page >> 6] |= <uint64_t>1 << (page & 63)
    if not m.header.trusted:
        rc = adopt_older(m, o, n)
    elif not o.takeover or m.header.fields.clean_shutdown:
        rc = store_session(m, o, n)
    if rc == 0 and found:
        rc = commit_checkpoint(&m.commit, n)
        if rc == 0 and m.compact:
            places_return(&m.places)
    return cut_storage(m) if rc == 0 else rc


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
    m.compact = m.header.fields.table_size != 0
    m.chunk_size = m.header.fields.chunk_size


cdef uint64_t image_base_bytes_left(const image_t* m) noexcept nogil:
    cdef uint64_t left
    if not m.has_bitmap:
        return 0
    left = (m.bitmap.blocks - load_relaxed(&m.bitmap.local)) * m.block_size
    # The last block may be partial, and its bit may be set before it is counted.
    if not bitmap_test(&m.bitmap, m.bitmap.blocks - 1):
        left -= min(left, m.bitmap.blocks * m.block_size - m.base_size)
    return min(left, m.base_size)


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


cdef bint image_enter_base(image_t* m) noexcept nogil:
    fetch_add_relaxed(&m.base_users, 1)
    fence()                            # pairs with that of image_end_base
    if load_acquire(&m.base_gone):
        fetch_sub_acq_rel(&m.base_users, 1)
        return False
    return True


cdef bint image_end_base(image_t* m) noexcept nogil:
    invariant(load_acquire(&m.complete) != 0)
    if exchange_acq_rel(&m.base_gone, 1):
        return False
    fence()
    return True


cdef int image_read_base(image_t* m, uint8_t* buffer, uint64_t length, uint64_t offset, int flags,
        int cause, block_t* n) noexcept nogil:
    cdef uint64_t there, begin, end
    cdef int rc = 0
    if not image_enter_base(m):
        return -ESTALE
    there = min(length, m.base.length - min(offset, m.base.length))
    begin = clock_now(m.commit.gate) if n != NULL and not flags & IO_NOWAIT else 0
    if there and begin and cause != CAUSE_PREFETCH:
        # So that prefetch sees what it would be in the way of.
        fetch_add_relaxed(&m.demand, 1)
        if m.first_reads != NULL:
            first_reads_note(m.first_reads, offset, there)
        rc = storage_read(m.base, buffer, there, offset, flags)
        fetch_add_relaxed(&m.demand_bytes, there if rc == 0 else 0)
        store_relaxed(&m.demand_ns, clock_now(m.commit.gate))
        fetch_sub_relaxed(&m.demand, 1)
    elif there:
        rc = storage_read(m.base, buffer, there, offset, flags)
        if flags & IO_NOWAIT and rc == 0 and m.first_reads != NULL:
            first_reads_note(m.first_reads, offset, there)
    image_leave_base(m)
    if rc < 0 and load_acquire(&m.base_gone):
        return -ESTALE                 # cut off in the middle
    rc = rc if rc != -ESTALE else -EIO
    # The base may end within its last sector.
    if rc == 0 and there < length:
        memset(buffer + there, 0, length - there)
    if n == NULL or rc == -EAGAIN:
        return rc
    count(n, N_BASE_REQUESTS + cause, 1)
    end = clock_now(m.commit.gate) if begin or rc < 0 else 0
    if begin and trace_is_on(&m.counters.trace):
        counters_trace(m.counters, n, TRACE_BASE, cause, begin, end, offset, there, rc, 0)
    if rc < 0:
        count(n, N_BASE_ERRORS + cause, 1)
        note_time(n, T_BASE_ERROR, end)
        return rc
    count(n, N_BASE_BYTES + cause, there)
    if begin:
        base_answered(n, cause, begin, end)
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
    gauge_set(m.counters, G_STORE_USED,
              places_used(&m.places) if m.compact else m.data_offset + m.size)


cdef int open_steps(image_t* m, storage_t* base, const image_options_t* o,
        const char** reason) noexcept nogil:
    cdef bint found = False
    cdef int rc
    rc = mutex_init(&m.header.mutex, o.gate)
    if rc == 0:
        rc = mutex_init(&m.resizing, o.gate)
    if rc < 0:
        return rc
    # A predecessor's writes may be in the page cache only: what is read below must be durable to
    # count as durable.
    if not o.read_only:
        rc = storage_flush(m.file)
        if rc == 0 and m.data != m.file:
            rc = storage_flush(m.data)
        if rc < 0:
            if o.takeover:
                keep_fault(o, rc)
            return rc
        m.commit.durable_length = m.data.length
    rc = header_load(&m.header, m.file, m.data)
    if rc < 0:
        reason[0] = m.header.reason
        return rc
    take_geometry(m)
    # Holes that stand for zeros, where storage is not known to read zeros (I9).
    if m.header.fields.need_zero_init and not m.compact and not m.data.grows:
        reason[0] = b"the image needs storage that reads zeros where nothing was written"
        return -EUCLEAN
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
    m.commit.data = m.data
    m.commit.header = &m.header
    m.commit.bitmap = &m.bitmap if m.has_bitmap else NULL
    m.commit.table = &m.table if m.compact else NULL
    m.commit.places = &m.places
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
    m.live_fd = -1
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
    if rc == 0 and (m.compact or image_needs_base(m)):
        rc = commit_checkpoint(&m.commit, n)
    if rc == 0 and cut_storage(m) == 0 and m.data != m.file:
        rc = commit_flush_data(&m.commit, n)
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
    return commit_flush_metadata(&m.commit, n)


cdef void image_free(image_t* m) noexcept nogil:
    if m.opened:
        commit_free(&m.commit)
        range_locks_free(&m.locks)
        m.opened = False
    journal_free(&m.journal)
    if m.bitmap.present != NULL:
        bitmap_free(&m.bitmap)
    places_free(&m.places)
    quiescence_free(&m.quiescence)
    table_free(&m.table)
    if m.live_fd >= 0:
        c_close(m.live_fd)
        m.live_fd = -1
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
    rc = commit_flush_metadata(&m.commit, n)
    if rc == 0:
        store_release(&m.complete, 1)
    return rc
