# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Layer 2. Pages for a checkpoint. See page_copies.pxd."""
from libc.errno cimport errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset
from .atomics cimport (
    ctz64, exchange_acq_rel, fetch_or_release, load_acquire, load_acquire32, load_relaxed,
)
from .bitmap cimport bitmap_settle_marks, bitmap_t
from .chunk_table cimport (
    CLOSED, UNMAPPED, chunk_table_t, table_is_loose, table_recorded, table_settle_marks,
)
from .limits cimport PAGE
from .storage cimport storage_t, storage_write
from .syscalls cimport (
    ENOMEM, MAP_ANONYMOUS, MAP_FAILED, MAP_NORESERVE, MAP_PRIVATE, PROT_READ, PROT_WRITE, c_mmap,
    c_munmap, drop_pages,
)

cdef enum:
    PAGE_WORDS = 512
    PAGE_ENTRIES = 1024
    KEEP_PAGES = 16                    # kept resident between checkpoints


cdef void copies_free(page_copies_t* k) noexcept nogil:
    if k.bytes != NULL:
        c_munmap(k.bytes, k.room * PAGE)
    free(k.marks)
    memset(k, 0, sizeof(page_copies_t))


cdef int make_room(page_copies_t* k, uint64_t pages) noexcept nogil:
    cdef void* p
    if k.room < pages:
        copies_free(k)
        k.marks = <uint64_t*>calloc(pages // 64 + 1, 8)
        if k.marks == NULL:
            return -ENOMEM
        p = c_mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        if p == MAP_FAILED:
            return -errno
        k.bytes = <uint8_t*>p
        k.room = pages
    k.pages = pages
    return 0


cdef int copies_take_bitmap(page_copies_t* k, bitmap_t* b) noexcept nogil:
    cdef uint64_t w, bits, page, i
    cdef uint64_t* copy
    cdef int rc = make_room(k, b.pages)
    if rc < 0:
        return rc
    bitmap_settle_marks(b)
    for w in range(k.pages // 64 + 1):
        bits = exchange_acq_rel(b.stale_pages + w, 0)
        k.marks[w] = bits
        while bits:
            page = w * 64 + <uint64_t>ctz64(bits)
            bits &= bits - 1
            copy = <uint64_t*>(k.bytes + page * PAGE)
            for i in range(<uint64_t>PAGE_WORDS):
                copy[i] = load_acquire(b.present + page * PAGE_WORDS + i)
    return 0


cdef int copies_take_table(page_copies_t* k, chunk_table_t* t) noexcept nogil:
    cdef uint64_t w, bits, page, i
    cdef uint32_t* copy
    cdef uint32_t entry
    cdef int rc = make_room(k, load_acquire(&t.pages))
    if rc < 0:
        return rc
    table_settle_marks(t)
    for w in range(k.pages // 64 + 1):
        bits = exchange_acq_rel(t.stale_pages + w, 0)
        k.marks[w] = bits
        while bits:
            page = w * 64 + <uint64_t>ctz64(bits)
            bits &= bits - 1
            copy = <uint32_t*>(k.bytes + page * PAGE)
            for i in range(<uint64_t>PAGE_ENTRIES):
                entry = load_acquire32(t.present + page * PAGE_ENTRIES + i)
                copy[i] = entry if entry == UNMAPPED else entry & ~CLOSED
    return 0


cdef inline bint is_marked(const page_copies_t* k, uint64_t page) noexcept nogil:
    return (k.marks[page >> 6] >> (page & 63)) & 1


cdef int copies_write(page_copies_t* k, storage_t* s, uint64_t offset,
        uint64_t* written) noexcept nogil:
    cdef uint64_t page = 0, end
    cdef int rc
    written[0] = 0
    while page < k.pages:
        if k.marks[page >> 6] == 0:
            page = (page | 63) + 1
            continue
        if not is_marked(k, page):
            page += 1
            continue
        end = page + 1
        while end < k.pages and is_marked(k, end):
            end += 1
        rc = storage_write(s, k.bytes + page * PAGE, (end - page) * PAGE, offset + page * PAGE, 0)
        if rc < 0:
            return rc
        written[0] += (end - page) * PAGE
        page = end
    return 0


cdef void forget(page_copies_t* k) noexcept nogil:
    if k.pages > KEEP_PAGES:
        drop_pages(k.bytes, k.pages * PAGE)


cdef void copies_settle_bitmap(page_copies_t* k, bitmap_t* b) noexcept nogil:
    cdef uint64_t w, bits, page, i
    cdef const uint64_t* copy
    for w in range(k.pages // 64 + 1):
        bits = k.marks[w]
        while bits:
            page = w * 64 + <uint64_t>ctz64(bits)
            bits &= bits - 1
            copy = <const uint64_t*>(k.bytes + page * PAGE)
            for i in range(<uint64_t>PAGE_WORDS):
                if copy[i] & ~load_relaxed(b.durable + page * PAGE_WORDS + i):
                    fetch_or_release(b.durable + page * PAGE_WORDS + i, copy[i])
    forget(k)


cdef void copies_settle_table(page_copies_t* k, chunk_table_t* t) noexcept nogil:
    cdef uint64_t w, bits, page, i, chunk
    cdef const uint32_t* copy
    for w in range(k.pages // 64 + 1):
        bits = k.marks[w]
        while bits:
            page = w * 64 + <uint64_t>ctz64(bits)
            bits &= bits - 1
            copy = <const uint32_t*>(k.bytes + page * PAGE)
            for i in range(<uint64_t>PAGE_ENTRIES):
                chunk = page * PAGE_ENTRIES + i
                if table_is_loose(t, chunk):
                    table_recorded(t, chunk, copy[i])
    forget(k)
