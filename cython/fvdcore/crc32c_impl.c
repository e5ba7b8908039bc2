/* SPDX-License-Identifier: Apache-2.0
 * CRC-32C (Castagnoli, reflected polynomial 0x82F63B78): a table walk, and the processor's
 * instruction where it exists. Both take and return the finished value, so calls chain. */
#include "crc32c_impl.h"
#include <string.h>

static uint32_t table[256];

__attribute__((constructor)) static void fill_table(void)
{
    for (uint32_t n = 0; n < 256; n++) {
        uint32_t c = n;
        for (int k = 0; k < 8; k++)
            c = (c & 1) ? 0x82F63B78u ^ (c >> 1) : c >> 1;
        table[n] = c;
    }
}

uint32_t fvd_crc32c_reference(uint32_t crc, const void *data, size_t length)
{
    const uint8_t *p = data;
    uint32_t c = ~crc;
    while (length--)
        c = table[(c ^ *p++) & 0xff] ^ (c >> 8);
    return ~c;
}

#if defined(__x86_64__)
__attribute__((target("sse4.2")))
static uint32_t crc32c_sse(uint32_t crc, const void *data, size_t length)
{
    const uint8_t *p = data;
    uint64_t c = (uint32_t)~crc;
    while (length >= 8) {
        uint64_t word;
        memcpy(&word, p, 8);
        c = __builtin_ia32_crc32di(c, word);
        p += 8;
        length -= 8;
    }
    while (length--)
        c = __builtin_ia32_crc32qi((uint32_t)c, *p++);
    return ~(uint32_t)c;
}
#endif

uint32_t fvd_crc32c(uint32_t crc, const void *data, size_t length)
{
#if defined(__x86_64__)
    if (__builtin_cpu_supports("sse4.2"))
        return crc32c_sse(crc, data, length);
#endif
    return fvd_crc32c_reference(crc, data, length);
}
