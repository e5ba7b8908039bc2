# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, initializedcheck=False, auto_pickle=False, freethreading_compatible=True
# SPDX-License-Identifier: Apache-2.0
"""The scheduler behind gate_t. See sim_gate.pxd.

Each thread has a semaphore of its own and sleeps on it unless it is the one that runs. A call that
gives up the processor marks the thread's state, chooses the next one, and posts that one's
semaphore; when the choice falls on the caller itself nothing is switched."""
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from fvdcore.limits cimport NEVER
from fvdcore.pthread cimport (
    SIG_SETMASK, pthread_attr_destroy, pthread_attr_init, pthread_attr_setstacksize,
    pthread_attr_t, pthread_create, pthread_detach, pthread_join, pthread_sigmask, sigfillset,
    sigset_t,
)
from fvdcore.sync cimport cond_t, gate_t, mutex_t, thread_body_t, thread_t

cdef extern from "<semaphore.h>" nogil:
    int sem_init(sem_t* s, int shared, unsigned int value)
    int sem_destroy(sem_t* s)
    int sem_wait(sem_t* s)
    int sem_post(sem_t* s)

cdef enum:
    ENOMEM = 12
    EAGAIN = 11
    ETIMEDOUT = 110
    STACK = 1048576                    # clones are reopened on whatever thread runs

cdef sim_gate_t* stepping = NULL       # whose threads the engine's atomic operations belong to


cdef void sim_note(sim_gate_t* g, uint32_t kind, uint64_t a, uint64_t b) noexcept nogil:
    cdef sim_event_t* e = &g.trace[g.traced % SIM_TRACE]
    e.at = g.now
    e.thread = <uint32_t>g.running
    e.kind = kind
    e.a = a
    e.b = b
    g.traced += 1
    g.digest = (g.digest ^ (<uint64_t>kind + (<uint64_t>g.running << 8) + (g.now << 16))) \
        * <uint64_t>0x100000001B3ULL
    g.digest = (g.digest ^ a) * <uint64_t>0x100000001B3ULL
    g.digest = (g.digest ^ b ^ (g.digest >> 29)) * <uint64_t>0x100000001B3ULL


# -- mutexes -----------------------------------------------------------------------------------

cdef int holder_of(const sim_gate_t* g, const mutex_t* m) noexcept nogil:
    cdef int i
    for i in range(g.held_count):
        if g.held[i] == m:
            return i
    return -1


cdef void hold(sim_gate_t* g, mutex_t* m, int thread) noexcept nogil:
    g.held[g.held_count] = m
    g.holders[g.held_count] = thread
    g.held_count += 1


cdef void let_go(sim_gate_t* g, mutex_t* m) noexcept nogil:
    cdef int at = holder_of(g, m)
    if at < 0 or g.holders[at] != g.running:
        g.stuck(g.owner, b"a mutex is unlocked by a thread that does not hold it")
    g.held_count -= 1
    g.held[at] = g.held[g.held_count]
    g.holders[at] = g.holders[g.held_count]


# -- choosing ----------------------------------------------------------------------------------

cdef bint can_run(const sim_gate_t* g, const sim_thread_t* t) noexcept nogil:
    if t.state == SIM_READY:
        return True
    if t.state == SIM_LOCKING:
        return holder_of(g, t.mutex) < 0
    if t.state == SIM_JOINING:
        return g.threads[t.target].state == SIM_DONE
    return False


cdef bint wake_due(sim_gate_t* g) noexcept nogil:
    """Threads whose time has come can run; whether there was one."""
    cdef sim_thread_t* t
    cdef bint found = False
    cdef int i
    for i in range(g.count):
        t = &g.threads[i]
        if t.state in (SIM_WAITING, SIM_SLEEPING) and t.deadline <= g.now:
            t.timed_out = True
            t.state = SIM_LOCKING if t.mutex != NULL else SIM_READY
            found = True
    return found


cdef bint advance(sim_gate_t* g) noexcept nogil:
    """Move the clock to the next deadline. False: there is none."""
    cdef uint64_t first = NEVER
    cdef int i
    for i in range(g.count):
        if g.threads[i].state in (SIM_WAITING, SIM_SLEEPING):
            first = min(first, g.threads[i].deadline)
    if first == NEVER:
        return False
    g.now = max(g.now, first)
    return wake_due(g)


cdef int choose(sim_gate_t* g, const int* candidates, int n) noexcept nogil:
    cdef int i, best = candidates[0]
    if g.policy == POLICY_STICKY and not chance(&g.random, 1, 24):
        for i in range(n):
            if candidates[i] == g.running:
                return g.running
    if g.policy == POLICY_PRIORITY and not chance(&g.random, 1, 32):
        for i in range(n):
            if g.threads[candidates[i]].priority > g.threads[best].priority:
                best = candidates[i]
        if chance(&g.random, 1, 24):
            g.threads[best].priority = next_random(&g.random)
        return best
    return candidates[below(&g.random, <uint64_t>n)]


