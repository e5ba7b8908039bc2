# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Crash clones. See sim_crash.pxd.

A clone runs on the thread that happens to run, without gate, delays or faults; the world stands
still meanwhile. Its image is opened as after the crash, every sector is judged by the oracle, and
often it lives on a little: writes, closes, is opened again, or suffers a second power cut."""
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdio cimport snprintf
from libc.string cimport memcmp, memcpy, memset

from fvdcore.commit cimport commit_fault, commit_flush
from fvdcore.counters cimport BLOCK_SHARED, block_t, counters_block
from fvdcore.image cimport image_close, image_free, image_open, image_options_t, image_t
from fvdcore.limits cimport BLOCK_MAX
from fvdcore.read_path cimport image_read
from fvdcore.storage cimport storage_t
from fvdcore.write_path cimport image_write
from sim_base cimport base_of_clones, base_quiet
from sim_check cimport check_bytes
from sim_disk cimport (
    DISK_FLUSH, DISK_STATUS, DISK_WRITE, KEEP_MASK, SURVIVALS, sim_disk_copy, sim_disk_cut,
    sim_disk_dirty, sim_disk_t,
)
from sim_gate cimport below, chance, next_random
from sim_manager cimport manager_follow, manager_settle
from sim_oracle cimport (
    MOMENT_EITHER, MOMENT_LIVE, MOMENT_POWER, oracle_check, oracle_copy, oracle_crash, oracle_name,
)
from sim_pattern cimport pattern_fill, pattern_read
from sim_state cimport (
    CRASH_DEATH, CRASH_DEATH_POWER, CRASH_KINDS, CRASH_POWER, CRASH_RECOVERY,
    MARK_BUSY_CHECKPOINT, MARK_CUT_IN_RECOVERY, MARK_POWER_CUT, MARK_TAKEOVER, world_t,
)

cdef enum:
    SECTOR = 512
    LATE_STAMP = 0x40000000            # written by a clone that lives on


cdef void world_fail(world_t* w, const char* what, const char* detail,
        long long number) noexcept nogil:
    if w.failed:
        return
    w.failed = True
    snprintf(w.message, 1024, b"%s: %s (%lld) at request %llu, step %llu", what, detail, number,
             <unsigned long long>w.completed, <unsigned long long>w.gate.steps)


cdef inline storage_t* data_of(world_t* w, sim_disk_t* file, sim_disk_t* data) noexcept nogil:
    return &data.head if w.has_data else &file.head


cdef int reopen(world_t* w, sim_disk_t* file, sim_disk_t* data, bint takeover, bint read_only,
        const char* what) noexcept nogil:
    """Open a clone; the live file is the clone's own when it takes over."""
    cdef image_options_t o
    cdef const char* reason = NULL
    cdef int rc
    memset(&o, 0, sizeof(o))
    o.read_only = read_only
    o.live_fd = w.clone_live_fd if w.with_live and not read_only else -1
    o.takeover = takeover
    o.boot_id = w.boot_id
    o.session = w.session
    if not read_only:
        manager_settle(w, file)
    rc = image_open(w.clone_image, &file.head, data_of(w, file, data), base_of_clones(w),
                    &w.clone_counters, &o, &reason)
    if w.ahead_min:
        w.clone_image.places.ahead_min = w.ahead_min
    if rc < 0:
        if reason == NULL:
            reason = b"the image cannot be opened"
        world_fail(w, what, reason, rc)
    return rc


cdef bint read_all(world_t* w, uint8_t* into, const char* what) noexcept nogil:
    """The whole disk, in pieces of odd sizes."""
    cdef block_t* n = counters_block(&w.clone_counters, BLOCK_SHARED)
    cdef uint64_t at = 0, size = w.clone_image.size, step
    cdef int rc
    while at < size:
        step = min((1 + below(&w.random, 512)) * SECTOR, size - at)
        rc = image_read(w.clone_image, into + at, step, at, 0, n)
        if rc < 0:
            world_fail(w, what, b"a read failed", rc)
            return False
        at += step
    return True


cdef bint zero(const uint8_t* p, uint64_t n) noexcept nogil:
    return n == 0 or (p[0] == 0 and (n == 1 or memcmp(p, p + 1, n - 1) == 0))


