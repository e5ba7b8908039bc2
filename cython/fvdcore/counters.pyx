# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Layer 1. The stats page: layout and names. See counters.pxd."""
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset, strlen
from libc.errno cimport errno
from .atomics cimport load_relaxed
from .checks cimport invariant
from .limits cimport PAGE
from .trace cimport trace_event_t, trace_free, trace_init, trace_put, trace_t
from .sync cimport clock_now, gate_t
from .syscalls cimport (
    EINVAL, EIO, ENOSPC, EPERM, EROFS, ESHUTDOWN, MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE,
    MAP_SHARED, PROT_READ, PROT_WRITE, c_mmap, c_munmap, file_length,
)

cdef enum:
    KIND_COUNTER = 0
    KIND_GAUGE = 1
    KIND_HISTOGRAM = 2
    KIND_OLDEST = 3                    # a time of each thread; the smallest that is not 0 counts
    KIND_NEWEST = 4                    # a time of each thread; the largest counts
    ENTRY_BYTES = 64
    NAME_BYTES = 52

cdef extern from *:
    """
    typedef struct { const char *name; uint32_t kind; } fvd_entry_t;
    #define ERRORS_OF(op) \
        {"io_errors_" op "_eio", 0}, {"io_errors_" op "_enospc", 0}, \
        {"io_errors_" op "_einval", 0}, {"io_errors_" op "_eperm", 0}, \
        {"io_errors_" op "_base", 0}, {"io_errors_" op "_other", 0}
    static const fvd_entry_t fvd_entries[] = {
        {"io_requests_read", 0}, {"io_requests_write", 0}, {"io_requests_flush", 0},
        {"io_requests_discard", 0}, {"io_requests_write_zeroes", 0},
        {"io_bytes_read", 0}, {"io_bytes_write", 0}, {"io_bytes_discard", 0},
        {"io_bytes_write_zeroes", 0},
        ERRORS_OF("read"), ERRORS_OF("write"), ERRORS_OF("flush"), ERRORS_OF("discard"),
        ERRORS_OF("write_zeroes"),
        {"read_bytes_image", 0}, {"read_bytes_base", 0}, {"read_bytes_zero", 0},
        {"cow_fill_bytes", 0}, {"cow_fills", 0},
        {"cor_bytes", 0}, {"cor_zero_bytes", 0}, {"cor_blocks", 0}, {"cor_zero_blocks", 0},
        {"cor_skipped_bytes_backlog", 0}, {"cor_skipped_bytes_busy", 0},
        {"cor_skipped_bytes_nospace", 0}, {"cor_skipped_bytes_error", 0},
        {"base_requests_demand", 0}, {"base_requests_cow", 0}, {"base_requests_prefetch", 0},
        {"base_errors_demand", 0}, {"base_errors_cow", 0}, {"base_errors_prefetch", 0},
        {"base_bytes_demand", 0}, {"base_bytes_cow", 0}, {"base_bytes_prefetch", 0},
        {"prefetch_bytes", 0}, {"prefetch_zero_bytes", 0},
        {"prefetch_pauses_manual", 0}, {"prefetch_pauses_error", 0},
        {"prefetch_pauses_slow_read", 0}, {"prefetch_pauses_slow_write", 0},
        {"prefetch_pauses_foreground", 0}, {"prefetch_pauses_budget", 0},
        {"prefetch_paused_ns", 0},
        {"journal_records", 0}, {"journal_bytes", 0}, {"journal_commits", 0},
        {"journal_checkpoints", 0}, {"journal_replays", 0},
        {"takeovers", 0}, {"unclean_opens", 0},
        {"image_write_bytes", 0}, {"metadata_write_bytes", 0}, {"image_flushes", 0},
        {"recv_calls", 0}, {"send_calls", 0}, {"crew_requests", 0},
        {"parkings", 0}, {"growths", 0}, {"growth_errors", 0}, {"growth_bytes", 0},
        {"resizes", 0}, {"resize_errors", 0}, {"resize_bytes", 0},
        {"io_inflight", 1}, {"io_parked", 1}, {"cor_outstanding_bytes", 1}, {"local_bytes", 1},
        {"base_bytes_left", 1}, {"journal_used_bytes", 1}, {"journal_size_bytes", 1},
        {"journal_epoch", 1}, {"pending_blocks", 1}, {"block_bytes", 1}, {"prefetch_state", 1},
        {"prefetch_rate", 1}, {"prefetch_read_rate", 1}, {"prefetch_write_rate", 1},
        {"prefetch_window", 1}, {"fault_errno", 1}, {"connections", 1}, {"virtual_size_bytes", 1},
        {"base_size_bytes", 1}, {"store_used_bytes", 1},
        {"busy_since", 3}, {"prefetch_paused_since", 3}, {"base_ok", 4},
        {"base_error", 4}, {"prefetch_done", 4}, {"io_error", 4},
        {"read_duration_image", 2}, {"read_duration_base", 2}, {"read_duration_zero", 2},
        {"io_duration_write", 2}, {"io_duration_flush", 2}, {"io_duration_discard", 2},
        {"io_duration_write_zeroes", 2},
        {"base_duration_demand", 2}, {"base_duration_cow", 2}, {"base_duration_prefetch", 2},
        {"commit_duration", 2}, {"checkpoint_duration", 2},
    };
    #define FVD_ENTRY_COUNT ((int)(sizeof fvd_entries / sizeof fvd_entries[0]))
    """
    ctypedef struct fvd_entry_t:
        const char* name
        uint32_t kind
    const fvd_entry_t* fvd_entries
    int FVD_ENTRY_COUNT


