# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""World: one simulated run, as Python drives it: sessions of an image with crashes between them."""
import os

from libc.stdint cimport uint8_t, uint64_t
from libc.stdio cimport fprintf, stderr
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from fvdcore.commit cimport commit_fault, commit_start, commit_stop
from fvdcore.counters cimport BLOCK_SHARED, counters_block, counters_free, counters_init
from fvdcore.crew cimport device_start_crew, device_stop_crew
from fvdcore.dispatch cimport device_free, device_init, device_t
from fvdcore.image cimport image_close, image_free, image_open, image_options_t, image_t
from fvdcore.layers cimport layers_interrupt
from fvdcore.limits cimport BLOCK_MAX, NEVER, NS_PER_S
from fvdcore.prefetch cimport (
    prefetch_free, prefetch_init, prefetch_set_policy, prefetch_stop, prefetch_thread_start,
)
from fvdcore.read_path cimport image_become_storage, image_read
from fvdcore.storage cimport storage_t
from fvdcore.sync cimport thread_join, thread_start
from sim_base cimport base_close, base_free, base_of, base_open, base_quiet
from sim_check cimport check_bytes, check_given_back
from sim_crash cimport crash_adopt, crash_executed, crash_observe, world_fail
from sim_disk cimport sim_disk_copy, sim_disk_free, sim_disk_t
from sim_gate cimport SIM_TRACE, chance, next_random, sim_event_t, sim_gate_free, sim_gate_init
from sim_guest cimport guest_main, guest_reply
from sim_manager cimport manager_follow, manager_main, manager_restart, manager_settle
from sim_patience cimport readers_come_back
from sim_oracle cimport (
    MOMENT_EITHER, MOMENT_LIVE, MOMENT_POWER, oracle_check, oracle_copy, oracle_free, oracle_init,
    oracle_restart,
)
from sim_setup cimport collect_marks, make_disk, make_sound, tune, tune_gate
from sim_state cimport (
    ACTIONS_MAX, GUESTS_MAX, MARK_CLOSED, MARK_LEFT, MARK_REFUSED, MARK_VERIFIED, PENDING_MAX,
    UNLIMITED_S, action_t, world_t,
)

from sim_setup import FAULT_OPS, MARK_NAMES

cdef extern from "<unistd.h>" nogil:
    void _exit(int status)
    int close(int fd)

cdef extern from "<sys/mman.h>" nogil:
    void* mmap(void* p, size_t n, int prot, int flags, int fd, long offset)
    int munmap(void* p, size_t n)
    int PROT_READ, PROT_WRITE, MAP_SHARED

cdef enum:
    SECTOR = 512
    SHORT_NS = 100000000               # the least time that a base is waited for


class SimulationFailed(Exception):
    """The engine broke a promise; the message says which."""


cdef void stuck(void* owner, const char* why) noexcept nogil:
    """No thread can be unwound from here: say so and end the process."""
    cdef world_t* w = <world_t*>owner
    cdef sim_event_t* e
    cdef int i
    for i in range(w.gate.count):
        fprintf(stderr, b"sim: thread %d is in state %d, key %p, mutex %p\n", i,
                w.gate.threads[i].state, w.gate.threads[i].key, w.gate.threads[i].mutex)
    for i in range(w.gate.held_count):
        fprintf(stderr, b"sim: mutex %p is held by thread %d\n", w.gate.held[i],
                w.gate.holders[i])
    for i in range(24):
        e = &w.gate.trace[(w.gate.traced - 24 + <uint64_t>i) % SIM_TRACE]
        fprintf(stderr, b"sim: %llu ns thread %u event %u of %llu, %llu\n",
                <unsigned long long>e.at, e.thread, e.kind, <unsigned long long>e.a,
                <unsigned long long>e.b)
    fprintf(stderr, b"sim: at %llu ns: %s (request %llu of %llu, %llu answered, step %llu)\n",
            <unsigned long long>w.gate.now, why,
            <unsigned long long>w.issued, <unsigned long long>w.requests,
            <unsigned long long>w.completed, <unsigned long long>w.gate.steps)
    _exit(70)


