# SPDX-License-Identifier: Apache-2.0
"""Layer 1. The stats page: counters, gauges and log2 latency histograms in shared memory.

The page describes itself (names stand in it), so a reader of another version understands it, and it
outlives the process when it is a file, so counters go on after a worker's death. Every thread adds
to a block of its own (no shared cache lines); a reader sums the blocks. Gauges live in block 0."""
from libc.stdint cimport int64_t, uint8_t, uint64_t
from .atomics cimport clz64, fetch_add_relaxed, store_relaxed
from .limits cimport CONNECTIONS_MAX, CREW_MAX

cdef enum op_t:
    OP_READ = 0
    OP_WRITE = 1
    OP_FLUSH = 2
    OP_DISCARD = 3
    OP_WRITE_ZEROES = 4
    OP_STATUS = 5

cdef enum cause_t:                     # why the base is read
    CAUSE_DEMAND = 0
    CAUSE_COW = 1
    CAUSE_PREFETCH = 2

# Slots of the page. The order is that of ENTRIES in counters.pyx; a native test compares them.
cdef enum slot_t:
    N_REQUESTS = 0                     # + op, 5
    N_BYTES = 5                        # + read, write, discard, write_zeroes: 4
    N_ERRORS = 9                       # + eio, enospc, einval, eperm, other: 5
    N_READ_IMAGE = 14
    N_READ_BASE = 15
    N_READ_ZERO = 16
    N_COW_FILL_BYTES = 17
    N_COW_FILLS = 18
    N_COR_BYTES = 19
    N_COR_ZERO_BYTES = 20
    N_COR_SKIPPED_BACKLOG = 21
    N_COR_SKIPPED_BUSY = 22
    N_COR_SKIPPED_ERROR = 23
    N_BASE_REQUESTS = 24               # + cause, 3
    N_BASE_ERRORS = 27
    N_BASE_BYTES = 30
    N_PREFETCH_BYTES = 33
    N_PREFETCH_ZERO_BYTES = 34
    N_JOURNAL_RECORDS = 35
    N_JOURNAL_BYTES = 36
    N_JOURNAL_COMMITS = 37
    N_JOURNAL_CHECKPOINTS = 38
    N_JOURNAL_REPLAYS = 39
    N_IMAGE_WRITE_BYTES = 40
    N_METADATA_WRITE_BYTES = 41
    N_IMAGE_FLUSHES = 42
    N_RECV_CALLS = 43
    N_SEND_CALLS = 44
    N_CREW_REQUESTS = 45
    G_IN_FLIGHT = 46
    G_COR_OUTSTANDING = 47
    G_LOCAL_BYTES = 48
    G_BASE_BYTES_LEFT = 49
    G_JOURNAL_USED = 50
    G_JOURNAL_SIZE = 51
    G_JOURNAL_EPOCH = 52
    G_PENDING_BLOCKS = 53
    G_PREFETCH_STATE = 54
    G_FAULT = 55
    G_CONNECTIONS = 56
    G_VIRTUAL_SIZE = 57
    G_BASE_SIZE = 58
    H_IO_DURATION = 59                 # + op, 5 histograms of HISTOGRAM_SLOTS
    H_BASE_DURATION = 304              # + cause, 3
    H_COMMIT_DURATION = 451
    H_CHECKPOINT_DURATION = 500
    SLOTS = 549

cdef enum:
    HISTOGRAM_BUCKETS = 48
    HISTOGRAM_SLOTS = 49
    BLOCK_SHARED = 0                   # gauges; callers of the Python face
    BLOCK_KEEPER = 1
    BLOCK_PREFETCH = 2
    BLOCK_CREW = 3                     # + CREW_MAX
    BLOCK_CONNECTION = 35              # + CONNECTIONS_MAX
    BLOCKS = 99
    STATS_BLOCKS_OFFSET = 12288

ctypedef uint64_t block_t              # first slot of one thread's block

cdef struct counters_t:
    uint8_t* page
    size_t page_bytes
    size_t stride                      # bytes from block to block

# Map fd (a file of stats_bytes() bytes; what it counted before goes on) or, with fd < 0, private
# memory.
cdef int counters_init(counters_t* c, int fd) noexcept nogil
cdef void counters_free(counters_t* c) noexcept nogil
cdef size_t stats_bytes() noexcept nogil
cdef uint64_t counters_sum(const counters_t* c, int slot) noexcept nogil

cdef inline block_t* counters_block(const counters_t* c, int index) noexcept nogil:
    return <block_t*>(c.page + STATS_BLOCKS_OFFSET + <size_t>index * c.stride)

cdef inline void count(block_t* b, int slot, uint64_t n) noexcept nogil:
    fetch_add_relaxed(b + slot, n)

cdef inline void gauge_set(const counters_t* c, int slot, uint64_t v) noexcept nogil:
    store_relaxed(counters_block(c, BLOCK_SHARED) + slot, v)

cdef inline void gauge_add(const counters_t* c, int slot, int64_t n) noexcept nogil:
    fetch_add_relaxed(counters_block(c, BLOCK_SHARED) + slot, <uint64_t>n)

cdef inline void observe(block_t* b, int first_slot, uint64_t ns) noexcept nogil:
    """Count one duration in a histogram: bucket k holds 2^k <= ns < 2^(k+1)."""
    cdef int k = 63 - clz64(ns | 1)
    if k >= HISTOGRAM_BUCKETS:
        k = HISTOGRAM_BUCKETS - 1
    fetch_add_relaxed(b + first_slot + k, 1)
    fetch_add_relaxed(b + first_slot + HISTOGRAM_BUCKETS, ns)
