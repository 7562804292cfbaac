/* A decoder's layer by the steps of this core, in one call: between two steps Python takes as long as a short prompt's norm. */
#include "p2l_native.h"

static void product(const p2l_weight *w, const void *x, int64_t rows, void *out, const p2l_batch *b, int threads) {
    if (w->scale)
        p2l_int8_linear(x, rows, w->depth, w->data, w->scale, w->bias, w->columns, b->scratch, out, w->level, threads);
    else
        p2l_linear(x, rows, w->depth, w->data, w->bias, w->columns, out, b->bf16, w->level, threads);
}

int p2l_layer(const p2l_layer_weights *w, const p2l_batch *b, int first, const void *prefix, int64_t n_prefix) {
    const int64_t n = b->tokens, columns = w->down.columns, heads = b->heads, kv_heads = b->kv_heads, size = 2 * b->half;
    p2l_rms_norm(b->x, first ? 0 : b->delta, w->attention_norm, b->normed, n, columns, b->eps, b->bf16, b->norm_threads);
    product(&w->qkv, b->normed, n, b->projected, b, b->qkv_threads);
    if (p2l_rope_kv(b->projected, n, heads, kv_heads, b->half, b->cosine, b->sine, b->n_positions, b->positions, b->sources,
                    b->keys, prefix, n_prefix, b->kv, b->bf16, b->rope_threads))
        return 1;
    const int status =
        p2l_attention(b->projected, (heads + 2 * kv_heads) * size, n, b->kv, b->keys, b->starts, b->key_starts, b->prompts,
                      heads, kv_heads, size, 0, b->bf16, b->rounded, b->attention_threads, b->attended);
    if (status) return status;
    product(&w->out, b->attended, n, b->delta, b, b->out_threads);
    p2l_rms_norm(b->x, b->delta, w->mlp_norm, b->normed, n, columns, b->eps, b->bf16, b->norm_threads);
    product(&w->gate_up, b->normed, n, b->gate_up, b, b->gate_up_threads);
    p2l_swiglu(b->gate_up, b->gate, n, w->down.depth, b->bf16, b->gate_threads);
    product(&w->down, b->gate, n, b->delta, b, b->down_threads);
    return 0;
}
