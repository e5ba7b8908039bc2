# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""What a compact image is made of: chunk table, quiescence, places, copies of metadata pages."""
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memset

from fvdcore.bitmap cimport bitmap_free, bitmap_init, bitmap_set_present, bitmap_t
from fvdcore.chunk_table cimport (
    chunk_table_t, table_entry, table_free, table_init, table_is_loose, table_mark_stale,
    table_note_difference, table_prepare, table_publish, table_recorded, table_set,
    table_set_durable, table_settle_load, table_settle_marks,
)
from fvdcore.page_copies cimport (
    copies_free, copies_settle_bitmap, copies_settle_table, copies_take_bitmap, copies_take_table,
    copies_write, page_copies_t,
)
from fvdcore.places cimport (
    places_allocate, places_checkpoint_begins, places_free, places_give_back, places_init,
    places_mapped_end, places_release, places_reserve, places_retire, places_return, places_t,
    places_take_table,
)
from fvdcore.quiescence cimport (
    quiescence_enter, quiescence_free, quiescence_init, quiescence_leave, quiescence_stamp,
    quiescence_t, quiescence_wait, quiescent,
)
from fvdcore.sync cimport clock_now
from probe_storage cimport Storage


cdef object bits_of(const uint64_t* words, uint64_t count):
    """The numbers of the bits that are set."""
    return {w * 64 + i for w in range(count) if words[w] for i in range(64) if words[w] >> i & 1}


