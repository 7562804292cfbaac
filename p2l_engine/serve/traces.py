"""Traces for OpenTelemetry: a span for each request, and within it one for each attempt. Optional: the extra ``otel``."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from p2l_engine import __version__
from p2l_engine.decision_log.record import Record

ATTRIBUTES = (
    "id", "api", "asked", "chosen", "model", "outcome", "status", "propensity", "propensity_error", "win_rate",
    "expected_cost", "cost", "tokens_in", "tokens_cached", "tokens_out", "streamed",
)  # fmt: skip
SECOND = 10**9  # in nanoseconds, in which spans are timed


class Traces:
    """provider: of tracers; None: one that exports by OTLP over HTTP, as the environment says (OTEL_EXPORTER_OTLP_ENDPOINT).

    Raises ModuleNotFoundError where the packages are not installed.
    """

    def __init__(self, provider: Any = None) -> None:
        try:
            from opentelemetry import trace
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

            self._provider = _exporting() if provider is None else provider
        except ModuleNotFoundError as error:
            remedy = "serve.traces needs the extra 'otel': pip install 'p2l-engine[otel]'"
            raise ModuleNotFoundError(f"{error}: {remedy}", name=error.name) from None
        self._trace, self._propagator = trace, TraceContextTextMapPropagator()
        self._tracer = self._provider.get_tracer("p2l_engine.serve", __version__)

    def begin(self, headers: Mapping[str, str]) -> Any:
        """The span of a request, within the client's trace if it has one."""
        context = self._propagator.extract(dict(headers))
        return self._tracer.start_span("p2l request", context, kind=self._trace.SpanKind.SERVER)

    def outgoing(self, span: Any) -> dict[str, str]:
        """The headers under which a provider continues the trace."""
        headers: dict[str, str] = {}
        self._propagator.inject(headers, self._trace.set_span_in_context(span))
        return headers

    def end(self, span: Any, record: Record) -> None:
        """Writes what became of the request. No prompt and no key is in it."""
        values = {f"p2l.{name}": getattr(record, name) for name in ATTRIBUTES}
        span.set_attributes({name: value for name, value in values.items() if value is not None})
        if record.status >= 500:
            span.set_status(self._trace.StatusCode.ERROR, record.outcome)
        within, end = self._trace.set_span_in_context(span), time.time_ns()
        start = end - int(sum(attempt.seconds for attempt in record.attempts) * SECOND)
        for attempt in record.attempts:
            child = self._tracer.start_span("attempt", within, kind=self._trace.SpanKind.CLIENT, start_time=start)
            child.set_attributes({"p2l.model": attempt.model, "p2l.deployment": attempt.deployment})
            if attempt.error is not None:
                child.set_status(self._trace.StatusCode.ERROR, attempt.error)
            start += int(attempt.seconds * SECOND)
            child.end(start)
        span.end(end)

    def close(self) -> None:
        """Exports what is left."""
        self._provider.shutdown()


def _exporting() -> Any:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create({SERVICE_NAME: "p2l-engine"})
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider
