# SPDX-License-Identifier: Apache-2.0
"""Layer 0. System calls and constants that Cython's own declarations lack."""
from libc.stdint cimport int64_t, uint32_t, uint64_t
from posix.types cimport off_t
from posix.uio cimport iovec

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <errno.h>
    #include <fcntl.h>
    #include <linux/falloc.h>
    #include <linux/fs.h>
    #include <poll.h>
    #include <sys/eventfd.h>
    #include <sys/ioctl.h>
    #include <sys/prctl.h>
    #include <linux/sockios.h>
    #include <time.h>
    #include <sys/mman.h>
    #include <sys/random.h>
    #include <sys/resource.h>
    #include <sys/socket.h>
    #include <sys/stat.h>
    #include <sys/statvfs.h>
    #include <sys/syscall.h>
    #include <sys/time.h>
    #include <sys/uio.h>
    #include <unistd.h>
    #ifndef EUCLEAN
    #define EUCLEAN 117
    #endif
    static inline int fvd_is_block_device(int fd) {
        struct stat st;
        if (fstat(fd, &st) < 0) return -errno;
        return S_ISBLK(st.st_mode) ? 1 : 0;
    }
    static inline int fvd_file_length(int fd, uint64_t *length) {
        struct stat st;
        if (fstat(fd, &st) < 0) return -errno;
        if (S_ISBLK(st.st_mode)) {
            unsigned long long n = 0;
            if (ioctl(fd, BLKGETSIZE64, &n) < 0) return -errno;
            *length = n;
        } else {
            *length = (uint64_t)st.st_size;
        }
        return 0;
    }
    static inline uint64_t fvd_free_space(int fd) {
        struct statvfs s;
        return fstatvfs(fd, &s) < 0 ? 0 : (uint64_t)s.f_bavail * s.f_frsize;
    }
    #ifndef MADV_DONTNEED_LOCKED
    #define MADV_DONTNEED_LOCKED 24
    #endif
    static inline void fvd_drop_pages(void *p, size_t n) {
        /* A worker locks its memory; plain DONTNEED refuses locked pages. */
        if (madvise(p, n, MADV_DONTNEED) < 0 && errno == EINVAL)
            (void)madvise(p, n, MADV_DONTNEED_LOCKED);
    }
    static inline int fvd_hung_up(int fd) {
        struct pollfd p = { fd, 0, 0 };
        return poll(&p, 1, 0) > 0 && (p.revents & POLLHUP) != 0;
    }
    static inline int fvd_direct_alignment(int fd) {
        struct stat st;
        int sector = 0;
        if (fstat(fd, &st) == 0 && S_ISBLK(st.st_mode) && ioctl(fd, BLKSSZGET, &sector) == 0)
            return sector;
    #ifdef STATX_DIOALIGN
        struct statx x;
        if (statx(fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &x) == 0
                && (x.stx_mask & STATX_DIOALIGN) && x.stx_dio_offset_align)
            return (int)(x.stx_dio_offset_align > x.stx_dio_mem_align ? x.stx_dio_offset_align
                                                                       : x.stx_dio_mem_align);
    #endif
        return 4096;
    }
    #ifndef SYS_cachestat
    #define SYS_cachestat 451
    #endif
    static inline int fvd_cached_pages(int fd, uint64_t offset, uint64_t length,
                                       uint64_t *pages) {
        uint64_t range[2] = { offset, length };
        uint64_t found[5];              /* in the page cache; dirty; written; evicted; recently */
        if (syscall(SYS_cachestat, fd, range, found, 0) < 0) return -errno;
        *pages = found[0];
        return 0;
    }
    static inline int fvd_pipe_open(int *ends, int bytes) {
        int capacity;
        if (pipe2(ends, O_CLOEXEC | O_NONBLOCK) < 0) return -errno;
        (void)fcntl(ends[0], F_SETPIPE_SZ, bytes);
        capacity = fcntl(ends[0], F_GETPIPE_SZ);
        return capacity < 0 ? -errno : capacity;
    }
    static inline uint64_t fvd_unread(int fd) {
        int n = 0;
        return ioctl(fd, SIOCOUTQ, &n) < 0 || n < 0 ? 0 : (uint64_t)n;
    }
    static inline void fvd_nap(uint64_t ns) {
        struct timespec t = { 0, (long)ns };
        (void)nanosleep(&t, NULL);
    }
    static inline void fvd_nap_exactly(void) { (void)prctl(PR_SET_TIMERSLACK, 1UL, 0UL, 0UL, 0UL); }
    static inline uint64_t fvd_thread_sleeps(void) {
        struct rusage used;
        return getrusage(RUSAGE_THREAD, &used) < 0 ? 0 : (uint64_t)used.ru_nvcsw;
    }
    static inline int fvd_socket_setup(int fd, int bytes, int send_timeout_s) {
        struct timeval tv = { send_timeout_s, 0 };
        int flags = fcntl(fd, F_GETFL);
        if (flags < 0 || fcntl(fd, F_SETFL, flags & ~O_NONBLOCK) < 0) return -errno;
        (void)setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof bytes);
        (void)setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &bytes, sizeof bytes);
        if (setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &tv, sizeof tv) < 0) return -errno;
        return 0;
    }
    """
    int is_block_device "fvd_is_block_device"(int fd) noexcept nogil
    int file_length "fvd_file_length"(int fd, uint64_t* length) noexcept nogil
    # Bytes that the file's file system has left; 0 where it does not tell.
    uint64_t free_space "fvd_free_space"(int fd) noexcept nogil
    int socket_setup "fvd_socket_setup"(int fd, int buffer_bytes,
            int send_timeout_s) noexcept nogil

    # What offset, length and memory of direct I/O are multiples of.
    int direct_alignment "fvd_direct_alignment"(int fd) noexcept nogil
    # How many pages of the range the page cache has. -ENOSYS before Linux 6.5.
    int cached_pages "fvd_cached_pages"(int fd, uint64_t offset, uint64_t length,
            uint64_t* pages) noexcept nogil
    # A pipe that is never waited for, of so many bytes if the system allows; those it has.
    int pipe_open "fvd_pipe_open"(int* ends, int bytes) noexcept nogil
    ssize_t c_splice "splice"(int source, int64_t* source_offset, int target,
            int64_t* target_offset, size_t n, unsigned int flags) nogil
    unsigned int SPLICE_F_MOVE, SPLICE_F_NONBLOCK, SPLICE_F_MORE

    # Bytes sent that the peer has not received yet; 0 where the socket does not tell.
    uint64_t unread "fvd_unread"(int fd) noexcept nogil
    # Sleep for less than a second; a thread that wants that to be exact says so once.
    void nap "fvd_nap"(uint64_t ns) noexcept nogil
    void nap_exactly "fvd_nap_exactly"() noexcept nogil
    # How often this thread has waited for something (and not merely lost its processor).
    uint64_t thread_sleeps "fvd_thread_sleeps"() noexcept nogil

    # Has the peer shut the connection down in both directions?
    bint hung_up "fvd_hung_up"(int fd) noexcept nogil

    int EAGAIN, EBADMSG, ECANCELED, EINTR, EINVAL, EIO, ENODATA, ENOMEM, ENOSPC, ENOTSUP, ENXIO
    int EOPNOTSUPP, EPERM, EPIPE, EPROTO, EROFS, EUCLEAN, EMFILE, EFBIG
    int EBUSY, EDQUOT, EOVERFLOW, ESHUTDOWN, ENOENT, ENOTCONN, ETIMEDOUT, ESTALE

    struct msghdr:
        void* msg_name
        iovec* msg_iov
        size_t msg_iovlen

    struct pollfd:
        int fd
        short events
        short revents
    int c_poll "poll"(pollfd* fds, unsigned long n, int timeout_ms) nogil
    short POLLIN, POLLOUT

    ssize_t c_preadv2 "preadv2"(int fd, const iovec* v, int n, off_t offset, int flags) nogil
    ssize_t c_pwritev2 "pwritev2"(int fd, const iovec* v, int n, off_t offset, int flags) nogil
    int RWF_NOWAIT, RWF_DSYNC
    int c_fdatasync "fdatasync"(int fd) nogil
    int c_fsync "fsync"(int fd) nogil
    int c_ftruncate "ftruncate"(int fd, off_t length) nogil
    int c_fallocate "fallocate"(int fd, int mode, off_t offset, off_t length) nogil
    int FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE
    int c_sync_file_range "sync_file_range"(int fd, off_t offset, off_t n,
            unsigned int flags) nogil
    unsigned int SYNC_FILE_RANGE_WRITE
    off_t c_lseek "lseek"(int fd, off_t offset, int whence) nogil
    int SEEK_DATA, SEEK_HOLE
    ssize_t c_recv "recv"(int fd, void* buffer, size_t n, int flags) nogil
    ssize_t c_sendmsg "sendmsg"(int fd, const msghdr* m, int flags) nogil
    int MSG_NOSIGNAL, MSG_MORE, MSG_DONTWAIT, MSG_PEEK
    int c_shutdown "shutdown"(int fd, int how) nogil
    int SHUT_RD, SHUT_WR, SHUT_RDWR
    int c_close "close"(int fd) nogil
    int c_dup_cloexec "fcntl"(int fd, int command, int arg) nogil
    int F_DUPFD_CLOEXEC
    int c_eventfd "eventfd"(unsigned int initial, int flags) nogil
    int EFD_CLOEXEC, EFD_NONBLOCK
    ssize_t c_write "write"(int fd, const void* b, size_t n) nogil
    ssize_t c_read "read"(int fd, void* b, size_t n) nogil
    ssize_t c_getrandom "getrandom"(void* b, size_t n, unsigned int flags) nogil
    unsigned int c_gettid "gettid"() nogil
    void* c_mmap "mmap"(void* address, size_t n, int prot, int flags, int fd, off_t offset) nogil
    int c_munmap "munmap"(void* address, size_t n) nogil
    # Give private anonymous pages back; they read as zeros afterwards (or stay, on old kernels).
    void drop_pages "fvd_drop_pages"(void* address, size_t n) noexcept nogil
    int PROT_NONE, PROT_READ, PROT_WRITE
    int MAP_SHARED, MAP_PRIVATE, MAP_ANONYMOUS, MAP_NORESERVE, MAP_FIXED
    void* MAP_FAILED
