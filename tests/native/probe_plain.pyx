# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""The small modules: crc32c, counters, atomics, limits and the wire's error numbers."""
from libc.stdint cimport uint32_t, uint64_t

from fvdcore cimport counters
from fvdcore.atomics cimport clz64, ctz64, popcount64
from fvdcore.counters cimport (
    count, counters_block, counters_free, counters_init, counters_sum, counters_t, gauge_add,
    gauge_set, observe, stats_bytes,
)
from fvdcore.crc32c cimport crc32c, crc32c_reference
from fvdcore.nbd_wire cimport nbd_error


def crc(data, uint32_t start=0):
    """What the engine computes."""
    cdef const unsigned char[::1] view = data
    return crc32c(start, &view[0] if len(data) else NULL, len(data))


def crc_reference(data, uint32_t start=0):
    """The table walk, whatever the processor has."""
    cdef const unsigned char[::1] view = data
    return crc32c_reference(start, &view[0] if len(data) else NULL, len(data))


def bits(uint64_t v):
    """(trailing zeros, leading zeros, ones) of a word that is not 0."""
    return ctz64(v), clz64(v), popcount64(v)


def wire_error(int rc):
    return nbd_error(rc)


def slots():
    """The slot enum: name of the counter -> slot."""
    ops = ("read", "write", "flush", "discard", "write_zeroes")
    causes = ("demand", "cow", "prefetch")
    found = {f"io_requests_{op}": counters.N_REQUESTS + i for i, op in enumerate(ops)}
    moved = ("read", "write", "discard", "write_zeroes")
    found |= {f"io_bytes_{op}": counters.N_BYTES + i for i, op in enumerate(moved)}
    errors = ("eio", "enospc", "einval", "eperm", "base", "other")
    for i, op in enumerate(ops):
        for j, name in enumerate(errors):
            found[f"io_errors_{op}_{name}"] = counters.N_ERRORS + i * len(errors) + j
    for i, source in enumerate(("image", "base", "zero")):
        found[f"read_duration_{source}"] = counters.H_READ_DURATION + i * counters.HISTOGRAM_SLOTS
    for i, cause in enumerate(causes):
        found[f"base_requests_{cause}"] = counters.N_BASE_REQUESTS + i
        found[f"base_errors_{cause}"] = counters.N_BASE_ERRORS + i
        found[f"base_bytes_{cause}"] = counters.N_BASE_BYTES + i
        found[f"base_duration_{cause}"] = (counters.H_BASE_DURATION
                                           + i * counters.HISTOGRAM_SLOTS)
    for i, op in enumerate(ops[1:]):
        found[f"io_duration_{op}"] = counters.H_IO_DURATION + i * counters.HISTOGRAM_SLOTS
    return found | single_slots()


