# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Layer 2. Header of an open image. See header.pxd.

fvdengine validates with full messages before the engine is called; what is checked here again is
everything that the engine's own memory safety and the data's safety rest on."""
from libc.errno cimport errno
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset
from .crc32c cimport crc32c
from .layout cimport (
    FVD_EXTENSION_OFFSET, FVD_FEATURE_STAGED, FVD_FEATURE_TRAILERS, FVD_MAGIC, FVD_VERSION,
    fvd_extension_t, fvd_header_t,
)
from .limits cimport (
    BLOCK_MAX, HEADER_BYTES, PAGE, PREFETCH_SLOTS_MAX, SECTOR, TABLE_BYTES_MAX,
)
from .storage cimport storage_read, storage_t, storage_write
from .sync cimport mutex_lock, mutex_unlock
from .syscalls cimport EIO, EUCLEAN, c_getrandom

cdef enum:
    HEADER_SIZE_MAX = 1048576
    JOURNAL_SIZE_MAX = 1073741824
    JOURNAL_BUFFER_MAX = 67108864
    JOURNAL_PERIOD_MAX_MS = 3600000
    PREFETCH_MEMORY_MAX = 268435456
    SECTIONS = 5

cdef struct section_t:
    uint64_t offset
    uint64_t size


cdef int refuse(header_t* h, const char* reason) noexcept nogil:
    h.reason = reason
    return -EUCLEAN


cdef bint sections_fit(const fvd_header_t* f, uint64_t length, uint64_t data_length) noexcept nogil:
    """Header, bitmap, journal, table and raw data: page-aligned, disjoint, inside their file."""
    cdef section_t[5] s
    cdef bint apart = f.data_file[0] != 0
    cdef int i, j
    s[0] = section_t(0, f.header_size)
    s[1] = section_t(f.bitmap_offset, f.bitmap_size)
    s[2] = section_t(f.journal_offset, f.journal_size)
    s[3] = section_t(f.table_offset, f.table_size)
    s[4] = section_t(f.data_offset, 0 if f.table_size else f.virtual_disk_size)
    for i in range(SECTIONS):
        if s[i].size == 0:
            continue
        if i == 4 and apart:
            return s[4].offset <= data_length and s[4].size <= data_length - s[4].offset
        if s[i].offset % PAGE or s[i].offset > length or s[i].size > length - s[i].offset:
            return False
        if i < 4 and s[i].size % PAGE:
            return False
        for j in range(i):
            if (s[j].size and s[i].offset < s[j].offset + s[j].size
                    and s[j].offset < s[i].offset + s[i].size):
                return False
    if f.table_size and not apart:
        # Chunks may lie anywhere behind data_offset; what they must not hit but the table is here.
        for i in range(3):
            if s[i].offset + s[i].size > f.data_offset:
                return False
    return True


cdef int validate_bitmap(header_t* h) noexcept nogil:
    cdef fvd_header_t* f = &h.fields
    if f.base_img_size == 0:
        if f.base_img[0] and not f.base_img_fully_prefetched:
            return refuse(h, b"a base of size 0")
        return 0
    if not f.base_img[0]:
        return refuse(h, b"base_img_size without a base")
    if f.base_img_size > f.virtual_disk_size or f.base_img_size % SECTOR:
        return refuse(h, b"bad base_img_size")
    if f.block_size == 0 or f.block_size % SECTOR or f.block_size > BLOCK_MAX:
        return refuse(h, b"bad block_size")
    if f.bitmap_offset == 0 or f.bitmap_size == 0:
        return refuse(h, b"a base but no bitmap")
    if f.bitmap_size < ((f.base_img_size + f.block_size - 1) // f.block_size + 7) // 8:
        return refuse(h, b"bitmap too small")
    if f.bytes_per_prefetch == 0 or f.bytes_per_prefetch % f.block_size:
        return refuse(h, b"bytes_per_prefetch is no multiple of block_size")
    return 0


cdef int validate_journal(header_t* h) noexcept nogil:
    cdef fvd_header_t* f = &h.fields
    if (f.journal_offset == 0) != (f.journal_size == 0):
        return refuse(h, b"only one of journal_offset and journal_size")
    if f.journal_size % PAGE or f.journal_size > JOURNAL_SIZE_MAX:
        return refuse(h, b"bad journal_size")
    if (f.journal_buf_size > JOURNAL_BUFFER_MAX
            or (f.journal_size and f.journal_buf_size > f.journal_size)):
        return refuse(h, b"bad journal_buf_size")
    if f.journal_clean_buf_period > JOURNAL_PERIOD_MAX_MS:
        return refuse(h, b"bad journal_clean_buf_period")
    if f.stable_journal_epoch > <uint64_t>1 << 62:
        return refuse(h, b"bad stable_journal_epoch")
    return 0


cdef int validate_prefetch(header_t* h) noexcept nogil:
    cdef fvd_header_t* f = &h.fields
    if f.num_prefetch_slots == 0 or f.num_prefetch_slots > PREFETCH_SLOTS_MAX:
        return refuse(h, b"bad num_prefetch_slots")
    if f.bytes_per_prefetch == 0 or f.bytes_per_prefetch > PREFETCH_MEMORY_MAX:
        return refuse(h, b"bad bytes_per_prefetch")
    if f.bytes_per_prefetch * f.num_prefetch_slots > PREFETCH_MEMORY_MAX:
        return refuse(h, b"bytes_per_prefetch times num_prefetch_slots above 256 MiB")
    if (f.prefetch_max_read_throughput < f.prefetch_min_read_throughput
            or f.prefetch_max_write_throughput < f.prefetch_min_write_throughput):
        return refuse(h, b"a maximum throughput of prefetch below its minimum")
    if (f.prefetch_read_throughput_measure_time == 0
            or f.prefetch_write_throughput_measure_time == 0):
        return refuse(h, b"a throughput measure time of 0")
    return 0


cdef int validate_table(header_t* h) noexcept nogil:
    cdef fvd_header_t* f = &h.fields
    cdef uint64_t chunks
    if (f.table_offset == 0) != (f.table_size == 0):
        return refuse(h, b"only one of table_offset and table_size")
    if f.table_size == 0:
        return 0
    if f.chunk_size < PAGE or f.chunk_size % PAGE or f.chunk_size > <uint64_t>1 << 40:
        return refuse(h, b"bad chunk_size")
    if f.base_img_size and f.chunk_size % f.block_size:
        return refuse(h, b"chunk_size is no multiple of block_size")
    chunks = (f.virtual_disk_size + f.chunk_size - 1) // f.chunk_size
    if f.table_size // 4 < chunks:
        return refuse(h, b"table too small")
    if f.storage_grow_unit < f.chunk_size:
        return refuse(h, b"storage_grow_unit below chunk_size")
    return 0


cdef int validate(header_t* h, uint64_t length, uint64_t data_length, bint apart) noexcept nogil:
    cdef fvd_header_t* f = &h.fields
    cdef int i, rc
    if f.magic != FVD_MAGIC:
        return refuse(h, b"not an FVD image")
    if f.header_size < HEADER_BYTES or f.header_size > HEADER_SIZE_MAX or f.header_size % PAGE:
        return refuse(h, b"bad header_size")
    for i in range(4096):
        if f.incompatible_features[i]:
            return refuse(h, b"unknown incompatible feature")
    if (f.virtual_disk_size == 0 or f.virtual_disk_size % SECTOR
            or f.virtual_disk_size > <uint64_t>1 << 62):
        return refuse(h, b"bad virtual_disk_size")
    if (f.data_file[0] != 0) != apart:
        return refuse(h, b"the header names a data file, and none was given" if f.data_file[0]
                      else b"a data file was given, and the header names none")
    if (f.data_offset % PAGE or f.data_offset > <uint64_t>1 << 62
            or (f.data_offset == 0) != (f.data_file[0] != 0)):
        return refuse(h, b"bad data_offset")
    rc = validate_bitmap(h)
    if rc == 0:
        rc = validate_journal(h)
    if rc == 0:
        rc = validate_prefetch(h)
    if rc == 0:
        rc = validate_table(h)
    if rc < 0:
        return rc
    if (f.bitmap_size > TABLE_BYTES_MAX or f.table_size > TABLE_BYTES_MAX
            or f.bitmap_size + f.table_size > TABLE_BYTES_MAX):
        return refuse(h, b"bitmap and table above the limit of 1 GiB")
    if not sections_fit(f, length, data_length):
        return refuse(h, b"sections overlap or leave the file")
    return 0


cdef bint extension_fits(header_t* h) noexcept nogil:
    """Is the extension's sum right? It counts only if no older writer was here, either."""
    cdef uint8_t[512] copy
    cdef uint32_t size, crc
    size = h.extension.ext_size
    if size < sizeof(fvd_extension_t) or size > 15 * SECTOR - FVD_EXTENSION_OFFSET:
        return False
    memcpy(copy, h.bytes + FVD_EXTENSION_OFFSET, size)
    memcpy(&crc, copy + 4, 4)
    memset(copy + 4, 0, 4)
    return crc32c(0, copy, size) == crc