# -- a session ---------------------------------------------------------------------------------

cdef int open_image(world_t* w, bint takeover, const char** reason) noexcept nogil:
    cdef image_options_t o
    cdef image_t* m = &w.device.layers[0]
    cdef int rc
    memset(&o, 0, sizeof(o))
    o.live_fd = w.live_fd if w.with_live else -1
    o.takeover = takeover
    o.boot_id = w.boot_id
    o.session = w.session
    o.gate = &w.gate.head
    manager_settle(w, &w.file)
    rc = base_open(w, reason)
    if rc < 0:
        return rc
    rc = image_open(m, &w.file.head, &w.data.head if w.has_data else &w.file.head, base_of(w),
                    &w.device.counters, &o, reason)
    if rc < 0:
        base_close(w)
        return rc
    image_become_storage(m)
    if w.ahead_min:
        m.places.ahead_min = w.ahead_min
    w.device.image = m
    w.device.layer_count = 1
    w.device.has_remote_base = w.distant and w.has_base
    w.device.base_may_hang = w.device.has_remote_base or w.patient
    return 0


cdef int start_threads(world_t* w) noexcept nogil:
    cdef device_t* d = &w.device
    cdef int rc = prefetch_init(&d.prefetch, d.image, w.prefetch_delay)
    if rc == 0:
        prefetch_set_policy(&d.prefetch, w.policy, d.has_remote_base)
        rc = device_start_crew(d, w.crew_count)
    if rc == 0:
        rc = commit_start(&d.image.commit)
    if rc == 0:
        rc = prefetch_thread_start(&d.prefetch)
    return rc


cdef void stop_threads(world_t* w) noexcept nogil:
    if w.patient and chance(&w.random, 1, 2):
        layers_interrupt(&w.device, True)
    device_stop_crew(&w.device)
    prefetch_stop(&w.device.prefetch)
    commit_stop(&w.device.image.commit)
    prefetch_free(&w.device.prefetch)


cdef void let_guests_run(world_t* w) noexcept nogil:
    cdef int i
    for i in range(PENDING_MAX):
        w.pending[i].guest = -1
    w.guests_left = w.guest_count
    for i in range(w.guest_count):
        w.guests[i].world = w
        w.guests[i].index = i
        w.guests[i].outstanding = 0
        w.guests[i].held = 0
        thread_start(&w.guests[i].thread, &w.gate.head, guest_main, &w.guests[i])
    thread_start(&w.manager, &w.gate.head, manager_main, w)
    for i in range(w.guest_count):
        thread_join(&w.guests[i].thread)
    thread_join(&w.manager)


cdef bint judge_all(world_t* w, int moment, const char* what) noexcept nogil:
    """Read the whole idle disk; w.content holds it afterwards."""
    cdef bint good
    w.cloning = True                   # no clone meanwhile: it would use the same buffer
    good = judge_content(w, moment, what)
    w.cloning = False
    return good


cdef bint judge_content(world_t* w, int moment, const char* what) noexcept nogil:
    cdef uint64_t at = 0, size, step
    cdef int rc, tries
    manager_follow(w, w.device.image)
    size = w.oracle.sectors * SECTOR
    if size != w.device.image.size:
        world_fail(w, what, b"the disk has a size that nobody asked for",
                   <long long>w.device.image.size)
        return False
    while at < size:
        step = min(<uint64_t>131072, size - at)
        tries = 0
        while True:
            rc = image_read(w.device.image, w.content + at, step, at, 0,
                            counters_block(&w.device.counters, BLOCK_SHARED))
            tries += 1
            if rc == 0 or tries == 200 or not w.fault_expected:
                break
        if rc < 0:
            if not w.fault_expected:
                world_fail(w, what, b"a read failed", rc)
            return False
        at += step
    if w.file.gave_up or w.data.gave_up:
        moment = MOMENT_EITHER if moment == MOMENT_LIVE else moment
    if not oracle_check(&w.oracle, w.content, 0, w.oracle.sectors, w.oracle.tick + 1, moment,
                        False):
        world_fail(w, what, w.oracle.failure, 0)
        return False
    return True


