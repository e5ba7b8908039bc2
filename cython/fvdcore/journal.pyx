# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Layer 2. Journal mechanism. See journal.pxd and FORMAT.md section 4."""
from libc.errno cimport errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset
from .atomics cimport load_acquire, store_release
from .bitmap cimport bitmap_set_durable, bitmap_t
from .checks cimport invariant
from .crc32c cimport crc32c
from .layout cimport (
    FVD_BITMAP_RECORD, FVD_RECORDS_BYTES, FVD_TRAILER_MAGIC, FVD_TRAILER_OFFSET,
    fvd_bitmap_record_t, fvd_trailer_t,
)
from .limits cimport JOURNAL_BATCH_MAX, PAGE, PAGE_SECTORS, SECTOR
from .storage cimport EXTENT_ZERO, storage_read, storage_status, storage_t, storage_write
from .syscalls cimport (
    ENOMEM, ENOSPC, EUCLEAN, MAP_ANONYMOUS, MAP_FAILED, MAP_NORESERVE, MAP_PRIVATE,
    PROT_READ, PROT_WRITE, c_mmap, c_munmap,
    drop_pages,
)

cdef enum:
    RECORD_BYTES = 16
    SECTORS_PER_RECORD_MAX = 1073741824  # keeps the u32 of a record far from overflow
    REPLAY_STEP = 262144


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


# -- replay ------------------------------------------------------------------------------------

cdef struct scan_t:
    uint64_t stable_epoch
    uint64_t base_sectors
    uint64_t block_sectors
    uint64_t blocks
    uint64_t epoch_max
    uint64_t sequence_max
    int counted
    bint apply


cdef bint trailer_valid(const journal_t* j, const uint8_t* sector,
        fvd_trailer_t* t) noexcept nogil:
    cdef uint8_t[512] copy
    memcpy(t, sector + FVD_TRAILER_OFFSET, sizeof(fvd_trailer_t))
    if t.magic != FVD_TRAILER_MAGIC:
        return False
    memcpy(copy, sector, SECTOR)
    memset(copy + FVD_TRAILER_OFFSET + 4, 0, 4)
    return crc32c(j.seed, copy, SECTOR) == t.crc


