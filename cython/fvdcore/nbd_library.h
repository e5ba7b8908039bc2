/* SPDX-License-Identifier: Apache-2.0 */
/* libnbd, found at run time: a host without remote bases needs no package for them. The types and
 * signatures are those of libnbd's stable interface (soname libnbd.so.0, version 1.10 or later). */
#ifndef FVD_NBD_LIBRARY_H
#define FVD_NBD_LIBRARY_H
#include <dlfcn.h>
#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

struct nbd_handle;

typedef struct {
    int (*callback)(void *user_data, int *error);
    void *user_data;
    void (*free)(void *user_data);
} fvd_nbd_completion;

typedef struct {
    int (*callback)(void *user_data, const char *context, uint64_t offset, uint32_t *entries,
                    size_t count, int *error);
    void *user_data;
    void (*free)(void *user_data);
} fvd_nbd_extents;

typedef struct {
    int (*callback)(void *user_data, const void *data, size_t count, uint64_t offset,
                    unsigned status, int *error);
    void *user_data;
    void (*free)(void *user_data);
} fvd_nbd_chunks;

typedef struct {
    struct nbd_handle *(*create)(void);
    void (*close)(struct nbd_handle *);
    const char *(*get_error)(void);
    int (*get_errno)(void);
    int (*add_meta_context)(struct nbd_handle *, const char *);
    int (*set_uri_allow_transports)(struct nbd_handle *, uint32_t);
    int (*set_uri_allow_local_file)(struct nbd_handle *, bool);
    int (*set_tls_certificates)(struct nbd_handle *, const char *);
    int (*set_tls_psk_file)(struct nbd_handle *, const char *);
    int (*set_tls_username)(struct nbd_handle *, const char *);
    int (*aio_connect_uri)(struct nbd_handle *, const char *);
    int (*aio_disconnect)(struct nbd_handle *, uint32_t);
    int (*aio_get_fd)(struct nbd_handle *);
    unsigned (*aio_get_direction)(struct nbd_handle *);
    int (*aio_notify_read)(struct nbd_handle *);
    int (*aio_notify_write)(struct nbd_handle *);
    int (*aio_is_connecting)(struct nbd_handle *);
    int (*aio_is_dead)(struct nbd_handle *);
    int (*aio_is_closed)(struct nbd_handle *);
    int64_t (*get_size)(struct nbd_handle *);
    int64_t (*get_block_size)(struct nbd_handle *, int);
    int (*is_read_only)(struct nbd_handle *);
    int (*can_multi_conn)(struct nbd_handle *);
    int (*can_flush)(struct nbd_handle *);
    int (*can_fua)(struct nbd_handle *);
    int (*can_zero)(struct nbd_handle *);
    int (*can_trim)(struct nbd_handle *);
    int (*can_meta_context)(struct nbd_handle *, const char *);
    int64_t (*aio_pread_structured)(struct nbd_handle *, void *, size_t, uint64_t,
                                    fvd_nbd_chunks, fvd_nbd_completion, uint32_t);
    int64_t (*aio_pwrite)(struct nbd_handle *, const void *, size_t, uint64_t,
                          fvd_nbd_completion, uint32_t);
    int64_t (*aio_flush)(struct nbd_handle *, fvd_nbd_completion, uint32_t);
    int64_t (*aio_trim)(struct nbd_handle *, uint64_t, uint64_t, fvd_nbd_completion, uint32_t);
    int64_t (*aio_zero)(struct nbd_handle *, uint64_t, uint64_t, fvd_nbd_completion, uint32_t);
    int64_t (*aio_block_status)(struct nbd_handle *, uint64_t, uint64_t, fvd_nbd_extents,
                                fvd_nbd_completion, uint32_t);
} fvd_nbd_library;

/* 0, or -ENOENT: the library is not there or lacks a function. It stays loaded. */
static inline int fvd_nbd_library_load(fvd_nbd_library *l) {
    void *library = dlopen("libnbd.so.0", RTLD_NOW | RTLD_LOCAL);
    if (library == NULL) return -ENOENT;
#define FVD_NBD_FIND(name) \
    do { \
        void *found = dlsym(library, "nbd_" #name); \
        if (found == NULL) return -ENOENT; \
        memcpy(&l->name, &found, sizeof found); \
    } while (0)
    FVD_NBD_FIND(create);
    FVD_NBD_FIND(close);
    FVD_NBD_FIND(get_error);
    FVD_NBD_FIND(get_errno);
    FVD_NBD_FIND(add_meta_context);
    FVD_NBD_FIND(set_uri_allow_transports);
    FVD_NBD_FIND(set_uri_allow_local_file);
    FVD_NBD_FIND(set_tls_certificates);
    FVD_NBD_FIND(set_tls_psk_file);
    FVD_NBD_FIND(set_tls_username);
    FVD_NBD_FIND(aio_connect_uri);
    FVD_NBD_FIND(aio_disconnect);
    FVD_NBD_FIND(aio_get_fd);
    FVD_NBD_FIND(aio_get_direction);
    FVD_NBD_FIND(aio_notify_read);
    FVD_NBD_FIND(aio_notify_write);
    FVD_NBD_FIND(aio_is_connecting);
    FVD_NBD_FIND(aio_is_dead);
    FVD_NBD_FIND(aio_is_closed);
    FVD_NBD_FIND(get_size);
    FVD_NBD_FIND(get_block_size);
    FVD_NBD_FIND(is_read_only);
    FVD_NBD_FIND(can_multi_conn);
    FVD_NBD_FIND(can_flush);
    FVD_NBD_FIND(can_fua);
    FVD_NBD_FIND(can_zero);
    FVD_NBD_FIND(can_trim);
    FVD_NBD_FIND(can_meta_context);
    FVD_NBD_FIND(aio_pread_structured);
    FVD_NBD_FIND(aio_pwrite);
    FVD_NBD_FIND(aio_flush);
    FVD_NBD_FIND(aio_trim);
    FVD_NBD_FIND(aio_zero);
    FVD_NBD_FIND(aio_block_status);
#undef FVD_NBD_FIND
    return 0;
}

#endif
