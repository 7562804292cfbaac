"""Decoder layers for training on a CPU: packed prompts, and one pass for each step between the matrix products.

transformers' layers, with or without peft's LoRA, spend two thirds of a CPU's training time on element-wise passes over
memory (casts, norms, SwiGLU, scaled sums, slices). Here each half of a layer is one autograd function: its products run in
bfloat16 or float32, the native core computes the steps between them, and little is saved for the backward pass. The parameters
stay those of the transformers and peft modules, so optimisers and checkpoints need no change.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from p2l_engine.backbone.families import DecoderConfig
from p2l_engine.backbone.packing import Run
from p2l_engine.backbone.rope import UnsupportedConfig
from p2l_engine.native import decoder

PROBABILITIES = 1 << 24  # of attention that are computed at once


class Product(NamedTuple):
    """y = x W' + b + (x A') B': weight [out, in], bias [out], and LoRA's factors [r, in] and, scaled, [out, r]."""

    weight: Tensor
    bias: Tensor | None
    a: Tensor | None
    b: Tensor | None

    @classmethod
    def of(cls, modules: Sequence[nn.Module], dtype: torch.dtype) -> Product:
        """Linear layers of one input, their weights stacked in one matrix; gradients flow back to each of them."""
        bases: Any = [getattr(module, "base_layer", module) for module in modules]
        weight = torch.cat([base.weight.to(dtype) for base in bases])
        bias = None if bases[0].bias is None else torch.cat([base.bias.to(dtype) for base in bases])
        adapted: Any = [module for module in modules if hasattr(module, "lora_A")]
        if not adapted:
            return cls(weight, bias, None, None)
        if len(adapted) != len(modules):
            raise ValueError("lora: expected an adapter on every linear layer of a block or on none")
        a = torch.cat([module.lora_A["default"].weight for module in adapted]).to(dtype)
        b = torch.block_diag(*(module.lora_B["default"].weight * module.scaling["default"] for module in adapted)).to(dtype)
        return cls(weight, bias, a, b)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [T, in] -> [T, out], plus the residual [T, out] where there is one."""
        if residual is not None:
            y = torch.addmm(residual, x, self.weight.t())
            if self.bias is not None:
                y += self.bias
        elif self.bias is not None:
            y = torch.addmm(self.bias, x, self.weight.t())
        else:
            y = x @ self.weight.t()
        if self.a is not None and self.b is not None:
            y.addmm_(x @ self.a.t(), self.b.t())
        return y

    def backward(self, x: Tensor, dy: Tensor, needed: Sequence[bool], dx_needed: bool = True) -> tuple[Tensor | None, ...]:
        """The gradients of x, weight, bias, a and b; None for those that are not needed."""
        dx = dy @ self.weight if dx_needed else None
        d_weight = dy.t() @ x if needed[0] else None
        d_bias = dy.sum(0) if needed[1] else None
        if self.a is None or self.b is None:
            return dx, d_weight, d_bias, None, None
        inner = dy @ self.b
        if dx is not None:
            dx.addmm_(inner, self.a)
        return dx, d_weight, d_bias, inner.t() @ x, dy.t() @ (x @ self.a.t())


@dataclass(frozen=True, slots=True)
class Layout:
    """Shared by the layers of a forward pass: runs of prompts of equal length; RoPE's cos and sin [T, size / 2] float32."""

    runs: tuple[Run, ...]
    cos: Tensor
    sin: Tensor
    heads: int
    kv_heads: int
    scale: float


