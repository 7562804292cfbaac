"""Prometheus metrics. Labels are bounded: models of the catalog, or ``other``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from p2l_engine.decision_log.record import Record
from p2l_engine.serve.answers import Answers
from p2l_engine.serve.scorer import Scorer

if TYPE_CHECKING:
    from p2l_engine.engine.prefix_cache import PrefixCache
    from p2l_engine.serve.learn import OnlineLearning

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """One registry for each server."""

    def __init__(self, scorer: Scorer, names: Sequence[str], answers: Answers | None = None) -> None:
        self.names = frozenset(names)
        self.registry = CollectorRegistry()
        self._parts: dict[tuple[Counter, tuple[str, ...]], Counter] = {}
        self.requests = Counter(
            "p2l_requests",
            "Requests by API, model, outcome and status",
            ("api", "model", "outcome", "status"),
            registry=self.registry,
        )
        self.attempts = Counter(
            "p2l_attempts", "Upstream requests by model and error", ("model", "error"), registry=self.registry
        )
        self.cost = Counter("p2l_cost_usd", "Money spent, USD", ("model", "estimated"), registry=self.registry)
        self.tokens = Counter("p2l_tokens", "Tokens that providers counted", ("model", "kind"), registry=self.registry)
        self.own = Histogram(
            "p2l_decision_seconds", "From the request to the decision", buckets=SECONDS, registry=self.registry
        )
        self.first_byte = Histogram(
            "p2l_first_byte_seconds", "From the request to the answer's first byte", buckets=SECONDS, registry=self.registry
        )
        self.total = Histogram(
            "p2l_request_seconds", "From the request to the answer's end", buckets=SECONDS, registry=self.registry
        )
        gauges: list[tuple[str, str, Callable[[], float]]] = [
            ("p2l_coefficient_cache_hits", "Prompts whose coefficients were cached", lambda: scorer.hits),
            ("p2l_coefficient_cache_misses", "Prompts that the engine computed", lambda: scorer.misses),
            ("p2l_engine_waiting", "Prompts that wait for the engine", lambda: scorer.waiting),
        ]
        if answers is not None:
            gauges += [
                ("p2l_answer_cache_hits", "Requests answered from the cache of answers", lambda: answers.hits),
                ("p2l_answer_cache_misses", "Requests whose answer was not in the cache", lambda: answers.misses),
                ("p2l_answer_cache_failures", "Failures of the cache's store", lambda: answers.failures),
                ("p2l_answer_cache_saved_usd", "Expected cost of the requests answered from it", lambda: answers.saved),
            ]
        self._add(gauges)
        self.feedback = Counter(
            "p2l_feedback", "Feedback by kind and what became of it", ("kind", "result"), registry=self.registry
        )
        self._learning: OnlineLearning | None = None

    def show(self, learning: OnlineLearning) -> None:
        """Adds what a server that learns tells."""
        self._learning = learning
        self._add(
            [
                ("p2l_learned_votes", "Votes that were learned from", lambda: learning.learned),
                ("p2l_learning_updates", "Updates of the head", lambda: learning.updates),
                ("p2l_learning_update_seconds", "Time that all updates took", lambda: learning.seconds),
                ("p2l_learning_refinements", "Times that the optimum over all votes was found", lambda: learning.refinements),
                ("p2l_learning_refine_seconds", "Time that these took", lambda: learning.refinement.seconds),
                ("p2l_learning_pending", "Votes since the last of them", lambda: learning.pending),
                ("p2l_learning_failures", "Updates, refinements and savings that failed", lambda: learning.failures),
                ("p2l_learning_waiting", "Feedback that was not learned from yet", lambda: learning.waiting),
                ("p2l_learning_lag_seconds", "Age of the oldest of it", lambda: learning.lag),
            ]
        )
        self._skipped = Gauge("p2l_learning_skipped", "Feedback that gave no vote", ("reason",), registry=self.registry)

    def show_prefixes(self, cache: PrefixCache) -> None:
        """Adds what an engine tells of the turns that it remembers."""
        self._add(
            [
                ("p2l_prefix_cache_hits", "Prompts that began with turns whose keys were cached", lambda: cache.hits),
                ("p2l_prefix_cache_misses", "Prompts of which all tokens were computed", lambda: cache.misses),
                ("p2l_prefix_cache_saved_tokens", "Tokens that were not computed, since they were cached", lambda: cache.saved),
                ("p2l_prefix_cache_bytes", "Memory of the keys and values that are cached", lambda: cache.bytes),
                ("p2l_prefix_cache_evictions", "Parts of prompts that left it for others", lambda: cache.evictions),
            ]
        )

    def _add(self, gauges: Sequence[tuple[str, str, Callable[[], float]]]) -> None:
        for name, text, value in gauges:
            Gauge(name, text, registry=self.registry).set_function(value)

    def add(self, record: Record) -> None:
        """Counts a finished request."""
        model = self._bounded(record.model or record.chosen)
        self._of(self.requests, record.api, model, record.outcome, str(record.status)).inc()
        for attempt in record.attempts:
            self._of(self.attempts, self._bounded(attempt.model), attempt.error or "none").inc()
        if record.cost:
            self._of(self.cost, model, "true" if record.estimated else "false").inc(record.cost)
        for kind, tokens in (("in", record.tokens_in), ("cached", record.tokens_cached), ("out", record.tokens_out)):
            if tokens and record.outcome != "cached":  # those were counted when the answer was new
                self._of(self.tokens, model, kind).inc(tokens)
        stages = record.latency
        for stage, histogram in (("choose", self.own), ("first_byte", self.first_byte), ("total", self.total)):
            if stage in stages:
                histogram.observe(stages[stage] / 1000)

    def text(self) -> bytes:
        """The exposition format."""
        if self._learning is not None:
            for reason, count in dict(self._learning.skipped).items():
                self._skipped.labels(reason).set(count)
        return generate_latest(self.registry)

    def _of(self, counter: Counter, *labels: str) -> Counter:
        """A counter's part of these labels: prometheus_client's own look-up takes several times as long as counting."""
        found = self._parts.get((counter, labels))
        if found is None:
            found = self._parts[counter, labels] = counter.labels(*labels)
        return found

    def _bounded(self, model: str) -> str:
        return model if model in self.names else "other"
