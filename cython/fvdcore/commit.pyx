# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Layer 2. Commit, checkpoint and the keeper thread. See commit.pxd; the order of flushes is
FORMAT.md section 6 and is written here and nowhere else.

Leading is exclusive: commit takes changes, checkpoint copies pages, never both. A checkpoint gives
up the lead after its copy, so commits go on beside its I/O in the next epoch; it keeps
checkpointing, so there is one at a time. A commit whose records do not fit into the ring waits for
a running checkpoint, or makes one itself while it leads: the only place where a flush stalls on the
ring."""
from libc.errno cimport errno
from libc.stdint cimport int64_t, uint8_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset
from .atomics cimport (
    ctz64, exchange_acq_rel, fence, fetch_or_release, load_acquire,
    load_relaxed, popcount64, store_release,
)
from .bitmap cimport bitmap_settle_marks, bitmap_t
from .counters cimport (
    BLOCK_KEEPER, G_FAULT, G_JOURNAL_EPOCH, G_JOURNAL_USED, G_PENDING_BLOCKS, H_CHECKPOINT_DURATION,
    H_COMMIT_DURATION, N_IMAGE_FLUSHES, N_IMAGE_WRITE_BYTES, N_JOURNAL_BYTES, N_JOURNAL_CHECKPOINTS,
    N_JOURNAL_COMMITS, N_JOURNAL_RECORDS, N_METADATA_WRITE_BYTES, block_t, count, counters_block,
    gauge_add, gauge_set, observe,
)
from .header cimport header_store_epoch
from .journal cimport (
    journal_apply_batch, journal_batch_pages, journal_begin, journal_put_blocks, journal_seal,
    journal_t, journal_used, journal_write,
)
from .limits cimport (
    BACKGROUND_COMMIT_BYTES, BACKGROUND_COMMIT_MS, NEVER, NS_PER_MS, PAGE, SECTOR,
)
from .storage cimport storage_flush, storage_write
from .sync cimport (
    clock_now, cond_broadcast, cond_free, cond_init, cond_signal, cond_wait, gate_t, mutex_free,
    mutex_init, mutex_lock, mutex_unlock, thread_join, thread_start,
)
from .syscalls cimport (
    EIO, ENOMEM, ENOSPC, MAP_ANONYMOUS, MAP_FAILED, MAP_NORESERVE, MAP_PRIVATE,
    PROT_READ, PROT_WRITE, c_mmap, c_munmap,
    drop_pages,
)

cdef enum:
    PAGE_WORDS = 512
    RECORD_BYTES = 16
    KEEPER_IDLE = 0                    # waits without a timer
    KEEPER_ARMED = 1                   # waits with the timer of the guest's changes
    KEEPER_ARMED_LONG = 2              # waits with the timer of copied blocks
    KEEPER_KICKED = 3                  # has been told to look


cdef int commit_init(commit_t* c, gate_t* gate) noexcept nogil:
    """The caller has set storage, header, bitmap, journal, counters, fault, period and buffer."""
    cdef void* p
    cdef int rc
    c.gate = gate
    rc = mutex_init(&c.mutex, gate)
    if rc == 0:
        rc = mutex_init(&c.flushing, gate)
    if rc == 0:
        rc = cond_init(&c.changed, gate)
    if rc == 0:
        rc = cond_init(&c.keeper_wake, gate)
    if rc < 0 or c.bitmap == NULL:
        return rc
    p = c_mmap(NULL, c.bitmap.pages * PAGE, PROT_READ | PROT_WRITE,
               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    if p == MAP_FAILED:
        return -errno
    c.copies = <uint8_t*>p
    c.copied_pages = <uint64_t*>calloc(c.bitmap.pages // 64 + 1, 8)
    return 0 if c.copied_pages != NULL else -ENOMEM


cdef void commit_free(commit_t* c) noexcept nogil:
    if c.copies != NULL:
        c_munmap(c.copies, c.bitmap.pages * PAGE)
        c.copies = NULL
    free(c.copied_pages)
    c.copied_pages = NULL
    mutex_free(&c.mutex)
    mutex_free(&c.flushing)
    cond_free(&c.changed)
    cond_free(&c.keeper_wake)


cdef int commit_fault(const commit_t* c) noexcept nogil:
    return <int>load_acquire(c.fault)


cdef void commit_set_fault(commit_t* c, int rc) noexcept nogil:
    """The first error stays: what the kernel dropped after it can no longer be told."""
    if load_acquire(c.fault) == 0:
        store_release(c.fault, <uint64_t>(-rc))
        gauge_set(c.counters, G_FAULT, <uint64_t>(-rc))
        if c.notify != NULL:
            c.notify(c.owner)


cdef int commit_flush_storage(commit_t* c, block_t* n) noexcept nogil:
    cdef int rc = -EIO
    # The kernel tells a lost page once: the thread that hears it must set the fault before another
    # flush can succeed.
    mutex_lock(&c.flushing)
    if commit_fault(c) == 0:
        rc = storage_flush(c.storage)
        count(n, N_IMAGE_FLUSHES, 1)
        if rc < 0:
            commit_set_fault(c, rc)
    mutex_unlock(&c.flushing)
    return rc


# -- taking changes ----------------------------------------------------------------------------

cdef struct taking_t:
    uint64_t first                     # run of blocks being gathered
    uint64_t end
    uint64_t blocks
    bint overflow                      # more than a batch holds: a checkpoint must do it


cdef void put_run(commit_t* c, taking_t* t) noexcept nogil:
    cdef uint64_t sectors, block_sectors = c.header.fields.block_size // SECTOR
    cdef uint64_t base_sectors = c.header.fields.base_img_size // SECTOR
    if t.first == t.end or t.overflow:
        return
    sectors = min(t.end * block_sectors, base_sectors) - t.first * block_sectors
    if journal_put_blocks(c.journal, t.first * block_sectors, sectors) < 0:
        t.overflow = True


cdef void take_word(commit_t* c, taking_t* t, uint64_t word) noexcept nogil:
    cdef uint64_t durable = load_relaxed(c.bitmap.durable + word)
    cdef uint64_t delta = load_acquire(c.bitmap.present + word) & ~durable
    cdef uint64_t first, length
    t.blocks += popcount64(delta)
    while delta:
        first = <uint64_t>ctz64(delta)
        length = <uint64_t>ctz64(~(delta >> first)) if delta >> first != ~<uint64_t>0 else 64
        if first + length >= 64:
            delta = 0
        else:
            delta &= ~<uint64_t>0 << (first + length)
        first += word * 64
        if first != t.end:
            put_run(c, t)
            t.first = first
        t.end = first + length


cdef void take_changes(commit_t* c, taking_t* t) noexcept nogil:
    """Clear the marks, then read the bits: a bit set later marks its word again."""
    cdef bitmap_t* b = c.bitmap
    cdef uint64_t g, groups, words, group, word
    memset(t, 0, sizeof(taking_t))
    bitmap_settle_marks(b)
    # Counted after it was marked: whoever is in these counts is found below.
    exchange_acq_rel(&b.pending_copied, 0)
    gauge_add(c.counters, G_PENDING_BLOCKS, -<int64_t>exchange_acq_rel(&b.pending, 0))
    for g in range(b.words // 4096 + 1):
        if load_acquire(b.dirty_groups + g) == 0:
            continue
        groups = exchange_acq_rel(b.dirty_groups + g, 0)
        while groups:
            group = g * 64 + <uint64_t>ctz64(groups)
            groups &= groups - 1
            words = exchange_acq_rel(b.dirty_words + group, 0)
            while words:
                word = group * 64 + <uint64_t>ctz64(words)
                words &= words - 1
                take_word(c, t, word)
    put_run(c, t)


# -- checkpoint --------------------------------------------------------------------------------

cdef uint64_t checkpoint_copy(commit_t* c) noexcept nogil:
    """(a) next epoch, (b) copy the stale pages. The caller leads. Returns the ring's head."""
    cdef bitmap_t* b = c.bitmap
    cdef uint64_t w, bits, page, i
    cdef uint64_t* copy
    bitmap_settle_marks(b)
    c.journal.epoch += 1
    gauge_set(c.counters, G_JOURNAL_EPOCH, c.journal.epoch)
    for w in range(b.pages // 64 + 1):
        bits = exchange_acq_rel(b.stale_pages + w, 0)
        c.copied_pages[w] = bits
        while bits:
            page = w * 64 + <uint64_t>ctz64(bits)
            bits &= bits - 1
            copy = <uint64_t*>(c.copies + page * PAGE)
            for i in range(<uint64_t>PAGE_WORDS):
                copy[i] = load_acquire(b.present + page * PAGE_WORDS + i)
    return c.journal.head


cdef int write_copies(commit_t* c, block_t* n) noexcept nogil:
    """Write runs of copied pages to the bitmap's place."""
    cdef bitmap_t* b = c.bitmap
    cdef uint64_t page = 0, end
    cdef int rc
    while page < b.pages:
        if not (c.copied_pages[page >> 6] >> (page & 63)) & 1:
            page += 1
            continue
        end = page + 1
        while end < b.pages and (c.copied_pages[end >> 6] >> (end & 63)) & 1:
            end += 1
        rc = storage_write(c.storage, c.copies + page * PAGE, (end - page) * PAGE,
                           c.header.fields.bitmap_offset + page * PAGE, 0)
        if rc < 0:
            return rc
        count(n, N_IMAGE_WRITE_BYTES, (end - page) * PAGE)
        count(n, N_METADATA_WRITE_BYTES, (end - page) * PAGE)
        page = end
    return 0


cdef void mark_copies_durable(commit_t* c) noexcept nogil:
    cdef bitmap_t* b = c.bitmap
    cdef uint64_t w, bits, page, i
    cdef const uint64_t* copy
    for w in range(b.pages // 64 + 1):
        bits = c.copied_pages[w]
        while bits:
            page = w * 64 + <uint64_t>ctz64(bits)
            bits &= bits - 1
            copy = <const uint64_t*>(c.copies + page * PAGE)
            for i in range(<uint64_t>PAGE_WORDS):
                if copy[i] & ~load_relaxed(b.durable + page * PAGE_WORDS + i):
                    fetch_or_release(b.durable + page * PAGE_WORDS + i, copy[i])
    if b.pages > 16:
        drop_pages(c.copies, b.pages * PAGE)


cdef int checkpoint_steps(commit_t* c, block_t* n, uint64_t epoch) noexcept nogil:
    """(c) data, (d) bitmap, (e) stable epoch: each durable before the next (I1, I3)."""
    cdef int rc
    rc = commit_flush_storage(c, n)
    if rc == 0:
        rc = write_copies(c, n)
    if rc == 0:
        rc = commit_flush_storage(c, n)
    if rc == 0:
        rc = header_store_epoch(c.header, c.storage, epoch)
        count(n, N_IMAGE_WRITE_BYTES, SECTOR)
        count(n, N_METADATA_WRITE_BYTES, SECTOR)
    if rc == 0:
        rc = commit_flush_storage(c, n)
    return rc


cdef int checkpoint_finish(commit_t* c, block_t* n, uint64_t epoch, uint64_t head) noexcept nogil:
    """The I/O of a checkpoint and its end. The caller has set checkpointing."""
    cdef uint64_t begin = clock_now(c.gate)
    cdef int rc = checkpoint_steps(c, n, epoch)
    if rc < 0:
        commit_set_fault(c, rc)
    else:
        mark_copies_durable(c)
        count(n, N_JOURNAL_CHECKPOINTS, 1)
        observe(n, H_CHECKPOINT_DURATION, clock_now(c.gate) - begin)
    mutex_lock(&c.mutex)
    if rc == 0:
        # (f) pages of the epochs before are free (I3).
        store_release(&c.journal.tail, head)
        gauge_set(c.counters, G_JOURNAL_USED, journal_used(c.journal) * PAGE)
    c.checkpointing = False
    cond_broadcast(&c.changed)
    mutex_unlock(&c.mutex)
    return rc


cdef int commit_checkpoint(commit_t* c, block_t* n) noexcept nogil:
    cdef uint64_t head, epoch
    if c.bitmap == NULL:
        return commit_flush(c, n)
    mutex_lock(&c.mutex)
    while c.leading or c.checkpointing:
        cond_wait(&c.changed, &c.mutex, NEVER)
    if commit_fault(c):
        mutex_unlock(&c.mutex)
        return -EIO
    c.leading = True
    c.checkpointing = True
    mutex_unlock(&c.mutex)
    head = checkpoint_copy(c)
    epoch = c.journal.epoch
    mutex_lock(&c.mutex)
    c.leading = False
    cond_broadcast(&c.changed)
    mutex_unlock(&c.mutex)
    return checkpoint_finish(c, n, epoch, head)


# -- commit ------------------------------------------------------------------------------------

cdef bint ring_has_room(commit_t* c, uint64_t pages) noexcept nogil:
    """Wait for a running checkpoint if the ring is full. The caller leads."""
    cdef journal_t* j = c.journal
    cdef bint room
    mutex_lock(&c.mutex)
    while journal_used(j) + pages > j.pages and c.checkpointing:
        cond_wait(&c.changed, &c.mutex, NEVER)
    room = journal_used(j) + pages <= j.pages
    mutex_unlock(&c.mutex)
    return room


cdef int checkpoint_leading(commit_t* c, block_t* n) noexcept nogil:
    """Checkpoint in place of a commit whose records do not fit (or for want of a journal)."""
    cdef uint64_t head
    mutex_lock(&c.mutex)
    while c.checkpointing:
        cond_wait(&c.changed, &c.mutex, NEVER)
    c.checkpointing = True
    mutex_unlock(&c.mutex)
    if commit_fault(c):
        mutex_lock(&c.mutex)
        c.checkpointing = False
        cond_broadcast(&c.changed)
        mutex_unlock(&c.mutex)
        return -EIO
    head = checkpoint_copy(c)
    return checkpoint_finish(c, n, c.journal.epoch, head)


cdef int commit_records(commit_t* c, block_t* n) noexcept nogil:
    """Data are flushed before the records that speak of them are written (I1)."""
    cdef journal_t* j = c.journal
    cdef uint64_t pages = journal_batch_pages(j)
    cdef int rc
    journal_seal(j)
    rc = commit_flush_storage(c, n)
    if rc < 0:
        return rc
    rc = journal_write(j)
    if rc < 0:
        commit_set_fault(c, rc)
        return rc
    rc = commit_flush_storage(c, n)
    if rc < 0:
        return rc
    count(n, N_JOURNAL_RECORDS, j.records)
    count(n, N_JOURNAL_BYTES, pages * PAGE)
    count(n, N_IMAGE_WRITE_BYTES, pages * PAGE)
    count(n, N_METADATA_WRITE_BYTES, pages * PAGE)
    gauge_set(c.counters, G_JOURNAL_USED, journal_used(j) * PAGE)
    journal_apply_batch(j, c.bitmap, c.header.fields.block_size)
    return 0


cdef int commit_run(commit_t* c, block_t* n) noexcept nogil:
    """One commit by the leading thread."""
    cdef taking_t taking
    if commit_fault(c):
        return -EIO
    if c.bitmap == NULL:
        return commit_flush_storage(c, n)
    journal_begin(c.journal)
    take_changes(c, &taking)
    if taking.blocks == 0:
        return commit_flush_storage(c, n)
    if taking.overflow or not ring_has_room(c, journal_batch_pages(c.journal)):
        return checkpoint_leading(c, n)
    return commit_records(c, n)


cdef int commit_flush(commit_t* c, block_t* n) noexcept nogil:
    cdef uint64_t need, begin
    cdef int rc = 0
    mutex_lock(&c.mutex)
    # Only a commit that begins to take changes after this moment covers what was acknowledged
    # before.
    need = c.started + 1
    while c.done < need and commit_fault(c) == 0:
        if c.leading:
            cond_wait(&c.changed, &c.mutex, NEVER)
            continue
        c.leading = True
        c.started += 1
        mutex_unlock(&c.mutex)
        begin = clock_now(c.gate)
        rc = commit_run(c, n)
        if rc == 0:
            count(n, N_JOURNAL_COMMITS, 1)
            observe(n, H_COMMIT_DURATION, clock_now(c.gate) - begin)
        mutex_lock(&c.mutex)
        c.done = c.started
        c.leading = False
        c.pending_since = 0
        if journal_fills(c):
            cond_signal(&c.keeper_wake)
        cond_broadcast(&c.changed)
    rc = -EIO if commit_fault(c) else 0
    mutex_unlock(&c.mutex)
    return rc


# -- the keeper --------------------------------------------------------------------------------

cdef uint64_t keeper_deadline(commit_t* c, uint64_t now) noexcept nogil:
    """When the pending changes must be committed: now, later, or NEVER (none, or no timer)."""
    cdef int64_t pending, copied
    if c.bitmap == NULL or commit_fault(c):
        return NEVER
    pending = <int64_t>load_relaxed(&c.bitmap.pending)
    if pending <= 0:
        c.pending_since = 0
        return NEVER
    copied = min(pending, <int64_t>load_relaxed(&c.bitmap.pending_copied))
    if <uint64_t>(pending - copied) * RECORD_BYTES >= max(c.buffer_bytes, <uint64_t>1):
        return now
    if <uint64_t>copied * c.header.fields.block_size >= BACKGROUND_COMMIT_BYTES:
        return now
    if c.pending_since == 0:
        c.pending_since = now
    if pending > copied and c.period_ns:
        return c.pending_since + c.period_ns
    return c.pending_since + <uint64_t>BACKGROUND_COMMIT_MS * NS_PER_MS


cdef bint copies_only(const commit_t* c) noexcept nogil:
    """Is nothing pending but blocks that were copied from the base?"""
    return c.bitmap != NULL and (<int64_t>load_relaxed(&c.bitmap.pending)
                                 <= <int64_t>load_relaxed(&c.bitmap.pending_copied))


cdef bint journal_fills(const commit_t* c) noexcept nogil:
    return (c.bitmap != NULL and c.journal.pages != 0 and commit_fault(c) == 0
            and journal_used(c.journal) * 2 > c.journal.pages)


cdef void* keeper_main(void* argument) noexcept nogil:
    cdef commit_t* c = <commit_t*>argument
    cdef block_t* n = counters_block(c.counters, BLOCK_KEEPER)
    cdef uint64_t now, deadline
    mutex_lock(&c.mutex)
    while not c.stopping:
        # Armed before the look, so that a change noted after it wakes us.
        store_release(&c.keeper_state, KEEPER_ARMED)
        now = clock_now(c.gate)
        if journal_fills(c) and not c.checkpointing:
            mutex_unlock(&c.mutex)
            commit_checkpoint(c, n)
            mutex_lock(&c.mutex)
            continue
        deadline = keeper_deadline(c, now)
        if deadline <= now:
            mutex_unlock(&c.mutex)
            commit_flush(c, n)
            mutex_lock(&c.mutex)
            continue
        if deadline == NEVER or copies_only(c):
            # Either we see a change, or commit_note sees that we sleep without the right timer.
            store_release(&c.keeper_state, KEEPER_IDLE if deadline == NEVER else KEEPER_ARMED_LONG)
            fence()
            if keeper_deadline(c, now) < deadline:
                continue
        cond_wait(&c.keeper_wake, &c.mutex, deadline)
    mutex_unlock(&c.mutex)
    return NULL


cdef void commit_note(commit_t* c) noexcept nogil:
    cdef uint64_t state
    cdef int64_t pending
    fence()
    state = load_acquire(&c.keeper_state)
    if state == KEEPER_KICKED:
        return
    if state == KEEPER_ARMED or (state == KEEPER_ARMED_LONG and copies_only(c)):
        pending = <int64_t>load_relaxed(&c.bitmap.pending)
        if (<uint64_t>pending * RECORD_BYTES < c.buffer_bytes
                and <uint64_t>pending * c.header.fields.block_size < BACKGROUND_COMMIT_BYTES):
            return
    mutex_lock(&c.mutex)
    store_release(&c.keeper_state, KEEPER_KICKED)
    cond_signal(&c.keeper_wake)
    mutex_unlock(&c.mutex)


cdef int commit_start(commit_t* c) noexcept nogil:
    c.stopping = False
    return thread_start(&c.keeper, c.gate, keeper_main, c)


cdef void commit_stop(commit_t* c) noexcept nogil:
    mutex_lock(&c.mutex)
    c.stopping = True
    cond_broadcast(&c.keeper_wake)
    mutex_unlock(&c.mutex)
    thread_join(&c.keeper)
