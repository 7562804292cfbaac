/* Causal attention within each prompt of a packed batch, with grouped heads: out = softmax(q k' / sqrt(size)) v.
 *
 * The queries of all heads that share a key head are the rows of one matrix, taken ROWS at a time; a task is a few such blocks
 * of one prompt. Scores are computed transposed, a key a line and a row a lane: the softmax needs no steps across lanes, a
 * prompt of a few tokens fills whole vectors, and keys that no row of a block may see are not computed. Keys come KEYS at a
 * time, and what was summed before shrinks when a higher score comes (Milakov and Gimelshein, 2018; Dao et al., 2022), so that
 * all of it stays in the first-level cache.
 *
 * A prompt's result depends on neither the other prompts nor the number of threads. Storage is float32 or bfloat16, arithmetic
 * float32; where the CPU has dot products of bfloat16, these multiply bfloat16, and float32 if it may be rounded. Reference
 * implementation: p2l_engine/kernels/attention.py.
 */
#include "bfloat16.h"
#include "p2l_native.h"
#include "pool.h"

#ifdef P2L_LEVELS
#include <immintrin.h>
#endif
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum {
    MOST_ROWS = 32, /* of a block */
    TASK_ROWS = 96, /* at most: enough that copying the keys costs little, few enough that one prompt fills several threads */
    KEYS = 72,      /* computed at once: a multiple of every TILE */
    SPARE = 8,      /* lines that a tile may reach beyond them */
};

typedef struct {
    const void *q, *kv;
    int64_t q_stride;
    const int32_t *starts, *key_starts;
    int64_t prompts, heads, kv_heads, size;
    int last, bf16;
    void *out;
} attention;

/* Rows first to first + rows, of a prompt's queries times the heads of one key head. */
typedef struct {
    int64_t prompt, head, first, rows;
} task;

/* One thread's memory. padded: the size rounded up to whole vectors, of any instruction set. Items of two elements need half of
 * the columns of q, items and k, and half of the lines of v and weights. */
typedef struct {
    int64_t padded;
    float *q;       /* [blocks, size, ROWS] */
    float *items;   /* [ROWS, size]: rows of q, where they have to be made items */
    float *k;       /* [KEYS + SPARE, size] */
    float *v;       /* [KEYS, padded] */
    float *weights; /* [KEYS + SPARE, ROWS] */
    float *sums;    /* [TASK_ROWS, padded]: of values times weights */
    float highest[TASK_ROWS], total[TASK_ROWS], shrink[MOST_ROWS];
    int32_t position[TASK_ROWS]; /* the last key that a row sees */
} scratch;

/* Four floats, and a choice of four from two of them. */
typedef float four __attribute__((vector_size(16)));
#ifdef __clang__
#define SHUFFLED(A, B, ...) __builtin_shufflevector(A, B, __VA_ARGS__)
#else
typedef int32_t choice __attribute__((vector_size(16)));
#define SHUFFLED(A, B, ...) __builtin_shuffle(A, B, (choice){__VA_ARGS__})
#endif

static int64_t queries_of(const attention *a, int64_t prompt) {
    return a->last ? 1 : a->starts[prompt + 1] - a->starts[prompt];
}

#define JOINED(A, B) A##B
#define JOIN(A, B) JOINED(A, B)
#define OF(NAME) JOIN(NAME, SUFFIX)

#define SUFFIX _base
#define TARGET
#define LANES 4
#define ROWS 16
#define TILE 4
#define ITEM 1
#include "attention_task.h"

#ifdef P2L_LEVELS
#define SUFFIX _v3
#define TARGET __attribute__((target("arch=x86-64-v3")))
#define LANES 8
#define ROWS 16
#define TILE 6
#define ITEM 1
#include "attention_task.h"

#define SUFFIX _v4
#define TARGET __attribute__((target("arch=x86-64-v4")))
#define LANES 16
#define ROWS 32
#define TILE 8
#define ITEM 1
#include "attention_task.h"

#define SUFFIX _pairs
#define TARGET __attribute__((target("arch=x86-64-v4,avx512bf16")))
#define LANES 16
#define ROWS 32
#define TILE 8
#define ITEM 2
#include "attention_task.h"
#endif

typedef void (*task_function)(const attention *a, scratch *s, task t);

