"""How a decoder computes a batch of prompts in training: fused, packed, padded, or prompts of one length at a time."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from p2l_engine.backbone import mixing
from p2l_engine.backbone.packing import Packed
from p2l_engine.backbone.unpacked import last_hidden
from p2l_engine.train import attention, fused

Way = Literal["fused", "packed", "padded", "by length"]


def ways(config: Any, fuse: bool, sharded: bool) -> list[Way]:
    """The ways in which a decoder of this config may be computed, the fastest first. fuse: whether its layers may be fused.

    sharded: whether processes gather the layers' weights from each other: equally often in all of them, and so once a batch.
    Raises ValueError where no way is left.
    """
    found: list[Way] = ["fused"] if fuse and fused.fusible(config) else []
    found += ["packed"] if mixing.packs(config) else []
    found += ["padded"] if mixing.pads(config) else []
    found += [] if sharded else ["by length"]
    if not found:
        raise ValueError(
            f"fsdp, deepspeed: {config.model_type} is trained with prompts of one length at a time, which sharded weights "
            "do not allow: leave them out"
        )
    return found


class Forward:
    """The hidden state of each prompt's last token [N, D], by a decoder of transformers, bare or within wrappers.

    plain: the bare decoder. way: "fused" needs a decoder that is ``fused.fuse``d, the others one that is not. Batches with
    prompts beyond the layers' window are padded where others are packed. own: the implementation of attention that
    transformers chose for it, for batches that are not packed.
    """

    def __init__(self, plain: Any, way: Way, own: str) -> None:
        self.plain, self.way, self._own = plain, way, own
        self.window = mixing.window(plain.config)
        attention.register()

    def __call__(self, decoder: Any, packed: Packed) -> Tensor:
        """decoder: ``plain``, or what wraps it."""
        way = "padded" if self.way == "packed" and packed.longest_own > self.window else self.way
        # Set before each pass and left so: with gradient checkpointing, the backward pass computes the layers again.
        # For its own implementations transformers makes a mask, all tokens by all tokens, that neither of these two reads.
        self.plain.config._attn_implementation = attention.NAME if way in ("packed", "fused") else self._own
        if way in ("padded", "by length"):
            return last_hidden(decoder, packed, way == "padded")
        positions = packed.positions.long()
        kept = {"layout": fused.layout_of(self.plain, positions, packed.runs())} if way == "fused" else {"packed": packed}
        hidden: Tensor = decoder(
            input_ids=packed.tokens.long()[None], position_ids=positions[None], use_cache=False, **kept
        ).last_hidden_state
        return hidden[0].index_select(0, packed.last.long())
