"""Traces: one OpenTelemetry span for each request that generated something, with the GenAI conventions' attributes.

Invariant: without the SDK, or without an endpoint to send to, nothing of this is imported or done. Spans hold counts
and names, no text.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from stemcache._version import __version__
from stemcache.api.context import Outcome, RequestContext

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

_log = logging.getLogger(__name__)

# open-telemetry/semantic-conventions-genai; all of them are "in development", so their names stand here only.
OPERATION: Final = "gen_ai.operation.name"
PROVIDER: Final = "gen_ai.provider.name"
MODEL: Final = "gen_ai.request.model"
INPUT: Final = "gen_ai.usage.input_tokens"
CACHED: Final = "gen_ai.usage.cache_read.input_tokens"
OUTPUT: Final = "gen_ai.usage.output_tokens"


class Spans:
    """Makes a span of a request that has ended."""

    def __init__(self, tracer: Tracer, model: str) -> None:
        self._tracer = tracer
        self._model = model

    def record(self, request: RequestContext, route: str, outcome: Outcome, headers: Mapping[str, str]) -> None:
        """Made at the end with the times of the whole, so that nothing has to be carried along meanwhile.

        A trace that the client began (`traceparent`) goes on.
        """
        from opentelemetry.trace import SpanKind, Status, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        end = time.time_ns()
        operation = "chat" if "chat" in route else "text_completion"
        usage = request.usage
        span = self._tracer.start_span(
            f"{operation} {self._model}",
            context=TraceContextTextMapPropagator().extract(headers),
            kind=SpanKind.SERVER,
            start_time=end - round((time.perf_counter() - request.started) * 1e9),
            attributes={
                OPERATION: operation,
                PROVIDER: "stemcache",
                MODEL: self._model,
                INPUT: usage.prompt_tokens,
                CACHED: usage.cached_tokens,
                OUTPUT: usage.completion_tokens,
                "stemcache.request_id": request.request_id,
            },
        )
        if outcome != "completed":
            span.set_attribute("error.type", outcome)
            span.set_status(Status(StatusCode.ERROR))
        span.end(end)


def exported_spans(model: str) -> Spans | None:
    """Spans that go to OTEL_EXPORTER_OTLP_ENDPOINT in the background; None, and a warning, without the SDK."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        _log.warning("OTEL_EXPORTER_OTLP_ENDPOINT is set, but no traces are sent: pip install 'stemcache[otel]'")
        return None
    # A provider of our own, as setting the global one would be a side effect on whoever embeds the application.
    provider = TracerProvider(resource=Resource.create({"service.name": "stemcache"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Spans(provider.get_tracer("stemcache", __version__), model)
