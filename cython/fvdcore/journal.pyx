# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Layer 2. Journal mechanism. See journal.pxd and FORMAT.md section 4."""
from libc.errno cimport errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset
from .atomics cimport load_acquire, store_release
from .bitmap cimport bitmap_set_durable, bitmap_t
from .checks cimport invariant
from .chunk_table cimport chunk_table_t, table_recorded
from .crc32c cimport crc32c
from .layout cimport (
    FVD_BITMAP_RECORD, FVD_RECORDS_BYTES, FVD_TABLE_RECORD, FVD_TRAILER_MAGIC, FVD_TRAILER_OFFSET,
    fvd_bitmap_record_t, fvd_table_record_t, fvd_trailer_t,
)
from .limits cimport JOURNAL_BATCH_MAX, PAGE, PAGE_SECTORS, SECTOR
from .storage cimport storage_t, storage_write, storage_zero
from .syscalls cimport (
    ENOSPC, MAP_ANONYMOUS, MAP_FAILED, MAP_NORESERVE, MAP_PRIVATE, PROT_READ, PROT_WRITE, c_mmap,
    c_munmap, drop_pages,
)

cdef enum:
    BITS_BYTES = 16
    TABLE_BYTES = 20
    SECTORS_PER_RECORD_MAX = 1073741824  # keeps the u32 of a record far from overflow


