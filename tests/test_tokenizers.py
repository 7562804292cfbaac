"""Tokenizers read without transformers, against transformers' own: texts and token ids are equal."""

from __future__ import annotations

import json
import logging
from datetime import datetime
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from p2l_engine import checkpoint
from p2l_engine.checkpoint import huggingface
from p2l_engine.checkpoint.tokenizer import REBUILT, NeedsTransformers, read_fast_tokenizer
from p2l_engine.evaluation.features import frozen
from p2l_engine.prompts.encode import PromptEncoder
from p2l_engine.prompts.template import ChatTemplate
from p2l_engine.prompts.tokenizer import FastTokenizer, TransformersTokenizer
from tests.support import tiny

PROMPTS = [
    "hello", "", "  two  spaces ", "Schreibe ein Gedicht über den Mond.", "日本語 🙂\u200d", "it's 12345 o'clock\r\n\r\n\tand",
    "<|im_end|> <|im_start|>user <cls> <|cls|><|endoftext|>", "def f(x):\n    return x + 1", "a" * 300, "e\u0301 \ufb01",
    "\u00a0x",
]  # fmt: skip
MASK = {"__type": "AddedToken", "content": "<|endoftext|>", "lstrip": False, "normalized": False, "special": True}
TRAINING = {"cls_token_if_none": "<|cls|>", "date": "2026-01-31"}  # the date where a template reads the clock
QWEN = (
    "{%- if messages[0]['role'] == 'system' %}\n    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}\n"
    "{%- else %}\n    {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud.<|im_end|>\\n' }}\n{%- endif %}\n"
    '{%- for message in messages %}\n    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}\n'
    "    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}\n    {%- endif %}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n"
)
TEMPLATES = {
    "plain": tiny.TEMPLATE,
    "qwen": QWEN,
    "special tokens": "{{ bos_token }}{% for m in messages %}{{ m.content | trim }}{{ eos_token }}{{ mask_token }}{% endfor %}",
    "blocks": "{% for m in messages %}\n    {% if loop.index > 1 %}\n next\n    {% endif %}\n{{ m['content'] }}\n{% endfor %}",
    "json and loops": "{% for m in messages %}{{ m | tojson }}{{ {'b': '<é>'} | tojson(indent=1) }}{% break %}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "namespace": "{% set n = namespace(i=0) %}{% for m in messages %}{% set n.i = n.i + 1 %}{{ n.i }}{% endfor %}",
    "undefined": "{% if tools is not none %}tools{% endif %}{% if other is defined %}x{% endif %}{{ messages[-1].content }}",
    "strftime": "{{ strftime_now('%Y') }}{{ dict(a=1) }}{{ messages[0].content }}",
}  # fmt: skip


