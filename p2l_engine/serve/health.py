"""Which deployments are up: one that failed is left out for a while, longer with each further failure."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from p2l_engine.serve.model_entry import Provider
from p2l_engine.serve.settings import Cooldown

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Deployment:
    """A place where a model runs. key: its secret, from the environment. failures: in a row; until: when it is tried again.
    reasons: whether it has reported output that it did not show. problem: why it cannot answer as it is configured."""

    name: str
    model: str
    provider: Provider
    key: str | None = None
    failures: int = 0
    until: float = 0.0
    reasons: bool = False
    problem: str | None = None

    def __repr__(self) -> str:
        return f"Deployment({self.name!r})"


class Health:
    """Cooldowns of deployments. clock: seconds."""

    def __init__(self, cooldown: Cooldown, clock: Callable[[], float] = time.monotonic, seed: int | None = None) -> None:
        self.cooldown, self._clock, self._random = cooldown, clock, Random(seed)

    def failed(self, deployment: Deployment, retry_after: float | None = None) -> None:
        """A failure that is the deployment's own; retry_after: seconds that it asked for."""
        deployment.failures += 1
        seconds = min(self.cooldown.seconds * 2 ** min(deployment.failures - 1, 30), self.cooldown.most)
        if retry_after is not None:
            seconds = max(seconds, min(retry_after, self.cooldown.most))
        deployment.until = max(deployment.until, self._clock() + seconds)

    def misconfigured(self, deployment: Deployment, problem: str) -> None:
        """A failure that will not pass by itself: said once, until it answers."""
        self.failed(deployment)
        if problem != deployment.problem:
            logger.error("the deployment %s of %s cannot answer: %s", deployment.name, deployment.model, problem)
        deployment.problem = problem

    def answered(self, deployment: Deployment) -> None:
        """It answered, whether the client liked it or not."""
        if deployment.problem is not None:
            logger.warning("the deployment %s of %s answers again", deployment.name, deployment.model)
        deployment.failures, deployment.until, deployment.problem = 0, 0.0, None

    def is_up(self, deployment: Deployment) -> bool:
        """Whether it may be tried now."""
        return deployment.until <= self._clock()

    def seconds_left(self, deployment: Deployment) -> float:
        """Until it may be tried again."""
        return max(deployment.until - self._clock(), 0.0)

    def pick(self, deployments: Sequence[Deployment]) -> Deployment | None:
        """One that is up, drawn by weight; None where there is none."""
        up = [deployment for deployment in deployments if self.is_up(deployment)]
        if len(up) < 2:
            return up[0] if up else None
        return self._random.choices(up, [deployment.provider.weight for deployment in up])[0]
