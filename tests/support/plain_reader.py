"""Reads a published P2L folder with transformers and safetensors only, as any other reader of the layout would."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoTokenizer


def coefficients(folder: Path, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """theta [N, M] and eta [N] (None for bt heads), float32, one prompt at a time."""
    tensors = {name: weight.float() for name, weight in load_file(folder / "model.safetensors").items()}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    body = AutoModel.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32).eval()
    body.load_state_dict({n.removeprefix("model."): w for n, w in tensors.items() if n.startswith("model.")})
    assert tensors[last_of(tensors, "head.head")].shape[0] == len(json.loads((folder / "model_list.json").read_text()))

    def layers(x: torch.Tensor, name: str) -> torch.Tensor:
        for part in [f"{name}."] if f"{name}.weight" in tensors else [f"{name}.0.", f"{name}.1."]:
            x = torch.nn.functional.linear(x, tensors[f"{part}weight"], tensors[f"{part}bias"])
        return x

    rows = []
    for prompt in prompts:
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
        text = text.replace(tokenizer.cls_token, "<cls>") + tokenizer.cls_token
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[:, -8192:]
        with torch.no_grad():
            rows.append(body(input_ids=ids).last_hidden_state[0, -1])
    hidden = torch.stack(rows)
    tied = any(name.startswith("head.eta_head") for name in tensors)
    return layers(hidden, "head.head"), layers(hidden, "head.eta_head").squeeze(-1) if tied else None


def last_of(tensors: dict[str, torch.Tensor], name: str) -> str:
    return f"{name}.weight" if f"{name}.weight" in tensors else f"{name}.1.weight"