class Attention(torch.autograd.Function):
    """x + out(attention(rotary(qkv(norm(x))))) for x [T, D]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Tensor, eps: float, layout: Layout, *weights: Tensor | None) -> Tensor:
        qkv_product, out_product = _products(weights)
        qkv = qkv_product(_norm(x, norm, eps))
        _rope(qkv, layout)
        attended = torch.empty(len(x), layout.heads * 2 * layout.cos.shape[1], dtype=x.dtype)
        for part in _parts(layout):
            q, k, v, out = part.of(qkv, attended)
            out.copy_((_probabilities(q.flatten(2, 3), k, part, layout) @ v).view_as(out))
        ctx.save_for_backward(x, norm, qkv, attended, *weights)
        ctx.eps, ctx.layout = eps, layout
        return out_product(attended, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, norm, qkv, attended, *weights = ctx.saved_tensors
        layout, needs = ctx.layout, ctx.needs_input_grad
        dy = dy.contiguous()
        qkv_product, out_product = _products(weights)
        d_attended, *d_out = out_product.backward(attended, dy, needs[8:])
        assert d_attended is not None
        d_qkv = torch.empty_like(qkv)
        for part in _parts(layout):
            q, k, v, d = part.of(qkv, d_attended)
            dq, dk, dv, _ = part.of(d_qkv, d_attended)
            # The queries of a group share their keys: as rows of one matrix, the products sum over them.
            q, d = q.flatten(2, 3), d.flatten(2, 3)
            p = _probabilities(q, k, part, layout)
            dv.copy_(p.transpose(-1, -2) @ d)
            d_scores = torch._softmax_backward_data(d @ v.transpose(-1, -2), p, -1, p.dtype)
            d_scores *= layout.scale
            dq.copy_((d_scores @ k).view_as(dq))
            dk.copy_(d_scores.transpose(-1, -2) @ q)
        _rope(d_qkv, layout, inverse=True)
        d_normed, *d_in = qkv_product.backward(_norm(x, norm, ctx.eps), d_qkv, needs[4:8])
        dx, d_norm = _norm_backward(x, norm, d_normed, dy, ctx.eps, needs[1])
        return dx, d_norm, None, None, *d_in, *d_out


class Mlp(torch.autograd.Function):
    """x + down(silu(gate(norm(x))) * up(norm(x))) for x [T, D]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Tensor, eps: float, *weights: Tensor | None) -> Tensor:
        gate_up_product, down_product = _products(weights)
        gate_up = gate_up_product(_norm(x, norm, eps))
        gated = decoder.swiglu(gate_up, gate_up.new_empty(len(x), gate_up.shape[1] // 2))
        ctx.save_for_backward(x, norm, gate_up, *weights)
        ctx.eps = eps
        return down_product(gated, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, norm, gate_up, *weights = ctx.saved_tensors
        needs = ctx.needs_input_grad
        dy = dy.contiguous()
        gate_up_product, down_product = _products(weights)
        # The gradient of the product's input comes first: swiglu_backward reads it, and recomputes the input.
        d_gated = _input_gradient(down_product, dy)
        d_gate_up, gated = torch.empty_like(gate_up), torch.empty_like(d_gated)
        decoder.swiglu_backward(gate_up, d_gated, d_gate_up, gated)
        _, *d_down = down_product.backward(gated, dy, needs[7:], dx_needed=False)
        d_normed, *d_in = gate_up_product.backward(_norm(x, norm, ctx.eps), d_gate_up, needs[3:7])
        dx, d_norm = _norm_backward(x, norm, d_normed, dy, ctx.eps, needs[1])
        return dx, d_norm, None, *d_in, *d_down


def fuse(decoder: Any, dtype: torch.dtype) -> None:
    """Replaces the forward passes of a transformers decoder's layers by fused ones in ``dtype`` (bfloat16 or float32).

    They then take the keyword ``layout``, and hidden states [1, T, D]. The decoder must be ``fusible``.
    """
    for layer in decoder.layers:
        layer.forward = types.MethodType(_layer, layer)
        layer.fused_dtype = dtype


def unfuse(decoder: Any) -> None:
    """Undoes ``fuse``."""
    for layer in decoder.layers:
        del layer.forward, layer.fused_dtype


def fusible(config: Any) -> bool:
    """Whether the layers of a decoder with this transformers config can be fused: those that inference packs, without biases in
    the MLP."""
    try:
        return not DecoderConfig.read(config.to_dict()).mlp_bias
    except UnsupportedConfig:
        return False


def layout_of(decoder: Any, positions: Tensor, runs: Sequence[Run]) -> Layout:
    """The layout of packed prompts whose tokens have these positions [T]."""
    config, first = decoder.config, decoder.layers[0].self_attn
    cos, sin = decoder.rotary_emb(torch.zeros(1, dtype=torch.float32), positions[None])
    half = cos.shape[-1] // 2
    cos, sin = (table[0, :, :half].float().contiguous() for table in (cos, sin))
    return Layout(tuple(runs), cos, sin, config.num_attention_heads, config.num_key_value_heads, first.scaling)


def _layer(self: Any, hidden_states: Tensor, layout: Layout, **_: Any) -> Tensor:
    dtype, attention, mlp = self.fused_dtype, self.self_attn, self.mlp
    x: Tensor = hidden_states[0].to(dtype)
    before, after = self.input_layernorm, self.post_attention_layernorm
    qkv = Product.of((attention.q_proj, attention.k_proj, attention.v_proj), dtype)
    out, down = Product.of((attention.o_proj,), dtype), Product.of((mlp.down_proj,), dtype)
    gate_up = Product.of((mlp.gate_proj, mlp.up_proj), dtype)
    attend: Any = Attention.apply
    feed: Any = Mlp.apply
    with torch.autocast("cpu", enabled=False):
        x = attend(x, before.weight.to(dtype), before.variance_epsilon, layout, *qkv, *out)
        x = feed(x, after.weight.to(dtype), after.variance_epsilon, *gate_up, *down)
    return x[None]


class _Part(NamedTuple):
    """``prompts`` prompts of ``length`` tokens each, from token ``start`` on, whose attention is computed at once."""

    start: int
    prompts: int
    length: int
    layout: Layout

    def of(self, qkv: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Views: q and out [count, kv heads, group, length, size], k and v [count, kv heads, length, size]."""
        heads, kv_heads = self.layout.heads, self.layout.kv_heads
        rows = slice(self.start, self.start + self.prompts * self.length)
        every = qkv[rows].view(self.prompts, self.length, heads + 2 * kv_heads, -1)
        q, k, v = every.split([heads, kv_heads, kv_heads], 2)
        q, o = (x.unflatten(2, (kv_heads, -1)) for x in (q, out[rows].view(self.prompts, self.length, heads, -1)))
        return q.permute(0, 2, 3, 1, 4), k.transpose(1, 2), v.transpose(1, 2), o.permute(0, 2, 3, 1, 4)


def _parts(layout: Layout) -> list[_Part]:
    parts, start = [], 0
    for run in layout.runs:
        most = max(1, PROBABILITIES // (run.length**2 * layout.heads))
        for first in range(0, run.prompts, most):
            count = min(most, run.prompts - first)
            parts.append(_Part(start, count, run.length, layout))
            start += count * run.length
    return parts


def _probabilities(q: Tensor, k: Tensor, part: _Part, layout: Layout) -> Tensor:
    """q [count, kv heads, group * length, size] -> [count, kv heads, group * length, length]."""
    scores = (q * layout.scale) @ k.transpose(-1, -2)
    by_head = scores.unflatten(2, (-1, part.length))
    by_head += torch.full((part.length, part.length), -torch.inf, dtype=q.dtype).triu(1)
    return scores.softmax(-1)


def _products(weights: Sequence[Tensor | None]) -> tuple[Product, Product]:
    return Product(*weights[:4]), Product(*weights[4:])  # type: ignore[arg-type]


def _input_gradient(product: Product, dy: Tensor) -> Tensor:
    dx = dy @ product.weight
    if product.a is not None and product.b is not None:
        dx.addmm_(dy @ product.b, product.a)
    return dx


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return decoder.rms_norm(x, weight, eps, torch.empty_like(x))


def _norm_backward(
    x: Tensor, weight: Tensor, d_out: Tensor | None, dy: Tensor, eps: float, weight_needed: bool
) -> tuple[Tensor, Tensor | None]:
    assert d_out is not None
    dx = dy.clone()
    return dx, decoder.rms_norm_backward(x, weight, d_out, dx, eps, weight_needed)


def _rope(qkv: Tensor, layout: Layout, inverse: bool = False) -> None:
    heads, rotated = layout.heads + 2 * layout.kv_heads, layout.heads + layout.kv_heads
    decoder.rope(qkv, layout.cos, layout.sin, heads, rotated, inverse)