cdef dict single_slots():
    return {
        "read_bytes_image": counters.N_READ_IMAGE, "read_bytes_base": counters.N_READ_BASE,
        "read_bytes_zero": counters.N_READ_ZERO, "cow_fill_bytes": counters.N_COW_FILL_BYTES,
        "cow_fills": counters.N_COW_FILLS, "cor_bytes": counters.N_COR_BYTES,
        "cor_zero_bytes": counters.N_COR_ZERO_BYTES,
        "cor_skipped_bytes_backlog": counters.N_COR_SKIPPED_BACKLOG,
        "cor_skipped_bytes_busy": counters.N_COR_SKIPPED_BUSY,
        "cor_skipped_bytes_nospace": counters.N_COR_SKIPPED_NOSPACE,
        "cor_skipped_bytes_error": counters.N_COR_SKIPPED_ERROR,
        "cor_blocks": counters.N_COR_BLOCKS, "cor_zero_blocks": counters.N_COR_ZERO_BLOCKS,
        "prefetch_pauses_manual": counters.N_PREFETCH_PAUSES_MANUAL,
        "prefetch_pauses_error": counters.N_PREFETCH_PAUSES_ERROR,
        "prefetch_pauses_slow_read": counters.N_PREFETCH_PAUSES_SLOW_READ,
        "prefetch_pauses_slow_write": counters.N_PREFETCH_PAUSES_SLOW_WRITE,
        "prefetch_pauses_foreground": counters.N_PREFETCH_PAUSES_FOREGROUND,
        "prefetch_pauses_budget": counters.N_PREFETCH_PAUSES_BUDGET,
        "prefetch_read_rate": counters.G_PREFETCH_READ_RATE,
        "prefetch_write_rate": counters.G_PREFETCH_WRITE_RATE,
        "prefetch_window": counters.G_PREFETCH_WINDOW,
        "prefetch_paused_ns": counters.N_PREFETCH_PAUSED_NS,
        "takeovers": counters.N_TAKEOVERS, "unclean_opens": counters.N_UNCLEAN_OPENS,
        "block_bytes": counters.G_BLOCK_BYTES, "prefetch_rate": counters.G_PREFETCH_RATE,
        "busy_since": counters.T_BUSY_SINCE, "prefetch_paused_since": counters.T_PAUSED_SINCE,
        "base_ok": counters.T_BASE_OK, "base_error": counters.T_BASE_ERROR,
        "prefetch_done": counters.T_PREFETCH_DONE, "io_error": counters.T_IO_ERROR,
        "prefetch_bytes": counters.N_PREFETCH_BYTES,
        "prefetch_zero_bytes": counters.N_PREFETCH_ZERO_BYTES,
        "journal_records": counters.N_JOURNAL_RECORDS,
        "journal_bytes": counters.N_JOURNAL_BYTES,
        "journal_commits": counters.N_JOURNAL_COMMITS,
        "journal_checkpoints": counters.N_JOURNAL_CHECKPOINTS,
        "journal_replays": counters.N_JOURNAL_REPLAYS,
        "image_write_bytes": counters.N_IMAGE_WRITE_BYTES,
        "metadata_write_bytes": counters.N_METADATA_WRITE_BYTES,
        "image_flushes": counters.N_IMAGE_FLUSHES, "recv_calls": counters.N_RECV_CALLS,
        "send_calls": counters.N_SEND_CALLS, "crew_requests": counters.N_CREW_REQUESTS,
        "parkings": counters.N_PARKINGS, "growths": counters.N_GROWTHS,
        "growth_errors": counters.N_GROWTH_ERRORS, "growth_bytes": counters.N_GROWTH_BYTES,
        "resizes": counters.N_RESIZES, "resize_errors": counters.N_RESIZE_ERRORS,
        "resize_bytes": counters.N_RESIZE_BYTES,
        "io_inflight": counters.G_IN_FLIGHT, "io_parked": counters.G_PARKED,
        "cor_outstanding_bytes": counters.G_COR_OUTSTANDING,
        "local_bytes": counters.G_LOCAL_BYTES, "base_bytes_left": counters.G_BASE_BYTES_LEFT,
        "journal_used_bytes": counters.G_JOURNAL_USED,
        "journal_size_bytes": counters.G_JOURNAL_SIZE, "journal_epoch": counters.G_JOURNAL_EPOCH,
        "pending_blocks": counters.G_PENDING_BLOCKS, "prefetch_state": counters.G_PREFETCH_STATE,
        "fault_errno": counters.G_FAULT, "connections": counters.G_CONNECTIONS,
        "virtual_size_bytes": counters.G_VIRTUAL_SIZE, "base_size_bytes": counters.G_BASE_SIZE,
        "store_used_bytes": counters.G_STORE_USED,
        "commit_duration": counters.H_COMMIT_DURATION,
        "checkpoint_duration": counters.H_CHECKPOINT_DURATION,
    }


def page_shape():
    """(slots, blocks, histogram buckets, bytes of the file)."""
    return counters.SLOTS, counters.BLOCKS, counters.HISTOGRAM_BUCKETS, stats_bytes()


cdef class Page:
    """A stats page over a descriptor, or in private memory with -1."""

    cdef counters_t c

    def __init__(self, int fd):
        cdef int rc = counters_init(&self.c, fd)
        if rc < 0:
            raise OSError(-rc, "counters_init")

    def count(self, int block, int slot, uint64_t n):
        count(counters_block(&self.c, block), slot, n)

    def observe(self, int block, int slot, uint64_t ns):
        observe(counters_block(&self.c, block), slot, ns)

    def gauge_set(self, int slot, uint64_t v):
        gauge_set(&self.c, slot, v)

    def gauge_add(self, int slot, long long n):
        gauge_add(&self.c, slot, n)

    def sum(self, int slot):
        return counters_sum(&self.c, slot)

    def free(self):
        counters_free(&self.c)
