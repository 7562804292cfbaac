"""Small P2L checkpoints with random weights, made in the test: published layout, tokenizer and all."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedTokenizerFast

TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
MODELS = ["alpha", "beta", "gamma", "delta", "epsilon"]
SIZES = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 8192,
}


def tokenizer(cls_token: str | None = "<|cls|>", template: str = TEMPLATE) -> PreTrainedTokenizerFast:
    """Bytes as tokens, and the special tokens of a chat model."""
    vocabulary = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        cls_token=cls_token,
    )
    fast.chat_template = template
    return fast


def config(family: str = "llama", **changes: object) -> PretrainedConfig:
    """A tiny decoder's config; ``changes`` override SIZES."""
    return AutoConfig.for_model(family, **{**SIZES, **changes})


def write(
    folder: Path,
    decoder: PretrainedConfig | None = None,
    loss_type: str = "grk",
    head_type: str = "rk",
    factor: float | None = None,
    eta_downsize: bool = False,
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
    seed: int = 0,
    template: str = TEMPLATE,
) -> Path:
    """Writes a checkpoint and returns its folder."""
    torch.manual_seed(seed)
    decoder = decoder or config()
    body = AutoModel.from_config(decoder, dtype=torch.float32)
    for name, parameter in body.named_parameters():
        # Biases and norms are initialised to constants, under which a mix-up would not show.
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.3)
    tensors = {f"model.{name}": weight for name, weight in body.state_dict().items()}
    hidden, m = int(decoder.hidden_size), len(MODELS)
    inner = int(m // factor) if factor else 0
    shapes = {"head.head.0": (inner, hidden), "head.head.1": (m, inner)} if factor else {"head.head": (m, hidden)}
    if head_type == "rk":
        shapes |= {"head.eta_head.1": (1, inner)} if factor and eta_downsize else {"head.eta_head": (1, hidden)}
    for name, shape in shapes.items():
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = torch.randn(shape), torch.randn(shape[0])
    if factor and head_type == "rk" and eta_downsize:
        for part in ("weight", "bias"):
            tensors[f"head.eta_head.0.{part}"] = tensors[f"head.head.0.{part}"].clone()
    tensors = {name: weight.to(dtype).contiguous() for name, weight in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    decoder.save_pretrained(folder)
    tokenizer(template=template).save_pretrained(folder)
    (folder / "model_list.json").write_text(json.dumps(MODELS))
    training = {"model_type": decoder.model_type, "head_type": head_type, "loss_type": loss_type}
    if factor:
        training |= {"linear_head_downsize_factor": factor, "head_config": {"eta_downsize": eta_downsize}}
    (folder / "training_config.json").write_text(json.dumps(training))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names = sorted(tensors)
    places = {name: f"model-{1 + i % shards:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(names)}
    for file in set(places.values()):
        save_file({name: tensors[name] for name in names if places[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def adapter_of(folder: Path, base: Path, named: str, prefix: str = "base_model.model.") -> Path:
    """A LoRA adapter of rank 2 on one module of ``base``, which it calls ``named``."""
    from safetensors.torch import load_file

    folder.mkdir(parents=True)
    whole = load_file(base / "model.safetensors")
    module = "model.layers.1.self_attn.q_proj"
    weight = whole[f"{module}.weight"]
    torch.manual_seed(1)
    tensors = {f"{prefix}{name}": w.contiguous() for name, w in whole.items() if name.startswith("head.")}
    tensors[f"{prefix}{module}.lora_A.weight"] = torch.randn(2, weight.shape[1]) * 0.1
    tensors[f"{prefix}{module}.lora_B.weight"] = torch.randn(weight.shape[0], 2) * 0.1
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": named, "peft_type": "LORA", "r": 2, "lora_alpha": 4})
    )
    for name in ("model_list.json", "training_config.json"):
        (folder / name).write_text((base / name).read_text())
    return folder


def reference_theta(
    folder: Path, prompts: list[str], most: int = 8192, attention: str = "eager"
) -> tuple[torch.Tensor, torch.Tensor]:
    """theta [N, M] and eta [N] by transformers in float32, one prompt at a time, its last ``most`` tokens, for single-layer rk
    heads."""
    from safetensors.torch import load_file

    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    config = AutoConfig.from_pretrained(folder)
    body = AutoModel.from_config(config, dtype=torch.float32, attn_implementation=attention).eval()
    body.load_state_dict({n.removeprefix("model."): w.float() for n, w in tensors.items() if n.startswith("model.")})
    tok, rows = tokenizer(), []
    for prompt in prompts:
        text = f"<|im_start|>user\n{prompt}<|im_end|>\n<|cls|>"
        ids = tok(text, add_special_tokens=False, return_tensors="pt").input_ids[:, -most:]
        with torch.no_grad():
            rows.append(body(input_ids=ids).last_hidden_state[0, -1])
    hidden = torch.stack(rows)
    theta = hidden @ tensors["head.head.weight"].float().T + tensors["head.head.bias"].float()
    eta = hidden @ tensors["head.eta_head.weight"].float().T + tensors["head.eta_head.bias"].float()
    return theta, eta.squeeze(-1)
