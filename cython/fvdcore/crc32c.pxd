# SPDX-License-Identifier: Apache-2.0
"""Layer 0. CRC-32C; crc 0 starts, calls chain: crc32c(crc32c(0, a), b) == crc32c(0, a + b)."""
from libc.stdint cimport uint32_t

cdef uint32_t crc32c(uint32_t crc, const void* data, size_t length) noexcept nogil
cdef uint32_t crc32c_reference(uint32_t crc, const void* data, size_t length) noexcept nogil
