# SPDX-License-Identifier: Apache-2.0
"""Layer 1. The stats page: counters, gauges and log2 latency histograms in shared memory.

The page describes itself (names stand in it), so a reader of another version understands it, and it
outlives the process when it is a file, so counters go on after a worker's death. Every thread adds
to a block of its own (no shared cache lines); a reader sums the blocks. Gauges live in block 0.
Times (T_) are CLOCK_MONOTONIC in ns, 0 = never; each block has its own."""
from libc.stdint cimport int64_t, uint8_t, uint64_t
from .atomics cimport clz64, fetch_add_relaxed, load_relaxed, store_relaxed
from .limits cimport CONNECTIONS_MAX, CREW_MAX
from .sync cimport gate_t
from .trace cimport trace_t

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

cdef enum error_t:                     # what a request that failed is counted as
    ERROR_EIO = 0
    ERROR_ENOSPC = 1
    ERROR_EINVAL = 2
    ERROR_EPERM = 3
    ERROR_BASE = 4                     # the base could not be read
    ERROR_OTHER = 5
    ERROR_KINDS = 6

cdef enum source_t:                    # where the data of a read came from
    SOURCE_IMAGE = 0
    SOURCE_BASE = 1                    # at least in part
    SOURCE_ZERO = 2                    # nothing was read

# Slots of the page. The order is that of ENTRIES in counters.pyx; a native test compares them.
cdef enum slot_t:
    N_REQUESTS = 0                     # + op, 5
    N_BYTES = N_REQUESTS + 5           # + read, write, discard, write_zeroes: 4
    N_ERRORS = N_BYTES + 4             # + op * ERROR_KINDS + error_t: 30
    N_READ_IMAGE = N_ERRORS + 30
    N_READ_BASE
    N_READ_ZERO
    N_COW_FILL_BYTES
    N_COW_FILLS
    N_COR_BYTES
    N_COR_ZERO_BYTES
    N_COR_BLOCKS
    N_COR_ZERO_BLOCKS
    N_COR_SKIPPED_BACKLOG
    N_COR_SKIPPED_BUSY
    N_COR_SKIPPED_NOSPACE
    N_COR_SKIPPED_ERROR
    N_BASE_REQUESTS                    # + cause, 3
    N_BASE_ERRORS = N_BASE_REQUESTS + 3
    N_BASE_BYTES = N_BASE_ERRORS + 3
    N_PREFETCH_BYTES = N_BASE_BYTES + 3
    N_PREFETCH_ZERO_BYTES
    N_PREFETCH_PAUSES_MANUAL
    N_PREFETCH_PAUSES_ERROR            # waits after an error of the base
    N_PREFETCH_PAUSES_SLOW_READ        # random waits: throughput below the minimum
    N_PREFETCH_PAUSES_SLOW_WRITE
    N_PREFETCH_PAUSES_FOREGROUND       # waits for guests, of milliseconds
    N_PREFETCH_PAUSES_BUDGET           # waits for this device's part of the host's budget
    N_PREFETCH_PAUSED_NS
    N_JOURNAL_RECORDS
    N_JOURNAL_BYTES
    N_JOURNAL_COMMITS
    N_JOURNAL_CHECKPOINTS
    N_JOURNAL_REPLAYS
    N_TAKEOVERS                        # opens that went on with a dead process's live state
    N_UNCLEAN_OPENS                    # opens of an image that was not closed clean
    N_IMAGE_WRITE_BYTES
    N_METADATA_WRITE_BYTES
    N_IMAGE_FLUSHES
    N_RECV_CALLS
    N_SEND_CALLS
    N_CREW_REQUESTS
    N_PARKINGS                         # changes that began to wait for space
    N_GROWTHS                          # storage that was asked for, and made longer
    N_GROWTH_ERRORS                    # and not
    N_GROWTH_BYTES
    N_RESIZES                          # of the disk, online
    N_RESIZE_ERRORS
    N_RESIZE_BYTES
    G_IN_FLIGHT
    G_PARKED                           # changes that wait for space
    G_COR_OUTSTANDING
    G_LOCAL_BYTES
    G_BASE_BYTES_LEFT
    G_JOURNAL_USED
    G_JOURNAL_SIZE
    G_JOURNAL_EPOCH
    G_PENDING_BLOCKS
    G_BLOCK_BYTES
    G_PREFETCH_STATE
    G_PREFETCH_RATE                    # bytes a second
    G_PREFETCH_READ_RATE               # moving averages that the minima are compared with
    G_PREFETCH_WRITE_RATE
    G_PREFETCH_WINDOW                  # bytes that may be in flight from the base
    G_FAULT
    G_CONNECTIONS
    G_VIRTUAL_SIZE
    G_BASE_SIZE
    G_STORE_USED                       # bytes of storage that are the image's: metadata and places
    T_BUSY_SINCE                       # arrival of what the thread works on, 0 = idle
    T_PAUSED_SINCE                     # prefetch waits, for a user or a base that failed
    T_BASE_OK                          # the last good answer of the base
    T_BASE_ERROR                       # the last bad one
    T_PREFETCH_DONE                    # when the last block became local
    T_IO_ERROR                         # when a request failed last, but for wrong ones
    H_READ_DURATION                    # + source_t, 3 histograms of HISTOGRAM_SLOTS
    H_IO_DURATION = H_READ_DURATION + 3 * 49  # + op - 1 for the others, 4
    H_BASE_DURATION = H_IO_DURATION + 4 * 49  # + cause, 3
    H_COMMIT_DURATION = H_BASE_DURATION + 3 * 49
    H_CHECKPOINT_DURATION = H_COMMIT_DURATION + 49
    SLOTS = H_CHECKPOINT_DURATION + 49