cdef class Table:
    """A chunk_table_t over private memory or a live file; entries begin unmapped."""

    cdef chunk_table_t t

    def __init__(self, uint64_t chunks, uint64_t size, int live_fd=-1, uint64_t live_offset=0,
                 bint fill=True):
        cdef int rc = table_init(&self.t, chunks, size, live_fd, live_offset, NULL)
        if rc < 0:
            raise OSError(-rc, "table_init")
        if fill:
            memset(self.t.present, 0xff, size)

    def __dealloc__(self):
        table_free(&self.t)

    def load(self, uint64_t chunk, uint32_t entry):
        """As reading it from a file would."""
        self.t.present[chunk] = entry

    def set(self, uint64_t chunk, uint32_t entry, bint reused=False):
        table_set(&self.t, chunk, entry, reused)

    def set_durable(self, uint64_t chunk, uint32_t entry):
        table_set_durable(&self.t, chunk, entry)

    def settle_load(self):
        table_settle_load(&self.t)

    def note_difference(self, Table disk):
        table_note_difference(&self.t, disk.t.present)

    def recorded(self, uint64_t chunk, uint32_t entry):
        table_recorded(&self.t, chunk, entry)

    def take_dirty(self):
        """As a commit does, all at once."""
        table_settle_marks(&self.t)
        found = self.dirty()
        memset(self.t.dirty, 0, (self.t.chunks // 64 + 1) * 8)
        self.t.pending = 0
        return found

    def grow(self, uint64_t chunks, uint64_t size, int live_fd=-1, uint64_t live_offset=0):
        cdef int rc = table_prepare(&self.t, size, live_fd, live_offset)
        if rc == 0:
            table_publish(&self.t, chunks, size)
        return rc

    def mark_stale(self, uint64_t first, uint64_t end):
        table_mark_stale(&self.t, first, end)

    def entry(self, uint64_t chunk):
        return table_entry(&self.t, chunk)

    def entries(self):
        """All of the pages, padding included."""
        return [self.t.present[i] for i in range(self.t.pages * 1024)]

    def is_loose(self, uint64_t chunk):
        return bool(table_is_loose(&self.t, chunk))

    def loose(self):
        return bits_of(self.t.loose, self.t.chunks // 64 + 1)

    def dirty(self):
        return bits_of(self.t.dirty, self.t.chunks // 64 + 1)

    def groups(self):
        return bits_of(self.t.dirty_groups, self.t.chunks // 4096 + 1)

    def stale(self):
        return bits_of(self.t.stale_pages, self.t.pages // 64 + 1)

    def counts(self):
        """(pending, mapped, reused)."""
        return self.t.pending, self.t.mapped, self.t.reused

    @property
    def chunks(self):
        return self.t.chunks


cdef class Quiescence:
    """A quiescence_t."""

    cdef quiescence_t q

    def __init__(self):
        cdef int rc = quiescence_init(&self.q, NULL)
        if rc < 0:
            raise OSError(-rc, "quiescence_init")

    def __dealloc__(self):
        quiescence_free(&self.q)

    def enter(self, int slot):
        """The slot to leave."""
        cdef int taken
        with nogil:
            taken = quiescence_enter(&self.q, slot)
        return taken

    def leave(self, int slot):
        quiescence_leave(&self.q, slot)

    def stamp(self):
        return quiescence_stamp(&self.q)

    def quiescent(self, uint64_t stamp):
        return bool(quiescent(&self.q, stamp))

    def wait(self, uint64_t stamp, double seconds):
        cdef bint quiet
        with nogil:
            quiet = quiescence_wait(&self.q, stamp, clock_now(NULL) + <uint64_t>(seconds * 1e9))
        return bool(quiet)


cdef class Places:
    """A places_t over a logging store."""

    cdef places_t p
    cdef Storage storage
    cdef Quiescence quiescence

    def __init__(self, Storage storage, uint64_t offset, uint64_t chunk_size, uint64_t grow_unit=0,
                 *, Quiescence quiescence=None):
        cdef int rc
        self.storage = storage
        self.quiescence = quiescence or Quiescence()
        rc = places_init(&self.p, storage.raw(), &self.quiescence.q, offset, chunk_size, grow_unit,
                         NULL)
        if rc < 0:
            raise OSError(-rc, "places_init")

    def __dealloc__(self):
        places_free(&self.p)

    def reserve(self, uint64_t table_offset, uint64_t table_bytes):
        places_reserve(&self.p, table_offset, table_bytes)
        return self.p.reserved_first, self.p.reserved_end

    def take_table(self, Table table):
        """(rc, reason)."""
        cdef const char* reason = NULL
        cdef int rc = places_take_table(&self.p, &table.t, &reason)
        return rc, reason.decode() if reason != NULL else None

    def mapped_end(self, Table table):
        return places_mapped_end(&self.p, &table.t)

    def allocate(self, uint64_t want, bint may_work=True):
        """(first, count, reused), or a negative errno."""
        cdef uint64_t first = 0
        cdef bint reused = False
        got = places_allocate(&self.p, want, may_work, &first, &reused)
        return (first, got, bool(reused)) if got >= 0 else got

    def give_back(self, uint64_t first, uint64_t count):
        places_give_back(&self.p, first, count)

    def retire(self, uint64_t place):
        return places_retire(&self.p, place)

    def checkpoint_begins(self):
        return places_checkpoint_begins(&self.p)

    def release(self, uint64_t checkpoint):
        return places_release(&self.p, checkpoint)

    def give_back_all(self):
        places_return(&self.p)

    @property
    def retired(self):
        return self.p.retired_count

    @property
    def free_below_fresh(self):
        return self.p.free_below_fresh

    @property
    def fresh(self):
        return self.p.fresh


cdef class Copies:
    """A page_copies_t, and a bitmap to take copies of."""

    cdef page_copies_t k
    cdef bitmap_t b

    def __init__(self, uint64_t blocks=8):
        cdef int rc = bitmap_init(&self.b, blocks, (blocks // 8 + 4096) // 4096 * 4096, NULL, NULL)
        memset(&self.k, 0, sizeof(page_copies_t))
        if rc < 0:
            raise OSError(-rc, "bitmap_init")

    def __dealloc__(self):
        copies_free(&self.k)
        bitmap_free(&self.b)

    def set_present(self, uint64_t first, uint64_t end):
        bitmap_set_present(&self.b, first, end, False)

    def durable(self):
        return bits_of(self.b.durable, self.b.words)

    def stale(self):
        return bits_of(self.b.stale_pages, self.b.pages // 64 + 1)

    def take_bitmap(self):
        return copies_take_bitmap(&self.k, &self.b)

    def take_table(self, Table table):
        return copies_take_table(&self.k, &table.t)

    def write(self, Storage storage, uint64_t offset):
        """(rc, bytes written)."""
        cdef uint64_t written = 0
        cdef int rc = copies_write(&self.k, storage.raw(), offset, &written)
        return rc, written

    def settle_bitmap(self):
        copies_settle_bitmap(&self.k, &self.b)

    def settle_table(self, Table table):
        copies_settle_table(&self.k, &table.t)
