# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Where the C structures of the format have their fields, and the header functions."""
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memset

from fvdcore.header cimport (
    header_load, header_store_clean, header_store_epoch, header_store_prefetched,
    header_store_session, header_store_version, header_t,
)
from probe_storage cimport Storage

cdef extern from *:
    """
    #include "layout.h"
    typedef struct { const char *name; uint32_t offset, size; } fvd_field_t;
    #define H(f) {#f, offsetof(fvd_header_t, f), sizeof(((fvd_header_t *)0)->f)}
    #define E(f) {#f, offsetof(fvd_extension_t, f), sizeof(((fvd_extension_t *)0)->f)}
    #define T(f) {#f, offsetof(fvd_trailer_t, f), sizeof(((fvd_trailer_t *)0)->f)}
    #define R(f) {#f, offsetof(fvd_bitmap_record_t, f), sizeof(((fvd_bitmap_record_t *)0)->f)}
    static const fvd_field_t header_fields[] = {
        H(magic), H(header_size), H(create_version), H(last_open_version), H(virtual_disk_size),
        H(data_offset), H(data_file), H(data_file_fmt), H(base_img), H(base_img_fmt),
        H(base_img_size), H(bitmap_offset), H(bitmap_size), H(block_size), H(journal_offset),
        H(journal_size), H(clean_shutdown), H(stable_journal_epoch), H(journal_buf_size),
        H(journal_clean_buf_period), H(table_offset), H(table_size), H(chunk_size),
        H(storage_grow_unit), H(add_storage_cmd), H(chunks_relocated), H(copy_on_read),
        H(max_outstanding_copy_on_read_data), H(prefetch_start_delay),
        H(base_img_fully_prefetched), H(num_prefetch_slots), H(bytes_per_prefetch),
        H(prefetch_read_throughput_measure_time), H(prefetch_write_throughput_measure_time),
        H(prefetch_min_read_throughput), H(prefetch_min_write_throughput),
        H(prefetch_max_read_throughput), H(prefetch_max_write_throughput),
        H(prefetch_throttle_time), H(need_zero_init), H(incompatible_features), {0, 0, 0}};
    static const fvd_field_t extension_fields[] = {
        E(ext_size), E(ext_crc32c), E(image_uuid), E(open_session), E(boot_id), E(create_time),
        E(compatible_features), E(base_length), E(base_kind), E(shrink_size),
        E(base_id), {0, 0, 0}};
    static const fvd_field_t trailer_fields[] = {
        T(magic), T(crc), T(epoch), T(sequence), {0, 0, 0}};
    static const fvd_field_t record_fields[] = {
        R(type), R(sectors), R(first_sector), {0, 0, 0}};
    """
    ctypedef struct fvd_field_t:
        const char* name
        uint32_t offset
        uint32_t size
    const fvd_field_t* header_fields
    const fvd_field_t* extension_fields
    const fvd_field_t* trailer_fields
    const fvd_field_t* record_fields
    int SIZE_H "((int)sizeof(fvd_header_t))"
    int SIZE_E "((int)sizeof(fvd_extension_t))"
    int SIZE_T "((int)sizeof(fvd_trailer_t))"
    int SIZE_R "((int)sizeof(fvd_bitmap_record_t))"
    long FVD_MAGIC, FVD_VERSION, FVD_BITMAP_RECORD, FVD_TABLE_RECORD, FVD_TRAILER_MAGIC
    long FVD_RECORDS_BYTES, FVD_TRAILER_OFFSET, FVD_EXTENSION_OFFSET, FVD_FEATURE_TRAILERS


cdef dict table(const fvd_field_t* f):
    found = {}
    while f.name != NULL:
        found[f.name.decode()] = (f.offset, f.size)
        f += 1
    return found


def fields():
    """Structure -> field -> (offset, size)."""
    return {"header": table(header_fields), "extension": table(extension_fields),
            "trailer": table(trailer_fields), "record": table(record_fields)}


def sizes():
    """Structure -> bytes."""
    return {"header": SIZE_H, "extension": SIZE_E, "trailer": SIZE_T, "record": SIZE_R}


def constants():
    """The format's numbers as C has them."""
    return {
        "magic": FVD_MAGIC, "version": FVD_VERSION, "bitmap_record": FVD_BITMAP_RECORD,
        "table_record": FVD_TABLE_RECORD, "trailer_magic": FVD_TRAILER_MAGIC,
        "records_bytes": FVD_RECORDS_BYTES, "trailer_offset": FVD_TRAILER_OFFSET,
        "extension_offset": FVD_EXTENSION_OFFSET, "feature_trailers": FVD_FEATURE_TRAILERS,
    }


cdef class Header:
    """A header_t loaded from a Storage."""

    cdef header_t h
    cdef Storage storage

    def __init__(self, Storage storage):
        memset(&self.h, 0, sizeof(header_t))
        self.storage = storage

    def load(self):
        """0 or a negative errno."""
        return header_load(&self.h, self.storage.raw(), self.storage.raw())

    @property
    def reason(self):
        return self.h.reason.decode() if self.h.reason != NULL else None

    @property
    def trusted(self):
        return bool(self.h.trusted)

    @property
    def trailers(self):
        return bool(self.h.trailers)

    def bytes(self):
        """The copy in memory as it would stand on disk."""
        return (<char*>&self.h.bytes[0])[:8192]

    def raw_fields(self):
        """The parsed structure's bytes."""
        return (<char*>&self.h.fields)[:SIZE_H]

    def raw_extension(self):
        return (<char*>&self.h.extension)[:SIZE_E]

    def numbers(self):
        """What the engine itself reads from the structure, through Cython's declarations."""
        f = &self.h.fields
        return {
            "magic": f.magic, "header_size": f.header_size, "create_version": f.create_version,
            "last_open_version": f.last_open_version, "virtual_disk_size": f.virtual_disk_size,
            "data_offset": f.data_offset, "base_img_size": f.base_img_size,
            "bitmap_offset": f.bitmap_offset, "bitmap_size": f.bitmap_size,
            "block_size": f.block_size, "journal_offset": f.journal_offset,
            "journal_size": f.journal_size, "clean_shutdown": f.clean_shutdown,
            "stable_journal_epoch": f.stable_journal_epoch,
            "journal_buf_size": f.journal_buf_size,
            "journal_clean_buf_period": f.journal_clean_buf_period,
            "table_offset": f.table_offset, "table_size": f.table_size,
            "chunk_size": f.chunk_size, "storage_grow_unit": f.storage_grow_unit,
            "chunks_relocated": f.chunks_relocated, "copy_on_read": f.copy_on_read,
            "max_outstanding_copy_on_read_data": f.max_outstanding_copy_on_read_data,
            "prefetch_start_delay": f.prefetch_start_delay,
            "base_img_fully_prefetched": f.base_img_fully_prefetched,
            "num_prefetch_slots": f.num_prefetch_slots,
            "bytes_per_prefetch": f.bytes_per_prefetch, "need_zero_init": f.need_zero_init,
            "base_img": f.base_img.decode(), "data_file": f.data_file.decode(),
        }

    def store_clean(self, bint clean):
        return header_store_clean(&self.h, self.storage.raw(), clean)

    def store_epoch(self, uint64_t epoch):
        return header_store_epoch(&self.h, self.storage.raw(), epoch)

    def store_prefetched(self):
        return header_store_prefetched(&self.h, self.storage.raw())

    def store_version(self):
        return header_store_version(&self.h, self.storage.raw())

    def store_session(self, bytes boot_id, bint keep):
        return header_store_session(&self.h, self.storage.raw(), <const uint8_t*><char*>boot_id,
                                    keep)
