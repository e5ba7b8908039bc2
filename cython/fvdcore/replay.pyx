# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Layer 2. Reading the journal of an image that is being opened (FORMAT.md section 4).

First every sector is read and every record of those that count is checked; only then are they
applied, in the order of (epoch, sequence): bits commute, entries of the chunk table do not. Sectors
without a trailer, an older writer's, come before those that have one, in the order of the epochs of
their table records and then of their places.

A record of 16 bytes may set a billion bits, and a hostile journal repeats it in every sector. So no
group of blocks is filled twice: the time is bounded by the journal's length and the bitmap's."""
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, qsort, realloc
from libc.string cimport memcpy, memset
from .bitmap cimport bitmap_set_durable, bitmap_t
from .chunk_table cimport CLOSED, PLACES_MAX, UNMAPPED, table_set_durable
from .crc32c cimport crc32c
from .journal cimport journal_t
from .layout cimport (
    FVD_BITMAP_RECORD, FVD_RECORDS_BYTES, FVD_TABLE_RECORD, FVD_TRAILER_MAGIC, FVD_TRAILER_OFFSET,
    fvd_bitmap_record_t, fvd_table_record_t, fvd_trailer_t,
)
from .limits cimport PAGE, SECTOR
from .storage cimport EXTENT_ZERO, storage_read, storage_status
from .syscalls cimport (
    ENOMEM, EOVERFLOW, EUCLEAN, MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE,
    c_mmap, c_munmap,
)

cdef enum:
    BITS_BYTES = 16
    TABLE_BYTES = 20
    REPLAY_STEP = 262144
    TRAILERED = 62                     # bit of a key's epoch: ours come after an older writer's
    GROUP_BLOCKS = 4096
    GROUP_WORDS = 64
    NUMBER_BITS = 61                   # of epochs and sequences that leave a writer room

cdef struct target_t:
    bitmap_t* bitmap                   # NULL: bitmap records are not applied
    uint32_t* onward                   # of each group: 0, or where to go on because it is full

cdef struct found_t:
    uint64_t epoch                     # with bit TRAILERED
    uint64_t sequence
    uint64_t at                        # bytes from the ring's begin

cdef struct scan_t:
    const journal_t* journal
    const journal_scope_t* scope
    uint8_t* window                    # REPLAY_STEP bytes of the ring, from window_at on
    uint64_t window_at
    uint64_t window_bytes
    found_t* found
    uint64_t count
    uint64_t room
    uint64_t epoch_max
    uint64_t sequence_max


cdef bint trailer_valid(const journal_t* j, const uint8_t* sector,
        fvd_trailer_t* t) noexcept nogil:
    cdef uint8_t[512] copy
    memcpy(t, sector + FVD_TRAILER_OFFSET, sizeof(fvd_trailer_t))
    if t.magic != FVD_TRAILER_MAGIC:
        return False
    memcpy(copy, sector, SECTOR)
    memset(copy + FVD_TRAILER_OFFSET + 4, 0, 4)
    return crc32c(j.seed, copy, SECTOR) == t.crc


# -- bits --------------------------------------------------------------------------------------

cdef int target_init(target_t* t, bitmap_t* b) noexcept nogil:
    t.bitmap = b
    t.onward = NULL
    if b != NULL:
        t.onward = <uint32_t*>calloc(b.blocks // GROUP_BLOCKS + 1, sizeof(uint32_t))
        if t.onward == NULL:
            return -ENOMEM
    return 0


cdef uint64_t next_group(uint32_t* onward, uint64_t group) noexcept nogil:
    """First group from here on that was not filled as a whole; the way gets shorter by walking."""
    while onward[group]:
        if onward[onward[group]]:
            onward[group] = onward[onward[group]]
        group = onward[group]
    return group


cdef void set_blocks(target_t* t, uint64_t first, uint64_t end) noexcept nogil:
    """Blocks [first, end) are durable."""
    cdef uint64_t group = (first + GROUP_BLOCKS - 1) // GROUP_BLOCKS
    cdef uint64_t stop = end // GROUP_BLOCKS
    if group >= stop:
        bitmap_set_durable(t.bitmap, first, end)
        return
    bitmap_set_durable(t.bitmap, first, group * GROUP_BLOCKS)
    bitmap_set_durable(t.bitmap, stop * GROUP_BLOCKS, end)
    group = next_group(t.onward, group)
    while group < stop:
        memset(t.bitmap.durable + group * GROUP_WORDS, 0xff, GROUP_WORDS * 8)
        t.onward[group] = <uint32_t>(group + 1)
        group = next_group(t.onward, group)


# -- records -----------------------------------------------------------------------------------
# target NULL: a record is checked and not applied.

cdef int walk_bits(const journal_scope_t* scope, const uint8_t* at, bint ours,
        target_t* target) noexcept nogil:
    """Check, and where asked apply, one bitmap record."""
    cdef fvd_bitmap_record_t r
    cdef uint64_t block_sectors = scope.block_size // SECTOR, blocks, limit, end
    if scope.base_size == 0:
        return -EUCLEAN
    memcpy(&r, at, BITS_BYTES)
    blocks = (scope.base_size + scope.block_size - 1) // scope.block_size
    # Ours are widened to whole blocks; an older writer's reach wherever the guest wrote.
    limit = blocks * block_sectors
    if not ours:
        limit = max(limit, scope.disk_size // SECTOR)
    if r.sectors == 0 or r.first_sector >= limit or r.sectors > limit - r.first_sector:
        return -EUCLEAN
    if (target != NULL and target.bitmap != NULL
            and r.first_sector < blocks * block_sectors):
        end = (r.first_sector + r.sectors + block_sectors - 1) // block_sectors
        set_blocks(target, r.first_sector // block_sectors, min(end, blocks))
    return BITS_BYTES


cdef int walk_table(const journal_scope_t* scope, const uint8_t* at, int room, bint ours,
        uint64_t epoch, target_t* target) noexcept nogil:
    """Check, and where asked apply, one table record; epoch: of its trailer, if it is ours."""
    cdef fvd_table_record_t r
    cdef uint32_t entry, i
    if scope.table == NULL or room < TABLE_BYTES:
        return -EUCLEAN
    memcpy(&r, at, TABLE_BYTES)
    if (r.count == 0 or r.count > <uint32_t>(room - TABLE_BYTES) // 4
            or <uint64_t>r.first_index + r.count > scope.table.chunks
            or (ours and r.epoch != epoch) or r.epoch >> 62):
        return -EUCLEAN
    for i in range(r.count):
        memcpy(&entry, at + TABLE_BYTES + 4 * i, 4)
        if entry != UNMAPPED:
            entry &= ~CLOSED
            if entry >= PLACES_MAX:
                return -EUCLEAN
        if target != NULL and r.epoch >= scope.stable_epoch:
            table_set_durable(scope.table, r.first_index + i, entry)
    return TABLE_BYTES + 4 * <int>r.count


cdef int walk_sector(const journal_scope_t* scope, const uint8_t* sector, bint ours,
        uint64_t epoch, target_t* target, uint64_t* table_epoch) noexcept nogil:
    """All records of a sector: ours with a trailer of that epoch, or an older writer's.
    *table_epoch: the highest of its table records'. 0 or -EUCLEAN."""
    cdef int at = 0, limit = FVD_RECORDS_BYTES if ours else SECTOR, rc
    cdef uint32_t kind
    cdef uint64_t own
    while at + 4 <= limit:
        memcpy(&kind, sector + at, 4)
        if kind == 0:
            return 0
        if kind == FVD_BITMAP_RECORD and at + BITS_BYTES <= limit:
            rc = walk_bits(scope, sector + at, ours, target)
        elif kind == FVD_TABLE_RECORD:
            rc = walk_table(scope, sector + at, limit - at, ours, epoch, target)
            if rc > 0:
                memcpy(&own, sector + at + 4, 8)
                table_epoch[0] = max(table_epoch[0], own)
        else:
            return -EUCLEAN
        if rc < 0:
            return rc
        at += rc
    return 0


