# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Caps and measured minima of prefetch, with times that the test gives."""
from libc.stdint cimport uint64_t

from fvdcore.manners cimport (
    manners_begin, manners_end, manners_init, manners_look, manners_may, manners_meter,
    manners_piece, manners_ready, manners_t,
)
from fvdcore.throttle cimport (
    bucket_init, bucket_pay, bucket_t, meter_begin, meter_end, meter_forget, meter_init, meter_t,
    pause_about, pause_drawn, random_next,
)


cdef class Bucket:
    cdef bucket_t b

    def __cinit__(self, uint64_t rate):
        bucket_init(&self.b, rate)

    def pay(self, uint64_t size, uint64_t now):
        """When the next step may begin."""
        bucket_pay(&self.b, size, now)
        return self.b.ready_ns


cdef class Meter:
    cdef meter_t t

    def __cinit__(self, uint64_t minimum, uint64_t window_ns):
        meter_init(&self.t, minimum, window_ns)

    def begin(self, uint64_t now):
        meter_begin(&self.t, now)

    def end(self, uint64_t size, uint64_t now):
        return bool(meter_end(&self.t, size, now))

    def forget(self, uint64_t now):
        meter_forget(&self.t, now)

    @property
    def average(self):
        return self.t.average


cdef class Random:
    cdef uint64_t state

    def __cinit__(self, uint64_t seed):
        self.state = seed

    def number(self):
        return random_next(&self.state)

    def pause(self, uint64_t limit):
        return pause_drawn(&self.state, limit)

    def about(self, uint64_t ns):
        return pause_about(&self.state, ns)


cdef class Manners:
    cdef manners_t t

    def __cinit__(self, int policy, bint distant, uint64_t least, uint64_t step, uint64_t most):
        manners_init(&self.t, policy, distant, least, step, most)

    def look(self, uint64_t demand, uint64_t demand_ns, uint64_t requests, uint64_t now):
        """Whether it has to wait for guests."""
        return bool(manners_look(&self.t, demand, demand_ns, requests, now))

    def piece(self):
        return manners_piece(&self.t)

    def may(self):
        return bool(manners_may(&self.t))

    def ready(self):
        return manners_ready(&self.t)

    def meter(self, uint64_t guest_bytes, uint64_t now):
        manners_meter(&self.t, guest_bytes, now)

    def begin(self, uint64_t size, uint64_t now=0):
        manners_begin(&self.t, size, now)

    def end(self, uint64_t size, uint64_t latency, bint ok, uint64_t now):
        manners_end(&self.t, size, latency, ok, now)

    @property
    def window(self):
        return self.t.window

    @property
    def rate(self):
        return self.t.rate

    @property
    def in_flight(self):
        return self.t.in_flight
