/* SPDX-License-Identifier: Apache-2.0 */
#ifndef FVD_ATOMICS_H
#define FVD_ATOMICS_H
#include <stdint.h>

/* Where threads meet without a lock, a scheduler may want to choose who goes first. Builds with
 * FVD_STEPS, which are never shipped, call fvd_step before each such operation; the simulator sets
 * it in every module. p: the word; change: whether it is stored to. Relaxed counting is no step. */
#ifdef FVD_STEPS
void (*fvd_step)(const void *p, int change);
#define FVD_STEP(p, change) do { if (fvd_step) fvd_step(p, change); } while (0)
#else
#define FVD_STEP(p, change) do { } while (0)
#endif

static inline uint64_t fvd_load_relaxed(const uint64_t *p)
{
    return __atomic_load_n(p, __ATOMIC_RELAXED);
}

static inline uint64_t fvd_load_acquire(const uint64_t *p)
{
    FVD_STEP(p, 0);
    return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}

static inline void fvd_store_relaxed(uint64_t *p, uint64_t v)
{
    __atomic_store_n(p, v, __ATOMIC_RELAXED);
}

static inline void fvd_store_release(uint64_t *p, uint64_t v)
{
    FVD_STEP(p, 1);
    __atomic_store_n(p, v, __ATOMIC_RELEASE);
}

static inline uint64_t fvd_fetch_add_relaxed(uint64_t *p, uint64_t v)
{
    return __atomic_fetch_add(p, v, __ATOMIC_RELAXED);
}

static inline uint64_t fvd_fetch_sub_relaxed(uint64_t *p, uint64_t v)
{
    return __atomic_fetch_sub(p, v, __ATOMIC_RELAXED);
}

static inline uint64_t fvd_fetch_sub_acq_rel(uint64_t *p, uint64_t v)
{
    FVD_STEP(p, 1);
    return __atomic_fetch_sub(p, v, __ATOMIC_ACQ_REL);
}

static inline uint64_t fvd_fetch_or_release(uint64_t *p, uint64_t v)
{
    FVD_STEP(p, 1);
    return __atomic_fetch_or(p, v, __ATOMIC_RELEASE);
}

static inline uint64_t fvd_fetch_and_acquire(uint64_t *p, uint64_t v)
{
    FVD_STEP(p, 1);
    return __atomic_fetch_and(p, v, __ATOMIC_ACQUIRE);
}

static inline uint64_t fvd_exchange_acq_rel(uint64_t *p, uint64_t v)
{
    FVD_STEP(p, 1);
    return __atomic_exchange_n(p, v, __ATOMIC_ACQ_REL);
}

static inline int fvd_compare_swap_acq_rel(uint64_t *p, uint64_t expected, uint64_t v)
{
    FVD_STEP(p, 1);
    return __atomic_compare_exchange_n(p, &expected, v, 0, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED);
}

static inline uint32_t fvd_load_acquire32(const uint32_t *p)
{
    FVD_STEP(p, 0);
    return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}

static inline void fvd_store_release32(uint32_t *p, uint32_t v)
{
    FVD_STEP(p, 1);
    __atomic_store_n(p, v, __ATOMIC_RELEASE);
}

static inline uint8_t fvd_load_relaxed8(const uint8_t *p)
{
    return __atomic_load_n(p, __ATOMIC_RELAXED);
}

static inline void fvd_store_relaxed8(uint8_t *p, uint8_t v)
{
    __atomic_store_n(p, v, __ATOMIC_RELAXED);
}

static inline void fvd_fence(void)
{
    FVD_STEP(0, 0);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

static inline int fvd_ctz64(uint64_t v) { return __builtin_ctzll(v); }
static inline int fvd_clz64(uint64_t v) { return __builtin_clzll(v); }
static inline uint64_t fvd_popcount64(uint64_t v) { return (uint64_t)__builtin_popcountll(v); }

#endif
