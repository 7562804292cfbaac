/* See pool.h. A step is published in one word, from which all threads take the numbers of tasks. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* the CPUs that a thread may use */
#endif
#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <time.h>

enum {
    AWAKE_NS = 100000,   /* a thread looks for work before it sleeps: Python needs 5 to 50 us from step to step */
    PAUSES = 64,         /* between two looks at the clock, and before the caller offers its CPU to late threads */
    MOST_TASKS = 1 << 22 /* of one word */
};

typedef struct {
    pthread_mutex_t lock;
    pthread_cond_t woken;
    pthread_t thread;
    int asleep;
#ifdef __linux__
    cpu_set_t allowed; /* while kept_off: the CPUs that it may use again when it is awake */
    int kept_off;      /* the CPU of the caller that wakes it */
#endif
} helper;

static struct {
    helper helpers[P2L_MOST_THREADS - 1];
    int started; /* helpers, changed by the caller that has the pool */
    int taken;   /* by a caller */
    void (*run)(void *, int64_t, int);
    void *work;
    /* Apart, since all threads write them. */
    uint64_t step __attribute__((aligned(64))); /* the next task, the number of tasks (23 bits each), the number of threads */
    int64_t done __attribute__((aligned(64)));
} pool;

static inline uint64_t next_of(uint64_t step) { return step & 0x7fffff; }
static inline uint64_t tasks_of(uint64_t step) { return step >> 23 & 0x7fffff; }
static inline int is_open(uint64_t step, int thread) { return next_of(step) < tasks_of(step) && thread < (int)(step >> 46); }

