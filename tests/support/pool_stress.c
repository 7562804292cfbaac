/* Callers of csrc/pool.c in several threads, one in the other, and in children of a fork: each task runs exactly once, a
 * thread's tasks come in rising order, and what they wrote is visible afterwards. Arguments: callers, steps of each, threads of
 * a step, forks. Exits with 1 where something is wrong. */
#include "pool.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

enum { MOST = 5000 };

typedef struct {
    int threads, nested, wrong;
    int64_t last[P2L_MOST_THREADS]; /* the last task of each thread */
    int runs[MOST];                 /* written by whoever runs the task, without a lock */
} step;

static int n_steps, n_threads;

static void count(void *work, int64_t task, int thread) {
    step *s = work;
    if (thread < 0 || thread >= s->threads || task <= s->last[thread]) s->wrong = 1;
    s->last[thread] = task;
    s->runs[task]++;
    for (volatile int i = 0; i < (task % 7) * 50; i++);
    if (s->nested && task % 100 == 0) {
        step inner = {.threads = s->threads};
        memset(inner.last, 0xff, sizeof inner.last);
        p2l_run(s->threads, 10, count, &inner);
        for (int i = 0; i < 10; i++)
            if (inner.runs[i] != 1 || inner.wrong) s->runs[task] = 1000;
    }
}

static void *call(void *seed) {
    unsigned state = (unsigned)(long)seed;
    step *s = malloc(sizeof *s);
    long wrong = 0;
    for (int n = 0; n < n_steps; n++) {
        const int64_t tasks = rand_r(&state) % (n % 10 ? 40 : MOST);
        memset(s, 0, sizeof *s);
        memset(s->last, 0xff, sizeof s->last);
        s->threads = 1 + rand_r(&state) % n_threads;
        s->nested = n % 10 == 3;
        if (rand_r(&state) % 50 == 0) usleep(300); /* long enough for the helpers to fall asleep */
        p2l_run(s->threads, tasks, count, s);
        for (int64_t i = 0; i < MOST; i++) wrong += s->runs[i] != (i < tasks);
        wrong += s->wrong;
    }
    free(s);
    return (void *)wrong;
}

static long all(int callers) {
    pthread_t threads[64];
    long wrong = 0;
    for (long i = 0; i < callers; i++) pthread_create(&threads[i], 0, call, (void *)(i + 1));
    for (int i = 0; i < callers; i++) {
        void *found;
        pthread_join(threads[i], &found);
        wrong += (long)found;
    }
    return wrong;
}

static void *all_again(void *callers) { return (void *)all((int)(long)callers); }

int main(int count_of, char **arguments) {
    if (count_of != 5) return 2;
    const int callers = atoi(arguments[1]), forks = atoi(arguments[4]);
    n_steps = atoi(arguments[2]), n_threads = atoi(arguments[3]);
    long wrong = all(callers);
    for (int i = 0; i < forks; i++) { /* while callers have the pool */
        pthread_t busy;
        void *found;
        pthread_create(&busy, 0, all_again, (void *)(long)callers);
        const pid_t child = fork();
        if (!child) _exit(call((void *)77L) ? 1 : 0);
        int status = 1;
        waitpid(child, &status, 0);
        pthread_join(busy, &found);
        wrong += (status != 0) + (long)found;
    }
    printf("%ld wrong\n", wrong);
    return wrong ? 1 : 0;
}