cdef bint judge(world_t* w, int moment, const char* what) noexcept nogil:
    """Read everything into w.content and ask the oracle."""
    cdef uint64_t sectors = w.clone_image.size // SECTOR
    if not read_all(w, w.content, what):
        return False
    if sectors < w.oracle.sectors:
        world_fail(w, what, b"the disk became smaller", <long long>sectors)
        return False
    if w.clone_image.size > w.growing_to or not zero(w.content + w.oracle.sectors * SECTOR,
                                                     (sectors - w.oracle.sectors) * SECTOR):
        world_fail(w, what, b"the disk grew too far, or shows what never was",
                   <long long>sectors)
        return False
    if w.file.gave_up or w.data.gave_up:
        moment = MOMENT_EITHER if moment == MOMENT_LIVE else moment
    if not oracle_check(&w.oracle, w.content, 0, w.oracle.sectors, w.oracle.tick + 1, moment,
                        False):
        world_fail(w, what, w.oracle.failure, 0)
        return False
    return True


cdef bint same_again(world_t* w, const char* what) noexcept nogil:
    """Read everything again: it must be what w.content holds."""
    cdef uint64_t s, at, sectors = w.clone_image.size // SECTOR
    if not read_all(w, w.scratch, what):
        return False
    for s in range(sectors):
        if memcmp(w.scratch + s * SECTOR, w.content + s * SECTOR, SECTOR) != 0:
            snprintf(w.oracle.failure, 512, b"sector %llu changed from %s %u to %s %u",
                     <unsigned long long>s, oracle_name(pattern_read(w.content + s * SECTOR, &at)),
                     pattern_read(w.content + s * SECTOR, &at),
                     oracle_name(pattern_read(w.scratch + s * SECTOR, &at)),
                     pattern_read(w.scratch + s * SECTOR, &at))
            world_fail(w, what, w.oracle.failure, 0)
            return False
    return True


