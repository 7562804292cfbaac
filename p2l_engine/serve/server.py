"""A server's state beside the service: its log, metrics, traces, and what happened lately."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from p2l_engine.decision_log.log import DecisionLog
from p2l_engine.decision_log.record import Record
from p2l_engine.serve.answers import Answers
from p2l_engine.serve.metrics import Metrics
from p2l_engine.serve.service import Service
from p2l_engine.serve.traces import Traces

if TYPE_CHECKING:
    from p2l_engine.serve.learn import OnlineLearning

RECENT = 50


class Server:
    """log: where decisions are kept; watch: is shown each, too; answers: the cache of answers; recent: the last decisions."""

    def __init__(
        self,
        service: Service,
        log: DecisionLog | None,
        watch: Callable[[Record], None] | None = None,
        answers: Answers | None = None,
    ) -> None:
        self.service, self.log, self.answers = service, log, answers
        self.metrics = Metrics(service.scorer, service.plan.names, answers)
        self.recent: deque[Record] = deque(maxlen=RECENT)
        self.started = time.time()
        self.traces: Traces | None = None
        self.learning: OnlineLearning | None = None
        self.running = 0
        self.ready = True
        self._watch = watch

    def finished(self, record: Record) -> None:
        """Takes the record of every decision."""
        self.recent.appendleft(record)
        self.metrics.add(record)
        if self.log is not None:
            self.log.add(record)
        if self._watch is not None:
            self._watch(record)
