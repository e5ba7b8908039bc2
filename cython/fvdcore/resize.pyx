# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Layer 3. Growing. See resize.pxd.

Every step leaves an image that opens: a table larger than the disk needs, chunks elsewhere than
before, storage that nobody uses yet. The size in sector 0 comes last."""
from libc.errno cimport errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memset
from .atomics cimport load_acquire, store_release
from .chunk_table cimport (
    CLOSED, UNMAPPED, table_entry, table_mark_stale, table_prepare, table_publish, table_set,
)
from .commit cimport (
    commit_checkpoint, commit_fault, commit_flush, commit_flush_data, commit_flush_metadata,
    commit_pause, commit_resume, commit_set_fault,
)
from .counters cimport (
    G_LOCAL_BYTES, G_STORE_USED, G_VIRTUAL_SIZE, N_IMAGE_WRITE_BYTES, N_METADATA_WRITE_BYTES,
    N_RESIZE_BYTES, N_RESIZE_ERRORS, N_RESIZES, block_t, count, gauge_add, gauge_set,
)
from .data_area cimport data_widen, data_zero
from .header cimport (
    header_store_backup, header_store_disk_size, header_store_relocated, header_store_table_size,
)
from .image cimport image_live_table, image_t
from .limits cimport NS_PER_S, PAGE, SECTOR, TABLE_BYTES_MAX, ZERO_STEP
from .places cimport (
    places_allocate, places_give_back, places_is_reserved, places_reserve, places_reserved_owned,
    places_retire,
)
from .quiescence cimport quiescence_pause, quiescence_stamp, quiescence_wait
from .range_lock cimport range_lock, range_unlock
from .storage cimport storage_read, storage_resize, storage_write, storage_zero
from .sync cimport clock_now, mutex_lock, mutex_unlock
from .syscalls cimport (
    EBUSY, EFBIG, EINVAL, EIO, ENOMEM, EROFS, MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ,
    PROT_WRITE, c_fallocate, c_mmap, c_munmap,
)

cdef enum:
    ENTRY_BYTES = 4
    COPY_STEP = 1048576                # of a chunk that is moved
    PATIENCE_S = 60                    # for requests that use what must be moved


# -- storage -----------------------------------------------------------------------------------

cdef int zero_steps(image_t* m, uint64_t begin, uint64_t end) noexcept nogil:
    """Zero addresses of the data: their content is unknown (I9)."""
    cdef uint64_t step
    cdef int rc
    while begin < end:
        step = min(end - begin, <uint64_t>ZERO_STEP)
        rc = storage_zero(m.data, step, begin, 0)
        if rc < 0:
            return rc
        begin += step
    return 0


cdef int grow_raw(image_t* m, uint64_t size) noexcept nogil:
    cdef uint64_t begin = m.data_offset + m.size, end = m.data_offset + size
    cdef uint64_t there = load_acquire(&m.data.length)
    cdef int rc
    if not m.data.grows:
        rc = storage_resize(m.data, end)
        return rc if rc < 0 else zero_steps(m, begin, end)
    # What stood behind the disk is cut off; what the file gains reads zeros.
    rc = 0
    if there > begin:
        rc = zero_steps(m, begin, min(there, end))
    if rc == 0 and there < end:
        rc = storage_resize(m.data, end)
    return rc


cdef int zero_last_chunk(image_t* m) noexcept nogil:
    """The old disk's last chunk may reach behind it."""
    cdef uint64_t end = (m.size + m.chunk_size - 1) // m.chunk_size * m.chunk_size
    cdef uint64_t first = m.size // m.block_size, last = first + 1
    cdef int rc
    if end == m.size:
        return 0
    data_widen(m, &first, &last)
    range_lock(&m.locks, first, last)
    rc = data_zero(m, end - m.size, m.size, 0)
    range_unlock(&m.locks, first, last)
    return rc


cdef int wait_for_users(image_t* m) noexcept nogil:
    """Until every request that goes through the table without a lock now has ended (I8)."""
    cdef uint64_t deadline = clock_now(m.commit.gate) + PATIENCE_S * NS_PER_S
    if quiescence_wait(&m.quiescence, quiescence_stamp(&m.quiescence), deadline):
        return 0
    return -EBUSY


# -- moving chunks out of the table's way ------------------------------------------------------

cdef int copy_place(image_t* m, uint64_t source, uint64_t target, uint8_t* buffer) noexcept nogil:
    cdef uint64_t done = 0, step
    cdef int rc
    while done < m.chunk_size:
        step = min(m.chunk_size - done, <uint64_t>COPY_STEP)
        rc = storage_read(m.data, buffer, step, m.data_offset + source * m.chunk_size + done, 0)
        if rc == 0:
            rc = storage_write(m.data, buffer, step,
                               m.data_offset + target * m.chunk_size + done, 0)
        if rc < 0:
            return rc
        done += step
    return 0


