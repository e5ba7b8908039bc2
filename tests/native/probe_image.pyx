# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""image_t over a real file and a base of the test's choosing, and prefetch_t upon it."""
from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset
from posix.time cimport CLOCK_THREAD_CPUTIME_ID, clock_gettime, timespec
from posix.types cimport off_t
from posix.uio cimport iovec

from fvdcore.bitmap cimport bitmap_test
from fvdcore.commit cimport (
    commit_checkpoint, commit_flush, commit_set_fault, commit_start, commit_stop,
)
from fvdcore.copy_on_read cimport copy_on_read_settle
from fvdcore.counters cimport (
    BLOCK_SHARED, block_t, counters_block, counters_free, counters_init, counters_sum, counters_t,
)
from fvdcore.discard_path cimport image_trim, image_write_zeroes
from fvdcore.fetch cimport fetch_begin, fetch_end, fetch_free, fetch_init, fetch_t
from fvdcore.file_storage cimport file_storage_open, file_storage_t
from fvdcore.image cimport (
    image_base_bytes_left, image_close, image_finish, image_free, image_open, image_options_t,
    image_t,
)
from fvdcore.header cimport header_value_t
from fvdcore.limits cimport BLOCK_MAX, HEADER_VALUES_MAX
from fvdcore.prefetch cimport (
    prefetch_free, prefetch_init, prefetch_pause, prefetch_run, prefetch_stop, prefetch_t,
    prefetch_thread_start,
)
from fvdcore.range_lock cimport range_lock, range_unlock
from fvdcore.read_path cimport (
    image_become_storage, image_read, image_run, image_status,
)
from fvdcore.resize cimport image_grow
from fvdcore.settings cimport settings_change
from fvdcore.storage cimport (
    IO_NOWAIT, storage_close, storage_read, storage_status, storage_t, storage_write, storage_zero,
)
from fvdcore.sync cimport mutex_lock, mutex_unlock
from fvdcore.syscalls cimport EIO, c_preadv2, c_pwritev2
from fvdcore.write_path cimport WRITE_TRY, image_write
from probe_gate cimport Gate
from probe_storage cimport FileStorage, Storage

STATES = ("disabled", "waiting", "running", "paused", "done", "failed")


cdef enum:
    PIECE = 4096
    TURN = 500                         # calls of one kind before those of the other


cdef uint64_t cpu_now() noexcept nogil:
    cdef timespec t
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t)
    return <uint64_t>t.tv_sec * 1000000000 + <uint64_t>t.tv_nsec


