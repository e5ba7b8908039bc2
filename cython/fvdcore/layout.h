/* SPDX-License-Identifier: Apache-2.0
 * The bytes on disk (fvdengine/FORMAT.md sections 1 and 4) as C sees them. Written independently of
 * the Python codec; a test compares the two field by field. Fields are copied with memcpy semantics
 * (packed), never through a cast pointer: past offset 2164 most are only 4-byte aligned. */
#ifndef FVD_LAYOUT_H
#define FVD_LAYOUT_H
#include <stddef.h>
#include <stdint.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the engine reads and writes little-endian structures in place"
#endif

typedef struct __attribute__((packed)) {
    uint32_t magic;
    uint32_t header_size;
    uint32_t create_version;
    uint32_t last_open_version;
    uint64_t virtual_disk_size;
    uint64_t data_offset;
    char data_file[1024];
    char data_file_fmt[16];
    char base_img[1024];
    char base_img_fmt[16];
    uint64_t base_img_size;
    uint64_t bitmap_offset;
    uint64_t bitmap_size;
    uint64_t block_size;
    uint64_t journal_offset;
    uint64_t journal_size;
    uint32_t clean_shutdown;
    uint64_t stable_journal_epoch;
    uint64_t journal_buf_size;
    uint64_t journal_clean_buf_period;
    uint64_t table_offset;
    uint64_t table_size;
    uint64_t chunk_size;
    uint64_t storage_grow_unit;
    char add_storage_cmd[1024];
    uint32_t chunks_relocated;
    uint32_t copy_on_read;
    uint64_t max_outstanding_copy_on_read_data;
    int64_t prefetch_start_delay;
    uint32_t base_img_fully_prefetched;
    uint32_t num_prefetch_slots;
    uint64_t bytes_per_prefetch;
    uint64_t prefetch_read_throughput_measure_time;
    uint64_t prefetch_write_throughput_measure_time;
    uint64_t prefetch_min_read_throughput;
    uint64_t prefetch_min_write_throughput;
    uint64_t prefetch_max_read_throughput;
    uint64_t prefetch_max_write_throughput;
    uint64_t prefetch_throttle_time;
    uint32_t need_zero_init;
    uint8_t incompatible_features[4096];
} fvd_header_t;

typedef struct __attribute__((packed)) {
    uint32_t ext_size;
    uint32_t ext_crc32c;
    uint8_t image_uuid[16];
    uint8_t open_session[16];
    uint8_t boot_id[16];
    uint64_t create_time;
    uint64_t compatible_features;
    uint64_t base_length;
    uint8_t base_kind;
    uint8_t shrink_size[7]; /* the engine leaves it as it is */
    uint8_t base_id[32];
} fvd_extension_t;

typedef struct __attribute__((packed)) {
    uint32_t type;
    uint32_t sectors;
    uint64_t first_sector;
} fvd_bitmap_record_t;

typedef struct __attribute__((packed)) {
    uint32_t type;
    uint64_t epoch;
    uint32_t count;
    uint32_t first_index; /* count entries of u32 follow */
} fvd_table_record_t;

typedef struct __attribute__((packed)) {
    uint32_t magic;
    uint32_t crc;
    uint64_t epoch;
    uint64_t sequence;
} fvd_trailer_t;

#define FVD_MAGIC 0x00445646u
#define FVD_VERSION 2u
#define FVD_BITMAP_RECORD 0x3F2AB8EDu
#define FVD_TABLE_RECORD 0xB4E6F7ACu
#define FVD_TRAILER_MAGIC 0x544A5646u
#define FVD_RECORDS_BYTES 484 /* records stand in bytes 0..483 of a sector */
#define FVD_TRAILER_OFFSET 488
#define FVD_EXTENSION_OFFSET 7440
#define FVD_FEATURE_TRAILERS 1u
#define FVD_FEATURE_STAGED 2u

#define FVD_AT(field, offset) \
    _Static_assert(offsetof(fvd_header_t, field) == (offset), "offset of " #field)
FVD_AT(virtual_disk_size, 16);
FVD_AT(data_file, 32);
FVD_AT(base_img, 1072);
FVD_AT(base_img_size, 2112);
FVD_AT(block_size, 2136);
FVD_AT(journal_offset, 2144);
FVD_AT(clean_shutdown, 2160);
FVD_AT(stable_journal_epoch, 2164);
FVD_AT(table_offset, 2188);
FVD_AT(add_storage_cmd, 2220);
FVD_AT(copy_on_read, 3248);
FVD_AT(prefetch_start_delay, 3260);
FVD_AT(base_img_fully_prefetched, 3268);
FVD_AT(bytes_per_prefetch, 3276);
FVD_AT(prefetch_throttle_time, 3332);
FVD_AT(need_zero_init, 3340);
FVD_AT(incompatible_features, 3344);
_Static_assert(sizeof(fvd_header_t) == FVD_EXTENSION_OFFSET, "header size");
/* The extension lies wholly inside sector 14, so that one sector write replaces it. */
_Static_assert(FVD_EXTENSION_OFFSET + sizeof(fvd_extension_t) <= 15 * 512,
    "extension in sector 14");
_Static_assert(sizeof(fvd_trailer_t) == 24, "trailer");
#endif