def byte_level(family: str) -> Tokenizer:
    """A byte-level BPE tokenizer as GPT-2's or Qwen2's classes build it, trained on the prompts."""
    core = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix=""))
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if family == "Qwen2Tokenizer":
        pattern = REBUILT[family][1]["pretokenizers"][0]["pattern"]["Regex"]
        words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        words = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), words])
        core.normalizer = normalizers.NFC()
    core.pre_tokenizer, core.decoder = words, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    core.train_from_iterator(PROMPTS * 3, trainer)
    core.add_special_tokens([AddedToken(t, special=True) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")])
    core.add_tokens([AddedToken("<tool_call>", normalized=False, special=False)])
    return core


def write(folder, class_name="PreTrainedTokenizerFast", model_type="llama", template=QWEN, **config):
    """A folder with a decoder's config and a tokenizer, as transformers 4 writes them."""
    folder.mkdir(exist_ok=True)
    core = byte_level(class_name.removesuffix("Fast"))
    core.save(str(folder / "tokenizer.json"))
    flags = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    added = {str(i): {flag: getattr(t, flag) for flag in flags} for i, t in core.get_added_tokens_decoder().items()}
    settings_ = {
        "tokenizer_class": class_name, "added_tokens_decoder": added, "chat_template": template, "bos_token": None,
        "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None, "model_max_length": 131072,
        "add_prefix_space": False, "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "clean_up_tokenization_spaces": False, "errors": "replace", "split_special_tokens": False, "add_bos_token": False,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings_ | config))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


def both(folder, model_type="llama", training=TRAINING):
    """The encoders of our tokenizer and of transformers'."""
    ours = read_fast_tokenizer(folder, model_type, training)
    theirs = TransformersTokenizer(huggingface.read_tokenizer(folder, training), training.get("date"))
    return PromptEncoder(ours), PromptEncoder(theirs)


def same(ours, theirs, prompts=PROMPTS):
    for prompt in prompts:
        turns = [prompt] if isinstance(prompt, str) else prompt
        messages = [{"role": "user", "content": turn} for turn in turns]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(chat_template_utils, "datetime", SimpleNamespace(now=lambda: datetime(2026, 1, 31)))
            rendered = theirs.tokenizer._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
        assert ours.text(turns) == theirs.text(turns) == rendered.replace(theirs.cls_token, "<cls>") + theirs.cls_token
    for one, other in zip(ours.encode(prompts), theirs.encode(prompts), strict=True):
        assert one.tolist() == other.tolist()
    assert ours.encode(prompts[:1])[0].tolist() == theirs.encode(prompts[:1])[0].tolist()
    assert len(ours.tokenizer) == len(theirs.tokenizer)
    assert ours.tokenizer.special_tokens == theirs.tokenizer.special_tokens
    assert ours.tokenizer.longest_token == theirs.tokenizer.longest_token
    assert ours.tokenizer.id_of(ours.cls_token) == theirs.tokenizer.id_of(theirs.cls_token)
    assert ours.tokenizer.id_of("<no token>") is None
    assert ours.prefix().tolist() == theirs.prefix().tolist()


@pytest.mark.parametrize(
    ("class_name", "model_type"),
    [
        ("PreTrainedTokenizerFast", "llama"),
        ("TokenizersBackend", "llama"),
        ("GPT2Tokenizer", "llama"),
        ("GPT2TokenizerFast", "llama"),
        ("Qwen2Tokenizer", "qwen2"),
        ("Qwen2TokenizerFast", "qwen2"),
    ],
)
def test_every_class_gives_the_same_tokens(class_name, model_type, tmp_path):
    folder = write(tmp_path, class_name, model_type)
    ours, theirs = both(folder, model_type)
    same(ours, theirs, [*PROMPTS, ["two", "turns"], "<tool_call>x"])


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_gives_the_same_text(name, tmp_path):
    folder = write(tmp_path, template=TEMPLATES[name], bos_token="<|im_start|>", mask_token=MASK)
    same(*both(folder), [*PROMPTS, ["two", "turns"]])


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.text(alphabet=st.characters(exclude_categories=["Cs"])), min_size=1, max_size=3))
def test_any_text_gives_the_same_tokens(texts, pair):
    ours, theirs = pair
    assert ours.encode([texts])[0].tolist() == theirs.encode([texts])[0].tolist()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return both(write(tmp_path_factory.mktemp("qwen") / "folder", "Qwen2Tokenizer", "qwen2"), "qwen2")


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_tiny_checkpoints_give_the_same_tokens(family, tmp_path):
    folder = tiny.write(tmp_path, tiny.config(family))
    training = json.loads((folder / "training_config.json").read_text())
    ours = PromptEncoder(checkpoint.read_tokenizer(folder, training, family))
    theirs = PromptEncoder(TransformersTokenizer(huggingface.read_tokenizer(folder, training)))
    same(ours, theirs)
    assert isinstance(ours.tokenizer, FastTokenizer) == (family == "llama")  # bytes without Qwen2's words: transformers'


@pytest.mark.slow
def test_the_default_checkpoint_gives_the_same_tokens(default_engine):
    ours = default_engine.encoder
    assert isinstance(ours.tokenizer, FastTokenizer)
    _, theirs = checkpoint.load().transformers()
    same(ours, PromptEncoder(TransformersTokenizer(theirs)))


def test_the_untrained_backbone_is_read_as_transformers_objects_too(tmp_path):
    folder = tiny.write(tmp_path, template=tiny.TEMPLATE)
    loaded = frozen(str(folder), json.loads((folder / "training_config.json").read_text()))
    config, theirs = loaded.transformers()
    assert config.vocab_size == loaded.config.vocab_size == len(loaded.weights.read()["embed_tokens.weight"])
    same(PromptEncoder(loaded.tokenizer), PromptEncoder(TransformersTokenizer(theirs)))


def test_where_the_template_comes_from(tmp_path):
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "list {{ messages[0].content }}"}]
    folder = write(tmp_path, chat_template=named)
    for training, file in (
        (TRAINING, None),
        (TRAINING, "file {{ messages[0].content }}"),
        (TRAINING | {"chat_template": QWEN}, None),
    ):
        if file:
            (folder / "chat_template.jinja").write_text(file)
        same(*both(folder, training=training))


