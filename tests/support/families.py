"""Tiny decoders of transformers with random weights, of every kind that reads prompts in its own way; each prompt alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import AutoModel, PretrainedConfig

from p2l_engine.backbone.packing import Tokens

SIZES = {
    "vocab_size": 300, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
UNGROUPED = {name: size for name, size in SIZES.items() if name != "num_key_value_heads"}
WINDOW = 8  # tokens
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MAMBA = {"mamba_d_state": 8, "mamba_n_heads": 6, "mamba_d_head": 16, "mamba_chunk_size": 8}
GPT2 = {"n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": 300, "n_positions": 512}
MIXED = ["sliding_attention", "full_attention"]


def rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 10000.0, **values}


LONG = {"short_factor": [1.0] * 6, "long_factor": [2.0 + i for i in range(6)], "original_max_position_embeddings": 16}

# By name: the class of the config, and its values.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    # Positions that depend on the longest prompt.
    "llama dynamic": ("Llama", SIZES | {"max_position_embeddings": 16, "rope_parameters": rope("dynamic", factor=2.0)}),
    "llama longrope": ("Llama", SIZES | {"rope_parameters": rope("longrope", factor=4.0, **LONG)}),
    "phi3 longrope": (
        "Phi3",
        SIZES
        | {"original_max_position_embeddings": 16, "rope_parameters": rope("longrope", partial_rotary_factor=1.0, **LONG)},
    ),
    "qwen3 yarn": (
        "Qwen3",
        SIZES | {"head_dim": 12, "rope_parameters": rope("yarn", factor=4.0, original_max_position_embeddings=256)},
    ),
    # Attention in windows.
    "cohere2": ("Cohere2", SIZES | {"sliding_window": WINDOW, "layer_types": MIXED}),
    "exaone4": ("Exaone4", SIZES | {"sliding_window": WINDOW, "layer_types": MIXED}),
    "gemma3_text": (
        "Gemma3Text",
        SIZES | {"sliding_window": WINDOW, "layer_types": MIXED, "head_dim": 12, "query_pre_attn_scalar": 12},
    ),
    "llama4_text": (
        "Llama4Text",
        SIZES | {
            "head_dim": 12, "attention_chunk_size": WINDOW, "num_local_experts": 2, "intermediate_size_mlp": 80,
            "layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0],
        },
    ),
    "mistral": ("Mistral", SIZES | {"sliding_window": WINDOW}),
    "mixtral": ("Mixtral", SIZES | EXPERTS | {"sliding_window": WINDOW}),
    "olmo3": ("Olmo3", SIZES | {"sliding_window": WINDOW, "layer_types": MIXED}),
    "phi3": ("Phi3", SIZES | {"sliding_window": WINDOW}),
    "qwen2": ("Qwen2", SIZES | {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 1}),
    "starcoder2": ("Starcoder2", SIZES | {"sliding_window": WINDOW}),
    # Other terms in attention: soft caps, sinks.
    "gemma2": ("Gemma2", SIZES | {"sliding_window": WINDOW, "head_dim": 12, "query_pre_attn_scalar": 12}),
    "vaultgemma": ("VaultGemma", SIZES | {"sliding_window": WINDOW, "head_dim": 12}),
    "gpt_oss": ("GptOss", SIZES | EXPERTS | {"sliding_window": WINDOW, "head_dim": 12, "layer_types": MIXED}),
    # Both sides.
    "bert": ("Bert", UNGROUPED),
    "gemma3_text both sides": (
        "Gemma3Text",
        SIZES | {"head_dim": 12, "query_pre_attn_scalar": 12, "use_bidirectional_attention": True},
    ),
    "llama both sides": ("Llama", SIZES | {"is_causal": False}),
    "modernbert": ("ModernBert", UNGROUPED | {"local_attention": WINDOW, "cls_token_id": 1, "sep_token_id": 2}),
    "roberta": ("Roberta", UNGROUPED),
    # Convolutions, recurrences and Fourier transforms.
    "bamba": ("Bamba", SIZES | MAMBA | {"attn_layer_indices": [1], "mamba_n_groups": 1}),
    "falcon_h1": ("FalconH1", SIZES | MAMBA | {"mamba_n_heads": 4, "mamba_d_ssm": 64, "head_dim": 12}),
    "fnet": ("FNet", UNGROUPED),
    "granitemoehybrid": (
        "GraniteMoeHybrid",
        SIZES | MAMBA | EXPERTS | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 32},
    ),
    "jamba": (
        "Jamba",
        SIZES | {
            "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "use_mamba_kernels": False, "mamba_d_state": 8,
        },
    ),
    "lfm2": ("Lfm2", SIZES | {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8}),
    "mamba": ("Mamba", {"hidden_size": 48, "num_hidden_layers": 2, "vocab_size": 300, "state_size": 8}),
    "mamba2": (
        "Mamba2",
        {
            "hidden_size": 48, "num_hidden_layers": 2, "vocab_size": 300, "state_size": 8, "num_heads": 6, "head_dim": 16,
            "n_groups": 2, "chunk_size": 8,
        },
    ),
    "qwen3_next": (
        "Qwen3Next",
        SIZES | {
            "head_dim": 12, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32, "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        },
    ),
    "recurrent_gemma": (
        "RecurrentGemma",
        SIZES | {"num_hidden_layers": 3, "lru_width": 48, "attention_window_size": WINDOW},
    ),
    "rwkv": ("Rwkv", {"hidden_size": 48, "num_hidden_layers": 2, "vocab_size": 300, "attention_hidden_size": 48}),
    # What decoders do only with long prompts, or keep from one prompt to the next.
    "big_bird": ("BigBird", UNGROUPED | {"block_size": 4, "num_random_blocks": 1}),
    "doge": ("Doge", SIZES | {"keep_window_size": WINDOW}),
    "falcon alibi": (
        "Falcon",
        {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300, "alibi": True},
    ),
    # Causal attention and no more.
    "apertus": ("Apertus", SIZES),
    "arcee": ("Arcee", SIZES),
    "cohere": ("Cohere", SIZES),
    "deepseek_v3": (
        "DeepseekV3",
        SIZES | {
            "num_key_value_heads": 4, "moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2,
            "n_group": 1, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
            "v_head_dim": 12, "first_k_dense_replace": 1,
        },
    ),
    "bitnet": ("BitNet", SIZES),
    "bloom": ("Bloom", {"vocab_size": 300, "hidden_size": 48, "n_layer": 2, "n_head": 4}),
    "codegen": ("CodeGen", GPT2 | {"n_ctx": 512, "rotary_dim": 8}),
    "ernie4_5": ("Ernie4_5", SIZES),
    "gemma": ("Gemma", SIZES | {"head_dim": 12}),
    "glm4": ("Glm4", SIZES | {"head_dim": 12}),
    "gpt2": ("GPT2", GPT2),
    "gpt_bigcode": ("GPTBigCode", GPT2),
    "gpt_neo": (
        "GPTNeo",
        {
            "vocab_size": 300, "hidden_size": 48, "num_layers": 2, "num_heads": 4,
            "attention_types": [[["global", "local"], 1]], "window_size": WINDOW, "max_position_embeddings": 512,
        },
    ),
    "gptj": ("GPTJ", GPT2 | {"rotary_dim": 8}),
    "gpt_neox": ("GPTNeoX", UNGROUPED),
    "granite": ("Granite", SIZES),
    "helium": ("Helium", SIZES | {"head_dim": 12}),
    "hunyuan_v1_dense": ("HunYuanDenseV1", SIZES | {"head_dim": 12}),
    "llama": ("Llama", SIZES),
    "ministral3": ("Ministral3", SIZES | {"head_dim": 12}),
    "modernbert-decoder": (
        "ModernBertDecoder",
        UNGROUPED | {"local_attention": WINDOW, "cls_token_id": 1, "sep_token_id": 2},
    ),
    "mpt": ("Mpt", {"vocab_size": 300, "d_model": 48, "n_layers": 2, "n_heads": 4, "max_seq_len": 512}),
    "nanochat": ("NanoChat", SIZES),
    "nemotron": ("Nemotron", SIZES),
    "olmo": ("Olmo", SIZES),
    "olmo2": ("Olmo2", SIZES),
    "olmoe": ("Olmoe", SIZES | {"num_experts": 4, "num_experts_per_tok": 2}),
    "opt": (
        "OPT",
        {
            "vocab_size": 300, "hidden_size": 48, "num_hidden_layers": 2, "ffn_dim": 80, "num_attention_heads": 4,
            "word_embed_proj_dim": 48, "max_position_embeddings": 512, "pad_token_id": 0,
        },
    ),
    "persimmon": ("Persimmon", UNGROUPED),
    "phi": ("Phi", SIZES),
    "phimoe": ("Phimoe", SIZES | EXPERTS),
    "qwen2_moe": (
        "Qwen2Moe",
        SIZES | {
            "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
        },
    ),
    "qwen3": ("Qwen3", SIZES | {"head_dim": 12}),
    "qwen3_moe": (
        "Qwen3Moe",
        SIZES | {"head_dim": 12, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
    "seed_oss": ("SeedOss", SIZES | {"head_dim": 12}),
    "smollm3": ("SmolLM3", SIZES),
    "stablelm": ("StableLm", SIZES | {"hidden_size": 64}),
}  # fmt: skip


def config(name: str, **changes: Any) -> PretrainedConfig:
    kind, values = FAMILIES[name]
    made: Callable[..., PretrainedConfig] = getattr(transformers, f"{kind}Config")
    return made(**{**values, **changes})


def weights(of: PretrainedConfig) -> dict[str, Tensor]:
    """Random weights, under which soft caps, sinks and neighbours show."""
    model = AutoModel.from_config(of, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.25)
            elif "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return dict(model.state_dict())


def alone(of: PretrainedConfig, weights: dict[str, Tensor], prompts: Sequence[Tokens]) -> Tensor:
    """The hidden state of each prompt's last token [N, D]: each prompt alone, in a new model, in eager attention."""
    found = []
    for ids in prompts:
        model = AutoModel.from_config(of, dtype=torch.float32, attn_implementation="eager").eval()
        model.load_state_dict(weights)
        with torch.inference_mode():
            found.append(model(input_ids=torch.from_numpy(ids).long()[None], use_cache=False).last_hidden_state[0, -1])
    return torch.stack(found)


def drawn(rng: np.random.Generator, lengths: Sequence[int]) -> list[Tokens]:
    return [rng.integers(5, 300, length).astype(np.int32) for length in lengths]
