"""Reads a checkpoint's tokenizer without transformers, where its files say all that transformers would use.

Used: ``tokenizer.json``; of ``tokenizer_config.json`` the special tokens, ``chat_template`` and ``split_special_tokens``;
``special_tokens_map.json`` where the config lists no added tokens; ``chat_template.jinja``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from p2l_engine.checkpoint.files import read_json
from p2l_engine.errors import CheckpointError
from p2l_engine.prompts.tokenizer import FastTokenizer

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FLAGS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")

# Classes that transformers runs on tokenizer.json unchanged.
GENERIC = ("PreTrainedTokenizer", "TokenizersBackend")
# Classes that some versions of transformers rebuild from the vocabulary: their normalizer and pre-tokenizer, and the special
# tokens that default to DEFAULT_TOKEN.
_QWEN2_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
REBUILT: dict[str, tuple[object, object, tuple[str, ...]]] = {
    "GPT2Tokenizer": (
        None,
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        ("unk_token", "bos_token", "eos_token"),
    ),
    "Qwen2Tokenizer": (
        {"type": "NFC"},
        {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": _QWEN2_WORDS}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        },
        ("unk_token", "eos_token", "pad_token"),
    ),
}
DEFAULT_TOKEN = "<|endoftext|>"


class NeedsTransformers(Exception):
    """The tokenizer must be read by transformers; the message says why."""


def read_fast_tokenizer(folder: Path, model_type: str, training: Mapping[str, Any]) -> FastTokenizer:
    """The tokenizer of a folder, with the chat template, date and CLS token that ``training`` (a training config) gives it.

    model_type: of the backbone's config. Raises NeedsTransformers; CheckpointError where tokenizer.json cannot be read or there
    is no CLS token or no chat template.
    """
    from tokenizers import AddedToken

    if not (folder / "tokenizer_config.json").is_file():
        raise NeedsTransformers("there is no tokenizer_config.json")
    config = read_json(folder / "tokenizer_config.json", dict)
    name = _class_of(config, model_type)
    backend = _backend(folder)
    added = backend.get_added_tokens_decoder()
    if "added_tokens_decoder" not in config and (folder / "special_tokens_map.json").is_file():
        named = read_json(folder / "special_tokens_map.json", dict)
        config |= {name: token["content"] if _is_token(token) else token for name, token in named.items()}
    elif "added_tokens_decoder" in config:
        _check_added(config["added_tokens_decoder"], added, all_of_them=name in REBUILT)
    if name in REBUILT:
        _check_rebuilt(name, backend)
        for token in REBUILT[name][2]:
            config.setdefault(token, DEFAULT_TOKEN)
    special = _special_tokens(config, added)
    prefix_space = bool(config.get("add_prefix_space"))
    if (_settings(backend.pre_tokenizer) or {}).get("add_prefix_space", prefix_space) != prefix_space:
        raise NeedsTransformers("add_prefix_space differs between tokenizer_config.json and tokenizer.json")
    template = _template(folder, config, training)
    if "cls_token" not in special and training.get("cls_token_if_none"):
        special["cls_token"] = _text(training["cls_token_if_none"])
        backend.add_special_tokens([AddedToken(special["cls_token"], normalized=False, special=True)])
    if "cls_token" not in special:
        raise CheckpointError(f"{folder}: expected a tokenizer with a CLS token, found none (tokenizer_config.json)")
    if not template:
        raise CheckpointError(f"{folder}: expected a tokenizer with a chat template, found none")
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = bool(config.get("split_special_tokens"))
    return FastTokenizer(backend, template, special, training.get("date"))


def _class_of(config: Mapping[str, Any], model_type: str) -> str:
    """The tokenizer class without "Fast"."""
    given = config.get("tokenizer_class")
    name = given.removesuffix("Fast") if isinstance(given, str) else None
    if "auto_map" in config or "fix_mistral_regex" in config:
        raise NeedsTransformers("tokenizer_config.json names custom code, or a patch")
    if model_type == "qwen2" and name in (*GENERIC, "Qwen2Tokenizer"):
        return "Qwen2Tokenizer"  # some versions of transformers use it for all of them
    if name not in (*GENERIC, "GPT2Tokenizer"):
        raise NeedsTransformers(f"tokenizer_class {given!r} may differ from tokenizer.json")
    assert name is not None
    return name


def _backend(folder: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise CheckpointError(f"{folder}: the tokenizer cannot be read (tokenizer.json): {error}") from error


def _check_added(given: Any, added: Mapping[int, AddedToken], all_of_them: bool) -> None:
    """Checks that the added tokens of tokenizer_config.json are in tokenizer.json, with the same flags."""
    if not isinstance(given, dict):
        raise NeedsTransformers("added_tokens_decoder is no mapping")
    for key, token in given.items():
        if not str(key).isdecimal() or not _same(added.get(int(key)), token):
            raise NeedsTransformers(f"the added token {key} differs between tokenizer_config.json and tokenizer.json")
    if all_of_them and len(given) != len(added):
        raise NeedsTransformers("tokenizer_config.json lacks added tokens of tokenizer.json")


def _same(token: AddedToken | None, other: object) -> bool:
    """Whether ``other``, an entry of tokenizer_config.json, has the token's text and flags."""
    if token is None or not isinstance(other, dict):
        return token is other
    return set(other) <= {*FLAGS, "__type"} and all(getattr(token, flag) == other.get(flag) for flag in FLAGS)


