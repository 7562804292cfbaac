"""Replicas of the engine on a Ray cluster, and what a front must know to ask them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from p2l_engine.checkpoint import fingerprint
from p2l_engine.coefficients import Coefficients, ExpectedUsage
from p2l_engine.engine import Engine
from p2l_engine.errors import PromptError
from p2l_engine.feedback import FeedbackModel
from p2l_engine.prompts.parse import Turns
from p2l_engine.prompts.tokenizer import ChatTokenizer
from p2l_engine.serve.service import Refused

logger = logging.getLogger(__name__)

R = TypeVar("R")
# A prompt's theta [M], eta, deviation [M], expected usage and share that is kept, or what is wrong with it.
Row = tuple[npt.NDArray[np.float32], float | None, npt.NDArray[np.float32] | None, ExpectedUsage | None, float | None] | str


BATCH = 64  # prompts that a replica computes together
WAIT = 0.001  # seconds that it waits for others
TRIES = (0.0, 0.2, 1.0)  # seconds before each try where a replica died
RETRY_AFTER = 5.0  # seconds, where no replica answers


@dataclass(frozen=True, slots=True)
class CheckpointFacts:
    """What a front must know of a checkpoint, without its weights. It stands in for an engine in ``Runtime``. uncertainty: the
    models that the checkpoint is uncertain of; None where it has no uncertainty."""

    models: tuple[str, ...]
    feedback: FeedbackModel
    tokenizer: ChatTokenizer
    uncertainty: tuple[str, ...] | None = None

    @property
    def encoder(self) -> CheckpointFacts:
        """Where an engine has its tokenizer."""
        return self


class EngineReplica:
    """An engine on one GPU or some CPUs of the cluster; calls that come at once are one batch.

    arguments: of ``Engine.from_pretrained``. expected: the fingerprint of the checkpoint, which must be the same on all
    machines; ValueError where it is not.
    """

    def __init__(self, arguments: tuple[Any, ...], expected: Mapping[str, Any]) -> None:
        self.engine = Engine.from_pretrained(*arguments)
        found = fingerprint.of_checkpoint(self.engine.folder, self.engine.base)
        if found != expected:
            different = [name for name in {**found, **expected} if found.get(name) != expected.get(name)]
            raise ValueError(f"checkpoint: {self.engine.folder} differs from the server's: {', '.join(different)}")
        self.engine.warmup()

    @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=WAIT)
    async def coefficients(self, prompts: list[Turns]) -> list[Row]:
        """A row for each prompt."""
        return await asyncio.to_thread(self._rows, prompts)

    def _rows(self, prompts: Sequence[Turns]) -> list[Row]:
        try:
            found = self.engine.coefficients(prompts)
        except PromptError as error:
            if len(prompts) == 1:
                return [error.problem]
            return [row for prompt in prompts for row in self._rows([prompt])]
        none = [None] * len(prompts)
        eta = none if found.eta is None else found.eta.tolist()
        usage = none if found.usage is None else [found.usage.rows(slice(i, i + 1)) for i in range(len(prompts))]
        deviation = none if found.deviation is None else found.deviation
        kept = none if found.kept is None else found.kept.tolist()
        return list(zip(found.theta, eta, deviation, usage, kept, strict=True))


class RemoteEngines:
    """The cluster's engines as a front's ``Computer``. handle: of their deployment."""

    def __init__(self, handle: Any, facts: CheckpointFacts) -> None:
        self._handle, self._facts = handle, facts
        self._asking: set[asyncio.Task[None]] = set()

    def submit(self, prompt: Turns, finish: Callable[[Coefficients], R], /) -> Future[R]:
        """See ``scorer.Computer``. Where no replica answers, the future raises Refused."""
        done: Future[R] = Future()
        done.set_running_or_notify_cancel()  # a replica may have begun
        task = asyncio.get_running_loop().create_task(self._ask(prompt, finish, done))
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)
        return done

    def close(self) -> None:
        """Nothing: replicas end with their deployment."""

    async def _ask(self, prompt: Turns, finish: Callable[[Coefficients], R], done: Future[R]) -> None:
        try:
            row = await self._row(prompt)
            if isinstance(row, str):
                raise PromptError(0, row)
            theta, eta, deviation, usage, kept = row
            facts = self._facts
            found = Coefficients(
                theta[None],
                None if eta is None else np.array([eta], np.float32),
                facts.models,
                facts.feedback,
                None if deviation is None else deviation[None],
                usage,
                None if kept is None else np.array([kept], np.float32),
            )
            done.set_result(finish(found))
        except Exception as error:
            done.set_exception(error)

    async def _row(self, prompt: Turns) -> Row:
        for seconds in TRIES:
            await asyncio.sleep(seconds)
            try:
                found: Row = await self._handle.coefficients.remote(prompt)
                return found
            except (RayError, RayServeException) as error:
                logger.warning("a replica of the engine failed (%s)", type(error).__name__)
        raise Refused(503, "no replica of the engine answers", None, "unavailable", RETRY_AFTER)
