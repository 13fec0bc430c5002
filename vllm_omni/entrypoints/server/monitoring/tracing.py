"""OpenTelemetry spans: one for a request, one for each of its stages, below the caller's own trace.

Spans are made when a request has ended, from the times that were measured anyway: requests pay nothing for them.
"""

from __future__ import annotations

from typing import Any

from vllm_omni.entrypoints.server.runs import Run
from vllm_omni.errors import ConfigError

NANOSECONDS = 1_000_000_000
SERVICE = "vllm-omni"


class Tracing:
    """Observes a RunTable. provider: a TracerProvider of the SDK, whose exporters are its owner's."""

    def __init__(self, provider: Any) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer(SERVICE)

    @classmethod
    def to_endpoint(cls, endpoint: str) -> Tracing:
        """Spans go to an OTLP collector over HTTP, as http://localhost:4318/v1/traces."""
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise ConfigError(f"--otel: {error.name} is missing; pip install 'vllm-omni[otel]'") from error
        provider = TracerProvider(resource=Resource.create({"service.name": SERVICE}))
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        return cls(provider)

    def observe(self, run: Run) -> None:
        """The spans of a run that has ended."""
        from opentelemetry.trace import Status, StatusCode, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        parent = TraceContextTextMapPropagator().extract({"traceparent": run.traceparent or ""})
        start = round(run.created * NANOSECONDS)
        attributes = {"gen_ai.request.model": run.model.name, "vllm_omni.request_id": run.id, "http.route": run.route}
        span = self._tracer.start_span(run.route, parent, start_time=start, attributes=attributes)
        if run.output is not None:
            inner = set_span_in_context(span, parent)
            for stage, values in run.output.metrics.items():
                self._stage(stage, values, start, inner)
            if run.output.error is not None:
                span.set_status(Status(StatusCode.ERROR, type(run.output.error).__name__))
        span.end(start + round(((run.ended_s or run.began_s) - run.began_s) * NANOSECONDS))

    def shutdown(self) -> None:
        """Sends what is left."""
        self._provider.shutdown()

    def _stage(self, stage: str, values: Any, start: int, context: Any) -> None:
        if "started_s" not in values:
            return
        begin = start + round(values["started_s"] * NANOSECONDS)
        counts = {f"vllm_omni.{name}": value for name, value in values.items() if isinstance(value, int | float)}
        span = self._tracer.start_span(stage, context, start_time=begin, attributes=counts)
        span.end(begin + round(values.get("ran_s", 0.0) * NANOSECONDS))
