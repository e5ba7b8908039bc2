# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Layer 2. The chunk table in memory. See chunk_table.pxd.

Address space for the largest table is reserved at open, so that growing moves nothing under the
readers. The bit arrays are sized for that table too; untouched pages of them cost nothing."""
from libc.errno cimport errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memset
from .atomics cimport (
    fetch_add_relaxed, fetch_and_acquire, fetch_or_release, fetch_sub_relaxed, load_acquire,
    load_relaxed, store_relaxed, store_release, store_release32,
)
from .checks cimport invariant
from .limits cimport PAGE, TABLE_BYTES_MAX
from .sync cimport gate_t, mutex_free, mutex_init, mutex_lock, mutex_unlock
from .syscalls cimport (
    EFBIG, ENOMEM, MAP_ANONYMOUS, MAP_FAILED, MAP_FIXED, MAP_NORESERVE, MAP_PRIVATE, MAP_SHARED,
    PROT_NONE, PROT_READ, PROT_WRITE, c_mmap, c_munmap,
)

cdef enum:
    PAGE_ENTRIES = 1024
    ENTRIES_MAX = 268435456            # TABLE_BYTES_MAX / 4
    MARKS_BYTES = 33554432             # a bit an entry
    GROUPS_BYTES = 528384              # a bit a word of marks; who walks them looks a word further
    PAGES_BYTES = 36864                # a bit a page, the same


cdef uint64_t* map_marks(uint64_t bytes) noexcept nogil:
    cdef void* p = c_mmap(NULL, bytes, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    return NULL if p == MAP_FAILED else <uint64_t*>p


cdef int map_part(chunk_table_t* t, uint64_t begin, uint64_t end, int live_fd,
        uint64_t live_offset) noexcept nogil:
    """Put memory under bytes [begin, end) of the reserved addresses."""
    cdef void* p
    if begin == end:
        return 0
    if live_fd >= 0:
        p = c_mmap(<uint8_t*>t.present + begin, end - begin, PROT_READ | PROT_WRITE,
                   MAP_SHARED | MAP_FIXED, live_fd, live_offset + begin)
    else:
        p = c_mmap(<uint8_t*>t.present + begin, end - begin, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0)
    return -errno if p == MAP_FAILED else 0


cdef int table_init(chunk_table_t* t, uint64_t chunks, uint64_t bytes, int live_fd,
        uint64_t live_offset, gate_t* gate) noexcept nogil:
    cdef void* p
    cdef int rc
    memset(t, 0, sizeof(chunk_table_t))
    if bytes > TABLE_BYTES_MAX or bytes % PAGE or chunks > bytes // 4:
        return -EFBIG
    rc = mutex_init(&t.setting, gate)
    if rc < 0:
        return rc
    p = c_mmap(NULL, TABLE_BYTES_MAX, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    if p == MAP_FAILED:
        mutex_free(&t.setting)
        return -errno
    t.present = <uint32_t*>p
    t.reserved = TABLE_BYTES_MAX
    t.chunks = chunks
    t.pages = bytes // PAGE
    t.dirty = map_marks(MARKS_BYTES)
    t.dirty_groups = map_marks(GROUPS_BYTES)
    t.loose = map_marks(MARKS_BYTES)
    t.stale_pages = map_marks(PAGES_BYTES)
    if t.dirty == NULL or t.dirty_groups == NULL or t.loose == NULL or t.stale_pages == NULL:
        rc = -ENOMEM
    else:
        rc = map_part(t, 0, bytes, live_fd, live_offset)
    if rc < 0:
        table_free(t)
    return rc


cdef void table_free(chunk_table_t* t) noexcept nogil:
    if t.present == NULL:
        return
    c_munmap(t.present, t.reserved)
    if t.dirty != NULL:
        c_munmap(t.dirty, MARKS_BYTES)
    if t.dirty_groups != NULL:
        c_munmap(t.dirty_groups, GROUPS_BYTES)
    if t.loose != NULL:
        c_munmap(t.loose, MARKS_BYTES)
    if t.stale_pages != NULL:
        c_munmap(t.stale_pages, PAGES_BYTES)
    mutex_free(&t.setting)
    memset(t, 0, sizeof(chunk_table_t))


cdef int table_prepare(chunk_table_t* t, uint64_t bytes, int live_fd,
        uint64_t live_offset) noexcept nogil:
    cdef uint64_t old = t.pages * PAGE
    cdef int rc
    if bytes > TABLE_BYTES_MAX:
        return -EFBIG
    if bytes <= old:
        return 0
    rc = map_part(t, old, bytes, live_fd, live_offset)
    if rc == 0:
        memset(<uint8_t*>t.present + old, 0xff, bytes - old)
    return rc


cdef void table_publish(chunk_table_t* t, uint64_t chunks, uint64_t bytes) noexcept nogil:
    store_release(&t.pages, bytes // PAGE)
    store_release(&t.chunks, chunks)


cdef inline void mark(uint64_t* words, uint64_t bit) noexcept nogil:
    fetch_or_release(words + (bit >> 6), <uint64_t>1 << (bit & 63))


cdef void table_mark_stale(chunk_table_t* t, uint64_t first, uint64_t end) noexcept nogil:
    cdef uint64_t page
    for page in range(first // PAGE_ENTRIES, (end + PAGE_ENTRIES - 1) // PAGE_ENTRIES):
        mark(t.stale_pages, page)


cdef void table_set(chunk_table_t* t, uint64_t chunk, uint32_t entry, bint reused) noexcept nogil:
    cdef uint32_t old
    invariant(chunk < load_relaxed(&t.chunks))
    # The entry and its marks are one step for a commit (table_settle_marks) that begins later. One
    # that runs finds a seen entry loose already; and it takes no other mark before the entry is
    # there, or it would record the former one and leave nothing for the next commit to find.
    mutex_lock(&t.setting)
    old = t.present[chunk]
    if reused:
        store_relaxed(&t.reused, t.reused + 1)
    if (old ^ entry) & ~CLOSED:
        mark(t.loose, chunk)
    store_release32(t.present + chunk, entry)
    if (old ^ entry) & ~CLOSED:
        mark(t.stale_pages, chunk // PAGE_ENTRIES)
        mark(t.dirty, chunk)
        mark(t.dirty_groups, chunk >> 6)
        fetch_add_relaxed(&t.pending, 1)
    mutex_unlock(&t.setting)
    if old == UNMAPPED and entry != UNMAPPED:
        fetch_add_relaxed(&t.mapped, 1)
    elif old != UNMAPPED and entry == UNMAPPED:
        fetch_sub_relaxed(&t.mapped, 1)


cdef void table_set_durable(chunk_table_t* t, uint64_t chunk, uint32_t entry) noexcept nogil:
    t.present[chunk] = entry
    mark(t.stale_pages, chunk // PAGE_ENTRIES)


cdef void table_settle_load(chunk_table_t* t) noexcept nogil:
    cdef uint64_t chunk, n = 0
    for chunk in range(t.chunks, t.pages * PAGE_ENTRIES):
        t.present[chunk] = UNMAPPED
    for chunk in range(t.chunks):
        if t.present[chunk] != UNMAPPED:
            # A place that was being moved is not any more.
            t.present[chunk] &= ~CLOSED
            n += 1
    t.mapped = n


cdef void table_note_difference(chunk_table_t* t, const uint32_t* disk) noexcept nogil:
    cdef uint64_t chunk
    for chunk in range(t.chunks):
        if t.present[chunk] != disk[chunk]:
            mark(t.loose, chunk)
            mark(t.stale_pages, chunk // PAGE_ENTRIES)
            mark(t.dirty, chunk)
            mark(t.dirty_groups, chunk >> 6)
            t.pending += 1


cdef void table_settle_marks(chunk_table_t* t) noexcept nogil:
    mutex_lock(&t.setting)
    mutex_unlock(&t.setting)


cdef void table_recorded(chunk_table_t* t, uint64_t chunk, uint32_t entry) noexcept nogil:
    cdef uint32_t now
    mutex_lock(&t.setting)
    now = t.present[chunk]
    # An entry that changed and changed back is another matter: what lies between may be durable.
    if (not (load_acquire(t.dirty + (chunk >> 6)) >> (chunk & 63)) & 1
            and (now == entry or (entry != UNMAPPED and now == (entry | CLOSED)))):
        fetch_and_acquire(t.loose + (chunk >> 6), ~(<uint64_t>1 << (chunk & 63)))
    mutex_unlock(&t.setting)
