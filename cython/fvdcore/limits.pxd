# SPDX-License-Identifier: Apache-2.0
"""Layer 0. Every bound and unit of the engine, by name. Bytes unless the name says otherwise."""
from libc.stdint cimport uint64_t

cdef enum:
    SECTOR = 512
    PAGE = 4096
    PAGE_SECTORS = 8
    HEADER_VALUES_MAX = 16             # fields that change while an image is open, at least
    HEADER_BYTES = 8192                # FvdHeader with its extension area (FORMAT.md section 1)

    REQUEST_MAX = 33554432             # largest NBD payload: what the kernel client may send
    BLOCK_MAX = 2097152                # largest block size: bounds the room beside a payload
    # Requests of one device that may wait for or be in the crew: so many that one connection may
    # have all 128 that the kernel sends at once (see request_take), lest some that wait for a base
    # that is away keep others from being read.
    REQUESTS = 288
    REQUESTS_SPARED = 8                # of these, kept for callers that are no connection
    CREW_MAX = 160                     # threads for what blocks: all 128 that the kernel sends at
                                       # once may wait for a distant base, and more are kept
    CREW_STARTED_MAX = 32              # of these, those that there are from the start
    CONNECTIONS_MAX = 64               # open NBD connections of one device
    PREFETCH_SLOTS_MAX = 64            # buffers of the prefetch pipeline
    PREFETCH_REMOTE_BYTES = 16777216   # in flight from a distant base: 1 Gbit/s for 130 ms
    FETCH_SIZE = 131072                # a demand read takes from a distant base, where it is kept
    FETCH_SIZE_MAX = 2097152           # at most
    CHAIN_MAX = 64                     # layers of a clone chain
    STORES_MAX = 130                   # a file and a data file a layer, a base and a map of all
    OWNERS_MAX = 33554432              # units of the map of a chain's owners, a byte each
    TABLE_BYTES_MAX = 1073741824       # of bitmap and chunk table together, each copy in memory
    RANGE_LOCKS = 256                  # block ranges locked at once

    RECEIVE_BUFFER = 524288            # one batch of requests, payloads of small writes included
    REPLY_BUFFER = 2097152             # replies of one batch, payloads included
    INLINE_READ_MAX = 1048576          # larger reads go to the crew
    SPLICE_MIN = 65536                 # reads from here on leave without a copy
    SPLICE_PIPE = 524288               # through a pipe of so much: a page of it holds a page
    BATCH_REPLIES = 256                # iovecs of one gathered send
    SOCKET_BUFFER = 4194304            # asked of the kernel for both directions

    JOURNAL_BATCH_MAX = 8388608        # bytes of records one commit may hold; more: checkpoint
    STACK_BYTES = 262144               # of every native thread
    KEEP_BYTES = 1048576               # of a request's buffer kept resident between uses
    STATUS_EXTENTS_MAX = 1024          # extents in one block status reply
    ZERO_STEP = 134217728              # bytes of one step of TRIM or WRITE_ZEROES
    CLOSE_DRAIN_S = 10                 # close() waits so long for clients to take their answers
    SEND_TIMEOUT_S = 60                # a client that takes nothing for so long is cut off
    SECOND_WAIT_S = 10                 # a second connection waits so long for writes of the first
    SPACE_WAIT_MS = 2000               # a write waits so long for readers that keep the last space
    APART_REQUESTS = 1024              # that wait for space beside the pool
    APART_BYTES = 268435456            # of their payloads
    PARK_RETRY_MS = 1000               # a change that waits for space is tried again so often
    GROW_AGAIN_MS = 30000              # after a growth that failed, none is asked for so long
    BACKGROUND_COMMIT_MS = 30000       # copied blocks are committed at least so often
    WRITEBACK_MIN = 65536              # fetched data of this size start write-back at once

cdef extern from *:
    """
    #define FVD_BACKGROUND_COMMIT_BYTES (256ULL << 20)
    #define FVD_NS_PER_MS 1000000ULL
    #define FVD_NS_PER_S 1000000000ULL
    #define FVD_NEVER UINT64_MAX
    """
    const uint64_t BACKGROUND_COMMIT_BYTES "FVD_BACKGROUND_COMMIT_BYTES"  # copied, uncommitted data
    const uint64_t NS_PER_MS "FVD_NS_PER_MS"
    const uint64_t NS_PER_S "FVD_NS_PER_S"
    const uint64_t NEVER "FVD_NEVER"                                      # no deadline