cdef int begin_session(world_t* w, bint takeover, const char** reason) noexcept nogil:
    cdef int rc
    memset(&w.device, 0, sizeof(device_t))
    rc = counters_init(&w.device.counters, -1)
    if rc == 0:
        rc = device_init(&w.device, &w.gate.head)
    if rc < 0:
        return rc
    w.device.reply = guest_reply
    rc = open_image(w, takeover, reason)
    if rc < 0:
        device_free(&w.device)
        counters_free(&w.device.counters)
        w.marks[MARK_REFUSED] += 1
    return rc


cdef int run_session(world_t* w, bint ends_clean) noexcept nogil:
    """Guests, then the end: a clean close, or letting go of a device whose crash was kept."""
    cdef int rc
    w.open_ = True
    rc = start_threads(w)
    if rc == 0:
        let_guests_run(w)
        if w.adopt_at != ~<uint64_t>0:
            crash_adopt(w)
        if not w.adopted and not w.failed:
            judge_all(w, MOMENT_LIVE, b"the idle disk")
    stop_threads(w)
    if rc == 0 and ends_clean and not w.failed:
        w.clones_left += 2
        w.clone_at = 0
        w.closing = True
        rc = image_close(w.device.image, counters_block(&w.device.counters, BLOCK_SHARED))
        if rc == 0:
            w.marks[MARK_CLOSED] += 1
            check_bytes(w, &w.file, &w.data)
            check_given_back(w, &w.file, &w.data)
    w.open_ = False
    w.closing = False
    collect_marks(w)
    image_free(w.device.image)
    base_close(w)
    device_free(&w.device)
    counters_free(&w.device.counters)
    w.marks[MARK_LEFT] += w.hanging
    return rc


# -- between sessions --------------------------------------------------------------------------

cdef void quiet(world_t* w, bint on) noexcept nogil:
    """No delays and no faults: the simulator itself looks."""
    w.file.silent = on
    w.data.silent = on
    base_quiet(w, on)


cdef void crash_here(world_t* w) noexcept nogil:
    """A session that could not end cleanly ends with a power cut."""
    w.adopt_death = False
    w.adopted = False
    crash_adopt(w)


cdef void take_adopted(world_t* w) noexcept nogil:
    """The kept crash becomes the present."""
    sim_disk_copy(&w.file, &w.next_file)
    if w.has_data:
        sim_disk_copy(&w.data, &w.next_data)
    oracle_copy(&w.oracle, &w.next_oracle)
    if w.adopt_death:
        memcpy(w.live, w.next_live, w.live_bytes)


cdef bint judge_start(world_t* w, int moment) noexcept nogil:
    """What a session finds at its start is what it must keep from now on."""
    cdef bint good
    quiet(w, True)
    good = judge_all(w, moment, b"the reopened disk")
    quiet(w, False)
    manager_restart(w, &w.file)
    # With a sticky fault what is seen never becomes durable.
    if good and not w.faulty_start:
        oracle_restart(&w.oracle, w.content)
    return good


cdef int one_session(world_t* w, bint takeover, int moment, bint ends_clean,
        const char** reason) noexcept nogil:
    cdef int rc = begin_session(w, takeover, reason)
    if rc < 0 and (w.file.gave_up or w.data.gave_up):
        # A failed flush is never retried into success: the remedy is to start the machine again.
        crash_here(w)
        take_adopted(w)
        takeover = False
        moment = MOMENT_POWER
    if rc < 0 and w.file.failures + w.data.failures + w.base.failures + w.below.failures:
        quiet(w, True)
        rc = begin_session(w, takeover, reason)
        quiet(w, False)
    if rc < 0:
        if reason[0] == NULL:
            reason[0] = b"no reason given"
        world_fail(w, b"the image cannot be opened", reason[0], rc)
        return rc
    w.faulty_start = commit_fault(&w.device.image.commit) != 0
    if not judge_start(w, moment):
        w.requests = 0
    rc = run_session(w, ends_clean)
    if w.adopted or rc < 0 or not ends_clean:
        if not w.adopted or (w.adopt_death and (w.next_file.gave_up or w.faulty_start)):
            crash_here(w)
        take_adopted(w)
        return 1 if w.adopt_death else 2
    return 0


