# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Invariants in the bytes of an image. See sim_check.pxd.

The reader here is a third one, beside the engine's and fvdengine's: written from FORMAT.md, so that
a mistake which the other two share is seen. One function for each invariant."""
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from fvdcore.crc32c cimport crc32c
from sim_crash cimport world_fail
from sim_disk cimport sim_disk_t
from sim_gate cimport below
from sim_manager cimport manager_check
from sim_pattern cimport STAMP_GARBAGE, STAMP_POISON, pattern_read
from sim_state cimport world_t

cdef enum:
    SECTOR = 512
    RECORDS_END = 484
    TRAILER = 488

cdef extern from *:
    """
    #define FVD_SIM_UNMAPPED 0xFFFFFFFFu
    #define FVD_SIM_BITMAP_RECORD 0x3F2AB8EDu
    #define FVD_SIM_TABLE_RECORD 0xB4E6F7ACu
    #define FVD_SIM_TRAILER 0x544A5646u
    """
    const uint32_t UNMAPPED "FVD_SIM_UNMAPPED"
    const uint32_t BITMAP_RECORD "FVD_SIM_BITMAP_RECORD"
    const uint32_t TABLE_RECORD "FVD_SIM_TABLE_RECORD"
    const uint32_t TRAILER_MAGIC "FVD_SIM_TRAILER"

cdef struct found_t:
    uint64_t epoch
    uint64_t sequence
    const uint8_t* sector

cdef struct view_t:
    const uint8_t* p
    uint64_t length                    # of the image file
    const uint8_t* data                # where data lie
    uint64_t data_length
    uint64_t size
    uint64_t data_offset
    uint64_t base_size
    uint64_t bitmap_offset
    uint64_t block_size
    uint64_t journal_offset
    uint64_t journal_size
    uint64_t stable
    uint64_t table_offset
    uint64_t table_size
    uint64_t chunk_size
    bint clean
    bint prefetched
    uint64_t blocks
    uint64_t chunks
    uint8_t* bits                      # after replay, a byte a block
    uint32_t* table                    # after replay
    found_t* found                     # journal sectors that count
    uint64_t found_count
    bint news                          # replay changed something


cdef inline uint64_t u64(const uint8_t* p) noexcept nogil:
    cdef uint64_t v
    memcpy(&v, p, 8)
    return v


cdef inline uint32_t u32(const uint8_t* p) noexcept nogil:
    cdef uint32_t v
    memcpy(&v, p, 4)
    return v


cdef bint load(view_t* v, const sim_disk_t* file, const sim_disk_t* data) noexcept nogil:
    cdef const uint8_t* p = file.cache
    cdef uint64_t i
    memset(v, 0, sizeof(view_t))
    v.p = p
    v.length = file.head.length
    v.data = data.cache
    v.data_length = data.head.length
    v.size = u64(p + 16)
    v.data_offset = u64(p + 24)
    v.base_size = u64(p + 2112)
    v.bitmap_offset = u64(p + 2120)
    v.block_size = u64(p + 2136)
    v.journal_offset = u64(p + 2144)
    v.journal_size = u64(p + 2152)
    v.clean = u32(p + 2160) != 0
    v.stable = u64(p + 2164)
    v.table_offset = u64(p + 2188)
    v.table_size = u64(p + 2196)
    v.chunk_size = u64(p + 2204)
    v.prefetched = u32(p + 3268) != 0
    v.blocks = (v.base_size + v.block_size - 1) // v.block_size if v.base_size else 0
    v.chunks = (v.size + v.chunk_size - 1) // v.chunk_size if v.table_size else 0
    v.bits = <uint8_t*>calloc(v.blocks + 1, 1)
    v.table = <uint32_t*>calloc(v.chunks + 1, 4)
    v.found = <found_t*>calloc(v.journal_size // SECTOR + 1, sizeof(found_t))
    if v.bits == NULL or v.table == NULL or v.found == NULL:
        return False
    for i in range(v.blocks):
        v.bits[i] = (p[v.bitmap_offset + i // 8] >> (i % 8)) & 1
    for i in range(v.chunks):
        v.table[i] = u32(p + v.table_offset + 4 * i)
        if v.table[i] != UNMAPPED:
            v.table[i] &= 0x7FFFFFFFu
    return True


cdef void unload(view_t* v) noexcept nogil:
    free(v.bits)
    free(v.table)
    free(v.found)


# -- the journal -------------------------------------------------------------------------------

cdef bint valid(const uint8_t* sector, const uint8_t* uuid) noexcept nogil:
    cdef uint8_t[512] copy
    if u32(sector + TRAILER) != TRAILER_MAGIC:
        return False
    memcpy(copy, sector, SECTOR)
    memset(copy + TRAILER + 4, 0, 4)
    return crc32c(crc32c(0, uuid, 16), copy, SECTOR) == u32(sector + TRAILER + 4)


cdef void gather(view_t* v) noexcept nogil:
    """The sectors that count, in the order of (epoch, sequence)."""
    cdef uint64_t at, k
    cdef const uint8_t* s
    cdef found_t here
    for at in range(v.journal_size // SECTOR):
        s = v.p + v.journal_offset + at * SECTOR
        if not valid(s, v.p + 7448):
            continue
        here.epoch = u64(s + 496)
        here.sequence = u64(s + 504)
        here.sector = s
        if here.epoch < v.stable:
            continue
        k = v.found_count
        while k and (v.found[k - 1].epoch > here.epoch or (
                v.found[k - 1].epoch == here.epoch and v.found[k - 1].sequence > here.sequence)):
            v.found[k] = v.found[k - 1]
            k -= 1
        v.found[k] = here
        v.found_count += 1


cdef bint apply_bits(view_t* v, const uint8_t* r) noexcept nogil:
    cdef uint64_t first = u64(r + 8), count = u32(r + 4), b
    if count == 0 or first * SECTOR >= v.base_size:
        return False
    for b in range(first * SECTOR // v.block_size,
                   ((first + count) * SECTOR + v.block_size - 1) // v.block_size):
        if b >= v.blocks:
            return False
        v.news = v.news or not v.bits[b]
        v.bits[b] = 1
    return True


cdef bint apply_table(view_t* v, const uint8_t* r, uint64_t epoch) noexcept nogil:
    cdef uint32_t count = u32(r + 12), first = u32(r + 16), i, entry
    if u64(r + 4) != epoch or count == 0 or <uint64_t>first + count > v.chunks:
        return False
    for i in range(count):
        entry = u32(r + 20 + 4 * i)
        if entry != UNMAPPED:
            entry &= 0x7FFFFFFFu
        v.news = v.news or v.table[first + i] != entry
        v.table[first + i] = entry
    return True


cdef bint replay(view_t* v) noexcept nogil:
    """False: a sector with a good sum holds a record that does not fit."""
    cdef uint64_t i
    cdef uint32_t kind
    cdef int at
    cdef const uint8_t* s
    gather(v)
    for i in range(v.found_count):
        s = v.found[i].sector
        at = 0
        while at + 4 <= RECORDS_END:
            kind = u32(s + at)
            if kind == BITMAP_RECORD and at + 16 <= RECORDS_END:
                if not apply_bits(v, s + at):
                    return False
                at += 16
            elif kind == TABLE_RECORD and at + 20 + 4 * <int>u32(s + at + 12) <= RECORDS_END:
                if not apply_table(v, s + at, v.found[i].epoch):
                    return False
                at += 20 + 4 * <int>u32(s + at + 12)
            elif kind == 0:
                break
            else:
                return False
    return True


# -- invariants --------------------------------------------------------------------------------

cdef bint broken(world_t* w, const char* which, const char* how, uint64_t where) noexcept nogil:
    world_fail(w, which, how, <long long>where)
    return False


cdef bint place_of(const view_t* v, uint64_t offset, uint64_t* place) noexcept nogil:
    """Where a byte of the disk lies in the data; False: in no chunk."""
    cdef uint32_t entry
    if v.table_size == 0:
        place[0] = v.data_offset + offset
        return True
    entry = v.table[offset // v.chunk_size]
    place[0] = v.data_offset + <uint64_t>entry * v.chunk_size + offset % v.chunk_size
    return entry != UNMAPPED


cdef bint unknown_content(const view_t* v, uint64_t offset) noexcept nogil:
    cdef uint64_t place, sector
    if not place_of(v, offset, &place) or place + SECTOR > v.data_length:
        return False
    return pattern_read(v.data + place, &sector) in (STAMP_POISON, STAMP_GARBAGE)


cdef bint check_present(world_t* w, const view_t* v) noexcept nogil:
    """I1, I9: what is local was written or zeroed by somebody."""
    cdef uint64_t b, at, end, behind = 0 if v.prefetched else v.base_size
    if not v.prefetched:
        for b in range(v.blocks):
            if not v.bits[b]:
                continue
            end = min((b + 1) * v.block_size, v.base_size)
            for at in range(b * v.block_size // SECTOR, end // SECTOR):
                if unknown_content(v, at * SECTOR):
                    return broken(w, b"I1/I9", b"a durable bit over storage nobody wrote, sector",
                                  at)
    for at in range(behind // SECTOR, v.size // SECTOR):
        if unknown_content(v, at * SECTOR):
            return broken(w, b"I9", b"local storage that nobody wrote, sector", at)
    return True


cdef bint check_mappings(world_t* w, const view_t* v) noexcept nogil:
    """I2: mapped chunks exist, are distinct and keep clear of the table."""
    cdef uint64_t i, k, begin
    for i in range(v.chunks):
        if v.table[i] == UNMAPPED:
            continue
        begin = v.data_offset + <uint64_t>v.table[i] * v.chunk_size
        if begin + v.chunk_size > v.data_length:
            return broken(w, b"I2", b"a mapping behind the end of the storage, chunk", i)
        if v.data == v.p and begin < v.table_offset + v.table_size:
            return broken(w, b"I2", b"a mapped chunk overlaps the table, chunk", i)
        for k in range(i):
            if v.table[k] == v.table[i]:
                return broken(w, b"I8", b"two chunks share one place, chunk", i)
    return True


cdef bint check_clean(world_t* w, const view_t* v) noexcept nogil:
    """I4: what says that it is clean needs no replay."""
    if v.clean and v.news:
        return broken(w, b"I4", b"clean, but the journal holds news; sectors",
                      v.found_count)
    return True


cdef bint check_prefetched(world_t* w, const view_t* v) noexcept nogil:
    """I5: fully prefetched means every bit is set."""
    cdef uint64_t b
    if not v.prefetched:
        return True
    for b in range(v.blocks):
        if not v.bits[b]:
            return broken(w, b"I5", b"fully prefetched, but a bit is clear, block", b)
    return True


cdef bint check_given_back(world_t* w, const sim_disk_t* file,
        const sim_disk_t* data) noexcept nogil:
    cdef view_t v
    cdef uint64_t i, end = 0
    cdef bint good
    if w.failed or not load(&v, file, data if w.has_data else file):
        return False
    if v.data == v.p and v.table_offset + v.table_size > v.data_offset:
        end = (v.table_offset + v.table_size - v.data_offset + v.chunk_size - 1) // v.chunk_size
    for i in range(v.chunks):
        if v.table[i] != UNMAPPED:
            end = max(end, <uint64_t>v.table[i] + 1)
    good = (v.chunks == 0 or not (data if w.has_data else file).head.grows
            or w.file.failures + w.data.failures
            or v.data_length <= v.data_offset + end * v.chunk_size)
    if not good:
        broken(w, b"space", b"behind the last chunk is kept after a close, bytes", v.data_length)
    unload(&v)
    return good


cdef bint check_bytes(world_t* w, const sim_disk_t* file, const sim_disk_t* data) noexcept nogil:
    cdef view_t v
    cdef bint good
    if w.failed or not load(&v, file, data if w.has_data else file):
        return False
    good = replay(&v)
    if not good:
        broken(w, b"journal", b"a sector with a good sum holds a record that does not fit", 0)
    good = (good and check_mappings(w, &v) and check_present(w, &v) and check_clean(w, &v)
            and check_prefetched(w, &v) and manager_check(w, file))
    unload(&v)
    # The draw comes first: how many looks are shared changes no run.
    if w.verify != NULL and below(&w.random, 256) < w.verify_share and good:
        good = w.verify(w, file, data)
    return good
