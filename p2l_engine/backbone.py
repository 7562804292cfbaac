"""The backbone: packed tokens in, the hidden state of each prompt's last (CLS) token out.

Packed: the prompts' tokens stand one after the other in one run, with the offsets of the prompts; nothing is padded. Prompts
are taken in order of their length, so that those of one length share one attention call. The last layer computes keys and
values of all tokens, but queries, output projection and MLP of the CLS tokens only.

Llama and Qwen2 decoders are computed here; every other architecture goes through transformers' AutoModel, padded: slower,
same result.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel, PretrainedConfig
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from p2l_engine.errors import CheckpointError

PACKED = ("llama", "qwen2")
STATIC_ROPE = ("default", "linear", "llama3", "yarn")  # the others change with the length of the sequence

logger = logging.getLogger(__name__)


class Backbone(Protocol):
    """What the engine needs of a decoder."""

    name: str

    def __call__(self, tokens: Tensor, lengths: list[int]) -> Tensor:
        """tokens [sum(lengths)] int, prompts one after the other -> hidden [N, D] of each one's last token, after the norm."""


def build(config: PretrainedConfig, weights: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype) -> Backbone:
    """The packed decoder where this module knows the architecture, else transformers' own."""
    reason = _unsupported(config)
    if reason is None:
        return PackedDecoder(config, weights, device, dtype)
    logger.warning("the backbone runs through transformers, padded: %s", reason)
    return TransformersDecoder(config, weights, device, dtype)


def _unsupported(config: PretrainedConfig) -> str | None:
    if config.model_type not in PACKED:
        return f"architecture {config.model_type!r} is not one of {', '.join(PACKED)}"
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if kind not in STATIC_ROPE:
        return f"rope_type {kind!r} is not one of {', '.join(STATIC_ROPE)}"
    if config.model_type == "qwen2" and getattr(config, "use_sliding_window", False):
        return "it uses sliding-window attention"
    return None


def same_length_runs(lengths: list[int]) -> Iterator[tuple[int, int, int]]:
    """(first token, prompts, length) of every run of neighbours of one length."""
    start = 0
    for length, run in groupby(lengths):
        count = sum(1 for _ in run)
        yield start, count, length
        start += count * length


