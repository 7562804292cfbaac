"""Any decoder of transformers over prompts that are not packed: slower, with the same result."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PretrainedConfig

from p2l_engine.backbone import mixing
from p2l_engine.backbone.packing import Packed, Tokens
from p2l_engine.backbone.weights import compare
from p2l_engine.errors import CheckpointError
from p2l_engine.prompts.encode import MAX_TOKENS


def last_hidden(model: Any, packed: Packed, padded: bool) -> Tensor:
    """The hidden state of each prompt's last token [N, D], by a decoder of transformers.

    padded: all prompts at once, padded on the right; else one call for each run of prompts of one length, which leaves the
    decoder's state as it was. See ``mixing``.
    """
    prompts = packed.tokens.long().split(packed.lengths)
    if padded:
        ids = nn.utils.rnn.pad_sequence(list(prompts), batch_first=True)
        size = packed.starts.diff()
        mask = torch.arange(ids.shape[1], device=ids.device) < size[:, None]
        hidden: Tensor = model(input_ids=ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
        return hidden[torch.arange(len(packed), device=ids.device), size.long() - 1]
    parts = []
    for run in packed.runs():
        ids = torch.stack(prompts[run.first : run.first + run.prompts])
        with unchanged(model):
            parts.append(model(input_ids=ids, use_cache=False).last_hidden_state[:, -1])
    return torch.cat(parts)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Restores buffers, attributes and submodules afterwards: some decoders keep what the last prompts made of them, such as a
    dynamic RoPE its frequencies."""
    kept = [(module, dict(vars(module)), dict(module._modules), dict(module._buffers)) for module in model.modules()]
    contents = [(buffer, buffer.clone(), buffer._version) for buffer in model.buffers()]
    try:
        yield
    finally:
        for module, attributes, modules, buffers in kept:
            _set(vars(module), attributes)
            _set(module._modules, modules)
            _set(module._buffers, buffers)
        for buffer, content, version in contents:
            if buffer._version != version:
                buffer.copy_(content)


def _set(target: dict[str, Any], content: dict[str, Any]) -> None:
    target.clear()
    target.update(content)


class UnpackedDecoder:
    """See Backbone. It shares no prefix, and applies the final norm itself. Safe to call from several threads, one at a time.

    Raises CheckpointError for wrong weights, and for a model that token ids alone do not run.
    """

    norm: Tensor | None = None
    eps = 0.0
    prefix: Tokens | None = None

    def __init__(
        self, config: PretrainedConfig, weights: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype
    ) -> None:
        self.name, self.device = f"transformers {config.model_type}", device
        self.padded = mixing.pads(config)
        self.model = AutoModel.from_config(config, dtype=dtype, attn_implementation=mixing.attention(config))
        expected = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}
        compare(expected, weights)
        self.model.load_state_dict({name: weights[name].to(dtype) for name in expected})
        self.model.eval()
        self._forward = threading.Lock()
        self.positions = positions(self.model)  # on the CPU: a GPU would not survive a position too many
        self.model.to(device)
        self.embedding: Tensor = self.model.get_input_embeddings().weight.detach()

    @torch.inference_mode()
    def __call__(self, packed: Packed) -> Tensor:
        """See Backbone."""
        with self._forward:
            return last_hidden(self.model, packed, self.padded)


class _Enough(Exception):
    """Ends a forward pass behind its first layer."""


@torch.inference_mode()
def positions(model: Any) -> int | None:
    """The tokens of the longest prompt that a decoder of transformers, on a CPU, computes; None: any length.

    Tables of positions have as many rows as the config says, less those that some decoders leave out: found by trying. Raises
    CheckpointError where the decoder computes nothing from token ids alone.
    """
    try:
        with unchanged(model):
            model(input_ids=_tokens(model, 2), use_cache=False).last_hidden_state  # noqa: B018
    except Exception as error:  # whatever a model raises for inputs that it lacks
        raise CheckpointError(
            f"config.json: expected a decoder that token ids alone run in {str(model.dtype).removeprefix('torch.')}, got "
            f"model_type {model.config.model_type!r}: {error}"
        ) from error
    most = mixing.context(model.config)
    if most is None or getattr(model.config, "rope_parameters", None):
        return None
    if most > MAX_TOKENS:  # no prompt is as long
        return most
    found = next((tokens for tokens in range(most + 1, most - 3, -1) if _computes(model, tokens)), None)
    if found is None:  # far fewer than the config says
        return bisect_left(range(2, most), True, key=lambda tokens: not _computes(model, tokens)) + 1
    return None if found > most else found


def _computes(model: Any, tokens: int) -> bool:
    def stop(*_: Any) -> None:
        raise _Enough

    layers = next((module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)), [model])
    hook = layers[0].register_forward_hook(stop)
    try:
        with unchanged(model):
            model(input_ids=_tokens(model, tokens), use_cache=False)
    except _Enough:
        return True
    except (IndexError, RuntimeError, ValueError):
        return False
    finally:
        hook.remove()
    return True


def _tokens(model: Any, count: int) -> Tensor:
    """None of them the padding token, whose position some decoders do not count."""
    return torch.full((1, count), 0 if getattr(model.config, "pad_token_id", None) else 1)
