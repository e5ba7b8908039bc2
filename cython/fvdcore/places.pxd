# SPDX-License-Identifier: Apache-2.0
"""Layer 2. Places: which parts of storage are chunks, are free, or wait to be free (I8, I9).

Place n is chunk_size bytes at data_offset + n * chunk_size. Places at and above *fresh* have never
been used in this session, and in a file, which is cut there at open, they read as zeros; the
content of any other free place is unknown. A place that lost its owner is *retired*: it is given
back to storage and becomes free only when a checkpoint that began later has ended, and every
request that might still use it has."""
from libc.stdint cimport int64_t, uint64_t
from .chunk_table cimport chunk_table_t
from .counters cimport counters_t
from .quiescence cimport quiescence_t
from .storage cimport storage_t
from .sync cimport cond_t, gate_t, mutex_t

cdef struct retired_t:
    uint64_t place
    uint64_t stamp                     # of quiescence_t, taken after its mapping was closed
    uint64_t checkpoint                # number of the first checkpoint that leaves it out

cdef struct places_t:
    storage_t* data
    quiescence_t* quiescence
    mutex_t mutex
    uint64_t offset                    # data_offset
    uint64_t chunk_size
    uint64_t grow_unit                 # bytes by which storage is made longer
    uint64_t ahead_min                 # a growth by less is never allocated ahead
    uint64_t* used                     # bit n: place n has an owner, or waits to be free
    uint64_t used_words
    uint64_t fresh                     # places from here on were never used in this session
    uint64_t hint                      # no free place below it
    uint64_t free_below_fresh
    uint64_t reserved_first            # places under the table: nobody's
    uint64_t reserved_end
    retired_t* retired
    uint64_t retired_count
    uint64_t retired_room
    uint64_t checkpoints               # begun
    uint64_t settled                   # the last of them that is durable
    cond_t freed                       # a place became free
    uint64_t released                  # places that became free again so far (atomic)
    uint64_t lacking                   # bytes that the last chunk without a place needed; 0
    counters_t* counters               # where it is told how much of storage is in use, or NULL

cdef int places_init(places_t* p, storage_t* data, quiescence_t* q, uint64_t offset,
        uint64_t chunk_size, uint64_t grow_unit, gate_t* gate) noexcept nogil
cdef void places_free(places_t* p) noexcept nogil
# Places that the table of these bytes of the same storage covers belong to nobody; whoever has one
# keeps it for the time being. The table only ever grows.
cdef void places_reserve(places_t* p, uint64_t table_offset, uint64_t table_bytes) noexcept nogil
# Count a table's places as used. -EUCLEAN: an entry out of range or outside storage, two equal
# ones, or one under the table; *reason says which.
cdef int places_take_table(places_t* p, const chunk_table_t* t, const char** reason) noexcept nogil
# Bytes of storage that are in use: up to the first place, and places with an owner or under the
# table. The caller holds the mutex, or nobody else runs.
cdef uint64_t places_used(const places_t* p) noexcept nogil
# Bytes of storage up to the end of the highest place that the table maps or covers.
cdef uint64_t places_mapped_end(const places_t* p, const chunk_table_t* t) noexcept nogil
# A run of up to want places for new owners: *first and the count. *reused: their content is
# unknown. Negative errno: -EAGAIN (it takes longer than a fresh place of storage that is there, and
# may_work is false), -ENOSPC, or what making storage longer gave.
cdef int64_t places_allocate(places_t* p, uint64_t want, bint may_work, uint64_t* first,
        bint* reused) noexcept nogil
# Look whether storage that does not grow by itself was made longer from outside. -ENOSPC: it is too
# short still for what was asked for last.
cdef int places_look_again(places_t* p) noexcept nogil
# Places that were allocated and not used after all. Their content is unknown from now on.
cdef void places_give_back(places_t* p, uint64_t first, uint64_t count) noexcept nogil
# Places under the table that still have an owner, or are about to get one.
cdef uint64_t places_reserved_owned(places_t* p) noexcept nogil
cdef bint places_is_reserved(const places_t* p, uint64_t place) noexcept nogil
# The mapping to a place was closed: free it when nobody can want it any more.
cdef int places_retire(places_t* p, uint64_t place) noexcept nogil
# Is there a place without owner that no durable checkpoint has left out yet?
cdef bint places_need_checkpoint(places_t* p) noexcept nogil
# Wait up to about SPACE_WAIT_MS for places that a checkpoint left out already and only somebody who
# still reads them keeps. False: none became free since so many had been released.
cdef bint places_wait(places_t* p, uint64_t released) noexcept nogil
# A checkpoint begins to copy; its number.
cdef uint64_t places_checkpoint_begins(places_t* p) noexcept nogil
# The checkpoint of that number is durable: free what it left out and nobody uses. Returns how many
# places that were.
cdef uint64_t places_release(places_t* p, uint64_t checkpoint) noexcept nogil
# Give what no chunk has back to storage: after a predecessor that could not. Before any request.
cdef void places_return(places_t* p) noexcept nogil