cdef int header_load(header_t* h, storage_t* image, storage_t* data) noexcept nogil:
    cdef int rc
    h.reason = NULL
    if image.length < HEADER_BYTES:
        return refuse(h, b"shorter than a header")
    rc = storage_read(image, h.bytes, HEADER_BYTES, 0, 0)
    if rc < 0:
        return rc
    memcpy(&h.fields, h.bytes, sizeof(fvd_header_t))
    rc = validate(h, image.length, data.length, data != image)
    if rc < 0:
        return rc
    memcpy(&h.extension, h.bytes + FVD_EXTENSION_OFFSET, sizeof(fvd_extension_t))
    h.readable = extension_fits(h)
    h.trusted = (h.readable and h.fields.last_open_version >= 2
                 and h.fields.last_open_version >= h.fields.create_version)
    h.trailers = h.trusted and (h.extension.compatible_features & FVD_FEATURE_TRAILERS) != 0
    return 0


cdef int store_sector(header_t* h, storage_t* image, const void* field, size_t width,
        int offset) noexcept nogil:
    """Change bytes of the copy and write the sector they stand in."""
    cdef int rc, sector = offset // SECTOR * SECTOR
    mutex_lock(&h.mutex)
    memcpy(h.bytes + offset, field, width)
    memcpy(&h.fields, h.bytes, sizeof(fvd_header_t))
    rc = storage_write(image, h.bytes + sector, SECTOR, <uint64_t>sector, 0)
    mutex_unlock(&h.mutex)
    return rc


