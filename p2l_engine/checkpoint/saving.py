"""Writes checkpoint folders, atomically, and with the same bytes for the same weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from p2l_engine.backbone import tensor_file
from p2l_engine.tables.atomic import write_file, write_folder


def write_whole(folder: Path, fill: Callable[[Path], None], replace: bool = True) -> None:
    """Lets ``fill`` write into a temporary folder, then renames it to ``folder``; if anything fails, nothing has changed.
    replace: whether a checkpoint that is there may be replaced, also one that another process has written meanwhile.

    Raises ValueError where ``folder`` is neither empty nor a checkpoint that may be replaced, and OSError where it cannot be
    written.
    """
    folder = folder.resolve()
    if folder.exists() and not replaceable(folder):
        raise ValueError(f"{folder}: expected no folder, an empty one or a checkpoint; nothing was changed")
    try:
        written = write_folder(folder, fill, replace)
    except OSError as error:
        raise OSError(f"{folder}: cannot be written, nothing was kept: {error}") from error
    except Exception as error:
        if type(error) is Exception:  # the tokenizers library raises no other, even for a full disk
            raise OSError(f"{folder}: cannot be written, nothing was kept: {error}") from error
        raise
    if not written:
        raise ValueError(
            f"{folder}: another process has written it meanwhile, which is kept: expected no folder or an empty one"
        )


def replaceable(folder: Path) -> bool:
    """Whether a folder is empty or a checkpoint."""
    return folder.is_dir() and (not any(folder.iterdir()) or (folder / "training_config.json").is_file())


def write_tensors(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = torch.bfloat16) -> None:
    """Writes tensors in this dtype (None: each in its own), in the order of their names: the same weights give the same bytes.
    Raises FloatingPointError for weights that are not finite, OSError where they cannot be written."""
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise FloatingPointError(f"{len(broken)} of {len(tensors)} weights are not finite, {broken[0]} first: not written")
    ready = {name: tensors[name].detach().to("cpu", dtype).contiguous() for name in sorted(tensors)}
    stored: set[int] = set()
    for name, tensor in ready.items():
        storage = tensor.untyped_storage().data_ptr()
        if storage in stored:
            # A layer that theta and eta share is stored under both names, which safetensors refuses for shared memory.
            ready[name] = tensor.clone()
        stored.add(storage)
    tensor_file.write(path, ready, {"format": "pt"})


def write_json(path: Path, value: Any) -> None:
    """Indented JSON with a newline at its end."""
    write_file(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
