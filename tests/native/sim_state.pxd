# SPDX-License-Identifier: Apache-2.0
"""The simulated world as its parts share it: disks, device, guests, oracle, spare disks for clones.

Declarations only. sim_guest runs the requests, sim_crash makes and checks the clones, sim_world
ties them together and is what Python sees."""
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from fvdcore.counters cimport counters_t
from fvdcore.dispatch cimport device_t
from fvdcore.image cimport image_t
from fvdcore.patience cimport patient_storage_t
from fvdcore.storage cimport storage_ops_t, storage_t
from fvdcore.sync cimport thread_t
from sim_disk cimport sim_disk_t
from sim_gate cimport sim_gate_t
from sim_oracle cimport oracle_t

cdef enum:
    GUESTS_MAX = 8
    PENDING_MAX = 160
    MARKS = 33
    UNLIMITED_S = 1000000              # a base is waited for so long: no delay is so long

cdef enum:
    CRASH_POWER = 0                    # a power cut
    CRASH_DEATH = 1                    # the process dies, the live state stays
    CRASH_DEATH_POWER = 2              # and a power cut at some moment of its successor
    CRASH_RECOVERY = 3                 # a power cut, and another one during recovery
    CRASH_KINDS = 4

cdef enum:                             # what happened in a run
    MARK_COMMIT = 0
    MARK_CHECKPOINT = 1
    MARK_BUSY_CHECKPOINT = 2           # with requests in flight
    MARK_WRAP = 3                      # the ring went round
    MARK_TAKEOVER = 4
    MARK_POWER_CUT = 5
    MARK_CUT_IN_RECOVERY = 6
    MARK_FAULT = 7                     # an I/O failed
    MARK_STICKY = 8                    # a flush failed for good
    MARK_NO_SPACE = 9
    MARK_PREFETCHED = 10
    MARK_CLOSED = 11
    MARK_REPLAY = 12
    MARK_COPY_ON_READ = 13
    MARK_COPY_ON_WRITE = 14
    MARK_BASE_FAULT = 15
    MARK_RESIZED = 16
    MARK_RELOCATED = 17
    MARK_TRIMMED = 18
    MARK_INLINE = 19
    MARK_CREW = 20
    MARK_REFUSED = 21                  # an open failed because of a fault
    MARK_UPDATED = 22
    MARK_OUTAGE = 23                   # the base was away for a while
    MARK_CHAIN = 24                    # the base is an image itself
    MARK_VERIFIED = 25                 # clones that fvdctl's check looked at as well
    MARK_FLAT = 26                     # the base's layers were read through a map of their owners
    MARK_ENDED_BASE = 27               # the base was closed beside guests
    MARK_AHEAD = 28                    # space was taken before it was needed
    MARK_PATIENT = 29                  # the base was read by readers of its own
    MARK_GIVEN_UP = 30                 # and somebody's time was over
    MARK_LEFT = 31                     # and some still hung when it was closed
    MARK_COPY_LATER = 32               # a read of the base was answered without the crew

cdef enum:
    ACTIONS_MAX = 8
    ACTION_GROW = 0                    # value: the new size
    ACTION_UPDATE = 1                  # value: of what the four fields are made
    ACTION_PREFETCH = 2                # value: 0 pause, 1 run

cdef struct world_t

cdef struct action_t:
    int kind
    uint64_t at                        # requests of the session that are answered before it
    uint64_t value

cdef struct settings_t:
    uint64_t period                    # journal_clean_buf_period, in sector 4 of the header
    uint64_t copy_on_read              # these are in sector 6
    uint64_t outstanding
    uint64_t throttle

cdef struct guest_t:
    world_t* world
    thread_t thread
    int index
    uint64_t outstanding
    uint64_t held                      # with the crew, as a connection counts them
    uint8_t* buffer
    uint64_t began                     # the request in its own hands; 0: none

cdef struct pending_t:
    int guest                          # -1: free
    uint32_t op                        # the oracle's, for changes
    uint64_t began
    bint faulty                        # the sticky fault was set before

