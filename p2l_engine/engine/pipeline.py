"""A stream of prompts through an engine: tokenised ahead in a thread, and on a GPU several batches under way at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from p2l_engine.backbone.packing import Packed, Tokens, batches, weight_of
from p2l_engine.prompts.parse import Prompt

Places = npt.NDArray[np.intp]

CHUNKS_AHEAD = 2


@dataclass(frozen=True, slots=True)
class Flight:
    """A batch under way: its tokens' page-locked memory must outlive the copy to the device."""

    rows: Places
    packed: Packed
    results: tuple[Tensor, ...]
    event: torch.cuda.Event | None

    def landed(self) -> tuple[Places, tuple[npt.NDArray[Any], ...]]:
        """The prompts' places and the results, once they are there."""
        if self.event is not None:
            self.event.synchronize()
        return self.rows, tuple(result.numpy() for result in self.results)


def ahead(
    encode: Callable[[Sequence[Prompt]], list[Tokens]], chunks: Iterable[Sequence[Prompt]]
) -> Iterator[list[Tokens] | None]:
    """Token ids, chunk by chunk, drawn and tokenised ahead in a thread; None before a chunk that is not there yet."""
    source = iter(chunks)

    def following() -> list[Tokens] | None:
        for chunk in source:
            return encode(chunk)
        return None

    with ThreadPoolExecutor(1, thread_name_prefix="p2l-tokenizer") as pool:
        waiting = deque(pool.submit(following) for _ in range(CHUNKS_AHEAD))
        while True:
            if not waiting[0].done():
                yield None
            tokens = waiting.popleft().result()
            if tokens is None:
                return
            waiting.append(pool.submit(following))
            yield tokens


def flights(
    chunks: Iterable[list[Tokens] | None],
    launch: Callable[[Places, list[Tokens]], Flight],
    prefix: Tokens | None,
    token_budget: int,
    under_way: int,
) -> Iterator[Flight]:
    """Batches of each chunk's prompts, by like length behind the shared prefix. So many stay under way before the first is
    handed out, as long as there are chunks: None says that the next one will take its time."""
    flying: deque[Flight] = deque()
    start = 0
    for tokens in chunks:
        if tokens is None:
            yield from flying
            flying.clear()
            continue
        for batch in batches([weight_of(ids, prefix) for ids in tokens], token_budget):
            flying.append(launch(np.array(batch) + start, [tokens[i] for i in batch]))
            if len(flying) > under_way:
                yield flying.popleft()
        start += len(tokens)
    yield from flying