cdef inline size_t block_stride() noexcept nogil:
    return (<size_t>SLOTS * 8 + 63) // 64 * 64


cdef size_t stats_bytes() noexcept nogil:
    return <size_t>STATS_BLOCKS_OFFSET + <size_t>BLOCKS * block_stride()


cdef void put_u32(uint8_t* p, uint32_t v) noexcept nogil:
    memcpy(p, &v, 4)


cdef void put_u64(uint8_t* p, uint64_t v) noexcept nogil:
    memcpy(p, &v, 8)


cdef void describe(uint8_t* page) noexcept nogil:
    """Write the page's header and its table of names."""
    cdef uint8_t* entry = page + PAGE
    cdef uint32_t slot = 0, width
    cdef int i
    memcpy(page, <const char*>b"FVDSTAT1", 8)
    put_u32(page + 8, 1)
    put_u32(page + 12, SLOTS)
    put_u32(page + 16, BLOCKS)
    put_u32(page + 20, <uint32_t>FVD_ENTRY_COUNT)
    put_u64(page + 24, STATS_BLOCKS_OFFSET)
    put_u64(page + 32, block_stride())
    for i in range(FVD_ENTRY_COUNT):
        width = HISTOGRAM_SLOTS if fvd_entries[i].kind == KIND_HISTOGRAM else 1
        memset(entry, 0, ENTRY_BYTES)
        memcpy(entry, fvd_entries[i].name, strlen(fvd_entries[i].name))
        put_u32(entry + NAME_BYTES, fvd_entries[i].kind)
        put_u32(entry + NAME_BYTES + 4, slot)
        put_u32(entry + NAME_BYTES + 8, width)
        slot += width
        entry += ENTRY_BYTES
    invariant(slot == SLOTS)
    invariant(entry <= page + STATS_BLOCKS_OFFSET)


