"""A checkpoint's JSON and safetensors files. Nothing in them is ever executed. Each function raises CheckpointError."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from p2l_engine.backbone import tensor_file
from p2l_engine.errors import CheckpointError


def read_json(path: Path, kind: type) -> Any:
    """The content of a JSON file, which must be of this type."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: expected the file {path.name}, found none") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: expected JSON: {error}") from None
    if not isinstance(value, kind):
        raise CheckpointError(f"{path}: expected a JSON {kind.__name__}, found {type(value).__name__}")
    return value


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped into memory: nothing is read before it is used."""
    tensors, _ = tensor_file.read(path)
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise CheckpointError(
                f"{path}: {name}: expected floating point, found {tensor.dtype}: take the weights before they were quantised; "
                "dtype int8 quantises them when they are read"
            )
    return tensors


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of ``model.safetensors``, or of the shards that its index names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return read_tensors(single)
    if index.is_file():
        places = read_json(index, dict).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
            raise CheckpointError(f"{index}: expected a 'weight_map' from key to file, found {places!r:.80}")
        tensors: dict[str, Tensor] = {}
        for shard in sorted(set(places.values())):
            tensors |= read_tensors(folder / Path(shard).name)
        missing = sorted(set(places) - set(tensors))
        if missing:
            raise CheckpointError(f"{folder}: the shards lack {_named(missing)}, which {index.name} promises")
        return tensors
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    hint = f" ({_named(pickled)} is pickled and never read: convert it to safetensors)" if pickled else ""
    raise CheckpointError(f"{folder}: expected model.safetensors or model.safetensors.index.json, found neither{hint}")


def _named(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
