# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Layer 5. The engine's CRC-32C for Python: a journal of a gigabyte has two million sums."""
from libc.stdint cimport uint32_t, uint8_t

from .crc32c cimport crc32c as native_crc32c


def crc32c(bytes data, uint32_t value=0):
    """CRC-32C of data, continued from the sum value of what came before; 0 begins."""
    cdef const uint8_t* begin = data
    return native_crc32c(value, begin, len(data))
