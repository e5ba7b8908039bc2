# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Layer 5. class Device: the engine as Python sees it.

Every method that may block releases the interpreter's lock first and only then takes the engine's.
While native threads run, the object holds a reference to itself, so it cannot vanish under them."""
import threading

from cpython.buffer cimport PyBUF_SIMPLE, Py_buffer, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from .atomics cimport load_acquire, store_release
from .calls cimport call_execute, call_extents, call_take
from .commit cimport commit_fault, commit_start, commit_stop
from .control cimport (
    check_cache, control_prefetch, end_base, prepare_base, prepare_prefetch, profile_reads,
    set_cache, set_space_policy, space_events, start_prefetch, storage_grown,
)
from .counters cimport (
    BLOCK_SHARED, OP_DISCARD, OP_FLUSH, OP_READ, OP_WRITE, OP_WRITE_ZEROES, counters_block,
    counters_free, counters_init, counters_sum, counters_t, stats_bytes,
)
from .crew cimport device_start_crew, device_stop_crew
from .dispatch cimport (
    device_free, device_init, device_settle, device_t, request_give, request_take,
)
from .errors cimport fault
from .fields cimport change_fields, grow_disk
from .figures cimport device_failures, device_figures, device_trace_events
from .image cimport image_close, image_free, image_options_t, live_bytes_for
from .layers cimport (
    check_layers, layers_interrupt, layers_open, take_remote_options,
)
from .links cimport (
    links_free, links_give, links_init, links_live, links_part, links_reap, links_serve,
    links_shut, links_start, links_stop, links_t,
)
from .limits cimport (
    CHAIN_MAX, CLOSE_DRAIN_S, CONNECTIONS_MAX, CREW_STARTED_MAX, FETCH_SIZE, NEVER, NS_PER_S, PAGE,
    REQUEST_MAX,
)
from .nbd_connection cimport CONNECTION_LIVE, connection_t
from .nbd_pool cimport nbd_options_t
from .prefetch cimport prefetch_free, prefetch_pause, prefetch_stop, prefetch_thread_start
from .request cimport request_t
from .sync cimport clock_now, mutex_lock, mutex_unlock
from .syscalls cimport c_read
from .trace cimport trace_lost, trace_start, trace_stop

cdef class Device:
    """An open FVD image with its engine. Make one with Device.open()."""

    cdef device_t d
    cdef links_t links
    cdef counters_t lower_counters
    cdef nbd_options_t nbd
    cdef object idle                   # threading.Condition: guards users and closing
    cdef int users                     # calls that may be outside the interpreter's lock
    cdef bint closing
    cdef bint is_open
    cdef bint started
    cdef int crew_threads

    def __cinit__(self):
        memset(&self.d, 0, sizeof(device_t))
        memset(&self.links, 0, sizeof(links_t))
        memset(&self.lower_counters, 0, sizeof(counters_t))
        self.links.event_fd = -1
        self.idle = threading.Condition()

    def __dealloc__(self):
        # Threads hold a reference, so none runs here; an open image is let go without writing.
        if self.is_open:
            self.release()

    @staticmethod
    def live_size(bitmap_size, table_size=0):
        """Bytes of a live file for an image whose bitmap and chunk table have so many bytes."""
        return PAGE + live_bytes_for(bitmap_size, table_size)

    @staticmethod
    def stats_size():
        """Bytes of a stats file."""
        return stats_bytes()

    @staticmethod
    def open(layers, *, bint read_only=False, int live_fd=-1, bint takeover=False, int stats_fd=-1,
             bytes boot_id=bytes(16), bytes open_session=None, int crew_threads=8,
             copy_on_read=None, prefetch_delay=None, double base_timeout=60.0,
             int base_connections=4, str on_full="error", bint can_grow=False,
             uint64_t fetch_size=FETCH_SIZE, str prefetch_policy="polite",
             bint record_reads=False, fetch_first=(), str cache="writeback", int direct_fd=-1):
        """Open an image chain, top layer first; what a layer is, says layers.pyx.

        Replays the journal; a writable open begins a session on disk. Raises EngineFault; then
        nothing was written unless the image had been found sound. See device.pyi.
        """
        cdef Device self = Device.__new__(Device)
        check_layers(layers)
        if len(boot_id) != 16 or (open_session is not None and len(open_session) != 16):
            raise ValueError("boot_id and open_session have 16 bytes")
        if not 1 <= crew_threads <= CREW_STARTED_MAX:
            raise ValueError(f"crew_threads is 1 to {CREW_STARTED_MAX}")
        if on_full not in ("error", "wait"):
            raise ValueError("on_full is error or wait")
        check_cache(cache, direct_fd)
        take_remote_options(&self.nbd, base_timeout, base_connections)
        self.crew_threads = crew_threads
        try:
            self.prepare(stats_fd)
            owner = boot_id if live_fd >= 0 else bytes(16)
            self.open_layers(layers, read_only, live_fd, takeover, owner, open_session)
            if copy_on_read is not None:
                self.d.image.copy_on_read = bool(copy_on_read) and self.d.image.has_bitmap
            prepare_prefetch(&self.d, &self.links, prefetch_delay, prefetch_policy)
            prepare_base(&self.d, fetch_size, record_reads, fetch_first)
            set_space_policy(&self.d, &self.links, on_full, can_grow)
            set_cache(&self.d, cache, direct_fd)
        except BaseException:
            self.release()
            raise
        return self

    cdef prepare(self, int stats_fd):
        """Allocate what needs no image."""
        cdef int rc = counters_init(&self.d.counters, stats_fd)
        if rc == 0:
            rc = counters_init(&self.lower_counters, -1)
        if rc == 0:
            rc = device_init(&self.d, NULL)
        if rc == 0:
            rc = links_init(&self.links, &self.d)
        # Whatever was prepared is released, also after a failure.
        self.is_open = True
        if rc < 0:
            raise fault(rc, "prepare the engine", -1)

    cdef open_layers(self, layers, bint read_only, int live_fd, bint takeover, bytes boot_id,
            bytes session):
        cdef image_options_t o
        memset(&o, 0, sizeof(o))
        o.read_only = read_only
        o.live_fd = live_fd
        o.takeover = takeover
        o.boot_id = <const uint8_t*>PyBytes_AS_STRING(boot_id)
        if session is not None:
            o.session = <const uint8_t*>PyBytes_AS_STRING(session)
        layers_open(&self.d, layers, &self.lower_counters, &o, &self.nbd)

    cdef release(self):
        """Free everything. No thread runs."""
        cdef int at
        if self.d.image != NULL:
            prefetch_free(&self.d.prefetch)
        for at in range(CHAIN_MAX):
            if self.d.layers != NULL and self.d.layers[at].opened:
                image_free(&self.d.layers[at])
        links_free(&self.links)
        counters_free(&self.d.counters)
        counters_free(&self.lower_counters)
        device_free(&self.d)
        self.is_open = False

    cdef check_open(self):
        if not self.is_open:
            raise ValueError("the device is closed")

    cdef enter(self):
        """Begin a call during which the device must not vanish."""
        with self.idle:
            if self.closing:
                raise ValueError("the device is closed")
            self.check_open()
            self.users += 1

    cdef leave(self):
        with self.idle:
            self.users -= 1
            if self.users == 0:
                self.idle.notify_all()

    cdef bint begin_end(self):
        """Let no new call in and wait for those inside. False: it is closed already."""
        with self.idle:
            if self.closing or not self.is_open:
                return False
            self.closing = True
            while self.users:
                self.idle.wait()
        return True

    # -- what it is --------------------------------------------------------------------------

    @property
    def size(self):
        """Virtual size in bytes."""
        self.check_open()
        return load_acquire(&self.d.image.size)

    @property
    def block_size(self):
        """Bytes of a block of the bitmap (4096 where there is none)."""
        self.check_open()
        return self.d.image.block_size

    @property
    def base_size(self):
        """Bytes of the disk that began in the base (base_img_size)."""
        self.check_open()
        return self.d.image.header.fields.base_img_size

    @property
    def read_only(self):
        """Whether the image was opened for reading only."""
        self.check_open()
        return bool(self.d.image.read_only)

    @property
    def image_uuid(self):
        """The image's identity, 16 bytes."""
        self.check_open()
        return PyBytes_FromStringAndSize(<char*>self.d.image.header.extension.image_uuid, 16)

    @property
    def open_session(self):
        """The session of this writable open, 16 bytes (FORMAT.md section 1.2)."""
        self.check_open()
        return PyBytes_FromStringAndSize(<char*>self.d.image.header.extension.open_session, 16)

    @property
    def event_fd(self):
        """Descriptor that becomes readable when take_events() has something."""
        self.check_open()
        return self.links.event_fd

    # -- threads and connections -------------------------------------------------------------

    def start(self):
        """Start the threads: keeper (background commits), crew, prefetch."""
        cdef int rc
        self.check_open()
        if self.started:
            return
        rc = device_start_crew(&self.d, self.crew_threads)
        if rc == 0 and not self.d.image.read_only:
            rc = commit_start(&self.d.image.commit)
        if rc == 0:
            rc = links_start(&self.links)
        if rc == 0:
            rc = prefetch_thread_start(&self.d.prefetch)
        self.started = True
        Py_INCREF(self)
        if rc < 0:
            raise fault(rc, "start the engine's threads", -1)

    def serve(self, int take_fd, *, bint structured=False, block_status_id=None,
            bint read_only=False, bytes received=b""):
        """Serve NBD transmission on a connected stream socket, which the engine owns from now on.

        Returns its id. received: see hand_over(). EngineFault(EMFILE): all places are taken.
        """
        cdef uint32_t status_id = block_status_id or 0
        cdef bint has_status = block_status_id is not None
        cdef const char* begin = PyBytes_AS_STRING(received)
        cdef uint64_t length = <uint64_t>len(received)
        cdef int64_t rc
        self.enter()
        try:
            if not self.started:
                raise ValueError("start() the device before it serves")
            with nogil:
                rc = links_serve(&self.links, take_fd, structured, read_only, has_status,
                    status_id, <const uint8_t*>begin, length)
        finally:
            self.leave()
        if rc < 0:
            raise fault(<int>rc, "serve a connection", -1)
        return rc

    def hand_over(self, double timeout):
        """Stop all connections between two messages, answer what was received, give them away.

        Returns [(id, the caller's descriptor, received bytes of the next message)]; None when not
        all could stop within timeout seconds, and they go on as before.
        """
        cdef uint64_t deadline = clock_now(NULL) + <uint64_t>(max(timeout, 0.0) * 1e9)
        cdef connection_t* c
        cdef bint done
        self.enter()
        try:
            given = []
            with nogil:
                done = links_part(&self.links, deadline)
            for at in range(CONNECTIONS_MAX):
                c = &self.links.slots[at]
                if done and c.parted:
                    rest = PyBytes_FromStringAndSize(<char*>c.receive, <Py_ssize_t>c.have)
                    given.append((c.id, links_give(&self.links, at), rest))
            return given if done else None
        finally:
            self.leave()

    def connections(self):
        """Ids of the connections that live."""
        self.check_open()
        return [self.links.slots[at].id for at in range(CONNECTIONS_MAX)
                if load_acquire(&self.links.slots[at].state) == CONNECTION_LIVE]

    def take_events(self):
        """What happened since the last call: ("connection_closed", id), ("prefetch", state number),
        ("fault", errno), ("failed", request), ("failures_lost", number), ("parked", changes that
        wait for space), ("grow", bytes to add)."""
        self.enter()
        try:
            return self.events()
        finally:
            self.leave()

    cdef events(self):
        cdef uint64_t got
        c_read(self.links.event_fd, &got, 8)
        mutex_lock(&self.links.mutex)
        ended = [self.links.ended[at] for at in range(self.links.ended_count)]
        self.links.ended_count = 0
        mutex_unlock(&self.links.mutex)
        with nogil:
            links_reap(&self.links)
            links_live(&self.links)
        events = [("connection_closed", number) for number in ended]
        if load_acquire(&self.links.prefetch_changed):
            store_release(&self.links.prefetch_changed, 0)
            events.append(("prefetch", load_acquire(&self.d.prefetch.state)))
        if load_acquire(&self.links.fault_changed):
            store_release(&self.links.fault_changed, 0)
            events.append(("fault", commit_fault(&self.d.image.commit)))
        return events + device_failures(&self.d) + space_events(&self.d, &self.links)

    # -- data --------------------------------------------------------------------------------

    cdef check_range(self, object offset, object length):
        self.check_open()
        size = load_acquire(&self.d.image.size)
        if offset < 0 or length < 0 or offset + length > size:
            raise ValueError(
                f"bytes {offset}..{offset + length} leave the disk of {size}")

    def read(self, offset, length):
        """Read length bytes at offset."""
        self.enter()
        try:
            self.check_range(offset, length)
            pieces = []
            while length:
                step = min(length, REQUEST_MAX)
                pieces.append(self.read_piece(offset, step))
                offset += step
                length -= step
            return b"".join(pieces)
        finally:
            self.leave()

    cdef bytes read_piece(self, uint64_t offset, uint64_t length):
        cdef request_t* r
        cdef int rc
        with nogil:
            call_take(&self.d, OP_READ, offset, length, 0, &r)
            call_execute(&self.d, r)
            rc = r.result
        data = PyBytes_FromStringAndSize(<char*>r.data, <Py_ssize_t>length) if rc == 0 else None
        with nogil:
            device_settle(&self.d, r, counters_block(&self.d.counters, BLOCK_SHARED))
            request_give(&self.d, r)
        if rc < 0:
            raise fault(rc, "read", offset)
        return data

    def write(self, offset, data, bint fua=False):
        """Write data at offset; with fua it is durable on return."""
        cdef Py_buffer view
        cdef uint64_t at = 0, step, total, begin
        cdef request_t* r
        cdef int rc = 0
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        entered = False
        try:
            self.enter()
            entered = True
            self.check_range(offset, view.len)
            begin = offset
            total = <uint64_t>view.len
            with nogil:
                while at < total and rc == 0:
                    step = min(total - at, <uint64_t>REQUEST_MAX)
                    call_take(&self.d, OP_WRITE, begin + at, step, 1 if fua else 0, &r)
                    memcpy(r.data, <uint8_t*>view.buf + at, step)
                    call_execute(&self.d, r)
                    rc = r.result
                    request_give(&self.d, r)
                    at += step
        finally:
            PyBuffer_Release(&view)
            if entered:
                self.leave()
        if rc < 0:
            raise fault(rc, "write", offset)

    cdef simple(self, int op, uint64_t offset, uint64_t length, int flags, str where):
        cdef request_t* r
        cdef int rc
        self.enter()
        try:
            with nogil:
                call_take(&self.d, op, offset, length, flags, &r)
                call_execute(&self.d, r)
                rc = r.result
                request_give(&self.d, r)
        finally:
            self.leave()
        if rc < 0:
            raise fault(rc, where, offset)

    def trim(self, offset, length):
        """Give back the space of local data in the range; its content is undefined afterwards."""
        self.check_range(offset, length)
        self.simple(OP_DISCARD, offset, length, 0, "trim")

    def write_zeroes(self, offset, length, bint no_hole=False, bint fua=False):
        """Make the range read as zeros; no_hole keeps its space allocated."""
        self.check_range(offset, length)
        self.simple(OP_WRITE_ZEROES, offset, length, (2 if no_hole else 0) | (1 if fua else 0),
            "zero")

    def flush(self):
        """Return when everything written before is on stable storage, metadata included (I6)."""
        self.check_open()
        self.simple(OP_FLUSH, 0, 0, 0, "flush")

    def block_status(self, offset, length):
        """Extents of the range: (length, "data" | "zero" | "base" | "base-zero")."""
        self.enter()
        try:
            self.check_range(offset, length)
            return call_extents(&self.d, offset, length)
        finally:
            self.leave()

    def resize(self, size):
        """Grow the disk to size bytes, a multiple of 512, while it is in use; what is new reads as
        zeros. Clients learn of it from whoever attached them."""
        self.enter()
        try:
            grow_disk(&self.d, size)
        finally:
            self.leave()

    def update(self, values, *, bint keep_copy_on_read=False):
        """Change fields of the header by name, durably and all or none; see settings.pxd for what
        takes effect at once. The caller has seen to it that they fit together."""
        self.enter()
        try:
            change_fields(&self.d, values, keep_copy_on_read)
        finally:
            self.leave()

    # -- state -------------------------------------------------------------------------------

    def status(self):
        """Figures of the moment; bytes, seconds, states by name."""
        self.check_open()
        return device_figures(&self.d, links_live(&self.links))

    def counter(self, int slot):
        """Sum of one slot of the stats page over all threads (tests compare it with the page)."""
        self.check_open()
        return counters_sum(&self.d.counters, slot)

    def trace_start(self):
        """Note from now on what is done and when. EngineFault(EBUSY): a trace is taken already."""
        cdef int rc
        self.check_open()
        rc = trace_start(&self.d.counters.trace)
        if rc < 0:
            raise fault(rc, "start a trace", -1)

    def trace_take(self):
        """(the oldest events not yet taken, trace.pxd's struct each; how many were lost so far)."""
        self.check_open()
        return device_trace_events(&self.d), trace_lost(&self.d.counters.trace)

    def trace_stop(self):
        """Note nothing more; what is left can still be taken."""
        self.check_open()
        trace_stop(&self.d.counters.trace)

    def prefetch_start(self):
        """Run prefetch now, also where the image's settings left it off."""
        self.enter()
        try:
            start_prefetch(&self.d, self.started)
        finally:
            self.leave()

    def prefetch_control(self, *, policy=None, budget=None):
        self.enter()
        try:
            control_prefetch(&self.d, policy, budget)
        finally:
            self.leave()

    def prefetch_pause(self):
        """Pause prefetch after the step at hand."""
        self.enter()
        try:
            prefetch_pause(&self.d.prefetch)
        finally:
            self.leave()

    def close_base(self):
        """Let go of the bases: their files, connections and keepers. ValueError before prefetch is
        done. Idempotent."""
        self.enter()
        try:
            end_base(&self.d)
        finally:
            self.leave()

    def first_reads(self):
        self.check_open()
        return profile_reads(&self.d)

    def storage_grown(self, bint ok):
        """Answer to the event ("grow", bytes), or news of space: what waits is tried at once."""
        self.enter()
        try:
            with nogil:
                storage_grown(&self.d, ok)
        finally:
            self.leave()

    # -- the end -----------------------------------------------------------------------------

    def drain(self, double timeout):
        """Read no more from any connection, finish and answer what was received, close them.
        Returns whether all ended within timeout seconds."""
        cdef uint64_t deadline = clock_now(NULL) + <uint64_t>(max(timeout, 0.0) * 1e9)
        cdef bint done
        self.enter()
        try:
            with nogil:
                done = links_shut(&self.links, False, deadline)
                links_reap(&self.links)
                links_live(&self.links)
        finally:
            self.leave()
        return bool(done)

    cdef stop_threads(self, bint now):
        if not self.started:
            return
        with nogil:
            if now:
                layers_interrupt(&self.d, True)
            # Clients that take no answers are cut off in the end.
            if now or not links_shut(&self.links, False,
                clock_now(NULL) + CLOSE_DRAIN_S * NS_PER_S):
                links_shut(&self.links, True, NEVER)
            # Nobody is left to whom a base that hangs would matter.
            layers_interrupt(&self.d, False)
            links_stop(&self.links)
            prefetch_stop(&self.d.prefetch)
            device_stop_crew(&self.d)
            if not self.d.image.read_only:
                commit_stop(&self.d.image.commit)
            links_reap(&self.links)
        self.started = False
        Py_DECREF(self)

    def close(self):
        """Stop everything and leave the image clean. Idempotent. Raises EngineFault when not all
        could be made durable; the image then stays unclean and consistent, and is closed."""
        cdef int rc
        if not self.begin_end():
            return
        self.stop_threads(False)
        with nogil:
            rc = image_close(self.d.image, counters_block(&self.d.counters, BLOCK_SHARED))
        self.release()
        if rc < 0:
            raise fault(rc, "close the image", -1)

    def abandon(self):
        """Let go at once, as a kill would: nothing is flushed, the image stays unclean."""
        if not self.begin_end():
            return
        self.stop_threads(True)
        self.release()
