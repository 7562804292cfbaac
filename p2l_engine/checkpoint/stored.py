"""The weights in a checkpoint's files: those of its bare decoder, and those of its head."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from p2l_engine.checkpoint.adapter import PEFT_PREFIX, Adapter
from p2l_engine.checkpoint.files import read_tensors, read_weights

HEADS = ("lm_head.", "head.")  # weights that are none of the bare decoder's


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """The bare decoder's weights, without the prefix ``model.``, read when they are needed.

    read: on the CPU, in the dtypes that the files hold, an adapter's changes merged in float32; a mapping of the caller's own.
    parameters: their number. fingerprint: of the files, see ``fingerprint.of_weights``; None for weights from elsewhere.
    """

    read: Callable[[], dict[str, Tensor]]
    parameters: int
    fingerprint: str | None

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], changes: Adapter | None, fingerprint: str | None) -> StoredWeights:
        """tensors: mapped into memory, and so not read yet; changes: an adapter's, which are merged with each ``read``."""
        count = sum(tensor.numel() for tensor in tensors.values())
        if changes is None:
            return cls(partial(dict, tensors), count, fingerprint)
        new = 0 if changes.new_rows is None else changes.new_rows.numel()
        return cls(partial(changes.merged, tensors), count + new, fingerprint)


def decoder_weights(folder: Path) -> dict[str, Tensor]:
    """The bare decoder's weights of a folder that holds a decoder, a language model or a P2L checkpoint."""
    return {n.removeprefix("model."): w for n, w in read_weights(folder).items() if not n.startswith(HEADS)}


def head_weights(folder: Path) -> dict[str, Tensor]:
    """The head's weights under their published names, layer by layer, of a checkpoint or an adapter."""
    adapter = folder / "adapter_model.safetensors"
    tensors = read_tensors(adapter) if adapter.is_file() else read_weights(folder)
    return {n: w for name, w in tensors.items() if (n := name.removeprefix(PEFT_PREFIX)).startswith("head.")}
