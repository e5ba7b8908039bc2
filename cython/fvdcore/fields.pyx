# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""Layer 5. Changes of an open image that stand in its header. See fields.pxd."""
from libc.stdint cimport uint64_t
from .atomics cimport load_acquire
from .counters cimport BLOCK_SHARED, counters_block
from .dispatch cimport device_t
from .errors cimport fault
from .header cimport header_value_t
from .limits cimport HEADER_VALUES_MAX
from .resize cimport image_grow
from .settings cimport settings_change

# FORMAT.md section 2: offset, bytes.
_FIELDS = {
    "journal_buf_size": (2172, 8),
    "journal_clean_buf_period": (2180, 8),
    "storage_grow_unit": (2212, 8),
    "copy_on_read": (3248, 4),
    "max_outstanding_copy_on_read_data": (3252, 8),
    "prefetch_start_delay": (3260, 8),
    "num_prefetch_slots": (3272, 4),
    "bytes_per_prefetch": (3276, 8),
    "prefetch_read_throughput_measure_time": (3284, 8),
    "prefetch_write_throughput_measure_time": (3292, 8),
    "prefetch_min_read_throughput": (3300, 8),
    "prefetch_min_write_throughput": (3308, 8),
    "prefetch_max_read_throughput": (3316, 8),
    "prefetch_max_write_throughput": (3324, 8),
    "prefetch_throttle_time": (3332, 8),
}


cdef int take_fields(object values, header_value_t* out) except -1:
    cdef int count = 0
    for name, value in values.items():
        if name not in _FIELDS:
            raise ValueError(f"{name} cannot change while the image is open")
        offset, width = _FIELDS[name]
        least = -1 if name == "prefetch_start_delay" else 0
        if not least <= value < 1 << (8 * width - 1):
            raise ValueError(f"{name} cannot be {value}")
        out[count].offset = offset
        out[count].width = width
        out[count].value = <uint64_t>(value & 0xFFFFFFFFFFFFFFFF)
        count += 1
    return count


cdef int grow_disk(device_t* d, object size) except -1:
    cdef uint64_t wanted = size
    cdef int rc
    before = load_acquire(&d.image.size)
    if size % 512 or size <= before:
        raise ValueError(f"a disk of {before} bytes cannot grow to {size}")
    with nogil:
        rc = image_grow(d.image, wanted, counters_block(&d.counters, BLOCK_SHARED))
    if rc < 0:
        raise fault(rc, "grow the disk", -1)
    return 0


cdef int change_fields(device_t* d, object values, bint keep_copy_on_read) except -1:
    cdef header_value_t[HEADER_VALUES_MAX] taken
    cdef int count = take_fields(values, &taken[0]), rc
    with nogil:
        rc = settings_change(d.image, &d.prefetch, &taken[0], count, keep_copy_on_read,
                             counters_block(&d.counters, BLOCK_SHARED))
    if rc < 0:
        raise fault(rc, "change the header", -1)
    return 0
