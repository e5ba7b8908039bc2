# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""journal_t over a logging store."""
from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memset

from fvdcore.bitmap cimport bitmap_free, bitmap_init, bitmap_set_present, bitmap_t
from fvdcore.changes cimport changes_t, changes_take
from fvdcore.chunk_table cimport (
    chunk_table_t, table_free, table_init, table_is_loose, table_set, table_settle_load,
)
from fvdcore.journal cimport (
    journal_apply_batch, journal_batch_pages, journal_begin, journal_free, journal_init,
    journal_put_blocks, journal_put_entry, journal_put_mapped, journal_seal, journal_t,
    journal_write,
)
from fvdcore.replay cimport journal_replay, journal_scope_t
from probe_storage cimport Storage


cdef class Journal:
    """A journal at an offset of a store, with a bitmap of its own."""

    cdef journal_t j
    cdef bitmap_t b
    cdef chunk_table_t t
    cdef Storage storage
    cdef uint64_t block_size
    cdef uint64_t base_size

    def __init__(self, Storage storage, uint64_t offset, uint64_t size, bytes uuid,
                 uint64_t block_size, uint64_t base_size, uint64_t chunks=0):
        """chunks: entries of a chunk table, all unmapped; 0: none."""
        cdef uint64_t blocks = (base_size + block_size - 1) // block_size
        cdef int rc
        self.storage = storage
        self.block_size = block_size
        self.base_size = base_size
        rc = bitmap_init(&self.b, blocks, (blocks // 8 + 4096) // 4096 * 4096, NULL, NULL)
        if rc == 0:
            rc = journal_init(&self.j, storage.raw(), offset, size, <uint8_t*><char*>uuid)
        if rc == 0 and chunks:
            rc = table_init(&self.t, chunks, (chunks * 4 + 4095) // 4096 * 4096, -1, 0, NULL)
        if rc < 0:
            raise OSError(-rc, "journal_init")
        if chunks:
            memset(self.t.present, 0xff, self.t.pages * 4096)
            table_settle_load(&self.t)

    def __dealloc__(self):
        journal_free(&self.j)
        bitmap_free(&self.b)
        table_free(&self.t)

    def replay(self, uint64_t stable_epoch, bint trailers=True, uint64_t disk_size=0):
        """Sectors that counted, or a negative errno."""
        cdef journal_scope_t scope
        scope.stable_epoch = stable_epoch
        scope.trailers = trailers
        scope.verifies = True
        scope.writes = False
        scope.bitmap = &self.b
        scope.block_size = self.block_size
        scope.base_size = self.base_size
        scope.disk_size = max(disk_size, self.base_size)
        scope.table = &self.t if self.t.present != NULL else NULL
        return journal_replay(&self.j, &scope)

    def begin(self):
        journal_begin(&self.j)

    def put(self, uint64_t first_sector, uint64_t sectors):
        return journal_put_blocks(&self.j, first_sector, sectors)

    def put_entry(self, uint64_t chunk, unsigned int entry):
        return journal_put_entry(&self.j, chunk, entry)

    def put_mapped(self, uint64_t first_sector, uint64_t sectors, uint64_t chunk,
                   unsigned int entry):
        return journal_put_mapped(&self.j, first_sector, sectors, chunk, entry)

    def set_entry(self, uint64_t chunk, unsigned int entry):
        table_set(&self.t, chunk, entry, False)

    def set_present(self, uint64_t first, uint64_t end):
        bitmap_set_present(&self.b, first, end, False)

    def take(self, uint64_t chunk_size, bint with_bitmap=True):
        """Put what is pending into a batch: what is known of it."""
        cdef changes_t c
        c.journal = &self.j
        c.bitmap = &self.b if with_bitmap else NULL
        c.table = &self.t if self.t.present != NULL else NULL
        c.block_size = self.block_size
        c.base_size = self.base_size
        c.chunk_size = chunk_size
        changes_take(&c)
        return {"blocks": c.blocks, "counted": c.counted, "entries": c.entries,
                "places_end": c.places_end, "overflow": bool(c.overflow)}

    def entries(self):
        return [self.t.present[i] for i in range(self.t.chunks)]

    def loose(self):
        return [i for i in range(self.t.chunks) if table_is_loose(&self.t, i)]

    def sectors(self):
        """The batch as it will be written."""
        return [(<char*>self.j.batch)[i * 512:(i + 1) * 512]
                for i in range(self.j.batch_sectors)]

    def seal(self):
        journal_seal(&self.j)

    def write(self):
        return journal_write(&self.j)

    def apply(self):
        journal_apply_batch(&self.j, &self.b, self.block_size, &self.t)

    def batch_pages(self):
        return journal_batch_pages(&self.j)

    def free_pages_until(self, uint64_t tail):
        """What a checkpoint does: pages below tail may be used again."""
        self.j.tail = tail

    def durable(self):
        """The bits as bytes, as they would stand in the bitmap on disk."""
        return (<char*>self.b.durable)[:(self.b.blocks + 7) // 8]

    @property
    def epoch(self):
        return self.j.epoch

    @epoch.setter
    def epoch(self, uint64_t value):
        self.j.epoch = value

    @property
    def sequence(self):
        return self.j.sequence

    @property
    def head(self):
        return self.j.head

    @property
    def pages(self):
        return self.j.pages

    @property
    def sectors_max(self):
        return self.j.batch_sectors_max

    @property
    def records(self):
        return self.j.records
