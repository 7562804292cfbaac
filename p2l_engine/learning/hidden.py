"""Hidden states of prompts, computed once: a cache on disk, by content."""

from __future__ import annotations

import hashlib
import json
import tempfile
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from p2l_engine.checkpoint import cache_folder as caches
from p2l_engine.checkpoint.adapter import PEFT_PREFIX
from p2l_engine.checkpoint.files import read_json, read_tensors, read_weights
from p2l_engine.engine import Engine, described
from p2l_engine.prompts.parse import Prompt, parse_batch
from p2l_engine.tables.atomic import write_file

Float32 = npt.NDArray[np.float32]

PER_FILE = 1024  # prompts: what an interrupted run loses at most
SAMPLES = 4096  # values of each tensor that tell backbones apart
NAMES = ("base_model_name_or_path", "inference_mode", "peft_version")  # settings of an adapter that change no hidden state


def cache_folder() -> Path:
    """Where the commands keep hidden states: in the user's cache."""
    return caches.cache_folder() / "hidden"


def hidden_states(
    engine: Engine, prompts: Sequence[Prompt], cache: Path | None = None, progress: Callable[[int], object] | None = None
) -> Float32:
    """[P, D]: what the head reads: see ``states_and_kept``."""
    return states_and_kept(engine, prompts, cache, progress)[0]


def states_and_kept(
    engine: Engine, prompts: Sequence[Prompt], cache: Path | None = None, progress: Callable[[int], object] | None = None
) -> tuple[Float32, Float32 | None]:
    """[P, D]: what the head reads, after the final norm, beside topics where the checkpoint has them, and after its shrinkage
    where it has one; and the share [P] that this kept, else None.

    cache: a folder of hidden states alone, before topics and shrinkage, by fingerprint of the engine's backbone and by content
    of the prompt; those that it lacks are computed and added, a file for each 1,024 prompts. Several processes may share it.
    progress: called with numbers of prompts that are finished. Raises PromptError for a prompt that cannot be read,
    ValueError for a damaged file of the cache, OSError where the cache cannot be written.
    """
    turns = parse_batch(prompts)
    keys = [hashlib.sha256(json.dumps(list(one)).encode()).digest() for one in turns]

    def stage(states: Tensor, _: object) -> tuple[Tensor]:
        return (engine.normed(states)[:, : engine.hidden_size],)

    states = np.empty((len(turns), engine.hidden_size), np.float32)
    folder = None if cache is None else cache / fingerprint(engine)
    known = {} if folder is None else _find(folder, set(keys), states.shape[1])
    rows: dict[bytes, list[int]] = {}
    for i, key in enumerate(keys):
        rows.setdefault(key, []).append(i)
    for key, row in known.items():
        states[rows[key]] = row
    new = [key for key in rows if key not in known]
    if folder is not None and new:
        _check_kept(folder)
    if progress is not None and len(new) < len(rows):
        progress(sum(len(rows[key]) for key in known))
    for start in range(0, len(new), PER_FILE):
        part = new[start : start + PER_FILE]
        found = np.empty((len(part), states.shape[1]), np.float32)
        for some, (hidden,) in engine.stream([turns[rows[key][0]] for key in part], stage):
            found[some] = hidden
            if progress is not None:
                progress(sum(len(rows[part[i]]) for i in some))
        for key, row in zip(part, found, strict=True):
            states[rows[key]] = row
        if folder is not None:
            data: dict[str, npt.NDArray[Any]] = {
                "keys": np.frombuffer(b"".join(part), np.uint8).reshape(-1, 32),
                "states": found,
            }
            write_file(folder / f"{uuid.uuid4().hex}.safetensors", save(data))
    if engine.state_size > engine.hidden_size:
        states = np.concatenate([states, engine.words(turns)], 1)
    with torch.inference_mode():
        read, kept = engine.read_normed(torch.from_numpy(states).to(engine.device))
    return read.cpu().numpy(), None if kept is None else kept.cpu().numpy()


def fingerprint(engine: Engine) -> str:
    """SHA-256 of what hidden states depend on: the backbone's weights (a sample of each tensor) and settings, the tokenizer and
    the text that it gets, the most tokens, the dtype and the kind of device; not the head and the models' names."""
    found = hashlib.sha256()
    adapter = engine.folder / "adapter_config.json"
    weights = [read_weights(engine.base)]
    settings: list[Any] = [read_json(engine.base / "config.json", dict)]
    if adapter.is_file():
        weights.append(read_tensors(engine.folder / "adapter_model.safetensors"))
        settings.append({key: value for key, value in read_json(adapter, dict).items() if key not in NAMES})
    for of in weights:
        for name in sorted(of):
            if not name.removeprefix(PEFT_PREFIX).startswith("head."):
                found.update(f"{name} {list(of[name].shape)} {of[name].dtype}\n".encode())
                found.update(_sample(of[name]))
    words = next(path for path in (engine.folder, engine.base) if (path / "tokenizer.json").is_file())
    found.update((words / "tokenizer.json").read_bytes())
    settings += [engine.encoder.text(["a", "b"]), engine.encoder.max_tokens, described(engine.dtype), engine.device.type]
    found.update(json.dumps(settings, sort_keys=True).encode())
    return found.hexdigest()[:32]


def _check_kept(folder: Path) -> None:
    """Makes the folder, and raises OSError where hidden states cannot be kept there: before they are computed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(
            f"{folder}: hidden states cannot be kept here: {error}; P2L_ENGINE_CACHE names another folder of caches, "
            "--no-cache keeps none"
        ) from error


def _sample(tensor: Tensor) -> bytes:
    """Evenly spread values of a tensor, all of a small one."""
    flat = tensor.reshape(-1)
    step = max(1, len(flat) // SAMPLES)
    return flat[::step].to(torch.float32).numpy().tobytes()


def _find(folder: Path, keys: set[bytes], width: int) -> dict[bytes, Float32]:
    """The cached hidden states of these keys."""
    found: dict[bytes, Float32] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="np") as file:
                stored = file.get_tensor("keys")
                places = [(i, key) for i, key in enumerate(map(bytes, stored)) if key in keys]
                if places:
                    states = file.get_tensor("states")
                    if states.shape != (len(stored), width):
                        raise ValueError(f"expected shape {[len(stored), width]}, got {list(states.shape)}")
                    if not np.isfinite(states).all():
                        raise ValueError("expected finite numbers")
                    found |= {key: states[i] for i, key in places}
        except FileNotFoundError:
            continue  # another process has cleared the cache
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{path}: cached hidden states cannot be read: {error}; remove this file") from error
    return found
