"""All weights of a packed decoder as it uses them on its device, made from a checkpoint's, or from tensors that were kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from p2l_engine.backbone.families import DecoderConfig
from p2l_engine.backbone.weights import Layer, Linear, check_weights, layers
from p2l_engine.native.panels import Panels


@dataclass(frozen=True, slots=True, eq=False)
class DecoderWeights:
    """embedding [V, D], the final norm [D], and the layers. Not to be changed: several decoders may share them."""

    embedding: Tensor
    norm: Tensor
    layers: list[Layer[Linear | Panels]]

    @classmethod
    def of(
        cls,
        config: DecoderConfig,
        weights: Mapping[str, Tensor],
        device: torch.device,
        dtype: torch.dtype,
        packed: torch.dtype | None,
    ) -> DecoderWeights:
        """weights: named as in transformers' bare model. dtype: of all but packed weights, see ``weights.layers``. Raises
        CheckpointError for a weight that is missing, unknown or of a wrong shape."""
        check_weights(config, weights)
        table = weights["embed_tokens.weight"]
        # Half precision is widened after the look-up, which gives the same numbers: a wide table is large.
        embedding = table.to(device) if dtype == torch.float32 and table.element_size() == 2 else table.to(device, dtype)
        return cls(embedding, weights["norm.weight"].to(device, dtype), layers(config, weights, device, dtype, packed))

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> DecoderWeights:
        """From what ``tensors`` returned, without a copy."""
        groups: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            group, _, own = name.rpartition(".")
            groups.setdefault(group, {})[own] = tensor

        def part(layer: str, name: str) -> Tensor | Linear | Panels:
            if name in groups[layer]:
                return groups[layer][name]
            product = groups[f"{layer}.{name}"]
            return Linear.of_tensors(product) if "weight" in product else Panels.of_tensors(product)

        count = sum("attention_norm" in group for group in groups.values())
        found = [{field.name: part(f"layers.{i}", field.name) for field in fields(Layer)} for i in range(count)]
        return cls(tensors["embedding"], tensors["norm"], [Layer(**each) for each in found])  # type: ignore[arg-type]

    def tensors(self) -> dict[str, Tensor]:
        """All of it as named tensors: "embedding", "norm", "layers.0.attention_norm", "layers.0.qkv.data" and so on. A change
        of what they are asks for another ``panels.LAYOUT``."""
        found = {"embedding": self.embedding, "norm": self.norm}
        for i, layer in enumerate(self.layers):
            for field in fields(layer):
                part, name = getattr(layer, field.name), f"layers.{i}.{field.name}"
                found |= {name: part} if isinstance(part, Tensor) else {f"{name}.{k}": t for k, t in part.tensors().items()}
        return found