static task_function best_function(int pairs) {
#ifdef P2L_LEVELS
    const int level = p2l_isa_level();
    if (level == 5 && pairs) return attend_pairs;
    if (level >= 4) return attend_v4;
    if (level == 3) return attend_v3;
#endif
    (void)pairs;
    return attend_base;
}

/* In one allocation; NULL when there is no memory. */
static scratch *new_scratch(int64_t size) {
    const int64_t padded = (size + 15) / 16 * 16;
    const int64_t sizes[] = {TASK_ROWS * size, MOST_ROWS * size,           (KEYS + SPARE) * size,
                             KEYS * padded,    (KEYS + SPARE) * MOST_ROWS, TASK_ROWS * padded};
    int64_t bytes = (sizeof(scratch) + 63) / 64 * 64;
    for (int i = 0; i < 6; i++) bytes += (sizes[i] + 15) / 16 * 64;
    scratch *s = aligned_alloc(64, bytes);
    if (!s) return NULL;
    float **const parts[] = {&s->q, &s->items, &s->k, &s->v, &s->weights, &s->sums};
    char *next = (char *)s + (sizeof(scratch) + 63) / 64 * 64;
    for (int i = 0; i < 6; i++) {
        *parts[i] = (float *)next;
        next += (sizes[i] + 15) / 16 * 64;
    }
    s->padded = padded;
    if (padded > size) memset(s->v, 0, KEYS * padded * sizeof(float)); /* the columns beyond the size */
    return s;
}

static int out_of_range(const attention *a, int64_t queries, int64_t keys) {
    if (a->starts[0] || a->key_starts[0] || a->key_starts[a->prompts] != keys) return 1;
    if ((a->last ? a->prompts : a->starts[a->prompts]) != queries) return 1;
    for (int64_t i = 0; i < a->prompts; i++) {
        const int64_t own = queries_of(a, i);
        if (own < 0 || a->key_starts[i + 1] - a->key_starts[i] < own) return 1;
    }
    return 0;
}

/* Tasks are numbered prompt by prompt, of one prompt the later rows first: they see more keys. */
typedef struct {
    const attention *a;
    task_function attend;
    struct {
        scratch *memory;
        int64_t prompt, before; /* where the thread's last task was: `before` tasks are of earlier prompts */
    } threads[P2L_MOST_THREADS];
    int failed;
} step;

static int64_t parts_of(const attention *a, int64_t prompt) {
    return (queries_of(a, prompt) * (a->heads / a->kv_heads) + TASK_ROWS - 1) / TASK_ROWS;
}

static void attend_task(void *work, int64_t number, int thread) {
    step *s = work;
    const attention *a = s->a;
    int64_t prompt = s->threads[thread].prompt, before = s->threads[thread].before, parts;
    if (!s->threads[thread].memory && !(s->threads[thread].memory = new_scratch(a->size))) {
        __atomic_store_n(&s->failed, 1, __ATOMIC_RELAXED);
        return;
    }
    while (number >= before + (parts = parts_of(a, prompt)) * a->kv_heads) before += parts * a->kv_heads, prompt++;
    s->threads[thread].prompt = prompt, s->threads[thread].before = before;
    const int64_t first = (parts - 1 - (number - before) / a->kv_heads) * TASK_ROWS;
    const int64_t left = queries_of(a, prompt) * (a->heads / a->kv_heads) - first;
    s->attend(a, s->threads[thread].memory,
              (task){prompt, (number - before) % a->kv_heads, first, left < TASK_ROWS ? left : TASK_ROWS});
}

int p2l_attention(const void *q, int64_t q_stride, int64_t queries, const void *kv, int64_t keys, const int32_t *starts,
                  const int32_t *key_starts, int64_t prompts, int64_t heads, int64_t kv_heads, int64_t size, int last, int bf16,
                  int rounded, int threads, void *out) {
    const attention a = {q, kv, q_stride, starts, key_starts, prompts, heads, kv_heads, size, last, bf16, out};
    if (out_of_range(&a, queries, keys)) return 1;
    step s = {&a, best_function(bf16 || rounded), {{0}}, 0};
    int64_t tasks = 0;
    for (int64_t i = 0; i < prompts; i++) tasks += parts_of(&a, i) * kv_heads;
    p2l_run(threads, tasks, attend_task, &s);
    for (int i = 0; i < P2L_MOST_THREADS; i++) free(s.threads[i].memory);
    return s.failed ? -1 : 0;
}
