# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""The manager. See sim_manager.pxd."""
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset

from fvdcore.atomics cimport load_acquire
from fvdcore.chunk_table cimport CLOSED, UNMAPPED, table_entry
from fvdcore.counters cimport BLOCK_SHARED, block_t, counters_block
from fvdcore.crc32c cimport crc32c
from fvdcore.header cimport header_value_t
from fvdcore.image cimport image_t
from fvdcore.prefetch cimport PREFETCH_DONE, prefetch_pause, prefetch_run
from fvdcore.resize cimport image_grow
from fvdcore.settings cimport settings_change
from sim_base cimport base_end
from sim_crash cimport world_fail
from sim_disk cimport sim_disk_t
from sim_gate cimport sim_wait
from sim_oracle cimport oracle_grow
from sim_state cimport (
    ACTION_GROW, ACTION_UPDATE, MARK_NO_SPACE, MARK_RELOCATED, MARK_RESIZED, MARK_UPDATED,
    action_t, settings_t, world_t,
)

cdef enum:
    SECTOR = 512
    BACKUP = 8192
    EXTENSION = 7440
    UUID = 7448
    FEATURES = 7504
    STAGED = 2
    ENOSPC = 28
    EBUSY = 16
    SLOW_NS = 1000000000               # disks on which a minute's wait may be in vain


# -- growing -----------------------------------------------------------------------------------

cdef void manager_follow(world_t* w, const image_t* m) noexcept nogil:
    cdef uint64_t sectors = m.size // SECTOR
    if sectors > w.oracle.sectors and m.size <= w.growing_to:
        oracle_grow(&w.oracle, sectors)