cdef int pick(sim_gate_t* g) noexcept nogil:
    """The thread that goes next; its mutex, if it waited for one, is its own."""
    cdef int[192] candidates           # SIM_THREADS
    cdef int i, n = 0
    cdef sim_thread_t* t
    g.steps += 1
    g.now += 200 + below(&g.random, 4000)
    if g.steps > g.steps_max:
        g.stuck(g.owner, b"no end in sight: more steps than any run needs")
    wake_due(g)
    while n == 0:
        for i in range(g.count):
            if can_run(g, &g.threads[i]):
                candidates[n] = i
                n += 1
        if n == 0 and not advance(g):
            g.stuck(g.owner, b"deadlock: nobody can run and no deadline is ahead")
    i = choose(g, candidates, n)
    t = &g.threads[i]
    if t.state == SIM_LOCKING:
        hold(g, t.mutex, i)
        t.mutex = NULL
    t.state = SIM_READY
    g.digest = (g.digest ^ <uint64_t>i ^ g.now) * <uint64_t>0x100000001B3ULL
    return i


cdef inline void wait_for_turn(sim_thread_t* t) noexcept nogil:
    while sem_wait(&t.wake) < 0:
        pass                           # interrupted by a signal


cdef void give_way(sim_gate_t* g) noexcept nogil:
    """Let the chosen thread run; returns when the caller is chosen again."""
    cdef int me = g.running, next_one = pick(g)
    if next_one != me:
        g.switches += 1
        g.running = next_one
        sem_post(&g.threads[next_one].wake)
        wait_for_turn(&g.threads[me])
    if g.observe != NULL:
        g.observe(g.owner)


# -- gate_t ------------------------------------------------------------------------------------

cdef void gate_lock(gate_t* p, mutex_t* m) noexcept nogil:
    cdef sim_gate_t* g = <sim_gate_t*>p
    cdef sim_thread_t* t = &g.threads[g.running]
    if holder_of(g, m) < 0 and not chance(&g.random, g.preempt, 256):
        hold(g, m, g.running)
        return
    if g.stall and chance(&g.random, 1, 6):
        sim_sleep(g, below(&g.random, g.stall))
    t.mutex = m
    t.state = SIM_LOCKING
    give_way(g)


cdef void gate_unlock(gate_t* p, mutex_t* m) noexcept nogil:
    cdef sim_gate_t* g = <sim_gate_t*>p
    let_go(g, m)
    if chance(&g.random, g.preempt, 256):
        give_way(g)


cdef int gate_wait(gate_t* p, cond_t* c, mutex_t* m, uint64_t deadline) noexcept nogil:
    cdef sim_gate_t* g = <sim_gate_t*>p
    cdef sim_thread_t* t = &g.threads[g.running]
    let_go(g, m)
    t.mutex = m
    t.timed_out = False
    if g.spurious and chance(&g.random, g.spurious, 65536):
        t.state = SIM_LOCKING
    else:
        t.state = SIM_WAITING
        t.key = c
        t.deadline = deadline
    give_way(g)
    t.key = NULL
    return -ETIMEDOUT if t.timed_out else 0


cdef void gate_wake(gate_t* p, cond_t* c, bint everybody) noexcept nogil:
    cdef sim_gate_t* g = <sim_gate_t*>p
    cdef int[192] candidates           # SIM_THREADS
    cdef int i, n = 0, chosen = -1
    for i in range(g.count):
        if g.threads[i].state == SIM_WAITING and g.threads[i].key == <void*>c:
            candidates[n] = i
            n += 1
    if n and not everybody:
        chosen = candidates[below(&g.random, <uint64_t>n)]
    for i in range(n):
        if everybody or candidates[i] == chosen:
            g.threads[candidates[i]].state = SIM_LOCKING


cdef void* run_thread(void* argument) noexcept nogil:
    cdef sim_thread_t* t = <sim_thread_t*>argument
    cdef sim_gate_t* g = t.gate
    cdef int next_one
    wait_for_turn(t)
    t.body(t.argument)
    if t.left:
        sem_destroy(&t.wake)
    t.state = SIM_GONE if t.left else SIM_DONE
    next_one = pick(g)
    g.switches += 1
    g.running = next_one
    sem_post(&g.threads[next_one].wake)
    return NULL


cdef int gate_start(gate_t* p, thread_t* handle, thread_body_t body, void* argument) noexcept nogil:
    cdef sim_gate_t* g = <sim_gate_t*>p
    cdef sim_thread_t* t
    cdef pthread_attr_t attributes
    cdef sigset_t everything, before
    cdef int rc
    cdef int at = 1
    while at < g.count and g.threads[at].state != SIM_GONE:
        at += 1
    if at == SIM_THREADS:
        return -EAGAIN
    t = &g.threads[at]
    memset(t, 0, sizeof(sim_thread_t))
    sem_init(&t.wake, 0, 0)
    t.body = body
    t.argument = argument
    t.gate = g
    t.priority = next_random(&g.random)
    pthread_attr_init(&attributes)
    pthread_attr_setstacksize(&attributes, STACK)
    sigfillset(&everything)
    pthread_sigmask(SIG_SETMASK, &everything, &before)
    rc = pthread_create(&t.native, &attributes, run_thread, t)
    pthread_sigmask(SIG_SETMASK, &before, NULL)
    pthread_attr_destroy(&attributes)
    if rc == 0:
        # The handle names the simulator's thread; join looks it up.
        (<int*>&handle.native)[0] = at
        g.count = max(g.count, at + 1)
    return -rc