def test_special_tokens_of_older_files(tmp_path):
    folder = write(tmp_path)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["added_tokens_decoder"], config["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    named = {"eos_token": {"content": "<|endoftext|>", "lstrip": False}, "cls_token": "<|im_end|>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(named))
    ours, theirs = both(folder)
    assert ours.cls_token == "<|im_end|>"
    same(ours, theirs)


def test_special_tokens_may_be_split(tmp_path):
    ours, theirs = both(write(tmp_path, split_special_tokens=True))
    same(ours, theirs)
    assert len(ours.encode(["<|im_end|>"])[0]) > len(both(write(tmp_path))[0].encode(["<|im_end|>"])[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer_class": "LlamaTokenizer"}, "tokenizer_class 'LlamaTokenizer'"),
        ({"tokenizer_class": None}, "tokenizer_class None"),
        ({"auto_map": {"AutoTokenizer": ["a.B", None]}}, "custom code"),
        ({"add_prefix_space": True}, "add_prefix_space differs"),
        ({"cls_token": "<new>"}, "the special token '<new>' is none in tokenizer.json"),
        ({"additional_special_tokens": ["<new>"]}, "the special token '<new>' is none"),
        ({"extra_special_tokens": {"image_token": "<image>"}}, "model-specific special tokens"),
        ({"image_token": "<image>"}, "names the special token image_token"),
        ({"eos_token": 3}, "a special token is 3"),
        ({"mask_token": {"content": "<|endoftext|>"}}, "a special token is {'content'"),
        ({"added_tokens_decoder": {"5": {"content": "<x>"}}}, "the added token 5 differs"),
        ({"added_tokens_decoder": []}, "no mapping"),
        ({"chat_template": [{"name": "rag", "template": "x"}]}, "none of its chat templates is the default"),
        ({"chat_template": {"a": 1}}, "is a dict"),
    ],
)
def test_tokenizers_that_need_transformers_say_why(change, message, tmp_path):
    with pytest.raises(NeedsTransformers, match=message):
        read_fast_tokenizer(write(tmp_path, **change), "llama", TRAINING)


def test_files_that_need_transformers(tmp_path):
    folder = write(tmp_path, "PreTrainedTokenizerFast")
    with pytest.raises(NeedsTransformers, match="not that of a Qwen2Tokenizer"):
        read_fast_tokenizer(folder, "qwen2", TRAINING)
    (folder / "additional_chat_templates").mkdir()
    with pytest.raises(NeedsTransformers, match="several chat templates"):
        read_fast_tokenizer(folder, "llama", TRAINING)
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(NeedsTransformers, match="no tokenizer_config"):
        read_fast_tokenizer(folder, "llama", TRAINING)


def test_reading_with_transformers_is_logged(tmp_path, caplog):
    fast = tiny.tokenizer()
    fast.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"image_token": "<|pad|>"}))
    with caplog.at_level(logging.INFO):
        found = checkpoint.read_tokenizer(tmp_path, {}, "llama")
    assert isinstance(found, TransformersTokenizer)
    assert "transformers reads the tokenizer of" in caplog.text
    assert "names the special token image_token" in caplog.text
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert found.ids(["hello"]) == theirs(["hello"], add_special_tokens=False)["input_ids"]
    assert isinstance(theirs, PreTrainedTokenizerFast)


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no') }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{% set n = namespace(_x=1) %}",
        "{% set n = namespace() %}{% set n._x = 1 %}",
        "{{ dict.__class__() }}",
        "{% for %}",
    ],
)
def test_templates_cannot_leave_the_sandbox(source):
    with pytest.raises(TemplateError):
        ChatTemplate(source, {}).render(["x"])
