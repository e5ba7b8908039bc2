# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Layer 2. Commit, checkpoint and the keeper thread. See commit.pxd; the order of flushes is
FORMAT.md section 6 and is written here and nowhere else.

Leading is exclusive: commit takes changes, checkpoint copies pages, never both. A checkpoint gives
up the lead after its copy, so commits go on beside its I/O in the next epoch; it keeps
checkpointing, so there is one at a time. A commit whose records do not fit into the ring waits for
a running checkpoint, or makes one itself while it leads: the only place where a flush stalls on the
ring."""
from libc.stdint cimport int64_t, uint64_t
from .atomics cimport fence, load_acquire, load_relaxed, store_relaxed, store_release
from .changes cimport changes_t, changes_take
from .counters cimport (
    BLOCK_KEEPER, G_FAULT, G_JOURNAL_EPOCH, G_JOURNAL_USED, G_PENDING_BLOCKS, H_CHECKPOINT_DURATION,
    H_COMMIT_DURATION, N_IMAGE_FLUSHES, N_IMAGE_WRITE_BYTES, N_JOURNAL_BYTES, N_JOURNAL_CHECKPOINTS,
    N_JOURNAL_COMMITS, N_JOURNAL_RECORDS, N_METADATA_WRITE_BYTES, block_t, count, counters_block,
    counters_trace, gauge_add, gauge_set, observe,
)
from .header cimport header_store_epoch
from .journal cimport (
    journal_apply_batch, journal_batch_pages, journal_seal, journal_t, journal_used, journal_write,
)
from .limits cimport (
    BACKGROUND_COMMIT_BYTES, BACKGROUND_COMMIT_MS, NEVER, NS_PER_MS, PAGE, SECTOR,
)
from .page_copies cimport (
    copies_free, copies_settle_bitmap, copies_settle_table, copies_take_bitmap, copies_take_table,
    copies_write, page_copies_t,
)
from .places cimport places_checkpoint_begins, places_release
from .storage cimport storage_flush, storage_t
from .sync cimport (
    clock_now, cond_broadcast, cond_free, cond_init, cond_signal, cond_wait, gate_t, mutex_free,
    mutex_init, mutex_lock, mutex_unlock, thread_join, thread_start,
)
from .syscalls cimport EIO
from .trace cimport TRACE_CHECKPOINT, TRACE_COMMIT, TRACE_FLUSH, trace_is_on

cdef enum:
    BITS_BYTES = 16                    # of a bitmap record
    ENTRY_BYTES = 24                   # of a table record with one entry
    KEEPER_IDLE = 0                    # waits without a timer
    KEEPER_ARMED = 1                   # waits with the timer of the guest's changes
    KEEPER_ARMED_LONG = 2              # waits with the timer of copied blocks
    KEEPER_KICKED = 3                  # has been told to look


cdef bint commit_has_metadata(const commit_t* c) noexcept nogil:
    return c.bitmap != NULL or c.table != NULL


cdef int commit_init(commit_t* c, gate_t* gate) noexcept nogil:
    """The caller has set what the image is made of, and counters, fault, period and buffer."""
    cdef int rc
    c.gate = gate
    rc = mutex_init(&c.mutex, gate)
    if rc == 0:
        rc = mutex_init(&c.flushing, gate)
    if rc == 0:
        rc = cond_init(&c.changed, gate)
    if rc == 0:
        rc = cond_init(&c.keeper_wake, gate)
    return rc


cdef void commit_free(commit_t* c) noexcept nogil:
    copies_free(&c.bitmap_copies)
    copies_free(&c.table_copies)
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


cdef void span(const commit_t* c, const block_t* n, int kind, uint64_t begin,
        int rc) noexcept nogil:
    """Of a trace: what began then ends now."""
    if trace_is_on(&c.counters.trace):
        counters_trace(c.counters, n, kind, 0, begin, clock_now(c.gate), 0, 0, rc, 0)


cdef int flush_one(commit_t* c, storage_t* s, block_t* n) noexcept nogil:
    cdef uint64_t length, begin
    cdef int rc = -EIO
    # The kernel tells a lost page once: the thread that hears it must set the fault before another
    # flush can succeed.
    mutex_lock(&c.flushing)
    if commit_fault(c) == 0:
        length = load_acquire(&s.length)
        begin = clock_now(c.gate) if trace_is_on(&c.counters.trace) else 0
        rc = storage_flush(s)
        if begin:
            span(c, n, TRACE_FLUSH, begin, rc)
        count(n, N_IMAGE_FLUSHES, 1)
        if rc < 0:
            commit_set_fault(c, rc)
        elif s == c.data:
            c.durable_length = length
    mutex_unlock(&c.flushing)
    return rc


cdef int commit_flush_data(commit_t* c, block_t* n) noexcept nogil:
    return flush_one(c, c.data, n)


cdef int commit_flush_metadata(commit_t* c, block_t* n) noexcept nogil:
    return flush_one(c, c.storage, n)


# -- checkpoint --------------------------------------------------------------------------------

cdef int checkpoint_copy(commit_t* c, uint64_t* head) noexcept nogil:
    """(a) next epoch, (b) copy the stale pages: the bitmap's first, or a bit could be saved whose
    mapping is not. The caller leads. *head: up to where the ring will be free."""
    cdef int rc = 0
    store_relaxed(&c.journal.epoch, c.journal.epoch + 1)
    gauge_set(c.counters, G_JOURNAL_EPOCH, c.journal.epoch)
    if c.table != NULL:
        c.places_checkpoint = places_checkpoint_begins(c.places)
    if c.bitmap != NULL:
        rc = copies_take_bitmap(&c.bitmap_copies, c.bitmap)
    if rc == 0 and c.table != NULL:
        rc = copies_take_table(&c.table_copies, c.table)
    head[0] = c.journal.head
    return rc


cdef void count_metadata(block_t* n, uint64_t bytes) noexcept nogil:
    count(n, N_IMAGE_WRITE_BYTES, bytes)
    count(n, N_METADATA_WRITE_BYTES, bytes)


cdef int write_pages(commit_t* c, page_copies_t* k, uint64_t offset, block_t* n) noexcept nogil:
    """Write copies to their place and flush them."""
    cdef uint64_t written = 0
    cdef int rc = copies_write(k, c.storage, offset, &written)
    count_metadata(n, written)
    return rc if rc < 0 or written == 0 else commit_flush_metadata(c, n)


cdef int checkpoint_steps(commit_t* c, block_t* n, uint64_t epoch) noexcept nogil:
    """(c) data, (d) table, bitmap, (e) stable epoch: each durable before the next (I1, I2, I3)."""
    cdef int rc
    rc = commit_flush_data(c, n)
    if rc == 0 and c.table != NULL:
        rc = write_pages(c, &c.table_copies, c.header.fields.table_offset, n)
    if rc == 0 and c.bitmap != NULL:
        rc = write_pages(c, &c.bitmap_copies, c.header.fields.bitmap_offset, n)
    if rc == 0:
        rc = header_store_epoch(c.header, c.storage, epoch)
        count_metadata(n, SECTOR)
    if rc == 0:
        rc = commit_flush_metadata(c, n)
    return rc


cdef void settle_copies(commit_t* c) noexcept nogil:
    """What the copies say is durable."""
    if c.bitmap != NULL:
        copies_settle_bitmap(&c.bitmap_copies, c.bitmap)
    if c.table != NULL:
        copies_settle_table(&c.table_copies, c.table)
        places_release(c.places, c.places_checkpoint)


cdef int checkpoint_finish(commit_t* c, block_t* n, uint64_t epoch, uint64_t head,
        int copied) noexcept nogil:
    """The I/O of a checkpoint and its end. The caller has set checkpointing. copied: how copying
    went."""
    cdef uint64_t begin = clock_now(c.gate)
    cdef int rc = copied
    if rc == 0:
        rc = checkpoint_steps(c, n, epoch)
    if rc < 0:
        commit_set_fault(c, rc)
    else:
        settle_copies(c)
        count(n, N_JOURNAL_CHECKPOINTS, 1)
        observe(n, H_CHECKPOINT_DURATION, clock_now(c.gate) - begin)
    span(c, n, TRACE_CHECKPOINT, begin, rc)
    mutex_lock(&c.mutex)
    if rc == 0:
        # (f) pages of the epochs before are free (I3).
        store_release(&c.journal.tail, head)
        gauge_set(c.counters, G_JOURNAL_USED, journal_used(c.journal) * PAGE)
    c.checkpointing = False
    cond_broadcast(&c.changed)
    if c.table != NULL and load_relaxed(&c.places.retired_count):
        cond_signal(&c.keeper_wake)
    mutex_unlock(&c.mutex)
    return rc


cdef int commit_checkpoint(commit_t* c, block_t* n) noexcept nogil:
    cdef uint64_t head = 0, epoch
    cdef int rc
    if not commit_has_metadata(c):
        return commit_flush(c, n)
    rc = commit_pause(c)
    if rc < 0:
        return rc
    rc = checkpoint_copy(c, &head)
    epoch = c.journal.epoch
    mutex_lock(&c.mutex)
    c.leading = False
    cond_broadcast(&c.changed)
    mutex_unlock(&c.mutex)
    return checkpoint_finish(c, n, epoch, head, rc)


cdef int commit_pause(commit_t* c) noexcept nogil:
    mutex_lock(&c.mutex)
    while c.leading or c.checkpointing:
        cond_wait(&c.changed, &c.mutex, NEVER)
    if commit_fault(c):
        mutex_unlock(&c.mutex)
        return -EIO
    c.leading = True
    c.checkpointing = True
    mutex_unlock(&c.mutex)
    return 0


cdef void commit_resume(commit_t* c) noexcept nogil:
    mutex_lock(&c.mutex)
    c.leading = False
    c.checkpointing = False
    cond_broadcast(&c.changed)
    mutex_unlock(&c.mutex)


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
    cdef uint64_t head = 0
    cdef int rc
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
    rc = checkpoint_copy(c, &head)
    return checkpoint_finish(c, n, c.journal.epoch, head, rc)


cdef bint one_flush_suffices(const commit_t* c, const changes_t* t,
        uint64_t reused) noexcept nogil:
    """No bit over a base, and every new mapping goes to storage that is durably there and reads
    zeros where this flush is torn: FORMAT.md section 6."""
    return (t.blocks == 0 and c.data == c.storage and reused == c.reused_before
            and c.places.offset + t.places_end * c.places.chunk_size <= c.durable_length)


cdef int commit_records(commit_t* c, bint together, block_t* n) noexcept nogil:
    """Data are flushed before the records that speak of them are written (I1), unless together."""
    cdef journal_t* j = c.journal
    cdef uint64_t pages = journal_batch_pages(j)
    cdef int rc = 0
    journal_seal(j)
    if not together:
        rc = commit_flush_data(c, n)
    if rc < 0:
        return rc
    rc = journal_write(j)
    if rc < 0:
        commit_set_fault(c, rc)
        return rc
    rc = commit_flush_metadata(c, n)
    if rc < 0:
        return rc
    count(n, N_JOURNAL_RECORDS, j.records)
    count(n, N_JOURNAL_BYTES, pages * PAGE)
    count_metadata(n, pages * PAGE)
    gauge_set(c.counters, G_JOURNAL_USED, journal_used(j) * PAGE)
    journal_apply_batch(j, c.bitmap, c.header.fields.block_size, c.table)
    return 0


cdef void prepare_changes(const commit_t* c, changes_t* t) noexcept nogil:
    t.journal = c.journal
    t.bitmap = c.bitmap
    t.table = c.table
    t.block_size = c.header.fields.block_size
    t.base_size = c.header.fields.base_img_size
    t.chunk_size = c.header.fields.chunk_size


cdef int commit_run(commit_t* c, block_t* n) noexcept nogil:
    """One commit by the leading thread."""
    cdef changes_t taken
    cdef uint64_t reused_before = 0, reused = 0
    cdef int rc
    if commit_fault(c):
        return -EIO
    if not commit_has_metadata(c):
        return commit_flush_data(c, n)
    prepare_changes(c, &taken)
    if c.table != NULL:
        reused_before = load_acquire(&c.table.reused)
    changes_take(&taken)
    if c.bitmap != NULL:
        gauge_add(c.counters, G_PENDING_BLOCKS, -<int64_t>taken.counted)
    if taken.blocks == 0 and taken.entries == 0:
        return commit_flush_data(c, n)
    if taken.overflow or not ring_has_room(c, journal_batch_pages(c.journal)):
        return checkpoint_leading(c, n)
    # Read after the entries were taken: whoever published one of them counted before.
    if c.table != NULL:
        reused = load_acquire(&c.table.reused)
    rc = commit_records(c, c.table != NULL and one_flush_suffices(c, &taken, reused), n)
    if rc == 0:
        c.reused_before = reused_before
    return rc


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
        span(c, n, TRACE_COMMIT, begin, rc)
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

cdef struct pending_t:
    uint64_t guest                     # bytes of records of what guests changed
    uint64_t copied                    # bytes of data copied from the base
    bint any


cdef void look_pending(const commit_t* c, pending_t* p) noexcept nogil:
    cdef int64_t blocks = 0, copied = 0
    cdef uint64_t entries = 0
    if c.bitmap != NULL:
        blocks = <int64_t>load_relaxed(&c.bitmap.pending)
        copied = min(blocks, <int64_t>load_relaxed(&c.bitmap.pending_copied))
    if c.table != NULL:
        entries = load_relaxed(&c.table.pending)
    p.any = blocks > 0 or entries != 0
    p.guest = 0
    p.copied = 0
    if blocks > copied:
        p.guest = <uint64_t>(blocks - copied) * BITS_BYTES
    if copied > 0:
        p.copied = <uint64_t>copied * c.header.fields.block_size
    # Entries beside copied blocks and no others are those blocks'.
    if p.guest or p.copied == 0:
        p.guest += entries * ENTRY_BYTES


cdef uint64_t keeper_deadline(commit_t* c, uint64_t now) noexcept nogil:
    """When the pending changes must be committed: now, later, or NEVER (none, or no timer)."""
    cdef pending_t p
    if commit_fault(c):
        return NEVER
    look_pending(c, &p)
    if not p.any:
        c.pending_since = 0
        return NEVER
    if (p.guest >= max(load_relaxed(&c.buffer_bytes), <uint64_t>1)
            or p.copied >= BACKGROUND_COMMIT_BYTES):
        return now
    if c.pending_since == 0:
        c.pending_since = now
    if p.guest and c.period_ns:
        return c.pending_since + c.period_ns
    return c.pending_since + <uint64_t>BACKGROUND_COMMIT_MS * NS_PER_MS


cdef bint copies_only(const commit_t* c) noexcept nogil:
    """Is nothing pending but blocks that were copied from the base?"""
    cdef pending_t p
    look_pending(c, &p)
    return p.guest == 0


cdef bint journal_fills(const commit_t* c) noexcept nogil:
    return (commit_has_metadata(c) and c.journal.pages != 0 and commit_fault(c) == 0
            and journal_used(c.journal) * 2 > c.journal.pages)


cdef uint64_t release_deadline(commit_t* c, uint64_t now) noexcept nogil:
    """When a checkpoint should free the places that lost their owners, or NEVER: none did."""
    if c.table == NULL or commit_fault(c) or load_relaxed(&c.places.retired_count) == 0:
        c.retired_since = 0
        return NEVER
    if c.retired_since == 0:
        c.retired_since = now
    return c.retired_since + <uint64_t>BACKGROUND_COMMIT_MS * NS_PER_MS


cdef void* keeper_main(void* argument) noexcept nogil:
    cdef commit_t* c = <commit_t*>argument
    cdef block_t* n = counters_block(c.counters, BLOCK_KEEPER)
    cdef uint64_t now, deadline, release
    mutex_lock(&c.mutex)
    while not c.stopping:
        # Armed before the look, so that a change noted after it wakes us.
        store_release(&c.keeper_state, KEEPER_ARMED)
        now = clock_now(c.gate)
        # A checkpoint that runs frees them; a deadline in the past would not let us sleep.
        release = NEVER if c.checkpointing else release_deadline(c, now)
        if (journal_fills(c) or release <= now) and not c.checkpointing:
            c.retired_since = 0
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
        cond_wait(&c.keeper_wake, &c.mutex, min(deadline, release))
    mutex_unlock(&c.mutex)
    return NULL


cdef void commit_note(commit_t* c) noexcept nogil:
    cdef uint64_t state
    cdef pending_t p
    fence()
    state = load_acquire(&c.keeper_state)
    if state == KEEPER_KICKED:
        return
    if state == KEEPER_ARMED or state == KEEPER_ARMED_LONG:
        look_pending(c, &p)
        if ((state == KEEPER_ARMED or p.guest == 0) and p.guest < load_relaxed(&c.buffer_bytes)
                and p.copied < BACKGROUND_COMMIT_BYTES):
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