cdef int scan_sector(const journal_t* j, const uint8_t* sector, scan_t* scan,
        bitmap_t* b) noexcept nogil:
    cdef fvd_trailer_t trailer
    cdef fvd_bitmap_record_t record
    cdef uint32_t kind
    cdef int at = 0
    if not trailer_valid(j, sector, &trailer):
        return 0
    if trailer.epoch >> 62 or trailer.sequence >> 62:
        return -EUCLEAN
    scan.epoch_max = max(scan.epoch_max, trailer.epoch)
    scan.sequence_max = max(scan.sequence_max, trailer.sequence)
    if trailer.epoch < scan.stable_epoch:
        return 0
    scan.counted += 1
    while at + 4 <= FVD_RECORDS_BYTES:
        memcpy(&kind, sector + at, 4)
        if kind == 0:
            return 0
        if kind != FVD_BITMAP_RECORD or at + RECORD_BYTES > FVD_RECORDS_BYTES or b == NULL:
            return -EUCLEAN
        memcpy(&record, sector + at, RECORD_BYTES)
        # A record may be widened to whole blocks, beyond the base's end in the last one.
        if (record.sectors == 0 or record.first_sector >= scan.base_sectors
                or record.sectors > scan.blocks * scan.block_sectors - record.first_sector):
            return -EUCLEAN
        if scan.apply:
            bitmap_set_durable(
                b, record.first_sector // scan.block_sectors,
                (record.first_sector + record.sectors + scan.block_sectors - 1)
                // scan.block_sectors)
        at += RECORD_BYTES
    return 0


cdef int scan_journal(const journal_t* j, uint8_t* buffer, scan_t* scan,
        bitmap_t* b) noexcept nogil:
    cdef uint64_t at = 0, step, size = j.pages * PAGE, n
    cdef int rc, kind
    while at < size:
        step = min(<uint64_t>REPLAY_STEP, size - at)
        kind = storage_status(j.storage, size - at, j.offset + at, &n)
        if kind == EXTENT_ZERO and n >= SECTOR:
            at += n // SECTOR * SECTOR
            continue
        rc = storage_read(j.storage, buffer, step, j.offset + at, 0)
        if rc < 0:
            return rc
        n = 0
        while n < step:
            rc = scan_sector(j, buffer + n, scan, b)
            if rc < 0:
                return rc
            n += SECTOR
        at += step
    return 0


cdef int journal_replay(journal_t* j, uint64_t stable_epoch, bitmap_t* b, uint64_t block_size,
        uint64_t base_size) noexcept nogil:
    cdef scan_t scan
    cdef void* buffer
    cdef int rc, counted
    memset(&scan, 0, sizeof(scan_t))
    scan.stable_epoch = stable_epoch
    scan.epoch_max = stable_epoch
    scan.block_sectors = block_size // SECTOR
    scan.base_sectors = base_size // SECTOR
    scan.blocks = (base_size + block_size - 1) // block_size
    if j.pages:
        buffer = c_mmap(NULL, REPLAY_STEP, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
            -1, 0)
        if buffer == MAP_FAILED:
            return -ENOMEM
        # First every record is checked, then all are applied. Bits commute, so order is free.
        rc = scan_journal(j, <uint8_t*>buffer, &scan, b)
        counted = scan.counted
        if rc == 0 and counted:
            scan.apply = True
            rc = scan_journal(j, <uint8_t*>buffer, &scan, b)
        c_munmap(buffer, REPLAY_STEP)
        if rc < 0:
            return rc
    else:
        counted = 0
    j.epoch = scan.epoch_max + 1
    j.sequence = scan.sequence_max + 1
    return counted


# -- writing -----------------------------------------------------------------------------------

cdef void journal_begin(journal_t* j) noexcept nogil:
    j.batch_sectors = 0
    j.cursor = FVD_RECORDS_BYTES
    j.records = 0


cdef int journal_put_blocks(journal_t* j, uint64_t first_sector, uint64_t sectors) noexcept nogil:
    cdef fvd_bitmap_record_t record
    while sectors:
        if j.cursor + RECORD_BYTES > FVD_RECORDS_BYTES:
            if j.batch_sectors == j.batch_sectors_max:
                return -ENOSPC
            memset(j.batch + j.batch_sectors * SECTOR, 0, SECTOR)
            j.batch_sectors += 1
            j.cursor = 0
        record.type = FVD_BITMAP_RECORD
        record.first_sector = first_sector
        record.sectors = <uint32_t>min(sectors, <uint64_t>SECTORS_PER_RECORD_MAX)
        memcpy(j.batch + (j.batch_sectors - 1) * SECTOR + j.cursor, &record, RECORD_BYTES)
        j.cursor += RECORD_BYTES
        j.records += 1
        first_sector += record.sectors
        sectors -= record.sectors
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


cdef void journal_apply_batch(const journal_t* j, bitmap_t* b, uint64_t block_size) noexcept nogil:
    cdef fvd_bitmap_record_t record
    cdef const uint8_t* at = j.batch
    cdef uint64_t left = j.records, block_sectors = block_size // SECTOR
    cdef int cursor = 0
    while left:
        if cursor + RECORD_BYTES > FVD_RECORDS_BYTES:
            at += SECTOR
            cursor = 0
        memcpy(&record, at + cursor, RECORD_BYTES)
        bitmap_set_durable(
            b, record.first_sector // block_sectors,
            (record.first_sector + record.sectors + block_sectors - 1) // block_sectors)
        cursor += RECORD_BYTES
        left -= 1
    # A burst must not stay resident.
    if j.batch_sectors > 2048:
        drop_pages(j.batch, j.batch_sectors * SECTOR)