cdef enum:
    HISTOGRAM_BUCKETS = 48
    HISTOGRAM_SLOTS = 49
    BLOCK_SHARED = 0                   # gauges; callers of the Python face
    BLOCK_KEEPER = 1
    BLOCK_PREFETCH = 2
    BLOCK_CREW = 3                     # + CREW_MAX
    BLOCK_CONNECTION = 163             # + CONNECTIONS_MAX
    BLOCKS = 227
    STATS_BLOCKS_OFFSET = 16384

ctypedef uint64_t block_t              # first slot of one thread's block

cdef struct counters_t:
    uint8_t* page
    size_t page_bytes
    size_t stride                      # bytes from block to block
    trace_t trace                      # this process's own: not in the page

# Map fd (a file of stats_bytes() bytes; what it counted before goes on) or, with fd < 0, private
# memory.
cdef int counters_init(counters_t* c, int fd) noexcept nogil
cdef void counters_free(counters_t* c) noexcept nogil
cdef size_t stats_bytes() noexcept nogil
# The index of a block: the slot of its thread wherever each thread has one.
cdef int counters_index(const counters_t* c, const block_t* b) noexcept nogil
cdef uint64_t counters_sum(const counters_t* c, int slot) noexcept nogil
# Put an event of the thread that counts in n; the caller has asked trace_is_on.
cdef void counters_trace(const counters_t* c, const block_t* n, int kind, int what, uint64_t begin,
        uint64_t end, uint64_t offset, uint64_t length, int result, int source) noexcept nogil

cdef inline block_t* counters_block(const counters_t* c, int index) noexcept nogil:
    return <block_t*>(c.page + STATS_BLOCKS_OFFSET + <size_t>index * c.stride)

cdef inline void count(block_t* b, int slot, uint64_t n) noexcept nogil:
    fetch_add_relaxed(b + slot, n)

cdef inline void gauge_set(const counters_t* c, int slot, uint64_t v) noexcept nogil:
    store_relaxed(counters_block(c, BLOCK_SHARED) + slot, v)

cdef inline void gauge_add(const counters_t* c, int slot, int64_t n) noexcept nogil:
    fetch_add_relaxed(counters_block(c, BLOCK_SHARED) + slot, <uint64_t>n)

cdef inline void observe_many(block_t* b, int first_slot, uint64_t ns, uint64_t n) noexcept nogil:
    """Count n times one duration in a histogram: bucket k holds 2^k <= ns < 2^(k+1)."""
    cdef int k = 63 - clz64(ns | 1)
    if k >= HISTOGRAM_BUCKETS:
        k = HISTOGRAM_BUCKETS - 1
    fetch_add_relaxed(b + first_slot + k, n)
    fetch_add_relaxed(b + first_slot + HISTOGRAM_BUCKETS, ns * n)

cdef inline void observe(block_t* b, int first_slot, uint64_t ns) noexcept nogil:
    observe_many(b, first_slot, ns, 1)

cdef inline void note_time(block_t* b, int slot, uint64_t ns) noexcept nogil:
    store_relaxed(b + slot, ns)

cdef inline void base_answered(block_t* b, int cause, uint64_t begin, uint64_t end) noexcept nogil:
    """A good answer of the base, waited for from begin to end."""
    observe(b, H_BASE_DURATION + cause * HISTOGRAM_SLOTS, end - begin)
    note_time(b, T_BASE_OK, end)

cdef struct progress_t:                # of one thread's block, before a request
    uint64_t image_bytes
    uint64_t base_bytes
    uint64_t zero_bytes
    uint64_t base_errors

cdef inline progress_t progress_of(const block_t* b) noexcept nogil:
    return progress_t(load_relaxed(b + N_READ_IMAGE), load_relaxed(b + N_READ_BASE),
                      load_relaxed(b + N_READ_ZERO),
                      load_relaxed(b + N_BASE_ERRORS) + load_relaxed(b + N_BASE_ERRORS + 1))

cdef enum:
    TALLY_SHIFT = 40                   # the bytes of a batch need fewer bits

cdef struct tally_t:                   # requests that one thread served and did not count yet
    uint64_t reads                     # 1 << TALLY_SHIFT for each, and their bytes
    uint64_t writes                    # likewise
    uint64_t zero_reads                # of the reads, those that read nothing
    uint64_t zero_bytes
    uint64_t base_reads                # those that took something from the base
    uint64_t base_bytes

cdef inline void tally_read(tally_t* t, uint64_t length) noexcept nogil:
    t.reads += (<uint64_t>1 << TALLY_SHIFT) + length

cdef inline void tally_parts(tally_t* t, uint64_t local, uint64_t zeros,
        uint64_t from_base) noexcept nogil:
    """The parts of such a read, where not all is from the image: local bytes, of which zeros."""
    if zeros or from_base:
        t.zero_bytes += zeros
        t.base_bytes += from_base
        t.base_reads += from_base != 0
        t.zero_reads += from_base == 0 and zeros == local

cdef inline void tally_write(tally_t* t, uint64_t length) noexcept nogil:
    t.writes += (<uint64_t>1 << TALLY_SHIFT) + length

# Count what was tallied as requests that arrived at begin_ns and end now; the tally is empty then.
cdef void tally_count(tally_t* t, block_t* b, uint64_t begin_ns, gate_t* gate) noexcept nogil

# Count a finished request; before: progress_of its block when it began.
cdef void count_request(block_t* b, const progress_t* before, int op, uint64_t length, int result,
        uint64_t duration_ns) noexcept nogil
