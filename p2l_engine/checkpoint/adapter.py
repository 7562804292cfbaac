"""LoRA adapters in peft's file format, merged into their backbone's weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from p2l_engine.backbone.weights import joined
from p2l_engine.checkpoint.lora import Lora
from p2l_engine.errors import CheckpointError

NEW_ROWS = "model.embed_tokens.new_rows"  # of an adapter: embeddings of tokens that its backbone does not know
PEFT_PREFIX = "base_model.model."
SIDES = ("lora_A", "lora_B")


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """What an adapter changes of its backbone. factors: LoRA's B, A and their scale for each weight that they change; new_rows
    [N, D]: embeddings of further tokens, None for none."""

    factors: Mapping[str, tuple[Tensor, Tensor, float]]
    new_rows: Tensor | None

    @classmethod
    def of(cls, folder: Path, weights: Mapping[str, Tensor], update: Mapping[str, Tensor], lora: Lora) -> Adapter:
        """weights: the backbone's; update: the tensors of the adapter in ``folder``. Raises CheckpointError for tensors that
        are not supported, that do not fit or that are missing."""
        factors, new = _factors(folder, weights, update, lora), update.get(NEW_ROWS)
        if new is not None:
            columns = weights["embed_tokens.weight"].shape[1]
            if new.ndim != 2 or new.shape[1] != columns:
                raise CheckpointError(f"{folder}: {NEW_ROWS}: expected rows of {columns}, found {list(new.shape)}")
        scaled = {name: (up, down, lora.scale_of(name.removesuffix(".weight"))) for name, (up, down) in factors.items()}
        return cls(scaled, new)

    def merged(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The backbone's weights, with W + scale B A in float32 for every pair of factors (Hu et al. 2021; peft's file format).
        Weights of one product lie one below the other in the result."""
        found = dict(weights)
        if self.new_rows is not None:
            table = weights["embed_tokens.weight"]
            found["embed_tokens.weight"] = torch.cat([table, self.new_rows.to(table.dtype)])
        product = torch.empty(0)  # one buffer for all: fresh memory costs as much as the sums
        for names in joined(self.factors):
            rows = [len(weights[target]) for target in names]
            out = torch.empty(sum(rows), weights[names[0]].shape[1])
            for target, part in zip(names, out.split(rows), strict=True):
                up, down, scale = self.factors[target]
                torch.mm(up.float(), down.float(), out=product.resize_(0))
                found[target] = part.copy_(weights[target]).add_(product.mul_(scale))
        return found


def _factors(
    folder: Path, weights: Mapping[str, Tensor], update: Mapping[str, Tensor], lora: Lora
) -> dict[str, tuple[Tensor, Tensor]]:
    """LoRA's B and A for each weight that they change. Raises CheckpointError."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in update.items():
        side = next((side for side in SIDES if key.endswith(f".{side}.weight")), None)
        if key == NEW_ROWS or (key.startswith("head.") and ".lora_" not in key):
            continue
        if side is None:
            raise CheckpointError(f"{folder}: adapter_model.safetensors: key {key} is neither LoRA nor head")
        module = key.removeprefix("model.").removesuffix(f".{side}.weight")
        if f"{module}.weight" not in weights:
            raise CheckpointError(f"{folder}: adapter key {key}: found no {module}.weight in the backbone for it")
        if side in found.setdefault(module, {}):
            raise CheckpointError(
                f"{folder}: adapter key {key}: expected it once, found it with the prefix 'model.' and without"
            )
        found[module][side] = tensor
    _check_targets(folder, weights, found, lora)
    factors = {}
    for module, of in found.items():
        missing = [side for side in SIDES if side not in of]
        if missing:
            raise CheckpointError(f"{folder}: adapter: {module}: found no {missing[0]} for it")
        down, up = (of[side] for side in SIDES)
        weight, rank = weights[f"{module}.weight"], lora.rank_of(module)
        expected = [rank, weight.shape[-1]], [weight.shape[0], rank]
        if weight.ndim != 2 or [list(down.shape), list(up.shape)] != list(expected):
            raise CheckpointError(
                f"{folder}: adapter key {module}.lora_A.weight: expected factors of {list(weight.shape)} of rank {rank}, "
                f"found {list(up.shape)} x {list(down.shape)}"
            )
        factors[f"{module}.weight"] = (up, down)
    return factors


def _check_targets(folder: Path, weights: Mapping[str, Tensor], found: Collection[str], lora: Lora) -> None:
    """Checks that the adapter has factors for the modules that its settings name, and for no other."""
    linear = (name.removesuffix(".weight") for name, weight in weights.items() if weight.ndim == 2 and "emb" not in name)
    targets = lora.targets(linear)
    lost = sorted((targets or set()) - set(found))
    other = sorted(set(found) - targets) if targets is not None else []
    if lost or (not found and targets != set()):
        which = f"none for {lost[0]} ({len(lost)} such)" if lost else "none"
        raise CheckpointError(
            f"{folder}: adapter_model.safetensors: expected factors for every target module, found {which}: were they gathered "
            "from all processes when it was saved?"
        )
    if other:
        raise CheckpointError(
            f"{folder}: adapter: {other[0]} has factors ({len(other)} such), but target_modules leaves it out"
        )
