"""OpenTelemetry traces: one span per prompt, sent to a collector. OpenTelemetry is loaded once a `Tracer` is made.

A span is made when its prompt has ended, from times that were measured anyway, so tokens cost nothing. Attributes are
those of the GenAI semantic conventions, without any text of prompts or outputs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from lamina.completions import Completion
from lamina.errors import InvalidRequest, LaminaError
from lamina.messages.engine_request import EngineRequest
from lamina.server.frontend import Observer

_OPERATIONS = {"/v1/chat/completions": "chat"}  # all other routes: "text_completion"
_EXPORT_TIMEOUT = 3.0  # seconds to send a batch of spans to the collector, retries included
_MAX_STATE = 512  # characters of a tracestate that is passed on: the least that W3C requires

_request: ContextVar[tuple[str, Mapping[str, str]]] = ContextVar("lamina_traced_request", default=("", {}))
"""The path and the trace headers of the running task's HTTP request."""


class Tracer:
    """Makes and sends spans. `provider` is an OpenTelemetry `TracerProvider`, `model` the served model's name."""

    def __init__(self, provider: Any, model: str) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("lamina")
        self._model = model

    @classmethod
    def from_endpoint(cls, url: str, model: str) -> Tracer:
        """A tracer that sends spans to an OTLP collector over HTTP, such as http://localhost:4318/v1/traces, on a
        thread of its own, and drops them where it does not answer. The variables OTEL_SERVICE_NAME,
        OTEL_RESOURCE_ATTRIBUTES, OTEL_TRACES_SAMPLER and OTEL_EXPORTER_OTLP_HEADERS have their usual meaning. Raises
        InvalidRequest where OpenTelemetry is not installed."""
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            message = f"otlp_traces_endpoint is {url!r:.80}, but OpenTelemetry is not installed: "
            raise InvalidRequest(
                f"{message}pip install opentelemetry-sdk opentelemetry-exporter-otlp-proto-http"
            ) from error
        resource = Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", "lamina")})
        provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url, timeout=_EXPORT_TIMEOUT)))
        return cls(provider, model)

    def of(self, model: str) -> Tracer:
        """A tracer of another model, which sends its spans with this one's."""
        return Tracer(self._provider, model)

    def middleware(self, app: ASGIApp) -> ASGIApp:
        """`app`, with the spans of its requests as children of the spans in their `traceparent` headers."""

        async def traced(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http":
                headers = {
                    key.decode("latin-1"): value.decode("latin-1")
                    for key, value in scope["headers"]
                    if key in (b"traceparent", b"tracestate")
                }
                if len(headers.get("tracestate", "")) > _MAX_STATE:
                    del headers["tracestate"]
                _request.set((scope["path"], headers))
            await app(scope, receive, send)

        return traced

    def observing(self, observer: Observer) -> Observer:
        """An observer that passes every call on to `observer`, and makes a span for each prompt that has ended."""
        return _Observing(self, observer)

    def close(self) -> None:
        """Send the waiting spans, and stop. Takes some seconds where the collector does not answer."""
        self._provider.shutdown()

    def completed(self, request: EngineRequest, completion: Completion, seconds: float) -> None:
        """Make the span of a prompt that has just ended, `seconds` after its submission."""
        end = time.time_ns()
        start = end - round(seconds * 1e9)
        timing, usage = completion.timing, completion.usage
        span = self._begin(request, start)
        span.set_attributes(
            {
                "gen_ai.usage.input_tokens": usage.prompt_tokens,
                "gen_ai.usage.output_tokens": usage.completion_tokens,
                "gen_ai.usage.cache_read.input_tokens": request.cached_tokens,
                "gen_ai.response.finish_reasons": tuple(sample.finish_reason for sample in completion.samples),
                "lamina.preemptions": request.preemptions,
            }
        )
        span.add_event("queued", timestamp=start)
        if request.scheduled is not None:
            span.set_attribute("gen_ai.latency.time_in_queue", timing.queued)
            span.add_event("scheduled", timestamp=start + round(timing.queued * 1e9))
        if usage.completion_tokens:
            span.set_attribute("gen_ai.response.time_to_first_chunk", timing.first_token)
            span.add_event("first token", timestamp=start + round(timing.first_token * 1e9))
            span.add_event("last token", timestamp=min(end, start + round(timing.total * 1e9)))
        span.end(end_time=end)

    def failed(self, request: EngineRequest, error: LaminaError) -> None:
        """Make the span of a prompt that has just ended with an error."""
        from opentelemetry.trace import Status, StatusCode

        end = time.time_ns()
        span = self._begin(request, end - round((time.monotonic() - request.submitted) * 1e9))
        span.set_attribute("error.type", type(error).__name__)
        span.set_status(Status(StatusCode.ERROR))
        span.end(end_time=end)

    def _begin(self, request: EngineRequest, start: int) -> Any:
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        path, headers = _request.get()
        operation, params = _OPERATIONS.get(path, "text_completion"), request.params
        attributes = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "lamina",
            "gen_ai.request.model": self._model,
            "gen_ai.response.model": self._model,
            "gen_ai.request.max_tokens": request.request.max_tokens,
            "gen_ai.request.choice.count": request.request.n,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.request.top_k": params.top_k,
            "gen_ai.request.frequency_penalty": params.frequency_penalty,
            "gen_ai.request.presence_penalty": params.presence_penalty,
            "lamina.request.id": request.id,
        }
        return self._tracer.start_span(
            f"{operation} {self._model}",
            context=TraceContextTextMapPropagator().extract(headers),
            kind=SpanKind.SERVER,
            start_time=start,
            attributes={name: value for name, value in attributes.items() if value is not None},
        )


class _Observing:
    """An observer before another one, and a tracer. Calls for tokens go to the other observer directly."""

    def __init__(self, tracer: Tracer, observer: Observer) -> None:
        self._tracer = tracer
        self._observer = observer
        self.first_token = observer.first_token
        self.next_tokens = observer.next_tokens

    def ended(self, request: EngineRequest, completion: Completion, seconds: float) -> None:
        self._observer.ended(request, completion, seconds)
        self._tracer.completed(request, completion, seconds)

    def failed(self, request: EngineRequest, error: LaminaError) -> None:
        self._observer.failed(request, error)
        self._tracer.failed(request, error)
