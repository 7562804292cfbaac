"""LoRA adapters in peft's file format, merged into their backbone's weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from p2l_engine.backbone.weights import joined
from p2l_engine.errors import CheckpointError

NEW_ROWS = "model.embed_tokens.new_rows"  # of an adapter: embeddings of tokens that its backbone does not know
PEFT_PREFIX = "base_model.model."


def merge(folder: Path, weights: dict[str, Tensor], update: dict[str, Tensor], lora: dict[str, Any]) -> dict[str, Tensor]:
    """W + scale B A in float32 for every pair of LoRA factors (Hu et al. 2021; peft's file format).

    weights: the backbone's; update: the tensors of the adapter in ``folder``; lora: its adapter_config.json. Weights of one
    product lie one below the other in the result. Raises CheckpointError for what is not supported or does not fit.
    """
    name = folder / "adapter_config.json"
    wanted = {"peft_type": "LORA", "bias": "none", "use_dora": False, "use_rslora": False, "fan_in_fan_out": False}
    for key, value in wanted.items():
        if lora.get(key, value) != value:
            raise CheckpointError(f"{name}: {key}: expected {value!r}, found {lora[key]!r}: not supported")
    for key in ("rank_pattern", "alpha_pattern"):
        if lora.get(key):
            raise CheckpointError(f"{name}: {key}: expected none, found {lora[key]!r}: not supported")
    rank = int(field(name, lora, "r", int))
    scale = float(field(name, lora, "lora_alpha", int | float)) / rank
    factors = _factors(folder, weights, update, rank)
    merged = dict(weights)
    if NEW_ROWS in update:
        table, new = weights["embed_tokens.weight"], update[NEW_ROWS]
        if new.ndim != 2 or new.shape[1] != table.shape[1]:
            raise CheckpointError(f"{folder}: {NEW_ROWS}: expected rows of {table.shape[1]}, found {list(new.shape)}")
        merged["embed_tokens.weight"] = torch.cat([table, new.to(table.dtype)])
    product = torch.empty(0)  # one buffer for all: fresh memory costs as much as the sums
    for names in joined(factors):
        rows = [len(weights[target]) for target in names]
        out = torch.empty(sum(rows), weights[names[0]].shape[1])
        for target, part in zip(names, out.split(rows), strict=True):
            up, down = factors[target]
            torch.mm(up.float(), down.float(), out=product.resize_(0))
            merged[target] = part.copy_(weights[target]).add_(product.mul_(scale))
    return merged


def _factors(
    folder: Path, weights: dict[str, Tensor], update: dict[str, Tensor], rank: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """LoRA's B and A for each weight that they change. Raises CheckpointError."""
    factors = {}
    for key, down in update.items():
        if key.startswith("head.") or key == NEW_ROWS:
            continue
        if not key.endswith(".lora_A.weight"):
            if not key.endswith(".lora_B.weight"):
                raise CheckpointError(f"{folder}: adapter_model.safetensors: key {key} is neither LoRA nor head")
            continue
        target = key.removeprefix("model.").removesuffix(".lora_A.weight") + ".weight"
        up = update.get(key.replace(".lora_A.", ".lora_B."))
        if target not in weights or up is None:
            raise CheckpointError(f"{folder}: adapter key {key}: found no {'lora_B' if up is None else target} for it")
        if (up.shape[0], down.shape[1]) != tuple(weights[target].shape) or not up.shape[1] == down.shape[0] == rank:
            raise CheckpointError(
                f"{folder}: adapter key {key}: expected factors of {list(weights[target].shape)} of rank {rank}, "
                f"found {list(up.shape)} x {list(down.shape)}"
            )
        factors[target] = (up, down)
    return factors


def field(path: Path, values: dict[str, Any], key: str, kind: Any) -> Any:
    value = values.get(key)
    if not isinstance(value, kind) or isinstance(value, bool) or not value:
        raise CheckpointError(f"{path}: {key}: expected a {getattr(kind, '__name__', 'number')}, found {value!r}")
    return value
