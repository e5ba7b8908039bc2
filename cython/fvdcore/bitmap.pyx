# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Layer 2. Block state in memory. See bitmap.pxd for the states and their order."""
from libc.errno cimport errno
from libc.stdint cimport uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset
from .atomics cimport (
    ctz64, fetch_add_relaxed, fetch_or_release, load_acquire, load_relaxed, popcount64,
    store_relaxed,
)
from .checks cimport invariant
from .limits cimport PAGE
from .sync cimport gate_t, mutex_free, mutex_init, mutex_lock, mutex_unlock
from .syscalls cimport (
    ENOMEM, EUCLEAN, MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, c_mmap,
    c_munmap,
)

cdef enum:
    PAGE_WORDS = 512


cdef uint64_t* map_words(uint64_t bytes) noexcept nogil:
    cdef void* p = c_mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    return NULL if p == MAP_FAILED else <uint64_t*>p


cdef int bitmap_init(bitmap_t* b, uint64_t blocks, uint64_t bytes, void* present,
        gate_t* gate) noexcept nogil:
    cdef int rc
    memset(b, 0, sizeof(bitmap_t))
    rc = mutex_init(&b.setting, gate)
    if rc < 0:
        return rc
    b.blocks = blocks
    b.words = bytes // 8
    b.pages = bytes // PAGE
    b.owns_present = present == NULL
    b.present = <uint64_t*>present if present != NULL else map_words(bytes)
    b.durable = map_words(bytes)
    b.dirty_words = <uint64_t*>calloc(b.words // 64 + 1, 8)
    b.dirty_groups = <uint64_t*>calloc(b.words // 4096 + 1, 8)
    b.stale_pages = <uint64_t*>calloc(b.pages // 64 + 1, 8)
    if (b.present == NULL or b.durable == NULL or b.dirty_words == NULL or b.dirty_groups == NULL
            or b.stale_pages == NULL):
        bitmap_free(b)
        return -ENOMEM
    return 0


cdef void bitmap_free(bitmap_t* b) noexcept nogil:
    if b.owns_present and b.present != NULL:
        c_munmap(b.present, b.words * 8)
    if b.durable != NULL:
        c_munmap(b.durable, b.words * 8)
    free(b.dirty_words)
    free(b.dirty_groups)
    free(b.stale_pages)
    mutex_free(&b.setting)
    memset(b, 0, sizeof(bitmap_t))


cdef inline uint64_t mask_from(uint64_t block) noexcept nogil:
    return ~<uint64_t>0 << (block & 63)


cdef inline uint64_t mask_until(uint64_t end, uint64_t word) noexcept nogil:
    """Bits of word that lie below block end."""
    return ~<uint64_t>0 if end - word * 64 >= 64 else (<uint64_t>1 << (end - word * 64)) - 1


cdef uint64_t next_bit(const uint64_t* words, uint64_t flip, uint64_t first,
        uint64_t end) noexcept nogil:
    cdef uint64_t w, bits
    if first >= end:
        return end
    w = first >> 6
    bits = (load_acquire(words + w) ^ flip) & mask_from(first)
    while bits == 0:
        w += 1
        if w * 64 >= end:
            return end
        bits = load_acquire(words + w) ^ flip
    return min(w * 64 + <uint64_t>ctz64(bits), end)


cdef uint64_t bitmap_next_clear(const bitmap_t* b, uint64_t first, uint64_t end) noexcept nogil:
    return next_bit(b.present, ~<uint64_t>0, first, end)


cdef uint64_t bitmap_run_end(const bitmap_t* b, uint64_t block, uint64_t end) noexcept nogil:
    invariant(block < end)
    return next_bit(b.present, 0, block + 1, end)


cdef uint64_t bitmap_set_present(bitmap_t* b, uint64_t first, uint64_t end,
        bint copied) noexcept nogil:
    cdef uint64_t w = first >> 6, mask, old, fresh = 0
    invariant(end <= b.blocks)
    # The bit and its marks are one step for a commit (bitmap_settle_marks): between them another
    # write of the block may already be acknowledged, because it needs no lock any more.
    mutex_lock(&b.setting)
    while w * 64 < end:
        mask = mask_until(end, w)
        if w == first >> 6:
            mask &= mask_from(first)
        old = fetch_or_release(b.present + w, mask)
        if mask & ~old:
            fresh += popcount64(mask & ~old)
            fetch_or_release(b.stale_pages + (w // PAGE_WORDS >> 6),
                <uint64_t>1 << (w // PAGE_WORDS & 63))
            fetch_or_release(b.dirty_words + (w >> 6), <uint64_t>1 << (w & 63))
            fetch_or_release(b.dirty_groups + (w >> 12), <uint64_t>1 << ((w >> 6) & 63))
        w += 1
    mutex_unlock(&b.setting)
    if fresh:
        fetch_add_relaxed(&b.local, fresh)
        if copied:
            fetch_add_relaxed(&b.pending_copied, fresh)
        fetch_add_relaxed(&b.pending, fresh)
    return fresh


cdef void bitmap_settle_marks(bitmap_t* b) noexcept nogil:
    mutex_lock(&b.setting)
    mutex_unlock(&b.setting)


cdef void bitmap_set_durable(bitmap_t* b, uint64_t first, uint64_t end) noexcept nogil:
    cdef uint64_t w = first >> 6, mask
    invariant(end <= b.blocks)
    while w * 64 < end:
        mask = mask_until(end, w)
        if w == first >> 6:
            mask &= mask_from(first)
        fetch_or_release(b.durable + w, mask)
        w += 1


cdef int bitmap_note_difference(bitmap_t* b) noexcept nogil:
    cdef uint64_t w, difference
    for w in range(b.words):
        difference = b.present[w] ^ b.durable[w]
        if difference == 0:
            continue
        if b.durable[w] & difference:
            return -EUCLEAN
        b.stale_pages[w // PAGE_WORDS >> 6] |= <uint64_t>1 << (w // PAGE_WORDS & 63)
        b.dirty_words[w >> 6] |= <uint64_t>1 << (w & 63)
        b.dirty_groups[w >> 12] |= <uint64_t>1 << ((w >> 6) & 63)
        b.pending += popcount64(difference)
    return 0


cdef void bitmap_clear_padding(bitmap_t* b) noexcept nogil:
    cdef uint64_t w
    for w in range(b.blocks >> 6, b.words):
        if w * 64 >= b.blocks:
            b.present[w] = 0
            b.durable[w] = 0
        else:
            b.present[w] &= mask_until(b.blocks, w)
            b.durable[w] &= mask_until(b.blocks, w)


cdef void bitmap_recount(bitmap_t* b) noexcept nogil:
    cdef uint64_t w, n = 0
    for w in range(b.words):
        n += popcount64(b.present[w])
    b.local = n
