# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""A device with connections over a data store whose writes can be stopped on their way, or find no
space; or that is as long as a test says and is made longer from outside, as a device is."""
from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memset

from fvdcore.atomics cimport exchange_acq_rel, load_acquire
from fvdcore.counters cimport (
    BLOCK_SHARED, counters_block, counters_free, counters_init, counters_sum,
)
from fvdcore.crew cimport device_start_crew, device_stop_crew
from fvdcore.dispatch cimport device_free, device_init, device_storage_grown, device_t
from fvdcore.file_storage cimport file_storage_open, file_storage_t
from fvdcore.image cimport image_close, image_free, image_open, image_options_t
from fvdcore.limits cimport NEVER
from fvdcore.links cimport (
    links_free, links_init, links_live, links_part, links_reap, links_serve, links_shut,
    links_start, links_stop, links_t,
)
from fvdcore.storage cimport ZERO_HINT, storage_close, storage_ops_t, storage_t
from fvdcore.sync cimport (
    clock_now, cond_broadcast, cond_free, cond_init, cond_t, cond_wait, mutex_free, mutex_init,
    mutex_lock, mutex_t, mutex_unlock,
)

from fvdcore.syscalls cimport ENOSPC


cdef struct gated_t:
    storage_t head                     # first: a gated_t* is a storage_t*
    storage_ops_t ops
    storage_t* under
    mutex_t mutex
    cond_t changed
    bint armed                         # the next write stops before it is done
    bint stopped
    int full                           # errno of writes and zeroing, or 0
    uint64_t capacity                  # bytes to which a resize finds it grown


cdef int gated_write(storage_t* p, const void* b, uint64_t n, uint64_t offset,
        int flags) noexcept nogil:
    cdef gated_t* g = <gated_t*>p
    cdef int rc
    mutex_lock(&g.mutex)
    if g.armed:
        g.armed = False
        g.stopped = True
        while g.stopped:
            cond_wait(&g.changed, &g.mutex, NEVER)
    rc = -g.full
    mutex_unlock(&g.mutex)
    return rc if rc < 0 else g.under.ops.write(g.under, b, n, offset, flags)


cdef int gated_read(storage_t* p, void* b, uint64_t n, uint64_t offset, int flags) noexcept nogil:
    cdef gated_t* g = <gated_t*>p
    return g.under.ops.read(g.under, b, n, offset, flags)


cdef int gated_zero(storage_t* p, uint64_t n, uint64_t offset, int flags) noexcept nogil:
    cdef gated_t* g = <gated_t*>p
    if g.full and not flags & ZERO_HINT:
        return -g.full
    return g.under.ops.zero(g.under, n, offset, flags)


cdef int gated_resize(storage_t* p, uint64_t length) noexcept nogil:
    cdef gated_t* g = <gated_t*>p
    p.length = g.capacity
    return 0 if g.capacity >= length else -ENOSPC


cdef void gated_close(storage_t* p) noexcept nogil:
    """Not the file's, by which the engine knows a file_storage_t."""


