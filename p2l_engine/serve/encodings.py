"""Models whose tokens are counted as their provider counts them: with tiktoken, where it knows the provider's name for them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from p2l_engine.serve.model_entry import Model
from p2l_engine.serve.tokens import TokenCounter

if TYPE_CHECKING:
    import tiktoken

SECONDS = 30.0  # that an encoding may take to be read, or downloaded
PIECE = 4_000  # characters that are encoded at a time: a long run without spaces takes time by its square


def counters(models: Mapping[str, Model], seconds: float = SECONDS) -> tuple[dict[str, TokenCounter], list[str]]:
    """Counters by model, and a line for each encoding that says which way was taken.

    Encodings are read here, from tiktoken's cache (``TIKTOKEN_CACHE_DIR``) or the network, and never again. A model of which
    tiktoken does not know every deployment, or has different encodings for them, has no counter.
    """
    try:
        import tiktoken
    except ModuleNotFoundError:
        return {}, []
    by_encoding = dict[str, list[str]]()
    for name, model in models.items():
        found = {_encoding_of(tiktoken, provider.model) for provider in model.provider}
        if len(found) == 1 and (encoding := found.pop()) is not None:
            by_encoding.setdefault(encoding, []).append(name)
    known, lines = dict[str, TokenCounter](), list[str]()
    for encoding, names in by_encoding.items():
        shown = ", ".join(names)
        try:
            counter = TokenCounter(_counting(_within(seconds, partial(tiktoken.get_encoding, encoding))))
        except Exception as error:  # of any library on the way to the file: the line says so
            why = f"tiktoken's {encoding} cannot be read ({type(error).__name__}; is it in TIKTOKEN_CACHE_DIR?)"
            lines.append(f"tokens of {shown}: counted by the P2L tokenizer, with its margin; {why}")
        else:
            known |= dict.fromkeys(names, counter)
            lines.append(f"tokens of {shown}: counted by tiktoken's {encoding}")
    return known, lines


def _encoding_of(tiktoken: Any, model: str) -> str | None:
    try:
        found: str = tiktoken.encoding_name_for_model(model)
    except KeyError:
        return None
    return found


def _counting(encoding: tiktoken.Encoding) -> Callable[[str], int]:
    """Special tokens in a text are text."""

    def count(text: str) -> int:
        return sum(len(encoding.encode_ordinary(piece)) for piece in _pieces(text))

    count("a text")  # whatever is wrong with it shows now
    return count


def _pieces(text: str) -> Sequence[str]:
    return [text] if len(text) <= PIECE else [text[i : i + PIECE] for i in range(0, len(text), PIECE)]


def _within(seconds: float, work: Callable[[], tiktoken.Encoding]) -> tiktoken.Encoding:
    """The result of ``work``, in a thread of its own: tiktoken waits for a network without a limit. Raises TimeoutError."""
    found, failed = list["tiktoken.Encoding"](), list[BaseException]()

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="tiktoken", daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise RuntimeError(type(failed[0]).__name__) if not isinstance(failed[0], Exception) else failed[0]
    if not found:
        raise TimeoutError(f"expected an encoding within {seconds:g} s")
    return found[0]
