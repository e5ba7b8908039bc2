# SPDX-License-Identifier: Apache-2.0
"""Layer 0. POSIX threads, as far as used (only by sync)."""
from posix.time cimport timespec

cdef extern from "<signal.h>" nogil:
    ctypedef struct sigset_t:
        pass
    int sigfillset(sigset_t* s)

cdef extern from *:
    """
    #include <errno.h>
    #include <pthread.h>
    #include <signal.h>
    #include <string.h>
    /* A blocked recv ends only by data, by the end of the connection, or by a signal with a
       handler. The number is one that neither Python nor the C library uses. */
    #define FVD_WAKE_SIGNAL (SIGRTMAX - 2)
    static void fvd_on_wake(int number) { (void)number; }
    static inline int fvd_wake_prepare(void) {
        struct sigaction action;
        memset(&action, 0, sizeof action);
        action.sa_handler = fvd_on_wake;
        sigemptyset(&action.sa_mask);
        return sigaction(FVD_WAKE_SIGNAL, &action, NULL) < 0 ? -errno : 0;
    }
    static inline void fvd_wake_allow(void) {
        sigset_t wake;
        sigemptyset(&wake);
        sigaddset(&wake, FVD_WAKE_SIGNAL);
        pthread_sigmask(SIG_UNBLOCK, &wake, NULL);
    }
    static inline void fvd_wake_send(pthread_t thread) {
        (void)pthread_kill(thread, FVD_WAKE_SIGNAL);
    }
    """
    int wake_prepare "fvd_wake_prepare"() noexcept nogil
    void wake_allow "fvd_wake_allow"() noexcept nogil
    void wake_send "fvd_wake_send"(pthread_t thread) noexcept nogil

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_t:
        pass
    ctypedef struct pthread_attr_t:
        pass
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef struct pthread_cond_t:
        pass
    ctypedef struct pthread_condattr_t:
        pass
    int SIG_SETMASK
    int pthread_create(pthread_t* t, const pthread_attr_t* a, void* (*fn)(void*) noexcept nogil,
            void* arg)
    int pthread_join(pthread_t t, void** r)
    int pthread_detach(pthread_t t)
    int pthread_attr_init(pthread_attr_t* a)
    int pthread_attr_destroy(pthread_attr_t* a)
    int pthread_attr_setstacksize(pthread_attr_t* a, size_t n)
    int pthread_sigmask(int how, const sigset_t* s, sigset_t* old)
    int pthread_mutex_init(pthread_mutex_t* m, void* a)
    int pthread_mutex_destroy(pthread_mutex_t* m)
    int pthread_mutex_lock(pthread_mutex_t* m)
    int pthread_mutex_unlock(pthread_mutex_t* m)
    int pthread_condattr_init(pthread_condattr_t* a)
    int pthread_condattr_destroy(pthread_condattr_t* a)
    int pthread_condattr_setclock(pthread_condattr_t* a, int clock)
    int pthread_cond_init(pthread_cond_t* c, const pthread_condattr_t* a)
    int pthread_cond_destroy(pthread_cond_t* c)
    int pthread_cond_wait(pthread_cond_t* c, pthread_mutex_t* m)
    int pthread_cond_timedwait(pthread_cond_t* c, pthread_mutex_t* m, const timespec* t)
    int pthread_cond_signal(pthread_cond_t* c)
    int pthread_cond_broadcast(pthread_cond_t* c)