# -- first pass: what counts -------------------------------------------------------------------

cdef int remember(scan_t* s, uint64_t epoch, uint64_t sequence, uint64_t at) noexcept nogil:
    cdef found_t* larger
    cdef uint64_t room
    if s.count == s.room:
        room = max(s.room * 2, <uint64_t>512)
        larger = <found_t*>realloc(s.found, room * sizeof(found_t))
        if larger == NULL:
            return -ENOMEM
        s.found = larger
        s.room = room
    s.found[s.count].epoch = epoch
    s.found[s.count].sequence = sequence
    s.found[s.count].at = at
    s.count += 1
    return 0


cdef int look_at(scan_t* s, const uint8_t* sector, uint64_t at) noexcept nogil:
    """Check a sector and remember it where it counts."""
    cdef fvd_trailer_t trailer
    cdef uint64_t epoch = 0
    cdef uint32_t first
    cdef int rc
    if trailer_valid(s.journal, sector, &trailer):
        if trailer.epoch >> 62:
            return -EUCLEAN
        if trailer.epoch < s.scope.stable_epoch:
            # Whatever is in it, it does not count: a sequence that nobody can follow neither.
            if trailer.sequence >> NUMBER_BITS == 0:
                s.sequence_max = max(s.sequence_max, trailer.sequence)
            return 0
        if trailer.sequence >> 62:
            return -EUCLEAN
        s.epoch_max = max(s.epoch_max, trailer.epoch)
        s.sequence_max = max(s.sequence_max, trailer.sequence)
        rc = walk_sector(s.scope, sector, True, trailer.epoch, NULL, &epoch)
        epoch = trailer.epoch | <uint64_t>1 << TRAILERED
        return rc if rc < 0 else remember(s, epoch, trailer.sequence, at)
    # A trailer of ours with a wrong sum: the sector was torn. Where the uuid is lost with the
    # extension nobody can tell, and what was committed must not be dropped.
    if trailer.magic == FVD_TRAILER_MAGIC and not s.scope.verifies:
        return -EUCLEAN
    memcpy(&first, sector, 4)
    if s.scope.trailers or trailer.magic == FVD_TRAILER_MAGIC or first == 0:
        return 0
    rc = walk_sector(s.scope, sector, False, 0, NULL, &epoch)
    if rc < 0:
        return rc
    s.epoch_max = max(s.epoch_max, epoch)
    return remember(s, epoch, at, at)


