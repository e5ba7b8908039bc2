# SPDX-License-Identifier: Apache-2.0
"""Layer 0. Atomic operations with the memory order in the name, and bit counting."""
from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef extern from "atomics.h" nogil:
    uint64_t load_relaxed "fvd_load_relaxed"(const uint64_t* p) noexcept
    uint64_t load_acquire "fvd_load_acquire"(const uint64_t* p) noexcept
    void store_relaxed "fvd_store_relaxed"(uint64_t* p, uint64_t v) noexcept
    void store_release "fvd_store_release"(uint64_t* p, uint64_t v) noexcept
    uint64_t fetch_add_relaxed "fvd_fetch_add_relaxed"(uint64_t* p, uint64_t v) noexcept
    uint64_t fetch_sub_relaxed "fvd_fetch_sub_relaxed"(uint64_t* p, uint64_t v) noexcept
    uint64_t fetch_sub_acq_rel "fvd_fetch_sub_acq_rel"(uint64_t* p, uint64_t v) noexcept
    uint64_t fetch_or_release "fvd_fetch_or_release"(uint64_t* p, uint64_t v) noexcept
    uint64_t fetch_and_acquire "fvd_fetch_and_acquire"(uint64_t* p, uint64_t v) noexcept
    uint64_t exchange_acq_rel "fvd_exchange_acq_rel"(uint64_t* p, uint64_t v) noexcept
    # Did *p hold expected, and holds v now?
    bint compare_swap_acq_rel "fvd_compare_swap_acq_rel"(uint64_t* p, uint64_t expected,
        uint64_t v) noexcept
    uint32_t load_acquire32 "fvd_load_acquire32"(const uint32_t* p) noexcept
    void store_release32 "fvd_store_release32"(uint32_t* p, uint32_t v) noexcept
    uint8_t load_relaxed8 "fvd_load_relaxed8"(const uint8_t* p) noexcept
    void store_relaxed8 "fvd_store_relaxed8"(uint8_t* p, uint8_t v) noexcept
    void fence "fvd_fence"() noexcept
    int ctz64 "fvd_ctz64"(uint64_t v) noexcept
    int clz64 "fvd_clz64"(uint64_t v) noexcept
    uint64_t popcount64 "fvd_popcount64"(uint64_t v) noexcept