cdef uint64_t place_of(uint64_t number, uint64_t size) noexcept nogil:
    """Where the transfer of that number goes: all over the disk."""
    cdef uint64_t x = number * 0x9E3779B97F4A7C15ULL
    return (x ^ (x >> 29)) % (size // PIECE) * PIECE


cdef int transfer(int fd, uint8_t* b, uint64_t at, bint writes) noexcept nogil:
    cdef iovec v
    cdef ssize_t done
    v.iov_base = b
    v.iov_len = PIECE
    done = c_pwritev2(fd, &v, 1, <off_t>at, 0) if writes else c_preadv2(fd, &v, 1, <off_t>at, 0)
    return 0 if done == PIECE else -EIO


class Refused(Exception):
    """image_open failed: errno and reason."""

    def __init__(self, errno, reason):
        super().__init__(reason)
        self.errno = errno
        self.reason = reason


cdef class Image:
    """An open image. Every call returns what C returned: data or 0, or a negative errno."""

    cdef image_t m
    cdef file_storage_t file
    cdef counters_t n
    cdef prefetch_t p
    cdef bint has_prefetch
    cdef fetch_t f
    cdef bint is_open
    cdef object base
    cdef object sources
    cdef Gate gate
    cdef Storage gatekeeper

    def __init__(self, source, base=None, *, data=None, bint read_only=False, int live_fd=-1,
                 bint takeover=False, bytes boot_id=bytes(16), Gate gate=None):
        cdef image_options_t o
        cdef const char* reason = NULL
        cdef storage_t* below = NULL
        cdef storage_t* image
        cdef storage_t* data_store
        cdef int rc = counters_init(&self.n, -1)
        self.sources = (source, data)
        if isinstance(source, Storage):
            image = (<Storage>source).raw()
        else:
            rc = file_storage_open(&self.file, source)
            if rc < 0:
                raise OSError(-rc, "open a file")
            image = &self.file.head
        data_store = (<Storage>data).raw() if data is not None else image
        self.base = base
        self.gate = gate
        if isinstance(base, Storage):
            below = (<Storage>base).raw()
        elif isinstance(base, FileStorage):
            below = (<FileStorage>base).raw()
        elif isinstance(base, Image):
            below = &(<Image>base).m.head
        memset(&o, 0, sizeof(o))
        o.read_only = read_only
        o.live_fd = live_fd
        o.takeover = takeover
        o.boot_id = <const uint8_t*><char*>boot_id
        o.gate = gate.raw() if gate is not None else NULL
        with nogil:
            rc = image_open(&self.m, image, data_store, below, &self.n, &o, &reason)
        if rc < 0:
            counters_free(&self.n)
            storage_close(&self.file.head)
            raise Refused(-rc, reason.decode() if reason != NULL else None)
        self.is_open = True
        image_become_storage(&self.m)

    def put_log(self, Storage log):
        """Let the data (not the metadata) pass through a logging store."""
        log.s.under = self.m.data
        self.m.data = log.raw()
        self.gatekeeper = log

    def free(self):
        """Let go without writing."""
        self.prefetch_end()
        if self.is_open:
            self.is_open = False
            image_free(&self.m)
            storage_close(&self.file.head)
            counters_free(&self.n)

    def close(self):
        """Commit, checkpoint, clean; then let go."""
        cdef int rc
        self.prefetch_end()
        with nogil:
            rc = image_close(&self.m, counters_block(&self.n, BLOCK_SHARED))
        self.free()
        return rc

    def read(self, uint64_t offset, uint64_t length, int flags=0):
        cdef uint8_t* b = <uint8_t*>malloc(length + 1)
        cdef int rc
        with nogil:
            rc = image_read(&self.m, b, length, offset, flags,
                            counters_block(&self.n, BLOCK_SHARED))
        found = (<char*>b)[:length] if rc == 0 else rc
        free(b)
        return found

    def write(self, uint64_t offset, bytes data, int flags=0):
        cdef uint64_t length = len(data)
        cdef uint8_t* room = <uint8_t*>malloc(length + 2 * <uint64_t>BLOCK_MAX)
        cdef int rc
        memcpy(room + BLOCK_MAX, <char*>data, length)
        with nogil:
            rc = image_write(&self.m, room + BLOCK_MAX, length, offset, flags,
                             counters_block(&self.n, BLOCK_SHARED))
        free(room)
        return rc

    def timed(self, int raw, uint64_t size, uint64_t calls, bint writes):
        """Processor time of this thread in ns that so many transfers of 4 KiB at random places
        below size (a power of two) take: of the image, and of preadv2 or pwritev2 on raw, in turn
        and at the same places. (None, None): one failed."""
        cdef uint8_t* room = <uint8_t*>calloc(PIECE + 2 * <uint64_t>BLOCK_MAX, 1)
        cdef uint8_t* b = room + BLOCK_MAX
        cdef block_t* n = counters_block(&self.n, BLOCK_SHARED)
        cdef uint64_t[2] took = [0, 0]
        cdef uint64_t begin, seed = 88172645463325252ULL, at, i, turn
        cdef int who, rc = 0
        with nogil:
            for turn in range(calls // TURN):
                for who in range(2):
                    begin = cpu_now()
                    for i in range(TURN):
                        at = place_of(seed + turn * TURN + i, size)
                        if who:
                            rc |= transfer(raw, b, at, writes)
                        elif writes:
                            rc |= image_write(&self.m, b, PIECE, at, WRITE_TRY, n)
                        else:
                            rc |= image_read(&self.m, b, PIECE, at, IO_NOWAIT, n)
                    took[who] += cpu_now() - begin
        free(room)
        return (took[0], took[1]) if rc == 0 else (None, None)

    def grow(self, uint64_t size):
        cdef int rc
        with nogil:
            rc = image_grow(&self.m, size, counters_block(&self.n, BLOCK_SHARED))
        return rc

    def change(self, dict values):
        """Change fields of the header: offset to (bytes, value)."""
        cdef header_value_t[HEADER_VALUES_MAX] taken
        cdef int i = 0, rc
        for offset, (width, value) in values.items():
            taken[i] = header_value_t(offset, width, value)
            i += 1
        with nogil:
            rc = settings_change(&self.m, &self.p, &taken[0], i, False,
                                 counters_block(&self.n, BLOCK_SHARED))
        return rc

    def trim(self, uint64_t offset, uint64_t length):
        cdef int rc
        with nogil:
            rc = image_trim(&self.m, length, offset, counters_block(&self.n, BLOCK_SHARED))
        return rc

    def write_zeroes(self, uint64_t offset, uint64_t length, bint keep=False):
        cdef uint8_t* room = <uint8_t*>malloc(3 * <uint64_t>BLOCK_MAX)
        cdef int rc
        with nogil:
            rc = image_write_zeroes(&self.m, length, offset, keep, room + BLOCK_MAX,
                                    counters_block(&self.n, BLOCK_SHARED))
        free(room)
        return rc

    def settle(self, uint64_t offset, bytes data):
        """What follows a read that returned data."""
        cdef uint64_t length = len(data)
        cdef const uint8_t* b = <const uint8_t*><char*>data
        with nogil:
            copy_on_read_settle(&self.m, b, length, offset, False,
                                counters_block(&self.n, BLOCK_SHARED))

    def run(self, uint64_t offset, uint64_t length):
        """(kind, bytes) of the run at offset."""
        cdef uint64_t run = 0
        cdef int kind = image_run(&self.m, length, offset, &run)
        return kind, run

    def status(self, uint64_t offset, uint64_t length):
        cdef uint64_t run = 0
        cdef int kind
        with nogil:
            kind = image_status(&self.m, length, offset, &run)
        return kind, run

    def as_layer(self, str call, uint64_t offset, uint64_t length):
        """Use the image as the base of another: the result of one call of its table."""
        cdef uint8_t* b = <uint8_t*>malloc(length + 1)
        cdef uint64_t run = 0
        cdef int rc = 0
        memset(b, 0, length)
        if call == "read":
            rc = storage_read(&self.m.head, b, length, offset, 0)
        elif call == "write":
            rc = storage_write(&self.m.head, b, length, offset, 0)
        elif call == "zero":
            rc = storage_zero(&self.m.head, length, offset, 0)
        elif call == "status":
            rc = storage_status(&self.m.head, length, offset, &run)
        found = (<char*>b)[:length] if call == "read" and rc == 0 else rc
        free(b)
        return (rc, run) if call == "status" else found

    def flush(self):
        cdef int rc
        with nogil:
            rc = commit_flush(&self.m.commit, counters_block(&self.n, BLOCK_SHARED))
        return rc

    def checkpoint(self):
        cdef int rc
        with nogil:
            rc = commit_checkpoint(&self.m.commit, counters_block(&self.n, BLOCK_SHARED))
        return rc

    def finish(self):
        cdef int rc
        with nogil:
            rc = image_finish(&self.m, counters_block(&self.n, BLOCK_SHARED))
        return rc

    def start_keeper(self):
        return commit_start(&self.m.commit)

    def stop_keeper(self):
        with nogil:
            commit_stop(&self.m.commit)

    def set_fault(self, int error):
        """As a failed flush would."""
        commit_set_fault(&self.m.commit, -error)

    def lock(self, uint64_t first, uint64_t end):
        with nogil:
            range_lock(&self.m.locks, first, end)

    def unlock(self, uint64_t first, uint64_t end):
        range_unlock(&self.m.locks, first, end)

    def locks(self):
        """The ranges of blocks that are locked."""
        mutex_lock(&self.m.locks.mutex)
        found = sorted((self.m.locks.first[i], self.m.locks.end[i])
                       for i in range(self.m.locks.used))
        mutex_unlock(&self.m.locks.mutex)
        return found

    def lock_waiters(self):
        return self.m.locks.waiting

    def lock_patient(self):
        return self.m.locks.patient

    def counted(self, uint64_t blocks):
        """Pretend that so many local blocks are counted."""
        self.m.bitmap.local = blocks

    def outstanding(self, uint64_t value):
        """Pretend that so many bytes are between reply and settled."""
        self.m.outstanding = value

    def local(self):
        """Local blocks."""
        return [i for i in range(self.m.bitmap.blocks) if bitmap_test(&self.m.bitmap, i)]

    def counter(self, int slot):
        return counters_sum(&self.n, slot)

    def facts(self):
        return {
            "size": self.m.size, "base_size": self.m.base_size, "block_size": self.m.block_size,
            "data_offset": self.m.data_offset, "has_bitmap": bool(self.m.has_bitmap),
            "complete": bool(self.m.complete), "read_only": bool(self.m.read_only),
            "left": image_base_bytes_left(&self.m), "fault": self.m.commit.fault[0],
            "epoch": self.m.journal.epoch, "sequence": self.m.journal.sequence,
            "outstanding_max": self.m.outstanding_max,
        }

    def prefetch_prepare(self, long delay):
        self.has_prefetch = True
        return prefetch_init(&self.p, &self.m, delay)

    def prefetch_thread(self):
        return prefetch_thread_start(&self.p)

    def prefetch_run(self):
        cdef int rc
        with nogil:
            rc = prefetch_run(&self.p)
        return rc

    def prefetch_pause(self):
        with nogil:
            prefetch_pause(&self.p)

    def prefetch_end(self):
        if self.has_prefetch:
            self.has_prefetch = False
            with nogil:
                prefetch_stop(&self.p)
                prefetch_free(&self.p)

    def prefetch_state(self):
        return STATES[self.p.state]

    def prefetch_stopping(self):
        return bool(self.p.stopping)

    def prefetch_copied(self):
        return self.p.copied

    def fetch_prepare(self, uint64_t size):
        return fetch_init(&self.f, &self.m, size, NULL)

    def fetch_sizes(self):
        """Bytes of a window, and of the longest."""
        return self.f.bytes, self.f.longest

    def fetch_begin(self, uint64_t begin, uint64_t end):
        """(place, begin, end) of the window that a read becomes."""
        cdef int place = fetch_begin(&self.f, &self.m, &begin, &end)
        return place, begin, end

    def fetch_end(self, int place):
        fetch_end(&self.f, place)

    def fetch_free(self):
        fetch_free(&self.f)