cdef int header_store_values(header_t* h, storage_t* image, int sector,
        const header_value_t* values, int count) noexcept nogil:
    cdef uint8_t[512] former
    cdef uint64_t begin = <uint64_t>sector * SECTOR
    cdef int i, rc = 0
    mutex_lock(&h.mutex)
    memcpy(&former[0], h.bytes + begin, SECTOR)
    for i in range(count):
        if values[i].offset // SECTOR == sector:
            memcpy(h.bytes + values[i].offset, &values[i].value, <size_t>values[i].width)
    if memcmp(&former[0], h.bytes + begin, SECTOR) != 0:
        rc = storage_write(image, h.bytes + begin, SECTOR, begin, 0)
        if rc < 0:
            memcpy(h.bytes + begin, &former[0], SECTOR)
            # Whatever the disk made of it: what counts is what it had.
            storage_write(image, h.bytes + begin, SECTOR, begin, 0)
        else:
            memcpy(&h.fields, h.bytes, sizeof(fvd_header_t))
            rc = 1
    mutex_unlock(&h.mutex)
    return rc


cdef void header_former_values(header_t* h, const header_value_t* values, header_value_t* former,
        int count) noexcept nogil:
    cdef int i
    for i in range(count):
        former[i] = values[i]
        memcpy(&former[i].value, h.bytes + values[i].offset, <size_t>values[i].width)


cdef bint header_must_stage(header_t* h, const header_value_t* values, int count) noexcept nogil:
    cdef int i, sector = -1
    if not h.trusted or h.fields.header_size < 2 * HEADER_BYTES:
        return False
    for i in range(count):
        if memcmp(h.bytes + values[i].offset, &values[i].value, <size_t>values[i].width) == 0:
            continue
        if sector >= 0 and sector != values[i].offset // SECTOR:
            return True
        sector = values[i].offset // SECTOR
    return False