def _special_tokens(config: Mapping[str, Any], added: Mapping[int, AddedToken]) -> dict[str, str]:
    """Special tokens by name. Raises NeedsTransformers unless all of them are special tokens of tokenizer.json."""
    known = {token.content for token in added.values() if token.special}
    special, extra = {}, config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    for name in SPECIAL_TOKENS:
        token = _content(config.get(name))
        if token:
            special[name] = token
    if not isinstance(extra, list):
        raise NeedsTransformers("it has model-specific special tokens")
    for key, value in config.items():
        if key.endswith("_token") and key not in SPECIAL_TOKENS and isinstance(value, str):
            raise NeedsTransformers(f"it names the special token {key}")
    for token in (*special.values(), *map(_content, extra)):
        if token not in known:
            raise NeedsTransformers(f"the special token {token!r} is none in tokenizer.json")
    return special


def _content(token: Any) -> str | None:
    """The text of a special token: a string, or a serialised AddedToken."""
    if _is_token(token) and token.get("__type") == "AddedToken":
        token = token["content"]
    if token is not None and not isinstance(token, str):
        raise NeedsTransformers(f"a special token is {token!r}")
    return token


def _is_token(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("content"), str)


def _check_rebuilt(name: str, backend: Tokenizer) -> None:
    """Checks that tokenizer.json equals the tokenizer that the class builds from its vocabulary."""
    normalizer, words, _ = REBUILT[name]
    model = backend.model
    plain = type(model).__name__ == "BPE" and (model.dropout, model.unk_token) == (None, None)
    plain &= not any((model.fuse_unk, model.byte_fallback, model.ignore_merges))
    if not plain or [_settings(backend.normalizer), _settings(backend.pre_tokenizer)] != [normalizer, words]:
        raise NeedsTransformers(f"tokenizer.json is not that of a {name}")


def _settings(part: Any) -> Any:
    """The settings of a normalizer or pre-tokenizer that change tokens; trim_offsets does not."""

    def without_offsets(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without_offsets(inner) for key, inner in value.items() if key != "trim_offsets"}
        return [without_offsets(item) for item in value] if isinstance(value, list) else value

    return None if part is None else without_offsets(json.loads(part.__getstate__()))


def _template(folder: Path, config: Mapping[str, Any], training: Mapping[str, Any]) -> str | None:
    """The chat template: training's, else that of a file, else the config's."""
    template = training.get("chat_template")
    if template:
        return _text(template)
    if (folder / "additional_chat_templates").exists() or any(folder.glob("chat_template_*.jinja")):
        raise NeedsTransformers("it has several chat templates")
    file = folder / "chat_template.jinja"
    template = file.read_text(encoding="utf-8") if file.is_file() else config.get("chat_template")
    if isinstance(template, list):
        named = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
        template = named.get("default")
        if template is None:
            raise NeedsTransformers("none of its chat templates is the default")
    return None if template is None else _text(template)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise NeedsTransformers(f"its chat template or CLS token is a {type(value).__name__}")
    return value
