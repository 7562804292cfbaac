"""llama.cpp in this process, through xllamacpp's server object: the decoder as a GGUF file, embeddings of the last token.

Settings: all threads for prompts, flash attention and key-value cache (half precision) as llama.cpp chooses them, weights laid
out for its products as it loads them, no cache of prompts. For throughput 16 sequences at a time over one key-value cache, in
micro-batches of 512 tokens, which is its default. Precisions: float32; int8 blocks (Q8_0) and int4 blocks (Q4_0, for which it
has its fastest products), each with a scale for 32 weights, and activations rounded to int8 alike; token embeddings of both in
Q8_0. bfloat16 is left out: the wheels are compiled for AVX2, without its instructions, and it was no faster than float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import xllamacpp

from bench.peers.batches import Batch
from bench.peers.decoder import Decoder, Floats
from p2l_engine.prompts.encode import MAX_TOKENS

KINDS = {
    "float32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "int8 blocks": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "int4 blocks": (gguf.GGMLQuantizationType.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
}
SEQUENCES = 16  # at a time, for throughput


def precisions() -> tuple[str, ...]:
    """All."""
    return tuple(KINDS)


class LlamaCpp:
    """See Peer."""

    name = "llama.cpp"

    def __init__(self, decoder: Decoder, precision: str, threads: int, throughput: bool, file: Path) -> None:
        self.precision, self.decoder = precision, decoder
        settings = xllamacpp.CommonParams()
        settings.model.path = str(file)
        settings.embedding, settings.pooling_type = True, xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_LAST
        settings.n_ctx = MAX_TOKENS * (2 if throughput else 1)
        settings.n_parallel, settings.kv_unified = SEQUENCES if throughput else 1, True
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
        settings.cache_prompt, settings.cache_ram_mib, settings.fit_params = False, 0, False
        settings.verbosity = 0
        self.server = xllamacpp.Server(settings)

    def run(self, batches: Sequence[Batch]) -> list[Floats]:
        """See Peer."""
        out = []
        for batch in batches:
            prompts = [ids.tolist() for ids in batch]
            # A single prompt is a list of its tokens; -1: as they are, not scaled to length 1.
            answer = self.server.handle_embeddings({"input": prompts if len(batch) > 1 else prompts[0], "embd_normalize": -1})
            if "data" not in answer:
                raise ValueError(f"llama.cpp: expected embeddings, got {answer}")
            rows = sorted(answer["data"], key=lambda row: row["index"])
            out.append(self.decoder.outputs(np.array([row["embedding"] for row in rows], np.float32)))
        return out


def start(decoder: Decoder, precision: str, threads: int, throughput: bool, folder: Path) -> LlamaCpp:
    """The peer; its file is written on first use."""
    file = folder / f"{precision.replace(' ', '-')}.gguf"
    if not file.exists():
        write(decoder, precision, file)
    return LlamaCpp(decoder, precision, threads, throughput, file)


def write(decoder: Decoder, precision: str, file: Path) -> None:
    """The decoder as a GGUF file without a vocabulary. Raises ValueError for a decoder that GGUF's keys do not describe."""
    c = decoder.config
    if c.rope.kind != "default" or c.output_bias or c.mlp_bias:
        raise ValueError(
            f"--peers: llama.cpp: expected the default RoPE and no biases but the queries', keys' and values', got {c}"
        )
    kind, named = KINDS[precision]
    writer = gguf.GGUFWriter(file, c.model_type)
    writer.add_file_type(named)
    writer.add_context_length(MAX_TOKENS)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(c.rope.theta)
    writer.add_vocab_size(c.vocab_size)
    writer.add_tokenizer_model("none")

    def matrix(name: str, weight: Floats, kind: gguf.GGMLQuantizationType) -> None:
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(weight, kind), raw_dtype=kind)

    embedded = kind if kind == gguf.GGMLQuantizationType.F32 else gguf.GGMLQuantizationType.Q8_0
    matrix("token_embd", decoder.embedding, embedded)
    writer.add_tensor("output_norm.weight", decoder.norm)
    heads = (c.num_attention_heads, c.num_key_value_heads)
    ends = np.cumsum([heads[0] * c.head_dim, heads[1] * c.head_dim])
    for i, layer in enumerate(decoder.layers):
        writer.add_tensor(f"blk.{i}.attn_norm.weight", layer.attention_norm.numpy())
        writer.add_tensor(f"blk.{i}.ffn_norm.weight", layer.mlp_norm.numpy())
        parts = dict(zip("qkv", np.split(layer.qkv.weight.t().numpy(), ends), strict=True))
        if layer.qkv.bias is not None:
            parts |= dict(zip(("q bias", "k bias", "v bias"), np.split(layer.qkv.bias.numpy(), ends), strict=True))
        if c.model_type == "llama":
            parts = {
                name: interleaved(part, heads["qkv".index(name[0])]) if name[0] != "v" else part for name, part in parts.items()
            }
        for name, part in parts.items():
            if name.endswith("bias"):
                writer.add_tensor(f"blk.{i}.attn_{name[0]}.bias", np.ascontiguousarray(part))
            else:
                matrix(f"blk.{i}.attn_{name}", np.ascontiguousarray(part), kind)
        gate, up = np.split(layer.gate_up.weight.t().numpy(), 2)
        for name, part in (("attn_output", layer.out.weight.t().numpy()), ("ffn_gate", gate), ("ffn_up", up)):
            matrix(f"blk.{i}.{name}", np.ascontiguousarray(part), kind)
        matrix(f"blk.{i}.ffn_down", layer.down.weight.t().numpy(), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleaved(rows: Floats, heads: int) -> Floats:
    """Rows of queries or keys, in the order in which llama.cpp rotates Llama's: neighbours instead of halves."""
    halves = rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)
