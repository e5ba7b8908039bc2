# SPDX-License-Identifier: Apache-2.0
"""Layer 3. How much a demand read takes from a distant base: more than was asked, because a round
trip costs as much as many bytes, and copy-on-read keeps what came along."""
from libc.stdint cimport uint64_t
from .image cimport image_t
from .sync cimport gate_t, mutex_t

cdef enum:
    FETCH_WINDOWS = 32                 # reads under way; more are not widened
    FETCH_STREAMS = 8                  # sequential readers that are told apart

cdef struct fetch_window_t:
    uint64_t begin
    uint64_t end                       # 0: free

cdef struct fetch_stream_t:
    uint64_t next                      # where its next read from the base is expected
    uint64_t bytes                     # of its last window; 0: free
    uint64_t used                      # order of the last use

cdef struct fetch_t:
    mutex_t mutex
    uint64_t bytes                     # of a window; 0: nothing is widened
    uint64_t longest                   # window that a stream grows to
    uint64_t uses
    fetch_window_t[32] windows         # FETCH_WINDOWS
    fetch_stream_t[8] streams          # FETCH_STREAMS

# bytes: of a window, 0 for none. Aligned windows of this size are taken, and a reader that goes on
# where its window ended gets twice as much each time, up to eight times.
cdef int fetch_init(fetch_t* f, const image_t* m, uint64_t bytes, gate_t* gate) noexcept nogil
cdef void fetch_free(fetch_t* f) noexcept nogil
# Widen a read that begins or ends in absent blocks, by absent blocks alone, at either end by so
# much less than BLOCK_MAX that whole blocks fit, and never into what another read fetches now.
# The place of the window, to be given back with fetch_end when the read has come; or -1, and
# nothing is widened.
cdef int fetch_begin(fetch_t* f, const image_t* m, uint64_t* begin, uint64_t* end) noexcept nogil
cdef void fetch_end(fetch_t* f, int place) noexcept nogil
