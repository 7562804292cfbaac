"""The weights of a packed decoder: checked against the config, then joined into the matrices of its products."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig

from p2l_engine.errors import CheckpointError


@dataclass(frozen=True, slots=True, eq=False)
class Linear:
    """weight [in, out], a view of the stored [out, in]; bias [out] or None."""

    weight: Tensor
    bias: Tensor | None

    def columns(self, first: int, last: int) -> Linear:
        """The outputs first to last."""
        return Linear(self.weight[:, first:last], None if self.bias is None else self.bias[first:last])


@dataclass(frozen=True, slots=True)
class Layer:
    """Queries, keys and values in one product, gates and ups in another."""

    attention_norm: Tensor
    qkv: Linear
    out: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear


def layers(config: PretrainedConfig, weights: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype) -> list[Layer]:
    """The decoder's layers; weights are named as in transformers' bare model."""

    def put(i: int, name: str) -> Tensor:
        return weights[f"layers.{i}.{name}.weight"].to(device, dtype)

    def linear(i: int, *names: str) -> Linear:
        whole = torch.cat([weights[f"layers.{i}.{name}.weight"] for name in names]).to(device, dtype)
        biases = [bias for name in names if (bias := weights.get(f"layers.{i}.{name}.bias")) is not None]
        return Linear(whole.t(), torch.cat(biases).to(device, dtype) if biases else None)

    return [
        Layer(
            put(i, "input_layernorm"),
            linear(i, "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            linear(i, "self_attn.o_proj"),
            put(i, "post_attention_layernorm"),
            linear(i, "mlp.gate_proj", "mlp.up_proj"),
            linear(i, "mlp.down_proj"),
        )
        for i in range(config.num_hidden_layers)
    ]


def head_size(config: PretrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def expected_shapes(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Every weight of the packed decoder and its shape."""
    d, size, inner = config.hidden_size, head_size(config), config.intermediate_size
    q, kv = config.num_attention_heads * size, config.num_key_value_heads * size
    qwen = config.model_type == "qwen2"
    qkv_bias = qwen or bool(getattr(config, "attention_bias", False))
    o_bias = not qwen and qkv_bias
    mlp_bias = bool(getattr(config, "mlp_bias", False))
    linear = {
        "self_attn.q_proj": (q, d, qkv_bias),
        "self_attn.k_proj": (kv, d, qkv_bias),
        "self_attn.v_proj": (kv, d, qkv_bias),
        "self_attn.o_proj": (d, q, o_bias),
        "mlp.gate_proj": (inner, d, mlp_bias),
        "mlp.up_proj": (inner, d, mlp_bias),
        "mlp.down_proj": (d, inner, mlp_bias),
    }
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (config.vocab_size, d), "norm.weight": (d,)}
    for i in range(config.num_hidden_layers):
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"layers.{i}.{name}.weight"] = (d,)
        for name, (rows, columns, bias) in linear.items():
            shapes[f"layers.{i}.{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"layers.{i}.{name}.bias"] = (rows,)
    return shapes


def check_weights(config: PretrainedConfig, weights: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError for a weight that is missing, unknown or of a wrong shape."""
    compare(expected_shapes(config), weights)


def compare(expected: Mapping[str, tuple[int, ...]], weights: Mapping[str, Tensor]) -> None:
    for name, shape in expected.items():
        if name not in weights:
            raise CheckpointError(f"model.{name}: expected a weight of shape {list(shape)}, found none")
        if tuple(weights[name].shape) != shape:
            raise CheckpointError(f"model.{name}: expected shape {list(shape)}, found {list(weights[name].shape)}")
    # Old checkpoints keep the rotary frequencies, which the config determines.
    unknown = sorted(name for name in set(weights) - set(expected) if not name.endswith("rotary_emb.inv_freq"))
    if unknown:
        raise CheckpointError(f"model.{unknown[0]}: unexpected weight ({len(unknown)} such); does config.json fit this file?")
