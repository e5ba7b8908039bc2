# SPDX-License-Identifier: Apache-2.0
"""Layer 2. The structures on disk (layout.h) and their constants."""
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

cdef extern from "layout.h" nogil:
    ctypedef struct fvd_header_t:
        uint32_t magic, header_size, create_version, last_open_version
        uint64_t virtual_disk_size, data_offset
        char* data_file
        char* data_file_fmt
        char* base_img
        uint64_t base_img_size, bitmap_offset, bitmap_size, block_size, journal_offset, journal_size
        uint32_t clean_shutdown
        uint64_t stable_journal_epoch, journal_buf_size, journal_clean_buf_period
        uint64_t table_offset, table_size, chunk_size, storage_grow_unit
        uint32_t chunks_relocated, copy_on_read
        uint64_t max_outstanding_copy_on_read_data
        int64_t prefetch_start_delay
        uint32_t base_img_fully_prefetched, num_prefetch_slots
        uint64_t bytes_per_prefetch
        uint64_t prefetch_read_throughput_measure_time, prefetch_write_throughput_measure_time
        uint64_t prefetch_min_read_throughput, prefetch_min_write_throughput
        uint64_t prefetch_max_read_throughput, prefetch_max_write_throughput
        uint64_t prefetch_throttle_time
        uint32_t need_zero_init
        uint8_t* incompatible_features
    ctypedef struct fvd_extension_t:
        uint32_t ext_size, ext_crc32c
        uint8_t* image_uuid
        uint8_t* open_session
        uint8_t* boot_id
        uint64_t create_time, compatible_features, base_length
        uint8_t base_kind
        uint8_t* base_id
    ctypedef struct fvd_bitmap_record_t:
        uint32_t type, sectors
        uint64_t first_sector
    ctypedef struct fvd_table_record_t:
        uint32_t type
        uint64_t epoch
        uint32_t count, first_index
    ctypedef struct fvd_trailer_t:
        uint32_t magic, crc
        uint64_t epoch, sequence
    uint32_t FVD_MAGIC, FVD_VERSION, FVD_BITMAP_RECORD, FVD_TABLE_RECORD, FVD_TRAILER_MAGIC
    int FVD_RECORDS_BYTES, FVD_TRAILER_OFFSET, FVD_EXTENSION_OFFSET
    uint64_t FVD_FEATURE_TRAILERS, FVD_FEATURE_STAGED
