"""Training must compute the function that inference computes: checked, when a model is built, on prompts computed together."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from p2l_engine.backbone import mixing
from p2l_engine.backbone.packing import Packed
from p2l_engine.backbone.unpacked import last_hidden
from p2l_engine.train import fused
from p2l_engine.train.forward import Forward, Way

logger = logging.getLogger(__name__)

LENGTHS = (9, 2, 5)  # short behind long: what leaks from one prompt to the next shows
# The largest difference, as a share of the hidden states' norm. bfloat16 rounds in every layer, and may choose other experts.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.2}


class Alone:
    """The hidden states of a few prompts, each alone in eager attention, as inference computes them.

    decoder: of transformers, in evaluation mode, as it was read. longest: the tokens that it computes at most, None for any
    number.
    """

    def __init__(self, decoder: Any, longest: int | None) -> None:
        config = decoder.config
        ids = np.random.default_rng(0).integers(0, int(config.vocab_size), sum(LENGTHS)).astype(np.int32)
        most = int(min(max(LENGTHS), mixing.window(config), longest or max(LENGTHS)))
        self.packed = Packed.of([prompt[-most:] for prompt in np.split(ids, np.cumsum(LENGTHS)[:-1])]).to(decoder.device)
        self._own = config._attn_implementation
        config._attn_implementation = "eager"
        with torch.no_grad():
            self.hidden = last_hidden(decoder, self.packed, padded=False).float()
        config._attn_implementation = self._own

    def agreeing(self, decoder: Any, plain: Any, ways: Sequence[Way], dtype: torch.dtype) -> Forward:
        """The first of these ways in which the prompts have the same hidden states together; the others are logged.

        decoder: ``plain``, or what wraps it. dtype: of its products. Raises ValueError where no way is left.
        """
        found = []
        for way in ways:
            if way == "fused":
                fused.fuse(plain, dtype)
            forward = Forward(plain, way, self._own)
            try:
                with torch.no_grad():
                    together = forward(decoder, self.packed).float()
            except ValueError as error:
                found.append(f"{way}: {error}")
            else:
                difference = float((together - self.hidden).norm() / self.hidden.norm())
                if difference <= TOLERANCE[dtype]:
                    break
                found.append(f"{way}: hidden states differ by {difference:.2g} of their norm")
            if way == "fused":
                fused.unfuse(plain)
        name = plain.config.model_type
        if len(found) == len(ways):
            raise ValueError(
                f"pretrain_model_name: {name} computes prompts together differently from each alone, as inference does: "
                f"{'; '.join(found)}"
            )
        if found:
            logger.warning("backbone: %s is computed %s in training: %s", name, forward.way, "; ".join(found))
        return forward
