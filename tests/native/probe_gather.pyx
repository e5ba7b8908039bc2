# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""When a connection's thread naps before it receives, with batches that the test makes up."""
from fvdcore.nbd_gather cimport gather_asks, gather_init, gather_note, gather_t


cdef class Gather:
    cdef gather_t g

    def __cinit__(self):
        gather_init(&self.g)

    def note(self, requests, starved):
        """The nap after a batch of so many; starved: what the client would answer if asked."""
        gather_note(&self.g, requests, gather_asks(&self.g) and starved)
        return self.g.nap_ns
