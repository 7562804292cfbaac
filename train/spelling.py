"""What tells apart the prompts of two sources."""

from __future__ import annotations

import re
import unicodedata

QUOTES = re.compile('["\u201c\u201d\u201e\u00ab\u00bb\u300c\u300d\u300e\u300f]')
ENDS = re.compile(r"(?:[.,;:?\u3001\u3002]|(?<![\d)])(?<!\b\w)!)+(?=\s|$)")  # marks behind a word; not the ! of a factorial
NO_WORDS_AROUND = re.compile(r"(?<!\w) | (?!\w)")


def spelling(text: str) -> str:
    """What tells prompts of different sources apart: the text in one case and one form of Unicode (NFKC), without quotes and
    marks behind words, and with white space between words alone. The text itself where nothing is left."""
    plain = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    words = ENDS.sub(" ", QUOTES.sub(" ", plain.replace("\u2018", "'").replace("\u2019", "'"))).split()
    return NO_WORDS_AROUND.sub("", " ".join(words)) or text