cdef int header_store_staged(header_t* h, storage_t* image, const header_value_t* values,
        int count) noexcept nogil:
    cdef uint8_t[HEADER_BYTES] copy
    cdef int i
    mutex_lock(&h.mutex)
    memcpy(&copy[0], h.bytes, HEADER_BYTES)
    mutex_unlock(&h.mutex)
    for i in range(count):
        memcpy(&copy[0] + values[i].offset, &values[i].value, <size_t>values[i].width)
    return storage_write(image, &copy[0], HEADER_BYTES, HEADER_BYTES, 0)


cdef int header_store_staged_bit(header_t* h, storage_t* image, bint staged) noexcept nogil:
    cdef uint8_t[16] boot_id
    memcpy(&boot_id[0], h.extension.boot_id, 16)
    if staged:
        h.extension.compatible_features |= FVD_FEATURE_STAGED
    else:
        h.extension.compatible_features &= ~FVD_FEATURE_STAGED
    return header_store_session(h, image, &boot_id[0], True)


cdef int header_store_clean(header_t* h, storage_t* image, bint clean) noexcept nogil:
    cdef uint32_t v = 1 if clean else 0
    return store_sector(h, image, &v, 4, 2160)


cdef int header_store_epoch(header_t* h, storage_t* image, uint64_t epoch) noexcept nogil:
    return store_sector(h, image, &epoch, 8, 2164)


cdef int header_store_prefetched(header_t* h, storage_t* image) noexcept nogil:
    cdef uint32_t v = 1
    return store_sector(h, image, &v, 4, 3268)


cdef int header_store_relocated(header_t* h, storage_t* image) noexcept nogil:
    cdef uint32_t v = 1
    return store_sector(h, image, &v, 4, 3244)


cdef int header_store_table_size(header_t* h, storage_t* image, uint64_t bytes) noexcept nogil:
    return store_sector(h, image, &bytes, 8, 2196)


cdef int header_store_disk_size(header_t* h, storage_t* image, uint64_t bytes) noexcept nogil:
    return store_sector(h, image, &bytes, 8, 16)


cdef int header_store_backup(header_t* h, storage_t* image) noexcept nogil:
    cdef int rc = 0
    if h.fields.header_size >= 2 * HEADER_BYTES:
        mutex_lock(&h.mutex)
        rc = storage_write(image, h.bytes, HEADER_BYTES, HEADER_BYTES, 0)
        mutex_unlock(&h.mutex)
    return rc


cdef int header_renew_extension(header_t* h) noexcept nogil:
    memset(&h.extension, 0, sizeof(fvd_extension_t))
    # Nothing of what stood there is ours to keep.
    memset(h.bytes + FVD_EXTENSION_OFFSET, 0, 15 * SECTOR - FVD_EXTENSION_OFFSET)
    h.extension.ext_size = sizeof(fvd_extension_t)
    h.extension.compatible_features = FVD_FEATURE_TRAILERS
    if c_getrandom(h.extension.image_uuid, 16, 0) != 16:
        return -EIO
    return 0


cdef int header_store_version(header_t* h, storage_t* image) noexcept nogil:
    cdef uint32_t v = FVD_VERSION
    if h.fields.last_open_version >= v:
        return 0
    return store_sector(h, image, &v, 4, 12)


cdef int header_store_session(header_t* h, storage_t* image, const uint8_t* boot_id,
        bint keep_session) noexcept nogil:
    cdef uint8_t[512] copy
    cdef uint32_t crc, size = h.extension.ext_size
    if not keep_session and c_getrandom(h.extension.open_session, 16, 0) != 16:
        return -EIO
    memcpy(h.extension.boot_id, boot_id, 16)
    h.extension.ext_crc32c = 0
    # Fields behind our struct (a newer version's) are kept.
    memcpy(copy, h.bytes + FVD_EXTENSION_OFFSET, size)
    memcpy(copy, &h.extension, sizeof(fvd_extension_t))
    crc = crc32c(0, copy, size)
    memcpy(copy + 4, &crc, 4)
    h.extension.ext_crc32c = crc
    return store_sector(h, image, copy, size, FVD_EXTENSION_OFFSET)