cdef struct judged_t:
    storage_t head                     # first: a judged_t* is a storage_t*
    storage_ops_t ops
    world_t* world
    patient_storage_t* s               # the device's

cdef struct world_t:
    sim_gate_t gate
    sim_disk_t file
    sim_disk_t data                    # used only with a data file
    sim_disk_t base
    bint has_data
    bint has_base
    # A base that is an image: its file is `base`, that of its own base `below`; and if that is an
    # image as well, that of its base `deep`. The device has them in its layers, clones read through
    # others, since they have no gate.
    bint has_below
    bint has_deep
    bint flat                          # the device reads them through one map of their owners
    bint ends_base                     # it lets go of them when all is local
    bint patient                       # the base is read by readers of its own (patience)
    uint64_t base_timeout              # which are waited for so long
    int hanging                        # stores that readers read from, of this session or earlier
    judged_t judged
    uint64_t ahead_min                 # a growth by so much is allocated at once; 0: the engine's
    sim_disk_t below
    sim_disk_t deep
    image_t* clone_base
    bint clone_base_open
    counters_t base_counters
    oracle_t oracle
    device_t device
    counters_t counters
    bint open_
    uint64_t random
    # The live file: memory that outlives the process.
    bint with_live
    int live_fd
    uint8_t* live
    uint64_t live_bytes
    uint8_t[16] boot_id
    uint8_t[16] session
    # The plan.
    uint64_t requests
    uint64_t issued
    uint64_t completed
    uint64_t depth
    int guest_count
    int crew_count
    uint64_t hot                       # sectors that most requests fall into, 0: all
    uint64_t length_max                # sectors of one request
    uint64_t think_ns
    uint32_t[6] weights                # read, write, flush, trim, write zeroes, status
    uint32_t fua                       # of 256 writes
    uint32_t inline_                   # of 256 reads and writes, how many try the inline path
    int64_t prefetch_delay             # seconds, -1: off
    int policy                         # of prefetch
    bint distant                       # the base is
    # What the manager does meanwhile.
    action_t[8] actions                # ACTIONS_MAX
    int action_count
    int guests_left
    thread_t manager
    uint64_t growing_to                # bytes that the disk may have
    settings_t settings                # that are durable
    settings_t next_settings           # that a crash may leave instead
    bint settings_mixed                # an update failed, and so did taking it back
    uint32_t verify_share              # of 256 looks at bytes, how many fvdctl's check takes too
    bint (*verify)(world_t* w, const sim_disk_t* file, const sim_disk_t* data) noexcept nogil
    void* verifier
    bint fault_expected                # errors are possible
    bint faulty_start                  # the session took over a sticky fault
    bint full_expected                 # the storage may be full
    guest_t[8] guests
    pending_t[160] pending
    # Crashes.
    uint64_t clones_left
    uint64_t clone_at                  # requests completed when the next one is due
    uint64_t clone_every
    uint64_t clone_step                # or gate steps, once due
    bint cloning
    bint closing                       # the session's last writes: most of them are followed
    int only_kind                      # -1: any
    uint64_t clones
    uint64_t[4] clones_of
    sim_disk_t clone_file
    sim_disk_t clone_data
    sim_disk_t second_file
    sim_disk_t second_data
    int64_t second_in                  # operations until the second cut; -1: none
    bint second_done
    int second_survival
    image_t* clone_image
    counters_t clone_counters
    int clone_live_fd
    uint8_t* clone_live
    uint8_t* content                   # of the virtual disk, as a clone showed it
    uint8_t* scratch
    # The state at the crash that ends this session.
    uint64_t adopt_at                  # requests completed; ~0: the session ends with a close
    bint adopted
    bint adopt_death                   # take it over, rather than a power cut
    sim_disk_t next_file
    sim_disk_t next_data
    oracle_t next_oracle
    uint8_t* next_live
    # Exhaustive mode: after every change of a disk, every subset of so many dirty sectors.
    uint64_t exhaustive
    uint64_t ios
    uint64_t[33] marks                 # MARKS
    bint failed
    char[1024] message
