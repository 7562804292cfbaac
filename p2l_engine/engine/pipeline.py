"""Streams of prompts through an engine: tokenised in a thread while batches are computed, several at once on a GPU."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from p2l_engine.backbone.packing import Packed, Tokens, batches

Rows = npt.NDArray[np.intp]
Chunk = TypeVar("Chunk", bound=Sequence[Any])

PREFETCHED_CHUNKS = 2


class Outputs(NamedTuple):
    """The outputs [n, K] float32 of n prompts (see ``Engine.outputs``), and the number of tokens that were computed for
    them, without those of a shared prefix."""

    outputs: npt.NDArray[np.float32]
    tokens: int


@dataclass(frozen=True, slots=True)
class InFlightBatch:
    """A batch that the device may still be computing.

    tokens: that are computed for it, without those of a shared prefix; held: the tokens' page-locked memory, until the copy is
    done; event: None if the results are there.
    """

    rows: Rows
    tokens: int
    results: tuple[Tensor, ...]
    held: Packed | None = None
    event: torch.cuda.Event | None = None

    def wait(self) -> tuple[Rows, tuple[npt.NDArray[Any], ...]]:
        """The rows of the prompts and their results, once the device has finished."""
        if self.event is not None:
            self.event.synchronize()
        return self.rows, tuple(result.numpy() for result in self.results)


def prefetch(encode: Callable[[Chunk], list[Tokens]], chunks: Iterable[Chunk]) -> Iterator[list[Tokens] | None]:
    """The token ids of each chunk. A thread draws and tokenises up to ``PREFETCHED_CHUNKS`` of them in advance.

    Yields None before a chunk that is not ready yet.
    """
    source = iter(chunks)

    def encode_next() -> list[Tokens] | None:
        for chunk in source:
            return encode(chunk)
        return None

    with ThreadPoolExecutor(1, thread_name_prefix="p2l-tokenizer") as pool:
        waiting = deque(pool.submit(encode_next) for _ in range(PREFETCHED_CHUNKS))
        while True:
            if not waiting[0].done():
                yield None
            tokens = waiting.popleft().result()
            if tokens is None:
                return
            waiting.append(pool.submit(encode_next))
            yield tokens


def in_flight_batches(
    chunks: Iterable[list[Tokens] | None],
    launch: Callable[[Rows, list[Tokens]], InFlightBatch],
    weigh: Callable[[Tokens], int],
    token_budget: int,
    most_in_flight: int,
) -> Iterator[InFlightBatch]:
    """Launches each chunk's prompts in batches of similar weight, and yields the batches in the order of their launch.

    Up to ``most_in_flight`` batches are launched before the first is yielded. None in place of a chunk says that the next one
    is not ready: all pending batches are yielded first.
    """
    in_flight: deque[InFlightBatch] = deque()
    start = 0
    for tokens in chunks:
        if tokens is None:
            yield from in_flight
            in_flight.clear()
            continue
        for batch in batches([weigh(ids) for ids in tokens], token_budget):
            in_flight.append(launch(np.array(batch) + start, [tokens[i] for i in batch]))
            if len(in_flight) > most_in_flight:
                yield in_flight.popleft()
        start += len(tokens)
    yield from in_flight


def outputs_in_order(
    chunks: Iterable[Sequence[Any]],
    encode: Callable[[Sequence[Any]], tuple[list[Tokens], dict[int, str]]],
    launch: Callable[[Iterator[list[Tokens] | None]], Iterator[InFlightBatch]],
) -> Iterator[Outputs]:
    """The outputs of each chunk of prompts, in order: see ``Engine.outputs_of``.

    encode: prompts to their tokens, and what is wrong with some, by index, whose outputs are NaN. launch: of their batches.
    """
    sizes: deque[int] = deque()
    refused: deque[list[int]] = deque()  # of each chunk

    def tokens_of(chunk: Sequence[Any]) -> list[Tokens]:
        tokens, problems = encode(chunk)
        refused.append(list(problems))
        return tokens

    def counted() -> Iterator[list[Tokens] | None]:
        for tokens in prefetch(tokens_of, chunks):
            if tokens is not None:
                sizes.append(len(tokens))
            yield tokens

    found = before = computed = 0
    for batch in launch(counted()):
        rows, (part,) = batch.wait()
        if not found:
            out = np.empty((sizes[0], part.shape[1]), np.float32)
        out[rows - before] = part
        found, computed = found + len(rows), computed + batch.tokens
        if found == sizes[0]:
            out[refused.popleft()] = np.nan
            yield Outputs(out, computed)
            before, found, computed = before + sizes.popleft(), 0, 0