static inline void pause_briefly(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int64_t nanoseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* Takes tasks until none are left; returns how many. The step of the moment may be another one than was seen before: what
 * counts is the word that is exchanged, and a step cannot end while a task that was taken from it runs. */
static int64_t take_tasks(int thread) {
    uint64_t step = __atomic_load_n(&pool.step, __ATOMIC_ACQUIRE);
    int64_t taken = 0;
    while (is_open(step, thread)) {
        if (!__atomic_compare_exchange_n(&pool.step, &step, step + 1, 1, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) continue;
        pool.run(pool.work, (int64_t)next_of(step), thread);
        taken++;
        step = __atomic_load_n(&pool.step, __ATOMIC_ACQUIRE);
    }
    if (taken) __atomic_fetch_add(&pool.done, taken, __ATOMIC_RELEASE);
    return taken;
}

static void sleep_until_woken(helper *h, int thread) {
    pthread_mutex_lock(&h->lock);
    __atomic_store_n(&h->asleep, 1, __ATOMIC_SEQ_CST);
    /* A caller writes the step first and reads `asleep` then: one of the two sees the other. */
    if (!is_open(__atomic_load_n(&pool.step, __ATOMIC_SEQ_CST), thread)) pthread_cond_wait(&h->woken, &h->lock);
    __atomic_store_n(&h->asleep, 0, __ATOMIC_SEQ_CST);
#ifdef __linux__
    if (h->kept_off) pthread_setaffinity_np(pthread_self(), sizeof h->allowed, &h->allowed);
    h->kept_off = 0;
#endif
    pthread_mutex_unlock(&h->lock);
}

static void *help(void *of) {
    helper *h = of;
    const int thread = (int)(h - pool.helpers) + 1;
    for (int64_t idle_since = nanoseconds();;) {
        if (take_tasks(thread))
            idle_since = nanoseconds();
        else if (nanoseconds() - idle_since > AWAKE_NS) {
            sleep_until_woken(h, thread);
            idle_since = nanoseconds();
        }
        for (int i = 0; i < PAUSES && !is_open(__atomic_load_n(&pool.step, __ATOMIC_ACQUIRE), thread); i++) pause_briefly();
    }
    return 0;
}

/* As many as can be started: a step needs none of them. Signals are left to the threads that Python knows. */
static void start(int helpers) {
    sigset_t all, before;
    pthread_attr_t detached;
    if (pool.started >= helpers || pthread_attr_init(&detached)) return;
    pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (; pool.started < helpers; pool.started++) {
        helper *h = &pool.helpers[pool.started];
        pthread_mutex_init(&h->lock, 0);
        pthread_cond_init(&h->woken, 0);
        if (pthread_create(&h->thread, &detached, help, h)) break;
    }
    pthread_sigmask(SIG_SETMASK, &before, 0);
    pthread_attr_destroy(&detached);
}

static void forget_threads(void) { memset(&pool, 0, sizeof pool); }

__attribute__((constructor)) static void watch_forks(void) { pthread_atfork(0, 0, forget_threads); }

#ifdef __linux__
/* The CPUs that the caller may use, and the others than its own; 0 where there are none. */
static int other_cpus(cpu_set_t *allowed, cpu_set_t *others) {
    const int cpu = sched_getcpu();
    if (cpu < 0 || cpu >= CPU_SETSIZE || sched_getaffinity(0, sizeof *allowed, allowed)) return 0;
    *others = *allowed;
    CPU_CLR(cpu, others);
    return CPU_COUNT(others) > 0;
}
#endif

/* A scheduler may wake a thread on the CPU of the one that wakes it, where it waits for the end of the step: so it is kept off
 * that CPU until it is awake. (Linux 6.18 in a virtual machine of two CPUs: a pass of 8 tokens took 7.8 ms on two threads, and
 * 5.6 on one; 5.2 on two that are kept apart.) */
static void wake(helper *helpers, int count) {
#ifdef __linux__
    cpu_set_t allowed, others;
    int known = -1; /* read once, when a helper is asleep */
#endif
    for (helper *h = helpers; h < helpers + count; h++) {
        if (!__atomic_load_n(&h->asleep, __ATOMIC_SEQ_CST)) continue;
        pthread_mutex_lock(&h->lock);
#ifdef __linux__
        if (h->asleep && !h->kept_off) {
            if (known < 0) known = other_cpus(&allowed, &others);
            if (known && !pthread_setaffinity_np(h->thread, sizeof others, &others)) h->allowed = allowed, h->kept_off = 1;
        }
#endif
        pthread_cond_signal(&h->woken);
        pthread_mutex_unlock(&h->lock);
    }
}

static void run_together(int threads, int64_t tasks) {
    __atomic_store_n(&pool.done, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&pool.step, (uint64_t)threads << 46 | (uint64_t)tasks << 23, __ATOMIC_SEQ_CST);
    wake(pool.helpers, threads - 1);
    take_tasks(0);
    for (int i = 0; __atomic_load_n(&pool.done, __ATOMIC_ACQUIRE) < tasks; i++) {
        if (i < 16 * PAUSES)
            pause_briefly();
        else
            sched_yield(); /* the thread that is late may need this CPU */
    }
}

typedef struct {
    void (*run)(void *, int64_t, int);
    void *work;
    int64_t first;
} later;

static void run_later(void *work, int64_t task, int thread) {
    const later *l = work;
    l->run(l->work, l->first + task, thread);
}

void p2l_run(int threads, int64_t tasks, void (*run)(void *work, int64_t task, int thread), void *work) {
    if (threads > P2L_MOST_THREADS) threads = P2L_MOST_THREADS;
    if (threads < 2 || tasks < 2 || __atomic_exchange_n(&pool.taken, 1, __ATOMIC_ACQUIRE)) {
        for (int64_t task = 0; task < tasks; task++) run(work, task, 0);
        return;
    }
    start(threads - 1);
    if (threads > pool.started + 1) threads = pool.started + 1;
    for (later l = {run, work, 0}; l.first < tasks; l.first += MOST_TASKS) {
        pool.run = run_later, pool.work = &l;
        run_together(threads, tasks - l.first < MOST_TASKS ? tasks - l.first : MOST_TASKS);
    }
    __atomic_store_n(&pool.taken, 0, __ATOMIC_RELEASE);
}

typedef struct {
    p2l_range range;
    const void *work;
    int64_t tasks, rows, total;
    int failed;
} ranges;

static void run_range(void *work, int64_t task, int thread) {
    ranges *r = work;
    (void)thread;
    const int64_t found = r->range(r->work, r->rows * task / r->tasks, r->rows * (task + 1) / r->tasks, task);
    if (found < 0)
        __atomic_store_n(&r->failed, 1, __ATOMIC_RELAXED);
    else if (found)
        __atomic_fetch_add(&r->total, found, __ATOMIC_RELAXED);
}

int64_t p2l_run_ranges(int threads, int64_t tasks, int64_t rows, p2l_range range, const void *work) {
    ranges r = {range, work, tasks, rows, 0, 0};
    p2l_run(threads, tasks, run_range, &r);
    return r.failed ? -1 : r.total;
}
