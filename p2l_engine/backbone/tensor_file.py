"""Safetensors files: every tensor that a checkpoint has in one is read and written here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from p2l_engine.errors import CheckpointError


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, mapped into memory (nothing is read before it is used), and its metadata. Raises CheckpointError
    for a file that is not there or cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            return tensors, file.metadata() or {}
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: expected the file {path.name}, found none") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged, truncated or no safetensors file: {error}; fetch it again") from error


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a file; the same tensors and metadata give the same bytes. Raises OSError."""
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(ready, path, metadata=None if metadata is None else dict(metadata))
    except SafetensorError as error:  # a full disk, among others
        raise OSError(f"{path.name}: {error}") from error
    path.chmod(0o644)
