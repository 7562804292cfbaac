"""Writes a checkpoint again, in another folder, with another head; the backbone, the tokenizer and all else stay the same."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from p2l_engine.backbone.head import Head
from p2l_engine.checkpoint.adapter import PEFT_PREFIX
from p2l_engine.checkpoint.files import read_json, read_tensors
from p2l_engine.checkpoint.read import Checkpoint
from p2l_engine.checkpoint.saving import write_json, write_tensors, write_whole
from p2l_engine.tables.atomic import write_file

ADAPTER, SINGLE, INDEX = "adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json"
HEAD_SHARD = "model-head.safetensors"
OF_ONE_HEAD = ("README.md", "evaluation.json")  # they describe the old one
LINEAR: dict[str, Any] = {"linear_head_downsize_factor": None, "head_config": {}}  # the head is one layer


def rewrite(
    source: Checkpoint,
    target: Path,
    head: Head,
    models: Sequence[str] | None = None,
    training: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes | Callable[[Path], object] | None] | None = None,
) -> None:
    """Writes ``source`` to the folder ``target`` with this head, its weights in float32, whatever their dtype was.

    head: for the hidden states of the same backbone, with a tie parameter where the source has one; one layer, also where the
    source's head has two. models: the names of its columns, None: the source's. training: entries of training_config.json that
    are added or replaced. files: contents of files by name, or functions that write them, None for a file of the source that is
    left out; README.md and evaluation.json, which describe the old head, are left out unless they are given. An adapter stays
    an adapter over the same backbone. The folder is written whole or not at all.

    Raises ValueError where ``target`` is neither missing nor an empty folder, or lies in the source's folder, or where head and
    models do not fit; FloatingPointError for weights that are not finite; OSError where the folder cannot be written.
    """
    names = tuple(source.models if models is None else models)
    _check(source, target, head, names)
    given = dict.fromkeys(OF_ONE_HEAD) | dict(files or {})
    own = {
        "model_list.json": list(names),
        "training_config.json": read_json(source.folder / "training_config.json", dict) | LINEAR | dict(training or {}),
    }
    if (source.folder / "adapter_config.json").is_file():
        settings = read_json(source.folder / "adapter_config.json", dict)
        own["adapter_config.json"] = settings | {"base_model_name_or_path": _base_from(source, target, settings)}
    reserved = sorted(name for name in given if name in own or _is_weights(name))
    if reserved:
        raise ValueError(f"files: expected none that the checkpoint consists of, got {', '.join(reserved)}")

    def fill(work: Path) -> None:
        written = _write_weights(source.folder, work, _tensors(head))
        for entry in sorted(source.folder.iterdir()):
            if entry.name in {*written, *given, *own} or entry.name.startswith("."):
                continue
            if entry.is_file():
                shutil.copyfile(entry, work / entry.name)
            elif entry.name == "additional_chat_templates":
                shutil.copytree(entry, work / entry.name)
        for name, value in own.items():
            write_json(work / name, value)
        for name, data in given.items():
            if callable(data):
                data(work / name)
            elif data is not None:
                write_file(work / name, data)

    write_whole(target, fill, replace=False)


def check_target(source: Path, target: Path) -> None:
    """Whether a checkpoint of the folder ``source`` can be written again as ``target``: raises ValueError where this is neither
    missing nor an empty folder, or lies in the source's folder; OSError where no folder can be made there."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target}: expected a folder that does not exist yet, or an empty one")
    if source.resolve() in (target.resolve(), *target.resolve().parents):
        raise ValueError(f"{target}: expected a folder outside the checkpoint's own, {source}")
    if target.is_mount():  # the finished folder takes its name, which no mount point gives up
        raise OSError(f"{target}: cannot be written, nothing was kept: it is a mount point: name a folder within it")
    above = next(folder for folder in target.resolve().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        why = "read-only" if above.is_dir() else "no folder"
        raise OSError(f"{target}: cannot be written, nothing was kept: {above} is {why}")


def _check(source: Checkpoint, target: Path, head: Head, names: tuple[str, ...]) -> None:
    check_target(source.folder, target)
    if len(names) != head.n_models or len(set(names)) != len(names) or not names:
        raise ValueError(f"models: expected {head.n_models} different names, one for each row of the head, got {len(names)}")
    if head.has_eta != source.head.has_eta or head.weight.shape[1] != source.head.weight.shape[1]:
        raise ValueError(
            f"head: expected rows of {source.head.weight.shape[1]} {'with' if source.head.has_eta else 'without'} a tie "
            f"parameter, as the checkpoint's, got rows of {head.weight.shape[1]} {'with' if head.has_eta else 'without'} one"
        )


def _is_weights(name: str) -> bool:
    return name in (ADAPTER, INDEX) or (name.startswith("model") and name.endswith(".safetensors"))


def _tensors(head: Head) -> dict[str, Tensor]:
    """The head's layers under their published names, float32."""
    m = head.n_models
    rows = {"head.head": slice(0, m)} | ({"head.eta_head": slice(m, m + 1)} if head.has_eta else {})
    return {
        f"{layer}.{part}": tensor[of].float()
        for layer, of in rows.items()
        for part, tensor in (("weight", head.weight), ("bias", head.bias))
    }


def _write_weights(source: Path, work: Path, head: Mapping[str, Tensor]) -> set[str]:
    """Writes the source's weights into ``work`` with this head. Returns the names of the source's files that need no copy.

    Shards without a part of the head are left to be copied; the new head is a shard of its own.
    """
    adapter, single = source / ADAPTER, source / SINGLE
    if adapter.is_file():
        tensors = read_tensors(adapter)
        wrapped = any(name.startswith(PEFT_PREFIX) for name in tensors)
        new = {f"{PEFT_PREFIX}{name}" if wrapped else name: tensor for name, tensor in head.items()}
        write_tensors(work / ADAPTER, _without_head(tensors) | new, dtype=None)
        return {ADAPTER}
    if single.is_file():
        write_tensors(work / SINGLE, _without_head(read_tensors(single)) | dict(head), dtype=None)
        return {SINGLE}
    index = read_json(source / INDEX, dict)
    places: dict[str, str] = dict(index["weight_map"])
    changed = {Path(place).name for name, place in places.items() if _is_head(name)}
    for shard in sorted(changed):
        rest = _without_head(read_tensors(source / shard))
        if rest:
            write_tensors(work / shard, rest, dtype=None)
    write_tensors(work / HEAD_SHARD, head, dtype=None)
    places = {name: Path(place).name for name, place in places.items() if not _is_head(name)}
    metadata = {key: value for key, value in index.get("metadata", {}).items() if key != "total_size"}
    write_json(work / INDEX, {"metadata": metadata, "weight_map": places | dict.fromkeys(head, HEAD_SHARD)})
    return changed | {INDEX, HEAD_SHARD}


def _is_head(name: str) -> bool:
    return name.removeprefix(PEFT_PREFIX).startswith("head.") and ".lora_" not in name


def _without_head(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not _is_head(name)}


def _base_from(source: Checkpoint, target: Path, settings: Mapping[str, Any]) -> str:
    """The backbone's name for an adapter in ``target``: a relative path starts there, other names stay."""
    name = str(settings["base_model_name_or_path"])
    path = Path(name).expanduser()
    local = (source.folder / path).is_dir() or path.is_dir()
    return os.path.relpath(source.base.resolve(), target.resolve()) if local and not path.is_absolute() else name