cdef class Served:
    """An open image that serves sockets."""

    cdef device_t d
    cdef links_t links
    cdef file_storage_t file
    cdef gated_t gate

    def __init__(self, int fd, int crew=2):
        cdef image_options_t o
        cdef const char* reason = NULL
        cdef int rc
        cdef bytes boot_id = bytes(16)
        memset(&o, 0, sizeof(o))
        o.boot_id = <const uint8_t*><char*>boot_id
        o.live_fd = -1
        assert counters_init(&self.d.counters, -1) == 0
        assert device_init(&self.d, NULL) == 0
        assert links_init(&self.links, &self.d) == 0
        assert file_storage_open(&self.file, fd) == 0
        self.d.image = &self.d.layers[0]
        rc = image_open(self.d.image, &self.file.head, &self.file.head, NULL, &self.d.counters,
                        &o, &reason)
        if rc < 0:
            raise OSError(-rc, "open the image")
        mutex_init(&self.gate.mutex, NULL)
        cond_init(&self.gate.changed, NULL)
        self.gate.under = self.d.image.data
        self.gate.head = self.d.image.data[0]
        self.gate.ops = self.d.image.data.ops[0]
        self.gate.ops.write = gated_write
        self.gate.ops.read = gated_read
        self.gate.ops.zero = gated_zero
        self.gate.ops.resize = gated_resize
        self.gate.ops.close = gated_close
        self.gate.head.ops = &self.gate.ops
        self.d.image.data = &self.gate.head
        assert device_start_crew(&self.d, crew) == 0
        assert links_start(&self.links) == 0

    def serve(self, int fd):
        """Serve a socket; its id or a negative errno."""
        cdef long rc
        with nogil:
            rc = links_serve(&self.links, fd, False, False, False, 0, NULL, 0)
        return rc

    def policy(self, bint waits, bint helped=False):
        """What changes do that find no space."""
        self.d.parking.image = self.d.image
        self.d.parking.waits = waits
        self.d.parking.helped = helped

    def full(self, int error):
        """Let writes and zeroing fail with this errno; 0: no more."""
        self.gate.full = error

    def device(self, uint64_t length):
        """Be a device of so many bytes, as far as new places are concerned."""
        self.gate.head.grows = False
        self.gate.head.length = length
        self.gate.capacity = length
        self.d.image.places.data = &self.gate.head

    def lengthen(self, uint64_t length):
        """Make that device longer; nobody is told."""
        self.gate.capacity = length

    def grown(self, bint ok):
        """Tell that it was made longer, or could not be."""
        with nogil:
            device_storage_grown(&self.d, ok)

    @property
    def data_offset(self):
        """Where the first place begins."""
        return self.d.image.data_offset

    @property
    def waiting(self):
        """Changes that wait for space."""
        return load_acquire(&self.d.parking.waiting)

    def counter(self, int slot):
        """The sum of a counter over all threads."""
        return counters_sum(&self.d.counters, slot)

    @property
    def crew(self):
        """Threads of the crew."""
        return self.d.crew_count

    @property
    def apart(self):
        """Requests beside the pool, and bytes of their payloads."""
        return load_acquire(&self.d.parking.apart_count), load_acquire(&self.d.parking.apart_bytes)

    @property
    def asked(self):
        """Bytes that were asked for since the last look."""
        return exchange_acq_rel(&self.d.parking.to_ask, 0)

    @property
    def live(self):
        """Connections that live."""
        return links_live(&self.links)

    def shut(self):
        """Read no more from any connection; finish, answer and close them."""
        with nogil:
            links_shut(&self.links, False, NEVER)

    def part(self, uint64_t ms):
        """Ask all connections to part within so many milliseconds; whether all did."""
        cdef bint done
        with nogil:
            done = links_part(&self.links, clock_now(NULL) + ms * 1000000)
        return bool(done)

    def arm(self):
        """Let the next write stop before it is done."""
        self.gate.armed = True

    @property
    def stopped(self):
        """Whether a write stands there."""
        return bool(self.gate.stopped)

    def release(self):
        """Let it go on."""
        with nogil:
            mutex_lock(&self.gate.mutex)
            self.gate.armed = False
            self.gate.stopped = False
            cond_broadcast(&self.gate.changed)
            mutex_unlock(&self.gate.mutex)

    def close(self):
        """End everything."""
        with nogil:
            links_shut(&self.links, True, NEVER)
            links_stop(&self.links)
            links_reap(&self.links)
            device_stop_crew(&self.d)
            self.d.image.data = self.gate.under
            self.d.image.places.data = self.gate.under
            image_close(self.d.image, counters_block(&self.d.counters, BLOCK_SHARED))
            image_free(self.d.image)
            storage_close(&self.file.head)
            links_free(&self.links)
            counters_free(&self.d.counters)
            device_free(&self.d)
            mutex_free(&self.gate.mutex)
            cond_free(&self.gate.changed)
