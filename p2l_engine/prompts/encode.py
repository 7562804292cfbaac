"""Prompts to token ids: the very text that published P2L models were trained on.

The text is the tokenizer's chat template over the user turns, without generation prompt, then the CLS token; a CLS token in
the user's own text becomes "<cls>"; truncated from the left (lmarena/p2l).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from p2l_engine.prompts.parse import Prompt, user_turns

MAX_TOKENS = 8192  # of which the last is the CLS token

BOUNDARY_WITHIN = 1 << 16  # characters in which a word of a text that is cut is looked for

BETWEEN_LETTERS = re.compile(r"[^\W\d_] [^\W\d_]")

PROBES = ("a", "The", "7", " x", "(", "\u4e2d", "\n\n", "\tz", "<", "é")  # turns with nothing in common


class PromptEncoder:
    """Tokenises prompts for one checkpoint. Its tokenizer must have a chat template and a CLS token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_tokens: int = MAX_TOKENS) -> None:
        if not tokenizer.cls_token:
            raise ValueError("tokenizer: expected a CLS token, got none; a P2L checkpoint's tokenizer names one")
        if not tokenizer.chat_template:
            raise ValueError("tokenizer: expected a chat template, got none; a P2L checkpoint's tokenizer has one")
        self.tokenizer, self.max_tokens = tokenizer, max_tokens
        self.cls_token: str = tokenizer.cls_token
        self._fast = _own_backend(tokenizer)

    def text(self, turns: list[str]) -> str:
        """The text that the P2L model sees for these user turns."""
        messages = [{"role": "user", "content": turn} for turn in turns]
        try:
            rendered = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
        except (TemplateError, TypeError) as error:
            raise ValueError(f"the tokenizer's chat template cannot be rendered: {error}") from error
        return str(rendered).replace(self.cls_token, "<cls>") + self.cls_token

    def encode(self, prompts: Sequence[Prompt]) -> list[npt.NDArray[np.int32]]:
        """Token ids of each prompt, the last of them the CLS token; at most ``max_tokens`` each."""
        return self._tokens([self.text(user_turns(prompt, i)) for i, prompt in enumerate(prompts)])

    def prefix(self) -> npt.NDArray[np.int32]:
        """The tokens that every prompt starts with, whatever the user says: what the chat template puts in front.

        Those that very different turns have in common; a prompt may still lack them, where it is truncated, or where its first
        characters melt into the template's last token.
        """
        try:
            probes = self._tokens([self.text([turn]) for turn in PROBES])
        except ValueError:  # a template that refuses some turns: nothing is known to be constant
            return np.zeros(0, np.int32)
        shortest = min(map(len, probes))
        same = np.logical_and.reduce([ids[:shortest] == probes[0][:shortest] for ids in probes])
        return probes[0][: shortest if same.all() else int(same.argmin())]

    def _tokens(self, texts: list[str]) -> list[npt.NDArray[np.int32]]:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens: expected one at least, got {self.max_tokens}")
        if not texts:
            return []
        ends = [self._end(text) for text in texts]
        every = [np.asarray(ids[-self.max_tokens :], np.int32) for ids in self._ids(ends)]
        for i, (text, end) in enumerate(zip(texts, ends, strict=True)):
            if len(end) < len(text) and len(every[i]) < self.max_tokens:  # the tokenizer leaves characters out
                every[i] = np.asarray(self._ids([text])[0][-self.max_tokens :], np.int32)
        return every

    def _ids(self, texts: list[str]) -> Any:
        if self._fast is None:
            return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        # Without the Python lists, masks and offsets that transformers makes of it: a third of the time.
        return [encoding.ids for encoding in self._fast.encode_batch_fast(texts, add_special_tokens=False)]

    def _end(self, text: str) -> str:
        """So much of a text's end that truncation leaves nothing else of it: tokenising takes a hundred bytes a character.

        It begins with a word (a space between letters), which is where tokenizers of this kind split whatever came before; a
        text without any in reach is cut as it comes.
        """
        if len(text) <= self.max_tokens:  # a token is a character at least
            return text
        most = self.max_tokens * self._longest_token
        if len(text) <= most + BOUNDARY_WITHIN:
            return text
        start = len(text) - most
        word = next(BETWEEN_LETTERS.finditer(text, start - BOUNDARY_WITHIN, start), None)
        return text[word.start() + 1 :] if word else text[start:]

    @cached_property
    def _longest_token(self) -> int:
        """Characters."""
        return max(map(len, self.tokenizer.get_vocab()))


def _own_backend(tokenizer: PreTrainedTokenizerBase) -> Any:
    """A fast tokenizer's backend, copied: truncation, padding and the like are its state, which every other user changes."""
    if not tokenizer.is_fast:
        return None
    backend: Any = tokenizer.backend_tokenizer
    own = type(backend).from_str(backend.to_str())
    own.no_truncation()
    own.no_padding()
    own.encode_special_tokens = bool(getattr(tokenizer, "split_special_tokens", False))
    return own