cdef int move_chunk(image_t* m, uint64_t chunk, uint8_t* buffer, block_t* n) noexcept nogil:
    """Move a chunk that we have locked, durably. While it is closed nobody writes to it without our
    lock."""
    cdef uint32_t entry = table_entry(&m.table, chunk)
    cdef uint64_t target = 0
    cdef bint reused = False
    cdef int64_t got
    cdef int rc = 0
    if entry == UNMAPPED or not places_is_reserved(&m.places, entry):
        return 0
    table_set(&m.table, chunk, entry | CLOSED, False)
    # Whoever wrote without a lock before that must have ended (I8).
    rc = wait_for_users(m)
    if rc == 0:
        got = places_allocate(&m.places, 1, True, &target, &reused)
        rc = <int>min(got, <int64_t>0)
    if rc == 0:
        rc = copy_place(m, entry, target, buffer)
        if rc < 0:
            places_give_back(&m.places, target, 1)
    if rc < 0:
        table_set(&m.table, chunk, entry, False)
        return rc
    # Its content may have been flushed long ago: it is durable here before the entry is (I6).
    table_set(&m.table, chunk, <uint32_t>target | CLOSED, True)
    # A checkpoint may save the entry, and a crash in it replay an older record: the old place has
    # all that the bits promise only as long as nobody has written to the new one (I1).
    rc = commit_flush(&m.commit, n)
    table_set(&m.table, chunk, <uint32_t>target, False)
    places_retire(&m.places, entry)
    return rc


