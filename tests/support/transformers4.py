"""An environment with transformers 4, and what lmarena/p2l's code does with a published folder in it.

The packages lie in a folder of their own, which comes before the tests' own packages on the path of a new process.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from p2l_engine.checkpoint.cache_folder import cache_folder
from p2l_engine.tables.atomic import write_folder

PACKAGES = ("transformers==4.57.6", "tokenizers==0.22.2", "huggingface-hub==0.36.2")  # 16 MB to download

# Reads a job from each line of standard input, and writes its answer as a line of JSON to the file descriptor that its argument
# names. {"folder": ..., "prompts": ...}: theta and eta in float32 and in float64, all prompts in one padded batch. {"folder":
# ..., "positions": ...}: cosines of RoPE at the last of so many positions.
READER = """
import json, os, sys
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, LlamaModel, LlamaPreTrainedModel, Qwen2Model, Qwen2PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

assert transformers.__version__.startswith("4.57."), transformers.__version__
KINDS = {"llama": (LlamaPreTrainedModel, LlamaModel), "qwen2": (Qwen2PreTrainedModel, Qwen2Model)}

class Head(torch.nn.Module):
    def __init__(self, hidden, models, head_type, factor, eta_downsize):
        super().__init__()
        inner = int(models // factor) if factor else 0
        first = torch.nn.Linear(hidden, inner) if factor else None
        def last(size):
            return torch.nn.Sequential(first, torch.nn.Linear(inner, size)) if factor else torch.nn.Linear(hidden, size)
        self.head = last(models)
        if head_type == "rk":
            self.eta_head = last(1) if eta_downsize else torch.nn.Linear(hidden, 1)

def coefficients(folder, prompts):
    models = json.loads((folder / "model_list.json").read_text())
    training = json.loads((folder / "training_config.json").read_text())
    base, body = KINDS[training["model_type"]]
    class Published(base):
        def __init__(self, config):
            super().__init__(config)
            self.model = body(config)
            head_config = training.get("head_config") or {}
            factor = training.get("linear_head_downsize_factor")
            self.head = Head(config.hidden_size, len(models), training["head_type"], factor, head_config.get("eta_downsize"))
            self.post_init()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, loading = Published.from_pretrained(folder, torch_dtype=torch.float32, output_loading_info=True)
    assert not any(loading.values()), loading
    model.eval()
    texts = []
    for prompt in prompts:
        turns = [prompt] if isinstance(prompt, str) else prompt
        messages = [{"role": "user", "content": turn} for turn in turns]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
        texts.append(text.replace(tokenizer.cls_token, "<cls>") + tokenizer.cls_token)
    batch = tokenizer(texts, return_tensors="pt", max_length=8192, padding="longest", truncation=True)
    found = {"dtype": str(AutoConfig.from_pretrained(folder).torch_dtype)}
    with torch.no_grad():
        for dtype in (torch.float32, torch.float64):
            model = model.to(dtype)
            states = model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
            at_cls = states[batch["input_ids"] == tokenizer.cls_token_id]
            eta = model.head.eta_head(at_cls).squeeze(-1).tolist() if training["head_type"] == "rk" else None
            found[str(dtype)] = {"theta": model.head.head(at_cls).tolist(), "eta": eta}
    return found

def cosines(folder, positions):
    rope = LlamaRotaryEmbedding(AutoConfig.from_pretrained(folder))
    return rope(torch.ones(1), torch.arange(positions)[None])[0][0, -1].tolist()

with os.fdopen(int(sys.argv[1]), "w") as answers:
    for line in sys.stdin:
        job = json.loads(line)
        folder = Path(job["folder"])
        found = cosines(folder, job["positions"]) if "positions" in job else coefficients(folder, job["prompts"])
        print(json.dumps(found), file=answers, flush=True)
"""


def environment() -> Path:
    """The folder of the packages, installed on first use; skips where that is impossible."""
    ready = cache_folder() / "tests" / PACKAGES[0].replace("==", "-")
    if not ready.is_dir():
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check", *PACKAGES]

        def fill(work: Path) -> None:
            done = subprocess.run([*install, "--target", str(work)], capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"{', '.join(PACKAGES)} cannot be installed: {done.stderr.strip().splitlines()[-1]}")

        write_folder(ready, fill, replace=False)
    return ready


Jobs = Callable[[list[dict[str, Any]]], list[Any]]


@contextmanager
def reader(packages: Path, folder: Path) -> Iterator[Jobs]:
    """A function that gives READER's answers to jobs, all computed in one process in ``folder``."""
    (folder / "reader.py").write_text(READER)
    answers, end = os.pipe()
    with (
        (folder / "log").open("w+") as log,
        os.fdopen(answers) as lines,
        subprocess.Popen(
            [sys.executable, "reader.py", str(end)],
            cwd=folder,  # not the repository's root, whose kernels/ would be taken for the package of that name
            env=os.environ | {"PYTHONPATH": str(packages), "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.PIPE, stdout=log, stderr=log, pass_fds=[end], text=True,
        ) as process,
    ):  # fmt: skip
        os.close(end)

        def run(jobs: list[dict[str, Any]]) -> list[Any]:
            found = []
            for job in jobs:
                assert process.stdin is not None
                with contextlib.suppress(BrokenPipeError):  # it ended: the log says why
                    print(json.dumps(job), file=process.stdin, flush=True)
                line = lines.readline()
                assert line, (folder / "log").read_text()
                found.append(json.loads(line))
            return found

        yield run
