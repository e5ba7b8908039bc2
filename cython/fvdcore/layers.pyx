# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Layer 5. Opening an image chain. See layers.pxd.

A layer is (source, kind) or (source, "fvd", data). The kinds: "fvd", an image, whose data lie in
the image itself or in data; "raw", plain bytes, and "nbd", an export of an NBD server, only at the
bottom. A source is a descriptor, which is duplicated; that of "nbd", and data in an export, is a
URI. A layer (source, "nbd", options) may have options: "length", what the export has in bytes
(opening then does not wait for the server); "exact", whether a longer one is refused, too;
"keeper", a descriptor that is held as long as the export is used."""
from libc.stdint cimport uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from .atomics cimport load_acquire
from .errors cimport fault
from .file_storage cimport file_storage_open, file_storage_t
from .image cimport image_end_base, image_free, image_open, image_t
from .limits cimport CHAIN_MAX, NS_PER_MS, STORES_MAX
from .nbd_pool cimport NBD_CONNECTIONS_MAX, nbd_options_t
from .nbd_storage cimport nbd_storage_interrupt, nbd_storage_open, nbd_storage_t
from .owners cimport owners_open, owners_t
from .patience cimport patient_interrupt, patient_open, patient_storage_t
from .read_path cimport image_become_storage
from .storage cimport storage_close, storage_t
from .sync cimport clock_now, cond_wait, mutex_lock, mutex_unlock
from .syscalls cimport EMFILE, ENOMEM

from .errors import EngineFault

cdef enum:
    QUIET_MS = 1000                    # at the end, answers of a server are waited for so long


cdef take_remote_options(nbd_options_t* o, double timeout, int connections):
    if not 0.001 <= timeout <= 1e6:
        raise ValueError("base_timeout is 0.001 to 1000000 seconds")
    if not 1 <= connections <= NBD_CONNECTIONS_MAX:
        raise ValueError(f"base_connections is 1 to {NBD_CONNECTIONS_MAX}")
    memset(o, 0, sizeof(nbd_options_t))
    o.keeper_fd = -1
    o.connections = connections
    o.timeout_ns = <uint64_t>(timeout * 1e9)


cdef check_layers(object layers):
    images = sum(1 for layer in layers if layer[1] == "fvd")
    if not 1 <= images <= CHAIN_MAX:
        raise ValueError(f"a chain has 1 to {CHAIN_MAX} images, not {images}")
    for at, layer in enumerate(layers):
        kind = layer[1]
        at_bottom = at == len(layers) - 1 and at > 0
        if kind != "fvd" and not (kind in ("raw", "nbd") and at_bottom):
            raise ValueError(f"layer {at} cannot be {kind!r}")


cdef storage_t* open_file(device_t* d, int fd, str what) except NULL:
    """A file or block device, kept by d."""
    cdef file_storage_t* f
    cdef int rc = 0
    if d.store_count == STORES_MAX:
        raise fault(-EMFILE, what, -1)
    f = <file_storage_t*>calloc(1, sizeof(file_storage_t))
    if f == NULL:
        raise fault(-ENOMEM, what, -1)
    rc = file_storage_open(f, fd)
    if rc < 0:
        free(f)
        raise fault(rc, what, -1)
    d.stores[d.store_count] = &f.head
    d.store_count += 1
    return &f.head


cdef storage_t* open_below(device_t* d, int fd, str what, uint64_t timeout_ns) except NULL:
    """The same below the top, where it may lie on something that hangs."""
    cdef patient_storage_t* s = <patient_storage_t*>calloc(1, sizeof(patient_storage_t))
    cdef int rc
    if s == NULL:
        raise fault(-ENOMEM, what, -1)
    try:
        open_file(d, fd, what)
    except BaseException:
        free(s)
        raise
    rc = patient_open(s, d.stores[d.store_count - 1], timeout_ns, d.gate)
    if rc < 0:
        free(s)
        raise fault(rc, what, -1)
    d.stores[d.store_count - 1] = &s.head
    return &s.head


cdef storage_t* open_export(device_t* d, str uri, dict wanted, bint writable,
        const nbd_options_t* options, str what) except NULL:
    """An export of an NBD server, kept by d."""
    cdef nbd_storage_t* s
    cdef nbd_options_t o = options[0]
    cdef const char* reason = NULL
    cdef bytes name = uri.encode()
    cdef const char* c_name = name
    cdef int rc
    if d.store_count == STORES_MAX:
        raise fault(-EMFILE, what, -1)
    s = <nbd_storage_t*>calloc(1, sizeof(nbd_storage_t))
    if s == NULL:
        raise fault(-ENOMEM, what, -1)
    o.writable = writable
    o.length = wanted.get("length", 0)
    o.exact = wanted.get("exact", False)
    o.keeper_fd = wanted.get("keeper", -1)
    with nogil:
        rc = nbd_storage_open(s, c_name, &o, &reason)
    if rc < 0:
        text = reason.decode("utf-8", "replace") if reason != NULL else ""
        free(s)
        raise EngineFault(-rc, what, -1, text)
    d.stores[d.store_count] = &s.head
    d.store_count += 1
    return &s.head


cdef storage_t* open_part(device_t* d, int at, int fd, str what,
        const nbd_options_t* nbd) except NULL:
    return open_below(d, fd, what, nbd.timeout_ns) if at else open_file(d, fd, what)


cdef open_image_layer(device_t* d, int at, object layer, storage_t* below, counters_t* counters,
        const image_options_t* o, const nbd_options_t* nbd):
    cdef const char* reason = NULL
    cdef image_t* m = &d.layers[at]
    cdef storage_t* file = open_part(d, at, layer[0], f"open layer {at}", nbd)
    cdef storage_t* data = file
    cdef int rc
    if len(layer) > 2 and isinstance(layer[2], str):
        data = open_export(d, layer[2], {}, not o.read_only, nbd,
                           f"open the data file of layer {at}")
    elif len(layer) > 2 and layer[2] is not None:
        data = open_part(d, at, layer[2], f"open the data file of layer {at}", nbd)
    with nogil:
        rc = image_open(m, file, data, below, counters, o, &reason)
    if rc < 0:
        raise EngineFault(-rc, f"open layer {at} of the image", -1,
                          reason.decode() if reason != NULL else "")
    d.layer_count += 1
    image_become_storage(m)


cdef storage_t* open_owners(device_t* d, int images, storage_t* bottom) except NULL:
    """The images below the top as one storage, kept by d."""
    cdef owners_t* o
    if d.store_count == STORES_MAX:
        raise fault(-EMFILE, "open the chain", -1)
    o = <owners_t*>calloc(1, sizeof(owners_t))
    if o == NULL:
        raise fault(-ENOMEM, "open the chain", -1)
    owners_open(o, &d.layers[1], images, bottom)
    d.stores[d.store_count] = &o.head
    d.store_count += 1
    return &o.head


cdef layers_open(device_t* d, object layers, counters_t* lower, const image_options_t* options,
        const nbd_options_t* nbd):
    cdef storage_t* below = NULL
    cdef storage_t* bottom_store
    cdef image_options_t o
    cdef int at, images = <int>len(layers)
    bottom = layers[images - 1]
    if bottom[1] == "raw":
        images -= 1
        below = open_below(d, bottom[0], "open the base", nbd.timeout_ns)
    elif bottom[1] == "nbd":
        images -= 1
        wanted = bottom[2] if len(bottom) > 2 else {}
        below = open_export(d, bottom[0], wanted, False, nbd, "open the base")
        d.has_remote_base = True
    bottom_store = below
    d.base_timeout_ns = nbd.timeout_ns
    d.base_may_hang = len(layers) > 1
    memset(&o, 0, sizeof(o))
    o.read_only = True
    o.live_fd = -1
    o.boot_id = options.boot_id
    o.gate = options.gate
    # From the bottom up: each layer is the base of the one above it.
    for at in range(images - 1, 0, -1):
        open_image_layer(d, at, layers[at], below, lower, &o, nbd)
        below = &d.layers[at].head
    # One image below the top is asked at once already.
    if images > 2:
        below = open_owners(d, images - 1, bottom_store)
    open_image_layer(d, 0, layers[0], below, &d.counters, options, nbd)
    d.image = &d.layers[0]


cdef inline bint is_below(const device_t* d, const storage_t* s) noexcept nogil:
    return s != d.image.file and s != d.image.data


cdef void interrupt(storage_t* s, uint64_t quiet_ns) noexcept nogil:
    nbd_storage_interrupt(s, quiet_ns)
    patient_interrupt(s)


cdef void layers_close_bases(device_t* d) noexcept nogil:
    cdef int i
    if not image_end_base(d.image):
        return
    for i in range(d.store_count):
        if is_below(d, d.stores[i]):
            interrupt(d.stores[i], QUIET_MS * NS_PER_MS)
    mutex_lock(&d.mutex)
    while load_acquire(&d.image.base_users):
        # Whoever leaves must not pay for a wake-up that is wanted once.
        cond_wait(&d.change_done, &d.mutex, clock_now(d.gate) + NS_PER_MS)
    mutex_unlock(&d.mutex)
    for i in range(1, CHAIN_MAX):
        if d.layers[i].opened:
            image_free(&d.layers[i])
    for i in range(d.store_count):
        if is_below(d, d.stores[i]):
            storage_close(d.stores[i])


cdef void layers_interrupt(device_t* d, bint now) noexcept nogil:
    cdef int i
    for i in range(d.store_count):
        interrupt(d.stores[i], 0 if now else QUIET_MS * NS_PER_MS)
