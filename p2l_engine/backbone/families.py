"""The decoder families that are computed over packed tokens, and the config of one of their decoders.

To add a family whose layers are built like Llama's (RMSNorm, RoPE, grouped-query attention, SwiGLU), add a row to ``FAMILIES``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from p2l_engine.backbone.rope import Rope, UnsupportedConfig


@dataclass(frozen=True, slots=True)
class Family:
    """What distinguishes one family from another.

    defaults: of config keys that transformers fills in. query_bias: whether queries, keys and values have biases; None: as the
    config's ``attention_bias`` says, which then holds for the output projection too. mlp_bias, sliding_window: whether the
    config's ``mlp_bias`` and ``use_sliding_window`` count.
    """

    defaults: Mapping[str, Any]
    query_bias: bool | None
    mlp_bias: bool
    sliding_window: bool


_COMMON = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
}
FAMILIES = {
    "llama": Family(
        defaults=_COMMON | {"vocab_size": 32000, "intermediate_size": 11008, "max_position_embeddings": 2048},
        query_bias=None,
        mlp_bias=True,
        sliding_window=False,
    ),
    "qwen2": Family(
        defaults=_COMMON
        | {
            "vocab_size": 151936, "intermediate_size": 22016, "max_position_embeddings": 32768, "num_key_value_heads": 32,
        },
        query_bias=True,
        mlp_bias=False,
        sliding_window=True,
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """What a packed decoder needs of a config.json, under transformers' names. head_dim: the size of an attention head."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    query_bias: bool
    output_bias: bool
    mlp_bias: bool
    rope: Rope

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> DecoderConfig:
        """From the content of a config.json, or a transformers config's ``to_dict``.

        Raises UnsupportedConfig, which says why, where the decoder cannot be computed over packed tokens, or where a value is
        not what transformers expects.
        """
        name = config.get("model_type")
        if not isinstance(name, str) or name not in FAMILIES:
            raise UnsupportedConfig(f"architecture {name!r} is not one of {', '.join(FAMILIES)}")
        family = FAMILIES[name]
        values = {**family.defaults, **config}
        if family.sliding_window and values["use_sliding_window"]:
            raise UnsupportedConfig("it uses sliding-window attention")
        if values.get("is_causal") is False:
            raise UnsupportedConfig("it attends in both directions")
        if values["hidden_act"] not in ("silu", "swish"):
            raise UnsupportedConfig(f"its activation {values['hidden_act']!r} is not silu")
        if values.get("num_key_value_heads") is None:
            values["num_key_value_heads"] = values["num_attention_heads"]
        names = (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "max_position_embeddings",
        )  # fmt: skip
        sizes = {key: _positive(values, key) for key in names}
        if sizes["hidden_size"] % sizes["num_attention_heads"]:
            raise UnsupportedConfig("its hidden_size is no multiple of its num_attention_heads")
        if values.get("head_dim") is None:
            values["head_dim"] = sizes["hidden_size"] // sizes["num_attention_heads"]
        head_dim = _positive(values, "head_dim")
        if head_dim % 2:
            raise UnsupportedConfig(f"its head_dim {head_dim} is odd")
        if not isinstance(values["rms_norm_eps"], float):
            raise UnsupportedConfig(f"its rms_norm_eps is {values['rms_norm_eps']!r}")
        biases = {key: values[key] for key in ("attention_bias", "mlp_bias")}
        if not all(isinstance(value, bool) for value in biases.values()):
            raise UnsupportedConfig(f"its biases are {biases}")
        rope = Rope.read(config, sizes.pop("max_position_embeddings"))
        return cls(
            model_type=name,
            **sizes,
            head_dim=head_dim,
            rms_norm_eps=values["rms_norm_eps"],
            query_bias=biases["attention_bias"] if family.query_bias is None else family.query_bias,
            output_bias=family.query_bias is None and biases["attention_bias"],
            mlp_bias=family.mlp_bias and biases["mlp_bias"],
            rope=rope,
        )


def _positive(values: Mapping[str, Any], key: str) -> int:
    value = values[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UnsupportedConfig(f"its {key} is {value!r}")
    return value
