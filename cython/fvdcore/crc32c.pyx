# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Layer 0. CRC-32C over the C implementation, which picks the processor's instruction."""
from libc.stdint cimport uint32_t

cdef extern from "crc32c_impl.h" nogil:
    uint32_t fvd_crc32c(uint32_t crc, const void* data, size_t length) noexcept
    uint32_t fvd_crc32c_reference(uint32_t crc, const void* data, size_t length) noexcept


cdef uint32_t crc32c(uint32_t crc, const void* data, size_t length) noexcept nogil:
    return fvd_crc32c(crc, data, length)


cdef uint32_t crc32c_reference(uint32_t crc, const void* data, size_t length) noexcept nogil:
    return fvd_crc32c_reference(crc, data, length)
