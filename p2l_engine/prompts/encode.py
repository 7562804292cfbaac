"""Prompts to token ids: the text that published P2L models were trained on.

The text is the tokenizer's chat template over the user turns, without a generation prompt, then the CLS token. A CLS token in
the user's own text becomes "<cls>". The token ids are truncated from the left (lmarena/p2l). Turns of a template that refuses
consecutive user messages are joined by blank lines.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise, takewhile

import numpy as np
import numpy.typing as npt

from p2l_engine.errors import PromptError
from p2l_engine.prompts.parse import Prompt, user_turns
from p2l_engine.prompts.tokenizer import ChatTokenizer

_Ids = npt.NDArray[np.int32]

MAX_TOKENS = 8192  # of which the last is the CLS token

BOUNDARY_WITHIN = 1 << 16  # characters that are searched for the beginning of a word, where a text is cut

BETWEEN_LETTERS = re.compile(r"[^\W\d_] [^\W\d_]")

PROBES = ("a", "The", "7", " x", "(", "\u4e2d", "\n\n", "\tz", "<", "é")  # turns with nothing in common
CHAT = ("The", "sky is blue", "why", "7 times 8", "no")  # turns of one chat


class PromptEncoder:
    """Tokenises prompts for one checkpoint."""

    def __init__(self, tokenizer: ChatTokenizer, max_tokens: int = MAX_TOKENS) -> None:
        self.tokenizer, self.max_tokens = tokenizer, max_tokens
        self.cls_token = tokenizer.special_tokens["cls_token"]

    def text(self, turns: Sequence[str]) -> str:
        """The text that the P2L model sees for these user turns. Raises ValueError where the template cannot be rendered."""
        try:
            rendered = self.tokenizer.template.render(turns)
        except Exception as error:  # a template is a program: it may raise anything
            raise ValueError(f"the tokenizer's chat template cannot be rendered: {error}") from error
        return rendered.replace(self.cls_token, "<cls>") + self.cls_token

    def check(self) -> None:
        """Raises ValueError where the template cannot be rendered, or leaves out what the user says, as those do that read the
        content of messages in parts only."""
        if self.text(["a"]) == self.text(["aa"]):
            raise ValueError(
                "the tokenizer's chat template leaves out what the user says: expected one that writes the content of messages "
                "that are text, not lists of parts"
            )

    def encode(self, prompts: Sequence[Prompt], first: int = 0) -> list[_Ids]:
        """Token ids of each prompt, the last of them the CLS token; at most ``max_tokens`` each.

        first: the index of the first prompt in its batch. Raises PromptError, with the index in the batch.
        """
        found, problems = self.encode_each(prompts, first)
        for index, problem in problems.items():
            raise PromptError(index, problem)
        return found

    def encode_each(self, prompts: Sequence[Prompt], first: int = 0) -> tuple[list[_Ids], dict[int, str]]:
        """As ``encode``, but prompts that the template or the tokenizer refuses do not fail the others.

        Returns the token ids of each prompt, the CLS token alone for one that is refused, and the reasons by index in the
        batch. Raises PromptError for a prompt that cannot be parsed.
        """
        texts: list[str] = []
        problems: dict[int, str] = {}
        for i, prompt in enumerate(prompts, first):
            try:
                texts.append(self.text(user_turns(prompt, i)))
            except PromptError:
                raise
            except ValueError as error:
                problems[i] = str(error)
                texts.append(self.cls_token)
        try:
            return self._tokens(texts), problems
        except Exception as error:
            if type(error) is not Exception:  # the tokenizers library raises no other
                raise
        found: list[_Ids] = []
        for i, text in enumerate(texts, first):
            try:
                found += self._tokens([text])
            except Exception as error:
                problems.setdefault(i, f"the tokenizer cannot encode it: {error}")
                found.append(np.array([self.tokenizer.id_of(self.cls_token)], np.int32))
        return found, dict(sorted(problems.items()))

    def problem(self, turns: Sequence[str]) -> str | None:
        """Why user turns have no tokens, if they have none."""
        return self.encode_each([turns])[1].get(0)

    def prefix(self) -> _Ids:
        """The tokens that every prompt starts with: the chat template's text before the first user turn.

        Found as those that very different turns have in common. A prompt may still lack them, where it is truncated, or where
        the tokenizer joins its first characters with the template's last ones.
        """
        try:
            probes = self._tokens([self.text([turn]) for turn in PROBES])
        except ValueError:  # a template that refuses some turns: nothing is known to be constant
            return np.zeros(0, np.int32)
        shortest = min(map(len, probes))
        same = np.logical_and.reduce([ids[:shortest] == probes[0][:shortest] for ids in probes])
        return probes[0][: shortest if same.all() else int(same.argmin())]

    def appends(self) -> bool:
        """Whether a further user turn leaves the tokens of those before it as they are, but for the chat's end.

        The end is what very different turns have in common behind them, such as a closing tag and the CLS token. False for a
        template that rewrites history: that marks or numbers the last turn, or gives it what the first had.
        """
        try:
            backwards = [ids[::-1] for ids in self.tokenizer.ids([self.text([turn]) for turn in PROBES])]
            chats = self.tokenizer.ids([self.text(CHAT[:n]) for n in range(1, len(CHAT) + 1)])
        except ValueError:  # a template that refuses some turns: nothing is known to stay
            return False
        end = sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*backwards, strict=False)))
        return all(list(longer[: len(ids) - end]) == list(ids[: len(ids) - end]) for ids, longer in pairwise(chats))

    def _tokens(self, texts: list[str]) -> list[_Ids]:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens: expected one at least, got {self.max_tokens}")
        if not texts:
            return []
        ends = [self._end(text) for text in texts]
        every = [np.asarray(ids[-self.max_tokens :], np.int32) for ids in self.tokenizer.ids(ends)]
        for i, (text, end) in enumerate(zip(texts, ends, strict=True)):
            if len(end) < len(text) and len(every[i]) < self.max_tokens:  # the tokenizer leaves characters out
                every[i] = np.asarray(self.tokenizer.ids([text])[0][-self.max_tokens :], np.int32)
        return every

    def _end(self, text: str) -> str:
        """A suffix of a text that covers its last ``max_tokens`` tokens: tokenising takes a hundred bytes a character.

        It begins at a word (a space between letters), where tokenizers split whatever comes before. A text without a word
        there is cut at any character.
        """
        if len(text) <= self.max_tokens:  # a token is a character at least
            return text
        most = self.max_tokens * self.tokenizer.longest_token
        if len(text) <= most + BOUNDARY_WITHIN:
            return text
        start = len(text) - most
        word = next(BETWEEN_LETTERS.finditer(text, start - BOUNDARY_WITHIN, start), None)
        return text[word.start() + 1 :] if word else text[start:]
