# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""The base. See sim_base.pxd."""
from libc.stdlib cimport calloc
from libc.string cimport memset

from fvdcore.dispatch cimport device_t
from fvdcore.image cimport image_free, image_open, image_options_t, image_t
from fvdcore.layers cimport layers_close_bases
from fvdcore.owners cimport owners_open, owners_t
from fvdcore.read_path cimport image_become_storage
from fvdcore.storage cimport storage_t
from fvdcore.syscalls cimport ENOMEM
from sim_crash cimport world_fail
from sim_disk cimport sim_disk_t
from sim_patience cimport base_read_with_patience
from sim_state cimport MARK_ENDED_BASE, MARK_FLAT, world_t


cdef int open_layer(world_t* w, image_t* m, sim_disk_t* file, storage_t* below, bint gated,
        const char** reason) noexcept nogil:
    cdef image_options_t o
    cdef int rc
    memset(&o, 0, sizeof(o))
    o.read_only = True
    o.live_fd = -1
    o.boot_id = w.boot_id
    o.gate = &w.gate.head if gated else NULL
    rc = image_open(m, &file.head, &file.head, below, &w.base_counters, &o, reason)
    if rc == 0:
        image_become_storage(m)
    return rc


cdef int open_layers(world_t* w, image_t* layers, bint gated, const char** reason) noexcept nogil:
    """The base's image and that of its own base, if that is one; the uppermost first."""
    cdef storage_t* below = &w.below.head
    cdef int rc = 0
    if w.has_deep:
        rc = open_layer(w, &layers[1], &w.below, &w.deep.head, gated, reason)
        below = &layers[1].head
    if rc == 0:
        rc = open_layer(w, layers, &w.base, below, gated, reason)
        if rc < 0:
            free_layers(layers)
    return rc


cdef void free_layers(image_t* layers) noexcept nogil:
    cdef int i
    for i in range(2):
        if layers[i].opened:
            image_free(&layers[i])


cdef int base_open(world_t* w, const char** reason) noexcept nogil:
    cdef device_t* d = &w.device
    cdef owners_t* o
    cdef int rc
    if not w.has_below:
        return base_read_with_patience(w) if w.patient else 0
    rc = open_layers(w, &d.layers[1], True, reason)
    if rc == 0 and w.flat:
        o = <owners_t*>calloc(1, sizeof(owners_t))
        if o == NULL:
            return -ENOMEM
        owners_open(o, &d.layers[1], 2 if w.has_deep else 1,
                    &w.deep.head if w.has_deep else &w.below.head)
        d.stores[0] = &o.head          # the device's to free
        d.store_count = 1
        w.marks[MARK_FLAT] += 1
    return rc


cdef void base_close(world_t* w) noexcept nogil:
    free_layers(&w.device.layers[1])


cdef storage_t* base_of(world_t* w) noexcept nogil:
    if not w.has_base:
        return NULL
    if not w.has_below:
        return &w.judged.head if w.patient else &w.base.head
    return w.device.stores[0] if w.flat else &w.device.layers[1].head


cdef void base_end(world_t* w) noexcept nogil:
    layers_close_bases(&w.device)
    w.marks[MARK_ENDED_BASE] += 1


cdef storage_t* base_of_clones(world_t* w) noexcept nogil:
    cdef const char* reason = NULL
    if not w.has_below:
        return &w.base.head if w.has_base else NULL
    if not w.clone_base_open:
        if open_layers(w, w.clone_base, False, &reason) < 0:
            if reason == NULL:
                reason = b"cannot be opened"
            world_fail(w, b"the base", reason, 0)
            return NULL
        w.clone_base_open = True
    return &w.clone_base.head


cdef void base_quiet(world_t* w, bint on) noexcept nogil:
    w.base.silent = on
    w.below.silent = on
    w.deep.silent = on


cdef void base_free(world_t* w) noexcept nogil:
    if w.clone_base_open:
        free_layers(w.clone_base)
        w.clone_base_open = False
