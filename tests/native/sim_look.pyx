# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Looks at the bytes of any image as the simulator does at those of its clones."""
from libc.stdint cimport uint64_t
from libc.stdlib cimport calloc, free

from sim_check cimport check_bytes
from sim_disk cimport sim_disk_free
from sim_setup cimport make_disk
from sim_state cimport world_t


def look(bytes image, bytes data=None):
    """What is wrong with an image, as text; nothing if it is in order. The layout must be sound."""
    cdef world_t* w = <world_t*>calloc(1, sizeof(world_t))
    if w == NULL:
        raise MemoryError
    w.has_data = data is not None
    w.settings_mixed = True            # of what its fields should be we know nothing
    try:
        make_disk(&w.file, w, False, <uint64_t>len(image), image)
        make_disk(&w.data, w, False, <uint64_t>len(data or b""), data)
        good = check_bytes(w, &w.file, &w.data)
        assert good or w.failed, "no memory"
        return w.message.decode(errors="replace")
    finally:
        sim_disk_free(&w.file)
        sim_disk_free(&w.data)
        free(w)
