# SPDX-License-Identifier: Apache-2.0
"""Layer 4. The NBD transmission phase on the wire: constants, header parsing, error narrowing."""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from *:
    """
    #include <string.h>
    #include <errno.h>
    #include <endian.h>
    #define FVD_NBD_REQUEST 0x25609513u
    #define FVD_NBD_SIMPLE 0x67446698u
    #define FVD_NBD_STRUCTURED 0x668e33efu
    typedef struct {
        uint32_t magic; uint16_t flags, type; uint64_t cookie, offset; uint32_t length;
    } fvd_nbd_request_t;
    static inline fvd_nbd_request_t fvd_nbd_parse(const uint8_t *p) {
        fvd_nbd_request_t r;
        uint16_t h; uint32_t w; uint64_t q;
        memcpy(&w, p, 4); r.magic = be32toh(w);
        memcpy(&h, p + 4, 2); r.flags = be16toh(h);
        memcpy(&h, p + 6, 2); r.type = be16toh(h);
        memcpy(&r.cookie, p + 8, 8);
        memcpy(&q, p + 16, 8); r.offset = be64toh(q);
        memcpy(&w, p + 24, 4); r.length = be32toh(w);
        return r;
    }
    static inline uint64_t fvd_nbd_simple(uint8_t *p, uint32_t error, uint64_t cookie) {
        uint32_t w = htobe32(FVD_NBD_SIMPLE);
        memcpy(p, &w, 4);
        w = htobe32(error); memcpy(p + 4, &w, 4);
        memcpy(p + 8, &cookie, 8);
        return 16;
    }
    static inline uint64_t fvd_nbd_chunk(uint8_t *p, uint16_t type, uint64_t cookie,
            uint32_t length) {
        uint32_t w = htobe32(FVD_NBD_STRUCTURED);
        uint16_t h = htobe16(1); /* DONE: every reply of ours is one chunk */
        memcpy(p, &w, 4); memcpy(p + 4, &h, 2);
        h = htobe16(type); memcpy(p + 6, &h, 2);
        memcpy(p + 8, &cookie, 8);
        w = htobe32(length); memcpy(p + 16, &w, 4);
        return 20;
    }
    static inline void fvd_put_be64(uint8_t *p, uint64_t v) { v = htobe64(v); memcpy(p, &v, 8); }
    static inline void fvd_put_be32(uint8_t *p, uint32_t v) { v = htobe32(v); memcpy(p, &v, 4); }
    static inline uint32_t fvd_nbd_error(int rc) {
        switch (-rc) {
        case 0: return 0;
        case EPERM: case EROFS: case EACCES: return 1;
        case ENOMEM: return 12;
        case EINVAL: return 22;
        case ENOSPC: case EDQUOT: case EFBIG: return 28;
        case EOVERFLOW: return 75;
        case EOPNOTSUPP: return 95;
        case ESHUTDOWN: return 108;
        default: return 5;
        }
    }
    """
    ctypedef struct nbd_request_t "fvd_nbd_request_t":
        uint32_t magic
        uint16_t flags, type
        uint64_t cookie, offset
        uint32_t length
    uint32_t NBD_REQUEST_MAGIC "FVD_NBD_REQUEST"
    # cookie stays as it came: it is opaque.
    nbd_request_t nbd_parse "fvd_nbd_parse"(const uint8_t* p) noexcept nogil
    uint64_t nbd_simple "fvd_nbd_simple"(uint8_t* p, uint32_t error,
            uint64_t cookie) noexcept nogil
    uint64_t nbd_chunk "fvd_nbd_chunk"(uint8_t* p, uint16_t type, uint64_t cookie,
            uint32_t length) noexcept nogil
    void put_be64 "fvd_put_be64"(uint8_t* p, uint64_t v) noexcept nogil
    void put_be32 "fvd_put_be32"(uint8_t* p, uint32_t v) noexcept nogil
    uint32_t nbd_error "fvd_nbd_error"(int rc) noexcept nogil

cdef enum:
    NBD_HEADER = 28
    NBD_CMD_READ = 0
    NBD_CMD_WRITE = 1
    NBD_CMD_DISC = 2
    NBD_CMD_FLUSH = 3
    NBD_CMD_TRIM = 4
    NBD_CMD_WRITE_ZEROES = 6
    NBD_CMD_BLOCK_STATUS = 7
    NBD_FLAG_FUA = 1
    NBD_FLAG_NO_HOLE = 2
    NBD_FLAG_DF = 4
    NBD_FLAG_REQ_ONE = 8
    NBD_CHUNK_NONE = 0
    NBD_CHUNK_DATA = 1
    NBD_CHUNK_STATUS = 5
    NBD_CHUNK_ERROR = 32769
    NBD_STATE_HOLE = 1
    NBD_STATE_ZERO = 2