cdef int counters_init(counters_t* c, int fd) noexcept nogil:
    cdef uint8_t[16384] wanted         # STATS_BLOCKS_OFFSET
    cdef uint64_t length = 0
    cdef void* p
    cdef int rc, block
    trace_init(&c.trace)
    c.page_bytes = stats_bytes()
    c.stride = block_stride()
    if fd >= 0:
        rc = file_length(fd, &length)
        if rc < 0:
            return rc
        if length < c.page_bytes:
            return -EINVAL
        p = c_mmap(NULL, c.page_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0)
    else:
        p = c_mmap(NULL, c.page_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    if p == MAP_FAILED:
        return -errno
    c.page = <uint8_t*>p
    memset(&wanted[0], 0, STATS_BLOCKS_OFFSET)
    describe(&wanted[0])
    # Counts of a page that describes itself otherwise would appear under wrong names: start anew.
    if memcmp(c.page, &wanted[0], STATS_BLOCKS_OFFSET) != 0:
        memset(c.page, 0, c.page_bytes)
        memcpy(c.page, &wanted[0], STATS_BLOCKS_OFFSET)
    # Nobody works for a predecessor any more, however it ended.
    gauge_set(c, G_IN_FLIGHT, 0)
    gauge_set(c, G_CONNECTIONS, 0)
    for block in range(BLOCKS):
        note_time(counters_block(c, block), T_BUSY_SINCE, 0)
        note_time(counters_block(c, block), T_PAUSED_SINCE, 0)
    return 0


cdef void counters_free(counters_t* c) noexcept nogil:
    trace_free(&c.trace)
    if c.page != NULL:
        c_munmap(c.page, c.page_bytes)
        c.page = NULL


cdef uint64_t counters_sum(const counters_t* c, int slot) noexcept nogil:
    cdef uint64_t total = 0
    cdef int i
    for i in range(BLOCKS):
        total += load_relaxed(counters_block(c, i) + slot)
    return total


cdef void counters_trace(const counters_t* c, const block_t* n, int kind, int what, uint64_t begin,
        uint64_t end, uint64_t offset, uint64_t length, int result, int source) noexcept nogil:
    cdef trace_event_t e
    e.begin_ns = begin
    e.end_ns = end
    e.offset = offset
    e.length = length
    e.kind = <uint32_t>kind
    e.what = <uint32_t>what
    e.result = result
    e.role = <uint32_t>counters_index(c, n)
    e.source = <uint32_t>source
    trace_put(<trace_t*>&c.trace, &e)


cdef int error_kind(int result, bint base_failed) noexcept nogil:
    if base_failed:
        return ERROR_BASE
    if result == -EIO:
        return ERROR_EIO
    if result == -ENOSPC:
        return ERROR_ENOSPC
    if result == -EINVAL:
        return ERROR_EINVAL
    if result == -EPERM or result == -EROFS:
        return ERROR_EPERM
    return ERROR_OTHER


cdef int duration_slot(int op, const progress_t* before, const progress_t* now) noexcept nogil:
    cdef int source = SOURCE_IMAGE
    if op != OP_READ:
        return H_IO_DURATION + (op - 1) * HISTOGRAM_SLOTS
    if now.base_bytes != before.base_bytes or now.base_errors != before.base_errors:
        source = SOURCE_BASE
    elif now.zero_bytes != before.zero_bytes and now.image_bytes == before.image_bytes:
        source = SOURCE_ZERO
    return H_READ_DURATION + source * HISTOGRAM_SLOTS


cdef void count_request(block_t* b, const progress_t* before, int op, uint64_t length, int result,
        uint64_t duration_ns) noexcept nogil:
    cdef progress_t now
    if op > OP_WRITE_ZEROES:
        return
    now = progress_of(b)
    count(b, N_REQUESTS + op, 1)
    observe(b, duration_slot(op, before, &now), duration_ns)
    if result < 0:
        # Of a connection that ended: it was answered to nobody.
        if result != -ESHUTDOWN:
            count(b, N_ERRORS + op * ERROR_KINDS
                  + error_kind(result, now.base_errors != before.base_errors), 1)
    elif op == OP_READ or op == OP_WRITE:
        count(b, N_BYTES + op, length)
    elif op != OP_FLUSH:
        count(b, N_BYTES + op - 1, length)


cdef inline uint64_t bytes_of(uint64_t tallied) noexcept nogil:
    return tallied & ((<uint64_t>1 << TALLY_SHIFT) - 1)


cdef void tally_reads(tally_t* t, block_t* b, uint64_t ns) noexcept nogil:
    cdef uint64_t reads = t.reads >> TALLY_SHIFT, bytes = bytes_of(t.reads)
    count(b, N_REQUESTS + OP_READ, reads)
    count(b, N_BYTES + OP_READ, bytes)
    observe_many(b, H_READ_DURATION + SOURCE_IMAGE * HISTOGRAM_SLOTS, ns,
                 reads - t.zero_reads - t.base_reads)
    count(b, N_READ_IMAGE, bytes - t.zero_bytes - t.base_bytes)
    if t.zero_bytes:
        count(b, N_READ_ZERO, t.zero_bytes)
        observe_many(b, H_READ_DURATION + SOURCE_ZERO * HISTOGRAM_SLOTS, ns, t.zero_reads)
    if t.base_reads:
        count(b, N_READ_BASE, t.base_bytes)
        observe_many(b, H_READ_DURATION + SOURCE_BASE * HISTOGRAM_SLOTS, ns, t.base_reads)


cdef void tally_count(tally_t* t, block_t* b, uint64_t begin_ns, gate_t* gate) noexcept nogil:
    cdef uint64_t ns
    if t.reads == 0 and t.writes == 0:
        return
    ns = clock_now(gate) - begin_ns
    if t.reads:
        tally_reads(t, b, ns)
    if t.writes:
        count(b, N_REQUESTS + OP_WRITE, t.writes >> TALLY_SHIFT)
        count(b, N_BYTES + OP_WRITE, bytes_of(t.writes))
        observe_many(b, H_IO_DURATION + (OP_WRITE - 1) * HISTOGRAM_SLOTS, ns,
                     t.writes >> TALLY_SHIFT)
    memset(t, 0, sizeof(tally_t))


cdef int counters_index(const counters_t* c, const block_t* b) noexcept nogil:
    return <int>((<size_t>b - <size_t>(c.page + STATS_BLOCKS_OFFSET)) // c.stride)