cdef void gate_join(gate_t* p, thread_t* handle) noexcept nogil:
    cdef sim_gate_t* g = <sim_gate_t*>p
    cdef int target = (<int*>&handle.native)[0]
    cdef sim_thread_t* t = &g.threads[g.running]
    if g.threads[target].state != SIM_DONE:
        t.target = target
        t.state = SIM_JOINING
        give_way(g)
    pthread_join(g.threads[target].native, NULL)
    sem_destroy(&g.threads[target].wake)
    g.threads[target].state = SIM_GONE


cdef void gate_leave(gate_t* p, thread_t* handle) noexcept nogil:
    cdef sim_thread_t* t = &(<sim_gate_t*>p).threads[(<int*>&handle.native)[0]]
    t.left = True
    pthread_detach(t.native)


cdef uint64_t gate_now(gate_t* p) noexcept nogil:
    return (<sim_gate_t*>p).now


# -- the simulator's own waits -----------------------------------------------------------------

cdef void sim_yield(sim_gate_t* g) noexcept nogil:
    give_way(g)


cdef void sim_sleep(sim_gate_t* g, uint64_t ns) noexcept nogil:
    cdef sim_thread_t* t = &g.threads[g.running]
    t.state = SIM_SLEEPING
    t.deadline = g.now + ns
    give_way(g)


cdef void sim_wait(sim_gate_t* g, const void* key) noexcept nogil:
    cdef sim_thread_t* t = &g.threads[g.running]
    t.state = SIM_WAITING
    t.key = key
    t.deadline = NEVER
    give_way(g)
    t.key = NULL


cdef void sim_wake(sim_gate_t* g, const void* key) noexcept nogil:
    cdef int i
    for i in range(g.count):
        if g.threads[i].state == SIM_WAITING and g.threads[i].key == key:
            g.threads[i].state = SIM_READY


# -- atomic operations -------------------------------------------------------------------------

cdef void sim_own_steps(sim_gate_t* g) noexcept nogil:
    global stepping
    stepping = g


cdef void watch(sim_gate_t* g, const void* word, uint64_t ns) noexcept nogil:
    """Stay away until somebody changes the word, or for so long."""
    cdef sim_thread_t* t = &g.threads[g.running]
    t.state = SIM_WAITING
    t.key = word
    t.deadline = g.now + ns
    g.watchers += 1
    give_way(g)
    g.watchers -= 1
    t.key = NULL


cdef void sim_step(const void* word, int change) noexcept nogil:
    cdef sim_gate_t* g = stepping
    cdef uint64_t way
    if g == NULL or g.still[0]:
        return
    if g.step_in:
        g.step_in -= 1
    elif g.step_every:
        g.step_in = below(&g.step_random, 2 * g.step_every)
        g.stepped += 1
        way = below(&g.step_random, 4)
        if way == 0:
            sim_sleep(g, below(&g.step_random, g.step_stall))
        elif way == 1 and word != NULL:
            watch(g, word, below(&g.step_random, g.step_stall))
        else:
            give_way(g)
    # The change follows before anybody else runs.
    if change and g.watchers:
        sim_wake(g, word)


cdef int sim_gate_init(sim_gate_t* g, uint64_t seed) noexcept nogil:
    memset(g, 0, sizeof(sim_gate_t))
    g.threads = <sim_thread_t*>calloc(SIM_THREADS, sizeof(sim_thread_t))
    g.held = <mutex_t**>calloc(SIM_HELD, sizeof(mutex_t*))
    g.holders = <int*>calloc(SIM_HELD, sizeof(int))
    g.trace = <sim_event_t*>calloc(SIM_TRACE, sizeof(sim_event_t))
    if g.threads == NULL or g.held == NULL or g.holders == NULL or g.trace == NULL:
        sim_gate_free(g)
        return -ENOMEM
    g.head = gate_t(NULL, gate_lock, gate_unlock, gate_wait, gate_wake, gate_start, gate_join,
                    gate_leave, gate_now)
    g.random = seed
    g.now = 1000000000
    g.digest = 0xCBF29CE484222325ULL
    g.steps_max = 10000000       # whoever waits for a slow base looks each millisecond
    g.preempt = 40
    g.count = 1
    sem_init(&g.threads[0].wake, 0, 0)
    g.threads[0].gate = g
    return 0


cdef void sim_gate_free(sim_gate_t* g) noexcept nogil:
    cdef int i
    if stepping == g:
        sim_own_steps(NULL)
    for i in range(g.count):
        if g.threads[i].state != SIM_GONE:
            sem_destroy(&g.threads[i].wake)
    free(g.threads)
    free(g.held)
    free(g.holders)
    free(g.trace)
    memset(g, 0, sizeof(sim_gate_t))
