# SPDX-License-Identifier: Apache-2.0
"""Layer 4. The crew: the threads that run what would block (base reads, copy-on-write, flushes,
NOWAIT misses), each request to its end on one of them: execute, reply, settle."""
from .dispatch cimport device_t

# With a base that may hang there are twice as many threads, half of them kept from what needs the
# base: so that it holds up nothing that is local. Above a distant base one more is started whenever
# all others wait for it, up to CREW_MAX: what a guest asks at once costs one round trip, not many.
cdef int device_start_crew(device_t* d, int threads) noexcept nogil
# As many threads as writes that the kernel holds back, one by one, in a queue's usual depth.
cdef void device_enlarge_crew(device_t* d) noexcept nogil
cdef void device_stop_crew(device_t* d) noexcept nogil
