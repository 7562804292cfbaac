"""Any causal decoder of transformers, over right-padded batches: slower than packed, with the same result."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import AutoModel, PretrainedConfig

from p2l_engine.backbone.packing import Packed, Tokens
from p2l_engine.backbone.weights import compare


class PaddedDecoder:
    """See Backbone. It shares no prefix, and applies the final norm itself. Raises CheckpointError for wrong weights."""

    norm: Tensor | None = None
    eps = 0.0
    prefix: Tokens | None = None

    def __init__(
        self, config: PretrainedConfig, weights: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype
    ) -> None:
        self.name, self.device = f"transformers {config.model_type}", device
        self.model = AutoModel.from_config(config, dtype=dtype)
        expected = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}
        compare(expected, weights)
        self.model.load_state_dict({name: weights[name].to(dtype) for name in expected})
        self.model.to(device).eval()

    @torch.inference_mode()
    def __call__(self, packed: Packed) -> Tensor:
        """See Backbone."""
        ids = torch.nn.utils.rnn.pad_sequence(list(packed.tokens.long().split(packed.lengths)), batch_first=True)
        size = packed.starts.diff()
        mask = torch.arange(ids.shape[1], device=self.device) < size[:, None]
        hidden = self.model(input_ids=ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
        last: Tensor = hidden[torch.arange(len(packed), device=self.device), size.long() - 1]
        return last
