# SPDX-License-Identifier: Apache-2.0
"""Layer 4. Changes that wait for space: parked, in no thread and under no lock.

A write or zeroing that found no space is parked when the device waits (on_full) or while somebody
makes the storage longer. It is tried again about once a second, and at once when storage was grown
or when another one that was parked has ended. Later changes of the same range are parked behind it.
Everything here happens under device_t.mutex, where nothing else is said."""
from libc.stdint cimport uint64_t
from .image cimport image_t
from .request cimport request_t

cdef struct parking_t:
    image_t* image
    bint waits                         # on_full: changes wait for space rather than fail
    bint helped                        # somebody grows the storage from outside when we ask
    bint closing                       # nothing is parked any more
    request_t* first                   # in the order of their hand-over
    uint64_t waiting                   # changes that were parked and have not ended (atomic)
    uint64_t retry_at                  # monotonic ns
    uint64_t growing                   # bytes asked for and not answered yet, or 0 (atomic)
    uint64_t grown_from                # length of the storage when that was asked
    uint64_t to_ask                    # the same until somebody was told (atomic)
    uint64_t wanted                    # bytes that storage needs at least for what was asked for
    uint64_t ask_at                    # not asked again before, after a growth that failed
    uint64_t growths                   # answered with more space
    uint64_t apart_count               # requests that left the pool (atomic)
    uint64_t apart_bytes               # of their payloads (atomic)
    void (*notify)(void* owner) noexcept nogil  # waiting began or ended; there is to_ask
    void* owner

# The same request in memory of its own, beside the pool; NULL: there is none,
# too many have it, or this one has. And its end. Both without device_t.mutex.
cdef request_t* parking_copy(parking_t* p, const request_t* r) noexcept nogil
cdef void parking_free(parking_t* p, request_t* r) noexcept nogil
# A change that found no space: keep it (True) or let it fail.
cdef bint parking_take(parking_t* p, request_t* r, uint64_t now) noexcept nogil
# Keep a change behind an earlier one that is parked.
cdef void parking_keep(parking_t* p, request_t* r, uint64_t now) noexcept nogil
# A change that was parked has ended.
cdef void parking_ended(parking_t* p) noexcept nogil
# The first of the list, which is not empty, off it. It stays parked until it is on a thread.
cdef request_t* parking_next(parking_t* p) noexcept nogil
# Ask for more storage if some is lacking, unless that was done lately.
cdef void parking_ask(parking_t* p, uint64_t now) noexcept nogil
# See how long storage is now. Without device_t.mutex.
cdef void parking_look(parking_t* p) noexcept nogil
# The answer to what was asked for, after a look. ok: there is more space.
cdef void parking_answer(parking_t* p, bint ok, uint64_t now) noexcept nogil
