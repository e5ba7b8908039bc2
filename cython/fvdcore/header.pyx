# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Layer 2. Header of an open image. See header.pxd.

fvdengine validates with full messages before the engine is called; what is checked here again is
everything that the engine's own memory safety and the data's safety rest on."""
from libc.errno cimport errno
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset
from .crc32c cimport crc32c
from .layout cimport (
    FVD_EXTENSION_OFFSET, FVD_FEATURE_TRAILERS, FVD_MAGIC, FVD_VERSION, fvd_extension_t,
    fvd_header_t,
)
from .limits cimport BLOCK_MAX, HEADER_BYTES, PAGE, SECTOR
from .storage cimport storage_read, storage_t, storage_write
from .sync cimport mutex_lock, mutex_unlock
from .syscalls cimport EIO, EUCLEAN, c_getrandom

cdef enum:
    HEADER_SIZE_MAX = 1048576
    SECTIONS = 4

cdef struct section_t:
    uint64_t offset
    uint64_t size


cdef int refuse(header_t* h, const char* reason) noexcept nogil:
    h.reason = reason
    return -EUCLEAN


cdef bint sections_fit(const fvd_header_t* f, uint64_t length) noexcept nogil:
    """Header, bitmap, journal and data: page-aligned, disjoint, inside the file."""
    cdef section_t[4] s
    cdef int i, j
    s[0] = section_t(0, f.header_size)
    s[1] = section_t(f.bitmap_offset, f.bitmap_size)
    s[2] = section_t(f.journal_offset, f.journal_size)
    s[3] = section_t(f.data_offset, f.virtual_disk_size)
    for i in range(SECTIONS):
        if s[i].size == 0:
            continue
        if s[i].offset % PAGE or s[i].offset > length or s[i].size > length - s[i].offset:
            return False
        if i < 3 and s[i].size % PAGE:
            return False
        for j in range(i):
            if (s[j].size and s[i].offset < s[j].offset + s[j].size
                    and s[j].offset < s[i].offset + s[i].size):
                return False
    return True


cdef int validate(header_t* h, uint64_t length) noexcept nogil:
    cdef fvd_header_t* f = &h.fields
    cdef int i
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
    if f.stable_journal_epoch >> 62:
        return refuse(h, b"bad stable_journal_epoch")
    if f.data_file[0]:
        return refuse(h, b"separate data files are not supported by this version")
    if f.table_offset or f.table_size:
        return refuse(h, b"compact images are not supported by this version")
    if f.data_offset == 0:
        return refuse(h, b"bad data_offset")
    if f.base_img_size:
        if f.base_img_size > f.virtual_disk_size or f.base_img_size % SECTOR:
            return refuse(h, b"bad base_img_size")
        if f.block_size == 0 or f.block_size % SECTOR or f.block_size > BLOCK_MAX:
            return refuse(h, b"bad block_size")
        if f.bitmap_offset == 0 or f.bitmap_size == 0:
            return refuse(h, b"a base but no bitmap")
        if f.bitmap_size < ((f.base_img_size + f.block_size - 1) // f.block_size + 7) // 8:
            return refuse(h, b"bitmap too small")
        if f.bitmap_size > <uint64_t>1 << 30:
            return refuse(h, b"bitmap above the limit of 1 GiB")
        if f.bytes_per_prefetch == 0 or f.bytes_per_prefetch % f.block_size:
            return refuse(h, b"bytes_per_prefetch is no multiple of block_size")
    elif f.base_img[0] and not f.base_img_fully_prefetched:
        return refuse(h, b"a base of size 0")
    if not sections_fit(f, length):
        return refuse(h, b"sections overlap or leave the file")
    return 0


cdef void load_extension(header_t* h) noexcept nogil:
    """Trust the extension only if its checksum fits and no older writer was here."""
    cdef uint8_t[512] copy
    cdef uint32_t size, crc
    memcpy(&h.extension, h.bytes + FVD_EXTENSION_OFFSET, sizeof(fvd_extension_t))
    size = h.extension.ext_size
    h.trailers = False
    if size < sizeof(fvd_extension_t) or size > 15 * SECTOR - FVD_EXTENSION_OFFSET:
        return
    memcpy(copy, h.bytes + FVD_EXTENSION_OFFSET, size)
    memcpy(&crc, copy + 4, 4)
    memset(copy + 4, 0, 4)
    if (crc32c(0, copy, size) != crc or h.fields.last_open_version < 2
            or h.fields.last_open_version < h.fields.create_version):
        return
    h.trailers = (h.extension.compatible_features & FVD_FEATURE_TRAILERS) != 0


cdef int header_load(header_t* h, storage_t* image) noexcept nogil:
    cdef int rc
    h.reason = NULL
    if image.length < HEADER_BYTES:
        return refuse(h, b"shorter than a header")
    rc = storage_read(image, h.bytes, HEADER_BYTES, 0, 0)
    if rc < 0:
        return rc
    memcpy(&h.fields, h.bytes, sizeof(fvd_header_t))
    rc = validate(h, image.length)
    if rc < 0:
        return rc
    load_extension(h)
    if not h.trailers:
        return refuse(h,
            b"the header's extension is damaged or was left behind by another program")
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


cdef int header_store_clean(header_t* h, storage_t* image, bint clean) noexcept nogil:
    cdef uint32_t v = 1 if clean else 0
    return store_sector(h, image, &v, 4, 2160)


cdef int header_store_epoch(header_t* h, storage_t* image, uint64_t epoch) noexcept nogil:
    return store_sector(h, image, &epoch, 8, 2164)


cdef int header_store_prefetched(header_t* h, storage_t* image) noexcept nogil:
    cdef uint32_t v = 1
    return store_sector(h, image, &v, 4, 3268)


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