cdef bint verify_clone(world_t* w, const sim_disk_t* file,
        const sim_disk_t* data) noexcept with gil:
    """Ask fvdctl's check about a clone: what we find in order it must not call corrupt."""
    cdef bytes why
    try:
        said = (<object>w.verifier)(
            (<char*>file.cache)[:file.head.length],
            (<char*>data.cache)[:data.head.length] if w.has_data else None)
        w.marks[MARK_VERIFIED] += 1
    except BaseException as error:
        said = repr(error)
    if said:
        why = said.encode()
        world_fail(w, b"fvdctl's check", why, 0)
    return not said


cdef class World:
    """A file, perhaps a data file and a base, and all that happens to them. One run each."""

    cdef world_t w
    cdef object verifier
    cdef int moment
    cdef bint takeover

    def __cinit__(self, dict config, bytes image, bytes data, bytes base, bytes below,
                  bytes deep, bytes start, object verify=None):
        cdef world_t* w = &self.w
        memset(w, 0, sizeof(world_t))
        w.live_fd = -1
        w.clone_live_fd = -1
        sim_gate_init(&w.gate, config["seed"])
        w.random = config["seed"] ^ 0x5DEECE66D
        w.gate.stuck = stuck
        w.gate.observe = crash_observe
        w.gate.owner = w
        tune_gate(w, config)
        w.only_kind = config.get("only_kind", -1)
        self.make_disks(config, image, data, base)
        self.make_base(config, base, below, deep)
        self.make_memory(config, start)
        self.plan(config)
        self.verifier = verify
        if verify is not None:
            self.w.verify = verify_clone
            self.w.verifier = <void*>verify
        self.moment = MOMENT_LIVE

    cdef make_disks(self, dict config, bytes image, bytes data, bytes base):
        cdef world_t* w = &self.w
        cdef uint64_t capacity = config["capacity"]
        cdef uint64_t data_capacity = config["data_capacity"] if data is not None else 0
        w.has_data = data is not None
        make_disk(&w.file, w, True, capacity, image)
        make_disk(&w.clone_file, w, False, capacity, None)
        make_disk(&w.second_file, w, False, capacity, None)
        make_disk(&w.next_file, w, False, capacity, None)
        make_disk(&w.data, w, True, data_capacity, data)
        make_disk(&w.clone_data, w, False, data_capacity, None)
        make_disk(&w.second_data, w, False, data_capacity, None)
        make_disk(&w.next_data, w, False, data_capacity, None)
        w.file.border = config["border"]
        w.file.executed = crash_executed
        w.file.owner = w
        w.data.executed = crash_executed
        w.data.owner = w
        tune(&w.file, config["file"])
        tune(&w.data, config["file"])

    cdef make_base(self, dict config, bytes base, bytes below, bytes deep):
        cdef world_t* w = &self.w
        w.has_base = base is not None
        w.has_below = below is not None
        w.distant = config["distant"]
        w.policy = config["prefetch_policy"]
        make_disk(&w.base, w, True, len(base) + 4096 if base is not None else 0, base)
        make_disk(&w.below, w, True, len(below) + 4096 if below is not None else 0, below)
        tune(&w.base, config["base"])
        tune(&w.below, config["base"])
        w.flat = config["flat"] > 0
        w.ends_base = config["ends_base"]
        w.patient = config["patient"] and w.has_base and not w.has_below
        w.base_timeout = UNLIMITED_S * NS_PER_S
        w.has_deep = deep is not None
        if deep is not None:
            make_disk(&w.deep, w, True, len(deep) + 4096, deep)
            tune(&w.deep, config["base"])
        w.clone_base = <image_t*>calloc(2, sizeof(image_t))
        if w.clone_base == NULL \
                or counters_init(&w.base_counters, -1) < 0:
            raise MemoryError

    cdef make_memory(self, dict config, bytes start):
        cdef world_t* w = &self.w
        cdef uint64_t size_max = config["size_max"]
        cdef uint64_t room = size_max + 2 * <uint64_t>BLOCK_MAX
        cdef int i
        w.content = <uint8_t*>calloc(1, room)
        w.scratch = <uint8_t*>calloc(1, room)
        for i in range(GUESTS_MAX):
            w.guests[i].buffer = <uint8_t*>calloc(1, size_max)
        w.clone_image = <image_t*>calloc(1, sizeof(image_t))
        if (w.content == NULL or w.scratch == NULL or w.clone_image == NULL
                or oracle_init(&w.oracle, size_max // SECTOR, config["ops_max"]) < 0
                or oracle_init(&w.next_oracle, size_max // SECTOR, config["ops_max"]) < 0
                or counters_init(&w.clone_counters, -1) < 0):
            raise MemoryError
        w.oracle.sectors = len(start) // SECTOR
        oracle_restart(&w.oracle, <const uint8_t*><char*>start)
        w.live_bytes = (<uint64_t>config["live_bytes"] + 4095) // 4096 * 4096
        w.with_live = config["with_live"]
        w.live_fd = os.memfd_create("sim-live")
        w.clone_live_fd = os.memfd_create("sim-clone-live")
        os.truncate(w.live_fd, w.live_bytes)
        os.truncate(w.clone_live_fd, w.live_bytes)
        w.live = <uint8_t*>mmap(NULL, w.live_bytes, PROT_READ | PROT_WRITE, MAP_SHARED,
                                w.live_fd, 0)
        w.clone_live = <uint8_t*>mmap(NULL, w.live_bytes, PROT_READ | PROT_WRITE, MAP_SHARED,
                                      w.clone_live_fd, 0)
        w.next_live = <uint8_t*>calloc(1, w.live_bytes)
        memset(w.boot_id, 7 if w.with_live else 0, 16)
        memset(w.session, 9, 16)

    cdef plan(self, dict config):
        cdef world_t* w = &self.w
        cdef int i
        w.depth = config["depth"]
        w.guest_count = config["guests"]
        w.crew_count = config["crew"]
        w.hot = config["hot"]
        w.length_max = config["length_max"]
        w.think_ns = config["think_ns"]
        for i in range(6):
            w.weights[i] = config["weights"][i]
        w.fua = config["fua"]
        w.inline_ = config["inline"]
        w.prefetch_delay = config["prefetch_delay"]
        w.full_expected = config.get("full_expected", False)
        w.exhaustive = config.get("exhaustive", 0)
        w.ahead_min = config["ahead_min"]
        w.verify_share = config["verify_share"]
        w.growing_to = w.oracle.sectors * SECTOR
        manager_restart(w, &w.file)

    def __dealloc__(self):
        cdef world_t* w = &self.w
        cdef int i
        sim_disk_free(&w.file)
        sim_disk_free(&w.clone_file)
        sim_disk_free(&w.second_file)
        sim_disk_free(&w.next_file)
        sim_disk_free(&w.data)
        sim_disk_free(&w.clone_data)
        sim_disk_free(&w.second_data)
        sim_disk_free(&w.next_data)
        base_free(w)
        sim_disk_free(&w.base)
        sim_disk_free(&w.below)
        sim_disk_free(&w.deep)
        free(w.clone_base)
        counters_free(&w.base_counters)
        oracle_free(&w.oracle)
        oracle_free(&w.next_oracle)
        counters_free(&w.clone_counters)
        for i in range(GUESTS_MAX):
            free(w.guests[i].buffer)
        free(w.content)
        free(w.scratch)
        free(w.clone_image)
        free(w.next_live)
        if w.live_fd >= 0:
            munmap(w.live, w.live_bytes)
            munmap(w.clone_live, w.live_bytes)
            close(w.live_fd)
            close(w.clone_live_fd)
        sim_gate_free(&w.gate)

    def fault(self, str disk, str op, long countdown, int error, bint sticky, int chance):
        """Plan failures of one kind of operation of "file", "data", "base" or "below"."""
        cdef world_t* w = &self.w
        cdef sim_disk_t* d = &w.file
        cdef int at = FAULT_OPS[op]
        if disk != "file":
            d = &w.data if disk == "data" else &w.below if disk == "below" else &w.base
        d.faults[at].countdown = countdown
        d.faults[at].error = error
        d.faults[at].sticky = sticky
        d.faults[at].chance = chance
        w.fault_expected = True

    def outage(self, long reads, uint64_t ns, uint64_t patience_ns):
        """From the n-th read on the base is away for ns; a read waits patience_ns, then fails."""
        self.w.base.outage_in = reads
        self.w.base.outage_ns = ns
        self.w.base.patience_ns = patience_ns
        self.w.fault_expected = True
        if self.w.patient:
            # It is the readers' callers that lose patience; a reader's read hangs.
            self.w.base_timeout = max(patience_ns, SHORT_NS)
            self.w.base.patience_ns = NEVER

    def no_faults(self):
        """All disks are sound again."""
        make_sound(&self.w.file)
        make_sound(&self.w.data)
        make_sound(&self.w.base)
        make_sound(&self.w.below)
        self.w.fault_expected = False
        self.w.base_timeout = UNLIMITED_S * NS_PER_S

    def rest(self):
        """The end: what hangs in the base comes back, and no thread is left."""
        with nogil:
            readers_come_back(&self.w)

    def session(self, requests, clones, str end, actions=()):
        """One session: open, requests, and the end: "close", "power" or "death". Beside the
        requests the manager's actions: (kind, requests answered before it, value).

        Raises SimulationFailed. Returns how it really ended.
        """
        cdef world_t* w = &self.w
        cdef const char* reason = NULL
        cdef bint ends_clean = end == "close"
        cdef int rc
        w.requests = requests
        w.issued = 0
        w.completed = 0
        w.clones_left = clones
        w.clone_every = max(1, requests * 2 // (3 * clones + 1))
        w.clone_at = next_random(&w.random) % (2 * w.clone_every)
        w.clone_step = 0
        w.adopted = False
        w.adopt_death = end == "death" and w.with_live
        w.adopt_at = ~<uint64_t>0
        if not ends_clean:
            w.adopt_at = requests - next_random(&w.random) % (requests // 4 + 1)
        w.file.failures = w.data.failures = w.base.failures = w.below.failures = 0
        w.action_count = 0
        for kind, at, value in actions[:ACTIONS_MAX]:
            w.actions[w.action_count] = action_t(kind, at, value)
            w.action_count += 1
        with nogil:
            rc = one_session(w, self.takeover, self.moment, ends_clean, &reason)
        if w.failed:
            raise SimulationFailed(w.message.decode(errors="replace"))
        self.takeover = rc == 1
        self.moment = MOMENT_POWER if rc == 2 else MOMENT_LIVE
        return ("close", "death", "power")[rc]

    def digest(self):
        """A number that depends on every step of the run so far."""
        return self.w.gate.digest

    def figures(self):
        """What happened, by name, and how much of it."""
        cdef world_t* w = &self.w
        found = {name: w.marks[i] for i, name in enumerate(MARK_NAMES)}
        return found | {
            "steps": w.gate.steps, "switches": w.gate.switches, "stepped": w.gate.stepped,
            "clones": w.clones,
            "clones_power": w.clones_of[0], "clones_death": w.clones_of[1],
            "clones_death_power": w.clones_of[2], "clones_recovery": w.clones_of[3],
            "ios": w.ios, "virtual_ms": w.gate.now // 1000000,
        }

    def trace(self, count=400):
        """The last steps: (virtual ns, thread, kind, a, b)."""
        cdef world_t* w = &self.w
        cdef uint64_t at, first = 0
        if w.gate.traced > min(count, SIM_TRACE):
            first = w.gate.traced - min(count, SIM_TRACE)
        return [(w.gate.trace[at % SIM_TRACE].at, w.gate.trace[at % SIM_TRACE].thread,
                 w.gate.trace[at % SIM_TRACE].kind, w.gate.trace[at % SIM_TRACE].a,
                 w.gate.trace[at % SIM_TRACE].b) for at in range(first, w.gate.traced)]
