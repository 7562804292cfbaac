"""What the speed benchmarks run on: backbones of real architectures with random weights, or a checkpoint; and prompts.

Random prompts have the lengths of Chatbot Arena's, as a log-normal law: median 48 tokens, sigma 1.2 (5%, 25%, 75% and 95% at 7,
21, 108 and 345 tokens, mean 99, at most 4,000), which is near what the prompts of routing_scores.parquet have under SmolLM2's
tokenizer (16, 24, 105, 400; mean 102). Their words are made up, and a BPE tokenizer is trained on them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast, Qwen2Config

import p2l_engine.checkpoint
from p2l_engine.backbone.families import DecoderConfig
from p2l_engine.backbone.head import Head
from p2l_engine.backbone.weights import expected_shapes
from p2l_engine.checkpoint import Checkpoint, StoredWeights
from p2l_engine.engine import natural_dtype
from p2l_engine.feedback import feedback_model
from p2l_engine.prompts.tokenizer import TransformersTokenizer
from p2l_engine.tables.whole import read_table

MEDIAN, SIGMA, LONGEST = 48, 1.2, 4000
SYSTEM = "You are a helpful assistant, made for benchmarks. Answer as well as you can, and say so when you cannot."
TEMPLATE = (
    "{{ '<|im_start|>system\n" + SYSTEM + "<|im_end|>\n' }}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
)


def _qwen(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, tied: bool) -> PretrainedConfig:
    return Qwen2Config(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=151936, max_position_embeddings=32768, tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip


# As in the config.json of SmolLM2-135M-Instruct and of Qwen2.5-Instruct; and one so small that the other stages dominate.
ARCHITECTURES: dict[str, Callable[[], PretrainedConfig]] = {
    "smollm2-135m": lambda: LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152, max_position_embeddings=8192, tie_word_embeddings=True, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
    ),
    "tiny": lambda: LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=8448, max_position_embeddings=8192,
    ),
    "qwen2.5-0.5b": lambda: _qwen(896, 4864, 24, 14, 2, True),
    "qwen2.5-1.5b": lambda: _qwen(1536, 8960, 28, 12, 2, True),
    "qwen2.5-7b": lambda: _qwen(3584, 18944, 28, 28, 4, False),
}  # fmt: skip


def checkpoint(name: str, n_models: int, device: torch.device, dtype: torch.dtype) -> Checkpoint:
    """The architecture ``name`` with random weights (standard deviation 0.02) and a grk head over ``n_models``."""
    theirs, words = ARCHITECTURES[name](), tokenizer()
    config = DecoderConfig.read(theirs.to_dict())
    count = sum(prod(shape) for shape in expected_shapes(config).values())
    weights = StoredWeights(partial(random_weights, config, device, dtype), count, None)
    rng = torch.Generator().manual_seed(0)
    rows = torch.randn(n_models + 1, config.hidden_size, generator=rng) / config.hidden_size**0.5
    head = Head(rows, torch.zeros(n_models + 1), n_models)
    names = tuple(f"model-{i}" for i in range(n_models))
    return Checkpoint(
        Path(name),
        Path(name),
        config,
        TransformersTokenizer(words),
        names,
        feedback_model("grk"),
        weights,
        head,
        lambda: (theirs, words),
    )


def random_weights(config: DecoderConfig, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The same ones each time; norms are ones."""
    rng = torch.Generator(device).manual_seed(0)
    return {
        name: torch.ones(shape, device=device, dtype=dtype)
        if "norm" in name
        else 0.02 * torch.randn(shape, device=device, dtype=dtype, generator=rng)
        for name, shape in expected_shapes(config).items()
    }


def load(name: str, device: torch.device, n_models: int) -> Checkpoint:
    """An architecture with random weights, or a checkpoint: a folder, a hub name, or "default"."""
    if name in ARCHITECTURES:
        return checkpoint(name, n_models, device, natural_dtype(device))
    return p2l_engine.checkpoint.load(name)


def words(count: int = 4000, seed: int = 0) -> list[str]:
    """Made-up words of one to four syllables, the first ones far more common in ``prompts``."""
    rng = np.random.default_rng(seed)
    syllables = [c + v + e for c in "bdfgklmnprstvw" for v in "aeiou" for e in ("", "n", "r", "st")]
    return ["".join(rng.choice(syllables, int(rng.integers(1, 5)))) for _ in range(count)]


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 8,192 tokens, trained on the made-up words, with the special tokens of a chat model."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=8192, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    core.train_from_iterator([" ".join(words()), " ".join(words()), SYSTEM], trainer)
    special = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|pad|>", "cls_token": "<|cls|>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=core, **special)
    fast.chat_template = TEMPLATE
    return fast


def prompts(count: int, seed: int = 0) -> list[str]:
    """Random prompts of log-normal length in words, of about one token each."""
    rng = np.random.default_rng(seed)
    vocabulary = np.array(words())
    lengths = np.minimum(np.exp(rng.normal(np.log(MEDIAN), SIGMA, count)), LONGEST).astype(int).clip(1)
    ranks = (len(vocabulary) ** rng.random(lengths.sum()) - 1).astype(int)  # nearly Zipf's law
    return [" ".join(part) for part in np.split(vocabulary[ranks], np.cumsum(lengths)[:-1])]


def read_prompts(path: Path, count: int, seed: int = 0) -> list[str]:
    """At most ``count`` prompts, in random order, of a table with a column ``prompt``, each as the text of its cell."""
    found = read_table(path, ["prompt"]).columns.get("prompt", [])
    wrong = next((i for i, text in enumerate(found) if not isinstance(text, str)), None)
    if wrong is not None or not found:
        raise ValueError(f"{path}: expected texts in a column 'prompt', found {'none' if wrong is None else found[wrong]!r}")
    order = np.random.default_rng(seed).permutation(len(found))[:count]
    return [found[i] for i in order]


def flops(config: DecoderConfig | PretrainedConfig, lengths: Sequence[int], shared: Sequence[int]) -> float:
    """Floating-point operations for prompts of ``lengths`` own tokens after ``shared`` shared ones, which count once.

    Products with weights, and attention's two, below the diagonal alone; keys and values for all tokens of the last layer, the
    rest of it for the last token of each prompt.
    """
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    d, inner = config.hidden_size, config.intermediate_size
    q, kv = config.num_attention_heads * size, config.num_key_value_heads * size
    own, before = np.asarray(lengths, float), np.asarray(shared, float)
    per_token = 2 * d * (q + 2 * kv) + 2 * q * d + 6 * d * inner
    pairs = own * before + own * (own + 1) / 2
    whole = (config.num_hidden_layers - 1) * (per_token * own.sum() + 4 * q * pairs.sum())
    last = 4 * d * kv * own.sum() + len(own) * (4 * d * q + 6 * d * inner) + 4 * q * (own + before).sum()
    return float(whole + last)
