/* Which CPUs csrc/pool.c lets its threads use, which is compiled with pthread_setaffinity_np as `recorded`: a thread that is
 * woken is kept off one of the caller's CPUs, until it is awake. Prints how often, or exits with 1 where something else was
 * set. */
#define _GNU_SOURCE
#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <unistd.h>

static pthread_t caller;
static cpu_set_t all;
static int kept_off, restored, wrong;

int recorded(pthread_t thread, size_t size, const cpu_set_t *cpus) {
    cpu_set_t both;
    CPU_AND(&both, cpus, &all);
    if (size != sizeof all || !CPU_EQUAL(&both, cpus) || pthread_equal(thread, caller))
        wrong = 1;
    else if (pthread_equal(pthread_self(), caller)) {
        wrong |= CPU_COUNT(cpus) != CPU_COUNT(&all) - 1;
        __atomic_fetch_add(&kept_off, 1, __ATOMIC_RELAXED);
    } else {
        wrong |= !pthread_equal(thread, pthread_self()) || !CPU_EQUAL(cpus, &all);
        __atomic_fetch_add(&restored, 1, __ATOMIC_RELAXED);
    }
    return pthread_setaffinity_np(thread, size, cpus);
}

static void nothing(void *work, int64_t task, int thread) { (void)work, (void)task, (void)thread; }

int main(void) {
    caller = pthread_self();
    if (sched_getaffinity(0, sizeof all, &all)) return 1;
    for (int pinned = 0; pinned < 2; pinned++) {
        for (int i = 0; i < 200; i++) {
            usleep(1000); /* until the others are asleep */
            p2l_run(3, 30, nothing, 0);
        }
        for (int i = 0; i < 10000 && __atomic_load_n(&restored, __ATOMIC_RELAXED) < kept_off; i++) usleep(1000);
        printf("%d kept off, %d restored\n", kept_off > 0, restored == kept_off);
        /* A caller on one CPU has no others to offer: the threads stay as they are. */
        kept_off = restored = 0;
        cpu_set_t one;
        CPU_ZERO(&one);
        CPU_SET(sched_getcpu(), &one);
        if (sched_setaffinity(0, sizeof one, &one)) return 1;
    }
    return wrong;
}