cdef int journal_init(journal_t* j, storage_t* s, uint64_t offset, uint64_t size,
        const uint8_t* uuid) noexcept nogil:
    cdef void* p
    memset(j, 0, sizeof(journal_t))
    j.storage = s
    j.offset = offset
    j.pages = size // PAGE
    j.seed = crc32c(0, uuid, 16)
    j.sequence = 1
    j.batch_sectors_max = min(j.pages * PAGE_SECTORS, <uint64_t>JOURNAL_BATCH_MAX // SECTOR)
    if j.pages == 0:
        return 0
    p = c_mmap(NULL, j.batch_sectors_max * SECTOR, PROT_READ | PROT_WRITE,
               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    if p == MAP_FAILED:
        return -errno
    j.batch = <uint8_t*>p
    return 0


cdef void journal_free(journal_t* j) noexcept nogil:
    if j.batch != NULL:
        c_munmap(j.batch, j.batch_sectors_max * SECTOR)
        j.batch = NULL


cdef void journal_reseed(journal_t* j, const uint8_t* uuid) noexcept nogil:
    j.seed = crc32c(0, uuid, 16)


cdef int journal_erase(journal_t* j) noexcept nogil:
    return storage_zero(j.storage, j.pages * PAGE, j.offset, 0) if j.pages else 0


# -- building a batch --------------------------------------------------------------------------

cdef inline void forget_records(journal_t* j) noexcept nogil:
    j.bits_at = -1
    j.table_at = -1


cdef void journal_begin(journal_t* j) noexcept nogil:
    j.batch_sectors = 0
    j.cursor = FVD_RECORDS_BYTES
    j.records = 0
    forget_records(j)


cdef inline uint8_t* last_sector(const journal_t* j) noexcept nogil:
    return j.batch + (j.batch_sectors - 1) * SECTOR


cdef int new_sector(journal_t* j) noexcept nogil:
    if j.batch_sectors == j.batch_sectors_max:
        return -ENOSPC
    memset(j.batch + j.batch_sectors * SECTOR, 0, SECTOR)
    j.batch_sectors += 1
    j.cursor = 0
    forget_records(j)
    return 0


cdef void add_bits(journal_t* j, uint64_t first_sector, uint32_t sectors) noexcept nogil:
    cdef fvd_bitmap_record_t record
    record.type = FVD_BITMAP_RECORD
    record.first_sector = first_sector
    record.sectors = sectors
    memcpy(last_sector(j) + j.cursor, &record, BITS_BYTES)
    j.bits_at = j.cursor
    j.bits_end = first_sector + sectors
    j.cursor += BITS_BYTES
    j.records += 1


cdef bint extends_bits(const journal_t* j, uint64_t first_sector, uint64_t sectors) noexcept nogil:
    """Can the sector's last bitmap record take these sectors as well?"""
    cdef fvd_bitmap_record_t record
    if j.bits_at < 0 or j.bits_end != first_sector:
        return False
    memcpy(&record, last_sector(j) + j.bits_at, BITS_BYTES)
    return record.sectors + sectors <= SECTORS_PER_RECORD_MAX


cdef void extend_bits(journal_t* j, uint32_t sectors) noexcept nogil:
    cdef fvd_bitmap_record_t record
    memcpy(&record, last_sector(j) + j.bits_at, BITS_BYTES)
    record.sectors += sectors
    memcpy(last_sector(j) + j.bits_at, &record, BITS_BYTES)
    j.bits_end += sectors


cdef int entry_room(const journal_t* j, uint64_t chunk) noexcept nogil:
    """Bytes that the chunk's entry needs in the last sector: 0 where it stands in it already."""
    if j.table_at < 0:
        return TABLE_BYTES + 4
    if j.table_first <= chunk < j.table_end:
        return 0
    if chunk == j.table_end and j.table_at + TABLE_BYTES + 4 * <int>(
            j.table_end - j.table_first) == j.cursor:
        return 4
    return TABLE_BYTES + 4


cdef void add_entry(journal_t* j, uint64_t chunk, uint32_t entry, int room) noexcept nogil:
    cdef fvd_table_record_t record
    cdef uint8_t* sector = last_sector(j)
    if room == 4:
        memcpy(&record, sector + j.table_at, TABLE_BYTES)
        record.count += 1
        memcpy(sector + j.table_at, &record, TABLE_BYTES)
        j.table_end += 1
    elif room:
        record.type = FVD_TABLE_RECORD
        record.epoch = j.epoch
        record.count = 1
        record.first_index = <uint32_t>chunk
        memcpy(sector + j.cursor, &record, TABLE_BYTES)
        j.table_at = j.cursor
        j.table_first = chunk
        j.table_end = chunk + 1
        j.cursor += TABLE_BYTES
        j.records += 1
    if room:
        memcpy(sector + j.cursor, &entry, 4)
        j.cursor += 4
    else:
        # It changed while this batch was taken: its mark is taken as well, so nobody else tells.
        memcpy(sector + j.table_at + TABLE_BYTES + 4 * (chunk - j.table_first), &entry, 4)


cdef int journal_put_blocks(journal_t* j, uint64_t first_sector, uint64_t sectors) noexcept nogil:
    cdef uint32_t step
    cdef int rc
    while sectors:
        step = <uint32_t>min(sectors, <uint64_t>SECTORS_PER_RECORD_MAX)
        if j.cursor + BITS_BYTES > FVD_RECORDS_BYTES:
            rc = new_sector(j)
            if rc < 0:
                return rc
        add_bits(j, first_sector, step)
        first_sector += step
        sectors -= step
    return 0


cdef int journal_put_entry(journal_t* j, uint64_t chunk, uint32_t entry) noexcept nogil:
    cdef int rc, room = entry_room(j, chunk)
    if j.cursor + room > FVD_RECORDS_BYTES:
        rc = new_sector(j)
        if rc < 0:
            return rc
        room = TABLE_BYTES + 4
    add_entry(j, chunk, entry, room)
    return 0


cdef int journal_put_mapped(journal_t* j, uint64_t first_sector, uint64_t sectors, uint64_t chunk,
        uint32_t entry) noexcept nogil:
    cdef int rc, room = entry_room(j, chunk)
    cdef bint more = extends_bits(j, first_sector, sectors)
    if j.cursor + room + (0 if more else BITS_BYTES) > FVD_RECORDS_BYTES:
        rc = new_sector(j)
        if rc < 0:
            return rc
        more = False
        room = TABLE_BYTES + 4
    # A table record grows at its end only, so it comes last where both are new.
    if room == 4:
        add_entry(j, chunk, entry, room)
        room = 0
    if more:
        extend_bits(j, <uint32_t>sectors)
    else:
        add_bits(j, first_sector, <uint32_t>sectors)
    add_entry(j, chunk, entry, room)
    return 0


cdef uint64_t journal_batch_pages(const journal_t* j) noexcept nogil:
    return (j.batch_sectors + PAGE_SECTORS - 1) // PAGE_SECTORS


cdef void journal_seal(journal_t* j) noexcept nogil:
    cdef fvd_trailer_t trailer
    cdef uint8_t* sector
    cdef uint64_t i
    for i in range(j.batch_sectors):
        sector = j.batch + i * SECTOR
        trailer.magic = FVD_TRAILER_MAGIC
        trailer.crc = 0
        trailer.epoch = j.epoch
        trailer.sequence = j.sequence
        j.sequence += 1
        memcpy(sector + FVD_TRAILER_OFFSET, &trailer, sizeof(fvd_trailer_t))
        trailer.crc = crc32c(j.seed, sector, SECTOR)
        memcpy(sector + FVD_TRAILER_OFFSET, &trailer, sizeof(fvd_trailer_t))
    # Unused sectors of the last page are zero: old records of a page's former life vanish with it.
    if j.batch_sectors % PAGE_SECTORS:
        memset(j.batch + j.batch_sectors * SECTOR, 0,
               (PAGE_SECTORS - j.batch_sectors % PAGE_SECTORS) * SECTOR)


cdef int journal_write(journal_t* j) noexcept nogil:
    cdef uint64_t count = journal_batch_pages(j), done = 0, slot, run
    cdef int rc
    invariant(j.head + count - load_acquire(&j.tail) <= j.pages)
    while done < count:
        slot = (j.head + done) % j.pages
        run = min(count - done, j.pages - slot)
        rc = storage_write(j.storage, j.batch + done * PAGE, run * PAGE, j.offset + slot * PAGE, 0)
        if rc < 0:
            return rc
        done += run
    store_release(&j.head, j.head + count)
    return 0


# -- what a batch made durable -----------------------------------------------------------------

cdef int apply_sector(const uint8_t* sector, bitmap_t* b, uint64_t block_sectors,
        chunk_table_t* t) noexcept nogil:
    """Apply the records of a sector of ours; how many they are."""
    cdef fvd_bitmap_record_t bits
    cdef fvd_table_record_t table
    cdef uint32_t kind, entry, i
    cdef int at = 0, n = 0
    while at + 4 <= FVD_RECORDS_BYTES:
        memcpy(&kind, sector + at, 4)
        if kind == 0:
            break
        if kind == FVD_BITMAP_RECORD:
            memcpy(&bits, sector + at, BITS_BYTES)
            bitmap_set_durable(b, bits.first_sector // block_sectors,
                               (bits.first_sector + bits.sectors + block_sectors - 1)
                               // block_sectors)
            at += BITS_BYTES
        else:
            memcpy(&table, sector + at, TABLE_BYTES)
            at += TABLE_BYTES
            for i in range(table.count):
                memcpy(&entry, sector + at, 4)
                table_recorded(t, table.first_index + i, entry)
                at += 4
        n += 1
    return n


cdef void journal_apply_batch(const journal_t* j, bitmap_t* b, uint64_t block_size,
        chunk_table_t* t) noexcept nogil:
    cdef uint64_t i
    for i in range(j.batch_sectors):
        apply_sector(j.batch + i * SECTOR, b, block_size // SECTOR, t)
    # A burst must not stay resident.
    if j.batch_sectors > 2048:
        drop_pages(j.batch, j.batch_sectors * SECTOR)
