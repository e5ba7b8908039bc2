# SPDX-License-Identifier: Apache-2.0
"""A disk that forgets: storage_t in memory with a volatile cache, tearing, delays and faults.

A file is two arrays: what a read returns (cache), and what a power cut leaves for certain
(durable). A sector that was written and not yet flushed is dirty; a power cut keeps any subset of
the dirty sectors. Now and then a dirty sector is written back early, as a kernel does, so
versions between two flushes survive as well. A flush covers the writes that had returned when it
was called; whether it takes newer ones along is chance."""
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from fvdcore.storage cimport storage_ops_t, storage_t
from sim_gate cimport sim_gate_t

cdef enum disk_op_t:
    DISK_READ = 0
    DISK_WRITE = 1
    DISK_FLUSH = 2
    DISK_ZERO = 3
    DISK_RESIZE = 4
    DISK_STATUS = 5
    DISK_OPS = 6

cdef enum sector_state_t:
    SECTOR_CLEAN = 0
    SECTOR_DIRTY = 1
    SECTOR_LOST = 2                    # a failed flush gave it up: the cache alone has it

cdef enum survival_t:                  # which dirty sectors a power cut keeps
    KEEP_NONE = 0
    KEEP_ALL = 1
    KEEP_HALF = 2
    KEEP_FEW = 3
    KEEP_MOST = 4
    KEEP_PAGES = 5                     # 4096 bytes share their fate
    KEEP_METADATA = 6                  # what lies before the border
    KEEP_DATA = 7
    KEEP_ONE = 8
    KEEP_ALL_BUT_ONE = 9
    KEEP_MASK = 10                     # the bits of a number, in the order of the dirty sectors
    SURVIVALS = 10

cdef struct disk_fault_t:
    int64_t countdown                  # operations until one fails; -1: never
    int error
    bint sticky                        # every later one fails too
    uint32_t chance                    # of 65536 operations, how many fail

cdef struct sim_disk_t:
    storage_t head                     # first: a sim_disk_t* is a storage_t*
    storage_ops_t ops
    sim_gate_t* gate                   # NULL: no delays, no other threads
    uint64_t random
    uint64_t capacity                  # bytes of the arrays; the file cannot grow beyond
    uint8_t* cache
    uint8_t* durable
    uint8_t* state                     # sector_state_t
    uint64_t* returned                 # oldest unflushed write that returned, 0: none
    uint64_t durable_length
    uint64_t sequence
    uint64_t border                    # metadata lie before it
    bint fixed                         # a device: it cannot be resized
    bint holes                         # status tells zeros apart
    bint hints                         # ZERO_HINT is taken
    bint again                         # NOWAIT reads may answer EAGAIN
    uint32_t writeback                 # of 256 operations, how many write something back early
    uint64_t delay_max                 # virtual ns of one operation
    uint64_t wait_chance               # of 16 operations, how many take time at all
    disk_fault_t[6] faults
    uint64_t[6] counts
    uint64_t failures                  # faults injected
    uint64_t ahead                     # how often space was taken beforehand
    bint spoiled                       # and where: something was written there
    bint gave_up                       # a flush failed: what it forgot is in the cache alone
    # From the n-th read on it is away for a while: reads wait so long at most, then fail.
    int64_t outage_in                  # -1: never
    uint64_t outage_ns
    uint64_t patience_ns
    uint64_t away_until
    uint64_t outages
    bint silent                        # no delays, no faults, for the simulator's own looks
    # After each execution of a write, zeroing, flush or resize.
    void (*executed)(void* owner, sim_disk_t* d, int op, uint64_t offset) noexcept nogil
    void* owner

cdef int sim_disk_init(sim_disk_t* d, sim_gate_t* gate, uint64_t capacity) noexcept nogil
cdef void sim_disk_free(sim_disk_t* d) noexcept nogil
# Put bytes there, durable at once.
cdef void sim_disk_load(sim_disk_t* d, const uint8_t* data, uint64_t length) noexcept nogil
# Another disk with the same state, page cache and all; no gate, no faults.
cdef void sim_disk_copy(sim_disk_t* into, const sim_disk_t* d) noexcept nogil
# Another disk as a power cut leaves this one.
cdef void sim_disk_cut(sim_disk_t* into, const sim_disk_t* d, int survival, uint64_t mask,
        uint64_t* random) noexcept nogil
cdef uint64_t sim_disk_dirty(const sim_disk_t* d) noexcept nogil