cdef int move_all(image_t* m, uint8_t* buffer, block_t* n) noexcept nogil:
    """One walk over the table."""
    cdef uint64_t chunk, first, end
    cdef uint32_t entry
    cdef int rc
    for chunk in range(m.table.chunks):
        entry = table_entry(&m.table, chunk)
        if entry == UNMAPPED or not places_is_reserved(&m.places, entry & ~CLOSED):
            continue
        first = chunk * (m.chunk_size // m.block_size)
        end = first + 1
        data_widen(m, &first, &end)
        range_lock(&m.locks, first, end)
        rc = move_chunk(m, chunk, buffer, n)
        range_unlock(&m.locks, first, end)
        if rc < 0:
            return rc
    return 0


cdef int clear_reserved(image_t* m, block_t* n) noexcept nogil:
    """Let no chunk lie under the table. A request that had its place before it was reserved may map
    it after the first walk."""
    cdef uint64_t deadline = clock_now(m.commit.gate) + PATIENCE_S * NS_PER_S
    cdef void* buffer
    cdef int rc = 0
    if places_reserved_owned(&m.places) == 0:
        return 0
    buffer = c_mmap(NULL, COPY_STEP, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    if buffer == MAP_FAILED:
        return -ENOMEM
    while rc == 0:
        rc = move_all(m, <uint8_t*>buffer, n)
        if rc < 0 or places_reserved_owned(&m.places) == 0:
            break
        if clock_now(m.commit.gate) >= deadline:
            rc = -EBUSY
        else:
            # In hand; nothing to wait for but its owner's next step.
            quiescence_pause(&m.quiescence)
    c_munmap(buffer, COPY_STEP)
    return rc


# -- the table ---------------------------------------------------------------------------------

cdef int table_may_grow(const image_t* m, uint64_t bytes) noexcept nogil:
    cdef uint64_t begin = m.header.fields.table_offset, end = begin + bytes
    if bytes > TABLE_BYTES_MAX or bytes + m.header.fields.bitmap_size > TABLE_BYTES_MAX:
        return -EFBIG
    if (begin < m.header.fields.bitmap_offset + m.header.fields.bitmap_size
            and m.header.fields.bitmap_offset < end and m.header.fields.bitmap_size):
        return -EFBIG
    if (begin < m.header.fields.journal_offset + m.header.fields.journal_size
            and m.header.fields.journal_offset < end and m.header.fields.journal_size):
        return -EFBIG
    return 0


cdef int make_way(image_t* m, uint64_t bytes, block_t* n) noexcept nogil:
    """Clear the storage into which the table grows, and say so durably."""
    cdef uint64_t end = m.header.fields.table_offset + bytes
    cdef int rc = 0
    if m.data == m.file and end > m.data_offset:
        if not m.header.fields.chunks_relocated:
            rc = header_store_relocated(&m.header, m.file)
            if rc == 0:
                rc = commit_flush_metadata(&m.commit, n)
        if rc == 0:
            places_reserve(&m.places, m.header.fields.table_offset, bytes)
            rc = clear_reserved(m, n)
        if rc == 0:
            rc = commit_checkpoint(&m.commit, n)
        # Readers of the old places must have left before the table overwrites them.
        if rc == 0:
            rc = wait_for_users(m)
    if rc == 0 and load_acquire(&m.file.length) < end:
        rc = storage_resize(m.file, end)
    return rc


cdef int fill_table(image_t* m, uint64_t begin, uint64_t end) noexcept nogil:
    """Unmapped entries on disk, for bytes [begin, end) of the table."""
    cdef uint8_t[4096] page
    cdef int rc
    memset(&page[0], 0xff, PAGE)
    while begin < end:
        rc = storage_write(m.file, &page[0], PAGE, m.header.fields.table_offset + begin, 0)
        if rc < 0:
            return rc
        begin += PAGE
    return 0


cdef int extend_live(image_t* m, uint64_t old, uint64_t bytes) noexcept nogil:
    """All of live memory has to be there before it is used: a full tmpfs must show here."""
    if m.live_fd < 0:
        return 0
    if c_fallocate(m.live_fd, 0, image_live_table(m) + old, bytes - old) < 0:
        return -errno
    return 0


cdef int clear_padding(image_t* m, uint64_t end, block_t* n) noexcept nogil:
    """Entries up to that one get a meaning; what stood there on disk had none."""
    if m.table.chunks >= end:
        return 0
    table_mark_stale(&m.table, m.table.chunks, end)
    return commit_checkpoint(&m.commit, n)


cdef int grow_table(image_t* m, uint64_t chunks, uint64_t bytes, block_t* n) noexcept nogil:
    cdef uint64_t old = m.header.fields.table_size
    cdef int rc = table_may_grow(m, bytes)
    if rc == 0:
        rc = extend_live(m, old, bytes)
    if rc == 0:
        rc = make_way(m, bytes, n)
    if rc == 0:
        rc = clear_padding(m, old // ENTRY_BYTES, n)
    if rc == 0:
        rc = table_prepare(&m.table, bytes, m.live_fd, image_live_table(m))
    if rc == 0:
        rc = fill_table(m, old, bytes)
        count(n, N_IMAGE_WRITE_BYTES, bytes - old)
        count(n, N_METADATA_WRITE_BYTES, bytes - old)
    if rc == 0:
        rc = commit_flush_metadata(&m.commit, n)
    if rc < 0:
        return rc
    rc = commit_pause(&m.commit)
    if rc < 0:
        return rc
    rc = header_store_table_size(&m.header, m.file, bytes)
    if rc < 0:
        commit_set_fault(&m.commit, rc)
    else:
        rc = commit_flush_metadata(&m.commit, n)
    if rc == 0:
        table_publish(&m.table, chunks, bytes)
    commit_resume(&m.commit)
    return rc


cdef int use_padding(image_t* m, uint64_t chunks, block_t* n) noexcept nogil:
    """The table has room for more entries."""
    cdef int rc = clear_padding(m, chunks, n)
    if rc == 0:
        rc = commit_pause(&m.commit)
    if rc == 0:
        table_publish(&m.table, chunks, m.header.fields.table_size)
        commit_resume(&m.commit)
    return rc


cdef int grow_compact(image_t* m, uint64_t size, block_t* n) noexcept nogil:
    cdef uint64_t chunks = (size + m.chunk_size - 1) // m.chunk_size
    cdef uint64_t bytes = (chunks * 4 + PAGE - 1) // PAGE * PAGE
    cdef int rc = zero_last_chunk(m)
    if rc < 0:
        return rc
    if bytes > m.header.fields.table_size:
        return grow_table(m, chunks, bytes, n)
    return use_padding(m, chunks, n) if chunks > m.table.chunks else 0


# -- all of it ---------------------------------------------------------------------------------

cdef int grow_locked(image_t* m, uint64_t size, block_t* n) noexcept nogil:
    cdef int rc
    if size <= m.size or size % SECTOR:
        return -EINVAL
    if size > <uint64_t>1 << 62 or (m.compact and size // m.chunk_size >= TABLE_BYTES_MAX // 4):
        return -EFBIG
    if commit_fault(&m.commit):
        return -EIO
    rc = grow_compact(m, size, n) if m.compact else grow_raw(m, size)
    # The zeros are durable before the size that shows them.
    if rc == 0:
        rc = commit_flush_data(&m.commit, n)
    if rc == 0:
        rc = header_store_disk_size(&m.header, m.file, size)
        count(n, N_IMAGE_WRITE_BYTES, SECTOR)
        count(n, N_METADATA_WRITE_BYTES, SECTOR)
        if rc < 0:
            commit_set_fault(&m.commit, rc)
    if rc == 0:
        rc = commit_flush_metadata(&m.commit, n)
    if rc < 0:
        return rc
    # Who opens the image compares the layout alone, and a smaller disk or table is no difference
    # there: a crash before it is durable leaves an older copy.
    header_store_backup(&m.header, m.file)
    gauge_add(m.counters, G_LOCAL_BYTES, <int64_t>(size - m.size))
    gauge_set(m.counters, G_VIRTUAL_SIZE, size)
    if not m.compact:
        gauge_set(m.counters, G_STORE_USED, m.data_offset + size)
    store_release(&m.head.length, size)
    store_release(&m.size, size)
    return 0


cdef int image_grow(image_t* m, uint64_t size, block_t* n) noexcept nogil:
    cdef uint64_t before
    cdef int rc
    if m.read_only:
        return -EROFS
    mutex_lock(&m.resizing)
    before = m.size
    rc = grow_locked(m, size, n)
    count(n, N_RESIZES if rc == 0 else N_RESIZE_ERRORS, 1)
    count(n, N_RESIZE_BYTES, m.size - before)
    mutex_unlock(&m.resizing)
    return rc
