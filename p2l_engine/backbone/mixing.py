"""How the prompts of transformers' decoders are computed together: packed, padded, or only with prompts of the same length.

Packed is right where tokens meet in causal attention alone: convolutions, recurrences, and masks and terms of attention that
the packed one lacks would mix prompts. Padded is right where nothing depends on the tokens to the right of a prompt, or on how
many there are. Prompts of one length, without padding, are right for any decoder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from p2l_engine.backbone.rope import REQUIRED

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# By model_type. The tests compare each of them with every prompt alone, in eager attention.
PACKED = frozenset({
    "apertus", "arcee", "cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "gemma3_text", "glm4", "gpt2", "gpt_neox",
    "granite", "helium", "llama", "mistral", "mixtral", "olmo", "olmo2", "olmo3", "olmoe", "opt", "phi", "phi3", "qwen2",
    "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "starcoder2",
})  # fmt: skip
PADDED = PACKED | {
    "bamba", "bert", "bitnet", "bloom", "codegen", "deepseek_v3", "falcon_h1", "gemma2", "gpt_bigcode", "gpt_neo", "gpt_oss",
    "gptj", "granitemoehybrid", "hunyuan_v1_dense", "jamba", "lfm2", "llama4_text", "mamba", "mamba2", "ministral3",
    "modernbert", "modernbert-decoder", "mpt", "nanochat", "nemotron", "persimmon", "phimoe", "qwen3_next", "recurrent_gemma",
    "stablelm", "vaultgemma",
}  # fmt: skip


def packs(config: PretrainedConfig) -> bool:
    """Whether prompts of up to ``window`` tokens may be packed, with causal attention within each."""
    return config.model_type in PACKED and not _of_both_sides(config) and not rope_of_length(config)


def pads(config: PretrainedConfig) -> bool:
    """Whether prompts of different lengths may be padded, on the right, under an attention mask."""
    return config.model_type in PADDED and not _of_both_sides(config) and not rope_of_length(config)


def window(config: PretrainedConfig) -> float:
    """Tokens that each token of a decoder that ``packs`` sees: beyond them its layers have masks of their own; or infinity."""
    found = getattr(config, "sliding_window", None)
    return float("inf") if found is None else int(found)


def context(config: PretrainedConfig) -> int | None:
    """The tokens that a decoder was made for; None where its config does not say. Those with tables of positions, see
    ``unpacked.positions``, compute no more."""
    values = config.to_dict()
    found = values.get(config.attribute_map.get("max_position_embeddings", "max_position_embeddings")) or values.get(
        "max_seq_len"
    )
    return None if found is None else int(found)


def attention(config: PretrainedConfig) -> str | None:
    """The implementation of attention to ask transformers for; None: its own choice, where the tests compare it with eager."""
    return None if pads(config) else "eager"


def rope_of_length(config: PretrainedConfig) -> bool:
    """Whether a rotary embedding changes with the sequence's length (dynamic, longrope), and so with neighbours."""
    return any(kind not in REQUIRED for kind in _ropes(config.to_dict()))


def _ropes(value: Any, within: bool = False) -> Iterator[object]:
    """The types of all rotary embeddings of a config, which may have one for each type of layer, and configs within it."""
    if not isinstance(value, Mapping):
        return
    if within and ("rope_type" in value or "type" in value):
        yield value.get("rope_type", value.get("type"))
    for name, inner in value.items():
        yield from _ropes(inner, within or name in ("rope_parameters", "rope_scaling"))


def _of_both_sides(config: PretrainedConfig) -> bool:
    """Whether the config makes a causal decoder see tokens on both sides."""
    return getattr(config, "is_causal", None) is False or bool(getattr(config, "use_bidirectional_attention", False))
