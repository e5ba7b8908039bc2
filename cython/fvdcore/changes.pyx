# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Layer 2. Taking changes for a commit. See changes.pxd.

Bits are taken before entries: a mapping is visible to whoever sees a bit that was set after it. A
bit of a chunk whose entry is not durable goes into one sector with that entry (I1)."""
from libc.stdint cimport uint32_t, uint64_t
from .atomics cimport (
    ctz64, exchange_acq_rel, fetch_and_acquire, load_acquire, load_relaxed, popcount64,
)
from .bitmap cimport bitmap_settle_marks, bitmap_t
from .chunk_table cimport (
    CLOSED, UNMAPPED, chunk_table_t, table_entry, table_is_loose, table_settle_marks,
)
from .journal cimport journal_begin, journal_put_blocks, journal_put_entry, journal_put_mapped
from .limits cimport SECTOR


cdef uint32_t entry_to_record(changes_t* c, uint64_t chunk) noexcept nogil:
    cdef uint32_t entry = table_entry(c.table, chunk)
    if entry != UNMAPPED:
        entry &= ~CLOSED
        c.places_end = max(c.places_end, <uint64_t>entry + 1)
    c.entries += 1
    return entry


cdef void put_plain(changes_t* c, uint64_t begin, uint64_t end) noexcept nogil:
    """Bytes [begin, end) of the disk, in whole blocks, are local."""
    if begin < end and journal_put_blocks(c.journal, begin // SECTOR,
                                          (end - begin) // SECTOR) < 0:
        c.overflow = True


cdef void put_run(changes_t* c) noexcept nogil:
    """The gathered run, cut where chunks begin whose entries are not durable."""
    cdef uint64_t at, stop, chunk, end, plain
    if c.first == c.end or c.overflow:
        return
    at = c.first * c.block_size
    end = min(c.end * c.block_size, c.base_size)
    plain = at
    while c.table != NULL and at < end and not c.overflow:
        chunk = at // c.chunk_size
        stop = min((chunk + 1) * c.chunk_size, end)
        if table_is_loose(c.table, chunk):
            put_plain(c, plain, at)
            # Not again for its own mark; a change from now on marks it anew.
            fetch_and_acquire(c.table.dirty + (chunk >> 6), ~(<uint64_t>1 << (chunk & 63)))
            if journal_put_mapped(c.journal, at // SECTOR, (stop - at) // SECTOR, chunk,
                                  entry_to_record(c, chunk)) < 0:
                c.overflow = True
            plain = stop
        at = stop
    put_plain(c, plain, end)


cdef void take_word(changes_t* c, uint64_t word) noexcept nogil:
    cdef uint64_t durable = load_relaxed(c.bitmap.durable + word)
    cdef uint64_t delta = load_acquire(c.bitmap.present + word) & ~durable
    cdef uint64_t first, length
    c.blocks += popcount64(delta)
    while delta:
        first = <uint64_t>ctz64(delta)
        length = <uint64_t>ctz64(~(delta >> first)) if delta >> first != ~<uint64_t>0 else 64
        if first + length >= 64:
            delta = 0
        else:
            delta &= ~<uint64_t>0 << (first + length)
        first += word * 64
        if first != c.end:
            put_run(c)
            c.first = first
        c.end = first + length


cdef void take_bits(changes_t* c) noexcept nogil:
    cdef bitmap_t* b = c.bitmap
    cdef uint64_t g, groups, words, group, word
    bitmap_settle_marks(b)
    # Counted after it was marked: whoever is in these counts is found below.
    exchange_acq_rel(&b.pending_copied, 0)
    c.counted = exchange_acq_rel(&b.pending, 0)
    for g in range(b.words // 4096 + 1):
        if load_acquire(b.dirty_groups + g) == 0:
            continue
        groups = exchange_acq_rel(b.dirty_groups + g, 0)
        while groups:
            group = g * 64 + <uint64_t>ctz64(groups)
            groups &= groups - 1
            words = exchange_acq_rel(b.dirty_words + group, 0)
            while words:
                word = group * 64 + <uint64_t>ctz64(words)
                words &= words - 1
                take_word(c, word)
    put_run(c)


cdef void take_entries(changes_t* c) noexcept nogil:
    cdef chunk_table_t* t = c.table
    cdef uint64_t g, groups, group, marks, chunk
    table_settle_marks(t)
    exchange_acq_rel(&t.pending, 0)
    for g in range(load_acquire(&t.chunks) // 4096 + 1):
        if load_acquire(t.dirty_groups + g) == 0:
            continue
        groups = exchange_acq_rel(t.dirty_groups + g, 0)
        while groups:
            group = g * 64 + <uint64_t>ctz64(groups)
            groups &= groups - 1
            marks = exchange_acq_rel(t.dirty + group, 0)
            while marks:
                chunk = group * 64 + <uint64_t>ctz64(marks)
                marks &= marks - 1
                if not c.overflow and journal_put_entry(c.journal, chunk,
                                                        entry_to_record(c, chunk)) < 0:
                    c.overflow = True


cdef void changes_take(changes_t* c) noexcept nogil:
    c.first = 0
    c.end = 0
    c.blocks = 0
    c.counted = 0
    c.entries = 0
    c.places_end = 0
    c.overflow = False
    journal_begin(c.journal)
    if c.bitmap != NULL:
        take_bits(c)
    if c.table != NULL:
        take_entries(c)
