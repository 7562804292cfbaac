/* Threads, for steps of some microseconds too. */
#ifndef P2L_POOL_H
#define P2L_POOL_H

#include <stdint.h>

enum { P2L_MOST_THREADS = 256 };

/* Runs run(work, task, thread) once for each task in [0, tasks), on the caller, which is thread 0, and at most `threads` - 1
 * others; a thread's tasks come in rising order. Returns when all tasks have ended. What they wrote is visible to the caller.
 *
 * A step ends with its tasks, not with its threads: one that the system has not woken, or runs elsewhere, is not waited for.
 * (At the end of OpenMP's parallel regions all threads meet, which takes milliseconds where other processes compute.) Threads
 * look for the next step for a while before they sleep. One caller at a time has them; the tasks of others, and of tasks that
 * call this, run on their own thread. After a fork the child starts threads of its own. */
void p2l_run(int threads, int64_t tasks, void (*run)(void *work, int64_t task, int thread), void *work);

/* Rows [first, last) of some work. Returns what is to be added up, or a negative number when memory allocation fails. */
typedef int64_t (*p2l_range)(const void *work, int64_t first, int64_t last, int64_t task);

/* Runs a range on all rows, in `tasks` parts of nearly equal size. Returns the sum of what they return, or -1 when one of them
 * returns a negative number. */
int64_t p2l_run_ranges(int threads, int64_t tasks, int64_t rows, p2l_range range, const void *work);

/* Of rows that may be computed by any thread: more than there are threads, so that one that starts late leaves more to the
 * others. */
static inline int64_t p2l_parts(int threads) { return threads > 1 ? 4 * threads : 1; }

#endif