cdef bint write_a_little(world_t* w) noexcept nogil:
    """The clone lives on: new writes, remembered in w.content."""
    cdef block_t* n = counters_block(&w.clone_counters, BLOCK_SHARED)
    cdef uint64_t first, count, i
    cdef int rounds = 1 + <int>below(&w.random, 6), rc
    while rounds:
        rounds -= 1
        count = 1 + below(&w.random, 12)
        first = below(&w.random, w.clone_image.size // SECTOR)
        count = min(count, w.clone_image.size // SECTOR - first)
        for i in range(count):
            pattern_fill(w.scratch + BLOCK_MAX + i * SECTOR, LATE_STAMP, first + i)
        memcpy(w.content + first * SECTOR, w.scratch + BLOCK_MAX, count * SECTOR)
        rc = image_write(w.clone_image, w.scratch + BLOCK_MAX, count * SECTOR, first * SECTOR, 0,
                         n)
        if rc == 0 and chance(&w.random, 1, 3):
            rc = commit_flush(&w.clone_image.commit, n)
        if rc < 0:
            if rc == -28 and w.full_expected:
                # Which part of it arrived is unknown: read instead of remembering.
                return read_all(w, w.content, b"after a full storage")
            world_fail(w, b"after a crash", b"a write to the reopened image failed", rc)
            return False
    return True


cdef void live_on(world_t* w, sim_disk_t* file, sim_disk_t* data) noexcept nogil:
    """Write, end in one way or another, open again; all must be there. The image is open."""
    cdef block_t* n = counters_block(&w.clone_counters, BLOCK_SHARED)
    cdef bint close = chance(&w.random, 1, 2)
    cdef int rc
    if commit_fault(&w.clone_image.commit) or not write_a_little(w):
        image_free(w.clone_image)
        return
    rc = image_close(w.clone_image, n) if close else commit_flush(&w.clone_image.commit, n)
    image_free(w.clone_image)
    if rc < 0:
        world_fail(w, b"after a crash", b"the reopened image cannot be closed", rc)
        return
    sim_disk_cut(&w.second_file, file, <int>below(&w.random, SURVIVALS), 0, &w.random)
    if w.has_data:
        sim_disk_cut(&w.second_data, data, <int>below(&w.random, SURVIVALS), 0, &w.random)
    if not check_bytes(w, &w.second_file, &w.second_data):
        return
    if reopen(w, &w.second_file, &w.second_data, False, chance(&w.random, 1, 2),
              b"opened again after a crash") == 0:
        same_again(w, b"opened again after a crash and a close" if close
                   else b"opened again after a crash and a flush")
        image_free(w.clone_image)


# -- the kinds ---------------------------------------------------------------------------------

cdef void cut(world_t* w, int survival, uint64_t mask) noexcept nogil:
    sim_disk_cut(&w.clone_file, &w.file, survival, mask, &w.random)
    if w.has_data:
        # Two files forget independently, unless the test says which sectors survive.
        if survival != KEEP_MASK and chance(&w.random, 1, 2):
            survival = <int>below(&w.random, SURVIVALS)
        sim_disk_cut(&w.clone_data, &w.data, survival, mask, &w.random)
    w.marks[MARK_POWER_CUT] += 1


cdef void arm_second(world_t* w) noexcept nogil:
    """The n-th operation of the clone is followed by a power cut; the clone goes on."""
    w.second_in = 1 + <long long>below(&w.random, 14)
    w.second_done = False
    w.second_survival = <int>below(&w.random, SURVIVALS)
    w.clone_file.executed = crash_second
    w.clone_file.owner = w
    w.clone_data.executed = crash_second
    w.clone_data.owner = w


cdef void disarm_second(world_t* w) noexcept nogil:
    w.clone_file.executed = NULL
    w.clone_data.executed = NULL


cdef void crash_second(void* owner, sim_disk_t* d, int op, uint64_t offset) noexcept nogil:
    cdef world_t* w = <world_t*>owner
    if w.second_done:
        return
    w.second_in -= 1
    if w.second_in > 0:
        return
    w.second_done = True
    sim_disk_cut(&w.second_file, &w.clone_file, w.second_survival, 0, &w.random)
    if w.has_data:
        sim_disk_cut(&w.second_data, &w.clone_data, w.second_survival, 0, &w.random)


cdef void judge_second(world_t* w, const char* what) noexcept nogil:
    """What the second power cut left."""
    if not w.second_done or w.failed:
        return
    w.marks[MARK_CUT_IN_RECOVERY] += 1
    if not check_bytes(w, &w.second_file, &w.second_data):
        return
    if reopen(w, &w.second_file, &w.second_data, False, chance(&w.random, 1, 4), what) == 0:
        judge(w, MOMENT_POWER, what)
        image_free(w.clone_image)


cdef void crash_power(world_t* w, int survival, uint64_t mask) noexcept nogil:
    cdef bint first_read_only = chance(&w.random, 1, 4)
    cut(w, survival, mask)
    if not check_bytes(w, &w.clone_file, &w.clone_data):
        return
    if first_read_only:
        if reopen(w, &w.clone_file, &w.clone_data, False, True, b"read-only after a power cut"):
            return
        judge(w, MOMENT_POWER, b"read-only after a power cut")
        image_free(w.clone_image)
    if w.failed or reopen(w, &w.clone_file, &w.clone_data, False, False, b"after a power cut"):
        return
    if judge(w, MOMENT_POWER, b"after a power cut") and chance(&w.random, 1, 2):
        live_on(w, &w.clone_file, &w.clone_data)
    else:
        image_free(w.clone_image)


cdef void crash_recovery(world_t* w) noexcept nogil:
    cut(w, <int>below(&w.random, SURVIVALS), 0)
    arm_second(w)
    if reopen(w, &w.clone_file, &w.clone_data, False, False, b"after a power cut") == 0:
        judge(w, MOMENT_POWER, b"after a power cut")
        image_free(w.clone_image)
    disarm_second(w)
    judge_second(w, b"after a power cut during recovery")


cdef void crash_death(world_t* w, bint with_power) noexcept nogil:
    cdef bint faulty
    sim_disk_copy(&w.clone_file, &w.file)
    if w.has_data:
        sim_disk_copy(&w.clone_data, &w.data)
    memcpy(w.clone_live, w.live, w.live_bytes)
    if with_power:
        arm_second(w)
    if reopen(w, &w.clone_file, &w.clone_data, True, False, b"after the process died") == 0:
        w.marks[MARK_TAKEOVER] += 1
        faulty = commit_fault(&w.clone_image.commit) != 0
        # A flush that failed and was not yet told to anybody: the dead process alone knew.
        if (w.file.gave_up or w.data.gave_up) and not faulty:
            with_power = False
        if judge(w, MOMENT_LIVE, b"after the process died") and not faulty and not with_power \
                and not w.file.gave_up and not w.data.gave_up:
            live_on(w, &w.clone_file, &w.clone_data)
        else:
            image_free(w.clone_image)
    disarm_second(w)
    if with_power:
        judge_second(w, b"after the process died, then a power cut")


cdef void crash_clone(world_t* w, int kind, int survival, uint64_t mask) noexcept nogil:
    if w.failed or w.cloning or not w.open_:
        return
    if not w.with_live and kind in (CRASH_DEATH, CRASH_DEATH_POWER):
        kind = CRASH_POWER
    w.cloning = True
    base_quiet(w, True)
    manager_follow(w, w.device.image)
    w.clones += 1
    w.clones_of[kind] += 1
    if kind == CRASH_POWER:
        crash_power(w, survival, mask)
    elif kind == CRASH_RECOVERY:
        crash_recovery(w)
    else:
        crash_death(w, kind == CRASH_DEATH_POWER)
    base_quiet(w, False)
    w.cloning = False


cdef void crash_adopt(world_t* w) noexcept nogil:
    if w.adopted:
        return
    w.adopted = True
    if w.open_:
        manager_follow(w, w.device.image)
    if w.adopt_death:
        sim_disk_copy(&w.next_file, &w.file)
        if w.has_data:
            sim_disk_copy(&w.next_data, &w.data)
        memcpy(w.next_live, w.live, w.live_bytes)
    else:
        sim_disk_cut(&w.next_file, &w.file, <int>below(&w.random, SURVIVALS), 0, &w.random)
        if w.has_data:
            sim_disk_cut(&w.next_data, &w.data, <int>below(&w.random, SURVIVALS), 0, &w.random)
    oracle_copy(&w.next_oracle, &w.oracle)
    oracle_crash(&w.next_oracle)


# -- when --------------------------------------------------------------------------------------

cdef void random_clone(world_t* w) noexcept nogil:
    cdef int kind = w.only_kind
    if kind < 0:
        kind = <int>below(&w.random, CRASH_KINDS)
    w.clones_left -= 1
    crash_clone(w, kind, <int>below(&w.random, SURVIVALS), 0)


cdef void crash_observe(void* owner) noexcept nogil:
    cdef world_t* w = <world_t*>owner
    if w.cloning or not w.open_:
        return
    if w.completed >= w.adopt_at and not w.adopted and chance(&w.random, 1, 64):
        crash_adopt(w)
    if not w.clones_left or w.completed < w.clone_at:
        return
    if w.clone_step == 0:
        w.clone_step = w.gate.steps + below(&w.random, 50)
    if w.gate.steps >= w.clone_step:
        w.clone_step = 0
        w.clone_at += 1 + below(&w.random, 2 * w.clone_every - 1)
        random_clone(w)


cdef void every_cut(world_t* w) noexcept nogil:
    """Every subset of few dirty sectors; of many: none, all, each alone, each missing, and more."""
    cdef uint64_t dirty = sim_disk_dirty(&w.file), mask
    cdef int survival
    if w.has_data:
        dirty = max(dirty, sim_disk_dirty(&w.data))
    if dirty <= w.exhaustive:
        for mask in range(<uint64_t>1 << dirty):
            crash_clone(w, CRASH_POWER, KEEP_MASK, mask)
        return
    for survival in range(<int>SURVIVALS):
        crash_clone(w, CRASH_POWER, survival, 0)
    for mask in range(min(dirty, 9 * (w.exhaustive - 1))):
        crash_clone(w, CRASH_POWER, KEEP_MASK, <uint64_t>1 << mask)
        crash_clone(w, CRASH_POWER, KEEP_MASK, ~(<uint64_t>1 << mask))
    crash_clone(w, CRASH_DEATH, 0, 0)
    crash_clone(w, CRASH_RECOVERY, 0, 0)


cdef void note_checkpoint(world_t* w, uint64_t offset) noexcept nogil:
    """A page of bitmap or table is written while a guest waits for an answer."""
    cdef uint64_t bitmap = w.device.image.header.fields.bitmap_offset
    cdef uint64_t table = w.device.image.header.fields.table_offset
    cdef int i
    if not (bitmap <= offset < bitmap + w.device.image.header.fields.bitmap_size
            or table <= offset < table + w.device.image.header.fields.table_size):
        return
    for i in range(w.guest_count):
        if w.guests[i].outstanding:
            w.marks[MARK_BUSY_CHECKPOINT] += 1
            return


cdef void crash_executed(void* owner, sim_disk_t* d, int op, uint64_t offset) noexcept nogil:
    """Moments right after metadata were written or a flush ended are worth more than others."""
    cdef world_t* w = <world_t*>owner
    w.ios += 1
    if op == DISK_WRITE and not w.cloning and w.open_:
        note_checkpoint(w, offset)
    if w.exhaustive and not w.cloning and w.open_ and op < DISK_STATUS:
        every_cut(w)
    if w.cloning or not w.open_ or not w.clones_left or op >= DISK_STATUS:
        return
    if (op == DISK_FLUSH or offset < d.border) and w.completed + w.clone_every >= w.clone_at \
            and chance(&w.random, 1, 2 if w.closing else 12):
        w.clone_at += w.clone_every
        random_clone(w)
