# SPDX-License-Identifier: Apache-2.0
"""Layer 0. libnbd's functions, loaded at run time (dlopen), so that it stays optional."""
from libc.stdint cimport int64_t, uint32_t, uint64_t

cdef extern from "nbd_library.h" nogil:
    struct nbd_handle:
        pass

    # callback returns 1: the command is retired at once. free is called exactly once, after the
    # last touch of the command's buffer, also when the command could not be issued.
    ctypedef struct nbd_completion_t "fvd_nbd_completion":
        int (*callback)(void* user_data, int* error) noexcept nogil
        void* user_data
        void (*free)(void* user_data) noexcept nogil

    ctypedef struct nbd_extents_t "fvd_nbd_extents":
        int (*callback)(void* user_data, const char* context, uint64_t offset, uint32_t* entries,
                size_t count, int* error) noexcept nogil
        void* user_data
        void (*free)(void* user_data) noexcept nogil

    # Called for each part of a read's reply; a simple reply is one part.
    ctypedef struct nbd_chunks_t "fvd_nbd_chunks":
        int (*callback)(void* user_data, const void* data, size_t count, uint64_t offset,
                unsigned int status, int* error) noexcept nogil
        void* user_data
        void (*free)(void* user_data) noexcept nogil

    ctypedef struct nbd_library_t "fvd_nbd_library":
        nbd_handle* (*create)() noexcept nogil
        void (*close)(nbd_handle* h) noexcept nogil
        const char* (*get_error)() noexcept nogil
        int (*get_errno)() noexcept nogil
        int (*add_meta_context)(nbd_handle* h, const char* name) noexcept nogil
        int (*set_uri_allow_transports)(nbd_handle* h, uint32_t mask) noexcept nogil
        int (*set_uri_allow_local_file)(nbd_handle* h, bint allow) noexcept nogil
        int (*set_tls_certificates)(nbd_handle* h, const char* directory) noexcept nogil
        int (*set_tls_psk_file)(nbd_handle* h, const char* path) noexcept nogil
        int (*set_tls_username)(nbd_handle* h, const char* name) noexcept nogil
        int (*aio_connect_uri)(nbd_handle* h, const char* uri) noexcept nogil
        int (*aio_disconnect)(nbd_handle* h, uint32_t flags) noexcept nogil
        int (*aio_get_fd)(nbd_handle* h) noexcept nogil
        unsigned int (*aio_get_direction)(nbd_handle* h) noexcept nogil
        int (*aio_notify_read)(nbd_handle* h) noexcept nogil
        int (*aio_notify_write)(nbd_handle* h) noexcept nogil
        int (*aio_is_connecting)(nbd_handle* h) noexcept nogil
        int (*aio_is_dead)(nbd_handle* h) noexcept nogil
        int (*aio_is_closed)(nbd_handle* h) noexcept nogil
        int64_t (*get_size)(nbd_handle* h) noexcept nogil
        int64_t (*get_block_size)(nbd_handle* h, int which) noexcept nogil
        int (*is_read_only)(nbd_handle* h) noexcept nogil
        int (*can_multi_conn)(nbd_handle* h) noexcept nogil
        int (*can_flush)(nbd_handle* h) noexcept nogil
        int (*can_fua)(nbd_handle* h) noexcept nogil
        int (*can_zero)(nbd_handle* h) noexcept nogil
        int (*can_trim)(nbd_handle* h) noexcept nogil
        int (*can_meta_context)(nbd_handle* h, const char* name) noexcept nogil
        int64_t (*aio_pread_structured)(nbd_handle* h, void* b, size_t n, uint64_t offset,
                nbd_chunks_t p, nbd_completion_t c, uint32_t flags) noexcept nogil
        int64_t (*aio_pwrite)(nbd_handle* h, const void* b, size_t n, uint64_t offset,
                nbd_completion_t c, uint32_t flags) noexcept nogil
        int64_t (*aio_flush)(nbd_handle* h, nbd_completion_t c, uint32_t flags) noexcept nogil
        int64_t (*aio_trim)(nbd_handle* h, uint64_t n, uint64_t offset, nbd_completion_t c,
                uint32_t flags) noexcept nogil
        int64_t (*aio_zero)(nbd_handle* h, uint64_t n, uint64_t offset, nbd_completion_t c,
                uint32_t flags) noexcept nogil
        int64_t (*aio_block_status)(nbd_handle* h, uint64_t n, uint64_t offset, nbd_extents_t e,
                nbd_completion_t c, uint32_t flags) noexcept nogil

    int nbd_library_load "fvd_nbd_library_load"(nbd_library_t* l) noexcept

cdef enum:                             # of libnbd
    DIRECTION_READ = 1
    DIRECTION_WRITE = 2
    TRANSPORT_TCP = 1
    TRANSPORT_UNIX = 2
    BLOCK_SIZE_MINIMUM = 0
    BLOCK_SIZE_MAXIMUM = 2
    COMMAND_FUA = 1
    COMMAND_NO_HOLE = 2
