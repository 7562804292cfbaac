"""The weights of a packed decoder: checked against its config, then joined into the matrices of its products."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar, overload

import torch
from torch import Tensor

from p2l_engine.backbone.families import DecoderConfig
from p2l_engine.errors import CheckpointError
from p2l_engine.native.panels import Panels


@dataclass(frozen=True, slots=True, eq=False)
class Linear:
    """weight [in, out], a view of the stored [out, in]; bias [out] or None."""

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> Linear:
        """From what ``tensors`` returned."""
        return cls(tensors["weight"].t(), tensors.get("bias"))

    def tensors(self) -> dict[str, Tensor]:
        """The stored weight [out, in], and the bias where there is one."""
        return {"weight": self.weight.t()} | ({} if self.bias is None else {"bias": self.bias})

    def part(self, first: int, last: int) -> Linear:
        """The outputs first to last."""
        return Linear(self.weight[:, first:last], None if self.bias is None else self.bias[first:last])


P = TypeVar("P", Linear, Panels, Linear | Panels)


@dataclass(frozen=True, slots=True)
class Layer(Generic[P]):
    """One layer: queries, keys and values in one product, the gate and up projections of SwiGLU in another."""

    attention_norm: Tensor
    qkv: P
    out: P
    mlp_norm: Tensor
    gate_up: P
    down: P


# Linear layers of one input, whose weights lie one below the other in one matrix.
JOINED = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"))


def joined(names: Collection[str]) -> Iterator[tuple[str, ...]]:
    """The names of weights in groups: those that one product joins, where all of its names are there; else each name alone."""
    done: set[str] = set()
    for name in names:
        if name in done:
            continue
        layer, _, rest = name.rpartition(".self_attn." if ".self_attn." in name else ".mlp.")
        part = f"{name.removeprefix(f'{layer}.')}".removesuffix(".weight")
        group = next((group for group in JOINED if part in group), (part,))
        whole = tuple(f"{layer}.{one}.weight" for one in group)
        found = whole if rest and set(whole) <= set(names) else (name,)
        done |= set(found)
        yield found


@overload
def layers(
    config: DecoderConfig, weights: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype
) -> list[Layer[Linear]]: ...


@overload
def layers(
    config: DecoderConfig,
    weights: Mapping[str, Tensor],
    device: torch.device,
    dtype: torch.dtype,
    packed: torch.dtype | None,
) -> list[Layer[Linear | Panels]]: ...


def layers(
    config: DecoderConfig,
    weights: Mapping[str, Tensor],
    device: torch.device,
    dtype: torch.dtype,
    packed: torch.dtype | None = None,
) -> list[Layer[Linear]] | list[Layer[Linear | Panels]]:
    """The decoder's layers; weights are named as in transformers' bare model. packed: the dtype of their ``Panels``; None:
    ``Linear``."""

    def vector(i: int, name: str) -> Tensor:
        return weights[f"layers.{i}.{name}.weight"].to(device, dtype)

    def linear(i: int, *names: str) -> Linear | Panels:
        weight = concatenated([weights[f"layers.{i}.{name}.weight"] for name in names], device, dtype)
        biases = [bias for name in names if (bias := weights.get(f"layers.{i}.{name}.bias")) is not None]
        bias = concatenated(biases, device, dtype) if biases else None
        if packed is None or (packed == torch.bfloat16 and weight.shape[1] % 2):
            return Linear(weight.t(), bias)
        return Panels.of(weight, bias, packed)

    return [
        Layer(
            vector(i, "input_layernorm"),
            linear(i, *JOINED[0]),
            linear(i, "self_attn.o_proj"),
            vector(i, "post_attention_layernorm"),
            linear(i, *JOINED[1]),
            linear(i, "mlp.down_proj"),
        )
        for i in range(config.num_hidden_layers)
    ]


def concatenated(parts: Sequence[Tensor], device: torch.device, dtype: torch.dtype) -> Tensor:
    """The parts one below the other, converted while they are copied; a view where memory holds them so already."""
    first = parts[0]
    if len(parts) == 1:
        return first.to(device, dtype)
    ends = [part.data_ptr() + part.nbytes for part in parts]
    adjacent = all(part.data_ptr() == end for part, end in zip(parts[1:], ends, strict=False))
    one_storage = len({part.untyped_storage().data_ptr() for part in parts}) == 1
    if adjacent and one_storage and all(p.is_contiguous() and (p.device, p.dtype) == (device, dtype) for p in parts):
        return first.as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())
    out = torch.empty(sum(map(len, parts)), *parts[0].shape[1:], device=device, dtype=dtype)
    for part, rows in zip(parts, out.split([len(part) for part in parts]), strict=True):
        rows.copy_(part)
    return out


def expected_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Every weight of the packed decoder and its shape."""
    d, inner = config.hidden_size, config.intermediate_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    linear = {
        "self_attn.q_proj": (q, d, config.query_bias),
        "self_attn.k_proj": (kv, d, config.query_bias),
        "self_attn.v_proj": (kv, d, config.query_bias),
        "self_attn.o_proj": (d, q, config.output_bias),
        "mlp.gate_proj": (inner, d, config.mlp_bias),
        "mlp.up_proj": (inner, d, config.mlp_bias),
        "mlp.down_proj": (d, inner, config.mlp_bias),
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


def check_weights(config: DecoderConfig, weights: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError for a weight that is missing, unknown or of a wrong shape."""
    compare(expected_shapes(config), weights)


def compare(expected: Mapping[str, tuple[int, ...]], weights: Mapping[str, Tensor]) -> None:
    """``check_weights`` against expected names and shapes."""
    for name, shape in expected.items():
        if name not in weights:
            raise CheckpointError(f"model.{name}: expected a weight of shape {list(shape)}, found none")
        if tuple(weights[name].shape) != shape:
            raise CheckpointError(f"model.{name}: expected shape {list(shape)}, found {list(weights[name].shape)}")
    # Old checkpoints keep the rotary frequencies, which the config determines.
    unknown = sorted(name for name in set(weights) - set(expected) if not name.endswith("rotary_emb.inv_freq"))
    if unknown:
        raise CheckpointError(
            f"model.{unknown[0]}: unexpected weight ({len(unknown)} such); does config.json fit this file, and was it not "
            "quantised?"
        )
