"""Tokenizers with a chat template and a CLS token: built on the tokenizers library, or wrapped from transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date as Date
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from p2l_engine.prompts.template import ChatTemplate

if TYPE_CHECKING:
    import tokenizers
    from transformers import PreTrainedTokenizerBase


class ChatTokenizer(Protocol):
    """A tokenizer with a chat template. special_tokens: texts by name, ``cls_token`` among them."""

    @property
    def special_tokens(self) -> Mapping[str, str]: ...

    @property
    def template(self) -> ChatTemplate: ...

    def ids(self, texts: Sequence[str]) -> Sequence[Sequence[int]]:
        """Token ids of texts, none added."""

    def id_of(self, token: str) -> int | None:
        """The id of a token; None where there is no such token."""

    def __len__(self) -> int:
        """The number of tokens, added ones among them."""

    @property
    def longest_token(self) -> int:
        """Characters of the longest token."""

    @property
    def added_tokens(self) -> Sequence[str]:
        """Texts that are one token wherever they are, such as special tokens."""


class FastTokenizer:
    """A tokenizer built on the tokenizers library, without transformers. It owns ``backend``, which nothing else may change.

    date: see ChatTemplate.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        template: str,
        special_tokens: Mapping[str, str],
        date: str | Date | None = None,
    ) -> None:
        self.special_tokens = dict(special_tokens)
        self._backend, self.template = backend, ChatTemplate(template, special_tokens, date)

    def ids(self, texts: Sequence[str]) -> Sequence[Sequence[int]]:
        """See ChatTokenizer."""
        if len(texts) == 1:  # on this thread
            return [self._backend.encode(texts[0], add_special_tokens=False).ids]
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def id_of(self, token: str) -> int | None:
        """See ChatTokenizer."""
        found: int | None = self._backend.token_to_id(token)
        return found

    def __len__(self) -> int:
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    @cached_property
    def longest_token(self) -> int:
        """See ChatTokenizer."""
        return max(map(len, self._backend.get_vocab(with_added_tokens=True)))

    @property
    def added_tokens(self) -> Sequence[str]:
        """See ChatTokenizer."""
        return [token.content for token in self._backend.get_added_tokens_decoder().values()]


class TransformersTokenizer:
    """A tokenizer of transformers. Where it is built on the tokenizers library, a copy of that is used: calls of the original
    change its truncation and padding. date: see ChatTemplate.

    Raises ValueError where it has no CLS token or no chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, date: str | Date | None = None) -> None:
        if not tokenizer.cls_token:
            raise ValueError("tokenizer: expected a CLS token, got none; a P2L checkpoint's tokenizer names one")
        if not tokenizer.chat_template:
            raise ValueError("tokenizer: expected a chat template, got none; a P2L checkpoint's tokenizer has one")
        self._tokenizer, self._own = tokenizer, _copied_backend(tokenizer)
        self.template = ChatTemplate(tokenizer.get_chat_template(), tokenizer.special_tokens_map, date)

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """See ChatTokenizer."""
        found = self._tokenizer.special_tokens_map
        return {name: str(token) for name, token in found.items() if name != "additional_special_tokens"}

    def ids(self, texts: Sequence[str]) -> Sequence[Sequence[int]]:
        """See ChatTokenizer."""
        if self._own is None:
            found: Any = self._tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)[
                "input_ids"
            ]
            return found  # type: ignore[no-any-return]
        # Without the lists, masks and offsets that transformers makes: a third of the time.
        return [encoding.ids for encoding in self._own.encode_batch_fast(texts, add_special_tokens=False)]

    def id_of(self, token: str) -> int | None:
        """See ChatTokenizer."""
        return self._tokenizer.get_vocab().get(token)

    def __len__(self) -> int:
        return len(self._tokenizer)

    @cached_property
    def longest_token(self) -> int:
        """See ChatTokenizer."""
        return max(map(len, self._tokenizer.get_vocab()))

    @property
    def added_tokens(self) -> Sequence[str]:
        """See ChatTokenizer."""
        return [str(token) for token in self._tokenizer.added_tokens_decoder.values()]


def _copied_backend(tokenizer: PreTrainedTokenizerBase) -> Any:
    if not tokenizer.is_fast:
        return None
    backend: Any = tokenizer.backend_tokenizer
    own = type(backend).from_str(backend.to_str())
    own.no_truncation()
    own.no_padding()
    own.encode_special_tokens = bool(getattr(tokenizer, "split_special_tokens", False))
    return own