cdef bint in_the_way(const image_t* m, uint64_t size) noexcept nogil:
    """Does a chunk lie where the table must grow?"""
    cdef uint64_t bytes = ((size + m.chunk_size - 1) // m.chunk_size * 4 + 4095) // 4096 * 4096
    cdef uint64_t chunk, end = m.header.fields.table_offset + bytes
    cdef uint32_t entry
    if m.data != m.file or bytes <= m.header.fields.table_size:
        return False
    for chunk in range(m.table.chunks):
        entry = table_entry(&m.table, chunk)
        if entry != UNMAPPED and m.data_offset + (entry & ~CLOSED) * m.chunk_size < end:
            return True
    return False


cdef void judge_failure(world_t* w, int rc, const char* what) noexcept nogil:
    """A failure needs a cause."""
    if rc == -ENOSPC and (w.full_expected or w.file.fixed):
        w.marks[MARK_NO_SPACE] += 1
    elif rc == -EBUSY and w.file.delay_max + w.gate.stall >= SLOW_NS:
        pass
    elif not w.faulty_start and w.file.failures + w.data.failures + w.base.failures \
            + w.below.failures == 0:
        world_fail(w, what, b"failed though no I/O did", rc)


cdef void grow(world_t* w, uint64_t size, block_t* n) noexcept nogil:
    cdef image_t* m = w.device.image
    cdef bint moves
    cdef int rc
    if size <= m.size:
        return
    moves = m.compact and in_the_way(m, size)
    # A growth that failed may have stored its size.
    w.growing_to = max(w.growing_to, size)
    rc = image_grow(m, size, n)
    if rc < 0:
        judge_failure(w, rc, b"growing the disk")
        return
    manager_follow(w, m)
    w.marks[MARK_RESIZED] += 1
    w.marks[MARK_RELOCATED] += moves


# -- updates -----------------------------------------------------------------------------------

cdef settings_t settings_in(const uint8_t* p) noexcept nogil:
    cdef settings_t s
    memset(&s, 0, sizeof(s))
    memcpy(&s.period, p + 2180, 8)
    memcpy(&s.copy_on_read, p + 3248, 4)
    memcpy(&s.outstanding, p + 3252, 8)
    memcpy(&s.throttle, p + 3332, 8)
    return s


cdef bint staged(const sim_disk_t* file) noexcept nogil:
    return (file.cache[FEATURES] & STAGED) != 0


cdef settings_t settings_of(const sim_disk_t* file) noexcept nogil:
    return settings_in(file.cache + (BACKUP if staged(file) else 0))


cdef void manager_restart(world_t* w, const sim_disk_t* file) noexcept nogil:
    w.settings = settings_of(file)
    w.next_settings = w.settings
    # What follows a failed flush may never become durable.
    w.settings_mixed = w.faulty_start


cdef bint manager_check(world_t* w, const sim_disk_t* file) noexcept nogil:
    cdef settings_t s
    if staged(file) and memcmp(file.cache + UUID, file.cache + BACKUP + UUID, 16) != 0:
        world_fail(w, b"an update", b"is staged without its copy", 0)
        return False
    s = settings_of(file)
    if w.settings_mixed or memcmp(&s, &w.settings, sizeof(s)) == 0 \
            or memcmp(&s, &w.next_settings, sizeof(s)) == 0:
        return True
    world_fail(w, b"an update", b"is made in part, or lost; throttle time", <long long>s.throttle)
    return False


cdef void put(sim_disk_t* file, uint64_t first, uint64_t end) noexcept nogil:
    memcpy(file.cache + first, file.cache + BACKUP + first, end - first)


cdef void manager_settle(world_t* w, sim_disk_t* file) noexcept nogil:
    cdef uint8_t[512] extension
    cdef uint32_t size, crc
    if not staged(file):
        return
    put(file, 2172, 2188)
    put(file, 2212, 2220)
    put(file, 3248, 3268)
    put(file, 3272, 3344)
    file.cache[FEATURES] &= 0xFF ^ STAGED
    memcpy(&size, file.cache + EXTENSION, 4)
    memset(file.cache + EXTENSION + 4, 0, 4)
    memcpy(&extension[0], file.cache + EXTENSION, min(size, <uint32_t>128))
    crc = crc32c(0, &extension[0], size)
    memcpy(file.cache + EXTENSION + 4, &crc, 4)
    memcpy(file.durable, file.cache, BACKUP)


cdef void update(world_t* w, uint64_t value, block_t* n) noexcept nogil:
    """Change some of the four fields: those of one sector, or of both."""
    cdef header_value_t[4] values
    cdef settings_t s = w.settings
    cdef int rc
    if value & 1:
        s.period = (value >> 8) % 64 + 64 * (value >> 1 & 63)
    if value & 1 == 0 or value & 128:
        s.copy_on_read = value >> 14 & 1
        s.outstanding = 1 + (value >> 15 & 0xFFFFF)
        s.throttle = value >> 8
    values[0] = header_value_t(2180, 8, s.period)
    values[1] = header_value_t(3248, 4, s.copy_on_read)
    values[2] = header_value_t(3252, 8, s.outstanding)
    values[3] = header_value_t(3332, 8, s.throttle)
    w.next_settings = s
    rc = settings_change(w.device.image, &w.device.prefetch, &values[0], 4, False, n)
    if rc == 0:
        w.settings = s
        w.marks[MARK_UPDATED] += 1
        return
    w.settings_mixed = True
    judge_failure(w, rc, b"an update")


# -- the thread --------------------------------------------------------------------------------

cdef void act(world_t* w, const action_t* a) noexcept nogil:
    cdef block_t* n = counters_block(&w.device.counters, BLOCK_SHARED)
    if a.kind == ACTION_GROW:
        grow(w, a.value, n)
    elif a.kind == ACTION_UPDATE:
        update(w, a.value, n)
    elif a.value:
        prefetch_run(&w.device.prefetch)
    else:
        prefetch_pause(&w.device.prefetch)


cdef void* manager_main(void* argument) noexcept nogil:
    cdef world_t* w = <world_t*>argument
    cdef int i
    for i in range(w.action_count):
        while w.completed < w.actions[i].at and w.guests_left and not w.failed and not w.adopted:
            sim_wait(&w.gate, &w.actions[0])
        if w.failed or w.adopted:
            break
        act(w, &w.actions[i])
    while w.ends_base and w.guests_left and not w.failed and not w.adopted:
        if load_acquire(&w.device.prefetch.state) == PREFETCH_DONE:
            base_end(w)
            break
        sim_wait(&w.gate, &w.actions[0])
    return NULL
