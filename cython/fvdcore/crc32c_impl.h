/* SPDX-License-Identifier: Apache-2.0 */
#ifndef FVD_CRC32C_H
#define FVD_CRC32C_H
#include <stddef.h>
#include <stdint.h>
uint32_t fvd_crc32c(uint32_t crc, const void *data, size_t length);
uint32_t fvd_crc32c_reference(uint32_t crc, const void *data, size_t length);
#endif