cdef int load_window(scan_t* s, uint64_t at, uint64_t most) noexcept nogil:
    """Let the window hold the ring's bytes from at on, and up to most more."""
    cdef uint64_t bytes = min(most, s.journal.pages * PAGE - at)
    cdef int rc
    if s.window_bytes and s.window_at <= at < s.window_at + s.window_bytes:
        return 0
    s.window_bytes = 0
    s.window_at = at
    rc = storage_read(s.journal.storage, s.window, bytes, s.journal.offset + at, 0)
    if rc == 0:
        s.window_bytes = bytes
    return rc


cdef int scan(scan_t* s) noexcept nogil:
    cdef uint64_t at = 0, size = s.journal.pages * PAGE, hole = 0, end
    cdef int rc
    while at < size:
        if (storage_status(s.journal.storage, size - at, s.journal.offset + at, &hole)
                == EXTENT_ZERO and hole >= SECTOR):
            at += hole // SECTOR * SECTOR
            continue
        rc = load_window(s, at, REPLAY_STEP)
        end = s.window_at + s.window_bytes
        while rc == 0 and at < end:
            rc = look_at(s, s.window + (at - s.window_at), at)
            at += SECTOR
        if rc < 0:
            return rc
    return 0


# -- second pass: apply ------------------------------------------------------------------------

cdef int compare(const void* a, const void* b) noexcept nogil:
    cdef const found_t* x = <const found_t*>a
    cdef const found_t* y = <const found_t*>b
    if x.epoch != y.epoch:
        return -1 if x.epoch < y.epoch else 1
    if x.sequence != y.sequence:
        return -1 if x.sequence < y.sequence else 1
    return 0


cdef int apply_found(scan_t* s) noexcept nogil:
    cdef target_t target
    cdef uint64_t i, epoch, unused = 0
    cdef bint ours
    cdef int rc
    if s.count == 0:
        return 0
    rc = target_init(&target, s.scope.bitmap)
    qsort(s.found, s.count, sizeof(found_t), compare)
    s.window_bytes = 0
    for i in range(s.count):
        if rc == 0:
            rc = load_window(s, s.found[i].at, PAGE)
        if rc < 0:
            break
        ours = s.found[i].epoch >> TRAILERED & 1
        epoch = s.found[i].epoch & ~(<uint64_t>1 << TRAILERED)
        rc = walk_sector(s.scope, s.window + (s.found[i].at - s.window_at), ours, epoch, &target,
                         &unused)
    free(target.onward)
    return rc


cdef int journal_replay(journal_t* j, const journal_scope_t* scope) noexcept nogil:
    cdef scan_t s
    cdef void* window
    cdef int rc = 0
    memset(&s, 0, sizeof(scan_t))
    s.journal = j
    s.scope = scope
    s.epoch_max = scope.stable_epoch
    if j.pages:
        window = c_mmap(NULL, REPLAY_STEP, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
                        -1, 0)
        if window == MAP_FAILED:
            return -ENOMEM
        s.window = <uint8_t*>window
        rc = scan(&s)
        if rc == 0:
            rc = apply_found(&s)
        c_munmap(window, REPLAY_STEP)
        free(s.found)
        if rc < 0:
            return rc
    j.epoch = s.epoch_max + 1
    j.sequence = s.sequence_max + 1
    if scope.writes and (j.epoch >> NUMBER_BITS or j.sequence >> NUMBER_BITS):
        return -EOVERFLOW
    return <int>s.count