class PackedDecoder:
    """A Llama or Qwen2 decoder over packed tokens; weights named as in transformers' bare model."""

    def __init__(
        self, config: PretrainedConfig, weights: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype
    ) -> None:
        check_weights(config, weights)
        self.name = f"packed {config.model_type}"
        self.dtype, self.device = dtype, device
        self.eps, self.n_layers = float(config.rms_norm_eps), int(config.num_hidden_layers)
        self.heads, self.kv_heads = int(config.num_attention_heads), int(config.num_key_value_heads)
        self.head_size = _head_size(config)
        self.activation = ACT2FN[config.hidden_act]
        rope = LlamaRotaryEmbedding(config=config)  # type: ignore[arg-type]  # reads rope settings only, Qwen2's too
        self.inv_freq, self.rope_scale = rope.inv_freq.float().to(device), float(rope.attention_scaling)
        self._tables = (torch.empty(0), torch.empty(0))
        self._rope(512)

        def put(weight: Tensor | None) -> Tensor | None:
            return None if weight is None else weight.to(device, dtype)

        def joined(layer: int, *names: str) -> tuple[Tensor, Tensor | None]:
            whole = torch.cat([weights[f"layers.{layer}.{name}.weight"] for name in names])
            biases = [weights.get(f"layers.{layer}.{name}.bias") for name in names]
            return whole.to(device, dtype), put(
                torch.cat([b for b in biases if b is not None]) if biases[0] is not None else None
            )

        self.embedding = weights["embed_tokens.weight"].to(device, dtype)
        self.norm = weights["norm.weight"].to(device, dtype)
        layers = range(self.n_layers)
        self.norms = [
            [weights[f"layers.{i}.{name}.weight"].to(device, dtype) for name in ("input_layernorm", "post_attention_layernorm")]
            for i in layers
        ]
        self.qkv = [joined(i, "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj") for i in layers]
        self.out = [joined(i, "self_attn.o_proj") for i in layers]
        self.gate_up = [joined(i, "mlp.gate_proj", "mlp.up_proj") for i in layers]
        self.down = [joined(i, "mlp.down_proj") for i in layers]

    @torch.inference_mode()
    def __call__(self, tokens: Tensor, lengths: list[int]) -> Tensor:
        """See Backbone. Prompts of equal length are fastest as neighbours."""
        sizes = torch.tensor(lengths)
        last = (sizes.cumsum(0) - 1).to(self.device)
        positions = torch.cat([torch.arange(length) for length in lengths]).to(self.device)
        cos, sin = (table[positions] for table in self._rope(max(lengths)))
        runs = list(same_length_runs(lengths))
        x = F.embedding(tokens.to(self.device), self.embedding)
        for i in range(self.n_layers - 1):
            q, k, v = self._qkv(i, self._norm(x, self.norms[i][0]))
            attended = self._attend(self._rotate(q, cos, sin), self._rotate(k, cos, sin), v, runs)
            x = self._mlp(i, x + F.linear(attended, *self.out[i]))
        i = self.n_layers - 1
        normed = self._norm(x, self.norms[i][0])
        (weight, bias), rows = self.qkv[i], self.heads * self.head_size
        q = F.linear(normed[last], weight[:rows], None if bias is None else bias[:rows])
        kv = F.linear(normed, weight[rows:], None if bias is None else bias[rows:])
        k, v = kv.view(-1, 2, self.kv_heads, self.head_size).unbind(1)
        q = q.view(-1, self.heads, self.head_size)
        attended = self._attend_last(self._rotate(q, cos[last], sin[last]), self._rotate(k, cos, sin), v, runs)
        x = self._mlp(i, x[last] + F.linear(attended, *self.out[i]))
        return self._norm(x, self.norm)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.eps)

    def _qkv(self, i: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = F.linear(x, *self.qkv[i]).view(len(x), -1, self.head_size)
        q, k, v = parts.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        return q, k, v

    def _mlp(self, i: int, x: Tensor) -> Tensor:
        gate, up = F.linear(self._norm(x, self.norms[i][1]), *self.gate_up[i]).chunk(2, dim=-1)
        return x + F.linear(self.activation(gate) * up, *self.down[i])

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [T, heads, head_size] turned by its position: halves rotated against each other (transformers' layout)."""
        low, high = x.chunk(2, dim=-1)
        return x * cos[:, None] + torch.cat((-high, low), dim=-1) * sin[:, None]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, runs: list[tuple[int, int, int]]) -> Tensor:
        """Causal attention within each prompt: one call for each run of prompts of one length."""
        done = []
        for start, count, length in runs:
            qs, ks, vs = (self._prompts(t, start, count, length) for t in (q, k, v))
            a = F.scaled_dot_product_attention(qs, ks, vs, is_causal=True, enable_gqa=self.heads != self.kv_heads)
            done.append(a.transpose(1, 2).reshape(count * length, -1))
        return torch.cat(done)

    def _attend_last(self, q: Tensor, k: Tensor, v: Tensor, runs: list[tuple[int, int, int]]) -> Tensor:
        """q [N, heads, head_size] of the last tokens over all keys of their own prompts: nothing to mask."""
        done, first = [], 0
        for start, count, length in runs:
            ks, vs = (self._prompts(t, start, count, length) for t in (k, v))
            one = q[first : first + count].unsqueeze(2)
            a = F.scaled_dot_product_attention(one, ks, vs, enable_gqa=self.heads != self.kv_heads)
            done.append(a.reshape(count, -1))
            first += count
        return torch.cat(done)

    def _prompts(self, packed: Tensor, start: int, count: int, length: int) -> Tensor:
        """[count, heads, length, head_size] of prompts of one length that stand together."""
        part = packed[start : start + count * length]
        return part.view(count, length, -1, self.head_size).transpose(1, 2)

    def _rope(self, positions: int) -> tuple[Tensor, Tensor]:
        """Tables of at least so many positions; both replaced in one step, since callers may be on several threads."""
        if positions > len(self._tables[0]):
            size = max(positions, 2 * len(self._tables[0]))
            angles = torch.arange(size, device=self.device).float()[:, None] * self.inv_freq
            angles = torch.cat((angles, angles), dim=-1)
            cos, sin = ((f(angles) * self.rope_scale).to(self.dtype) for f in (torch.cos, torch.sin))
            self._tables = (cos, sin)
            return cos, sin
        return self._tables


class TransformersDecoder:
    """Any causal decoder of transformers, over right-padded batches."""

    def __init__(
        self, config: PretrainedConfig, weights: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype
    ) -> None:
        self.name, self.device = f"transformers {config.model_type}", device
        self.model = AutoModel.from_config(config, dtype=dtype)
        expected = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}
        _compare(expected, weights)
        self.model.load_state_dict({name: weights[name].to(dtype) for name in expected})
        self.model.to(device).eval()

    @torch.inference_mode()
    def __call__(self, tokens: Tensor, lengths: list[int]) -> Tensor:
        """See Backbone."""
        parts = tokens.long().split(lengths)
        ids = torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True).to(self.device)
        size = torch.tensor(lengths, device=self.device)
        mask = torch.arange(ids.shape[1], device=self.device) < size[:, None]
        hidden = self.model(input_ids=ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
        last: Tensor = hidden[torch.arange(len(lengths), device=self.device), size - 1]
        return last


def _head_size(config: PretrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def expected_shapes(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Every weight of the packed decoder and its shape."""
    d, size, inner = config.hidden_size, _head_size(config), config.intermediate_size
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
    _compare(expected_shapes(config), weights)


def _compare(expected: Mapping[str, tuple[int, ...]], weights: Mapping[str, Tensor]) -> None:
    for name, shape in expected.items():
        if name not in weights:
            raise CheckpointError(f"model.{name}: expected a weight of shape {list(shape)}, found none")
        if tuple(weights[name].shape) != shape:
            raise CheckpointError(f"model.{name}: expected shape {list(shape)}, found {list(weights[name].shape)}")
    # Old checkpoints keep the rotary frequencies, which the config determines.
    unknown = sorted(name for name in set(weights) - set(expected) if not name.endswith("rotary_emb.inv_freq"))
    if unknown:
        raise CheckpointError(f"model.{unknown[0]}: unexpected weight ({len(unknown)} such); does config.json fit this file?")
