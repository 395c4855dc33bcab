"""Spans of prompts: their times, their parents, and nothing of the text."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from scripted_reply import ticket
from unobserved import Unobserved

from lamina.completions import Completion, Sample, Timing, Usage
from lamina.errors import EngineError
from lamina.server.metrics.tracing import Tracer

trace = pytest.importorskip("opentelemetry.sdk.trace")
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def spans() -> Any:
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    return InMemorySpanExporter()


@pytest.fixture
def tracer(spans: Any) -> Tracer:
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor

    provider = trace.TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(spans))
    return Tracer(provider, "m")


def completion(length: int, timing: Timing, reason: Any = "stop") -> Completion:
    return Completion((Sample(0, "a secret", tuple(range(length)), reason, None),), Usage(3, length, 2), timing)


def test_a_prompts_span_has_its_times(tracer: Tracer, spans: Any) -> None:
    asked = ticket(max_tokens=50, temperature=0.5)
    asked.scheduled, asked.cached_tokens = asked.submitted + 0.1, 2
    before = time.time_ns()
    tracer.observing(Unobserved()).ended(asked, completion(5, Timing(0.1, 0.4, 2.4, 5)), 2.5)
    [span] = spans.get_finished_spans()
    assert span.name == "text_completion m"
    assert span.parent is None
    assert before <= span.end_time <= time.time_ns()
    assert span.end_time - span.start_time == 2_500_000_000
    events = {event.name: (event.timestamp - span.start_time) / 1e9 for event in span.events}
    assert events == pytest.approx({"queued": 0, "scheduled": 0.1, "first token": 0.4, "last token": 2.4})
    assert span.attributes["gen_ai.request.max_tokens"] == 50
    assert span.attributes["gen_ai.request.temperature"] == 0.5
    assert span.attributes["gen_ai.usage.input_tokens"] == 3
    assert span.attributes["gen_ai.usage.output_tokens"] == 5
    assert span.attributes["gen_ai.usage.cache_read.input_tokens"] == 2
    assert span.attributes["gen_ai.response.finish_reasons"] == ("stop",)
    assert "secret" not in span.to_json()


def test_what_ended_in_the_queue_was_never_scheduled(tracer: Tracer, spans: Any) -> None:
    tracer.completed(ticket(), completion(0, Timing(0, 0, 0, 0), "abort"), 1.0)
    [span] = spans.get_finished_spans()
    assert [event.name for event in span.events] == ["queued"]


def test_a_failure_is_an_error_by_its_class(tracer: Tracer, spans: Any) -> None:
    asked = ticket()
    asked.submitted -= 3
    tracer.observing(Unobserved()).failed(asked, EngineError("a secret"))
    [span] = spans.get_finished_spans()
    assert span.attributes["error.type"] == "EngineError"
    assert not span.status.is_ok
    assert span.end_time - span.start_time >= 3_000_000_000
    assert "secret" not in span.to_json()


def answer(tracer: Tracer, path: str, *headers: tuple[bytes, bytes]) -> None:
    """One HTTP request, whose prompt ends in a task that it starts, as a stream's does."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async def stream() -> None:
            tracer.completed(ticket(), completion(1, Timing(0, 0.1, 0.1, 1)), 0.2)

        await asyncio.create_task(stream())

    nothing: Any = None
    scope = {"type": "http", "path": path, "headers": list(headers)}
    asyncio.run(tracer.middleware(app)(scope, nothing, nothing))


def test_a_span_is_a_child_of_its_clients(tracer: Tracer, spans: Any) -> None:
    answer(tracer, "/v1/chat/completions", (b"traceparent", PARENT.encode()), (b"tracestate", b"x=1"))
    answer(tracer, "/v1/chat/completions", (b"traceparent", PARENT.encode()), (b"tracestate", b"x=" + b"y" * 600))
    for span in spans.get_finished_spans():
        assert span.name == "chat m"
        assert f"{span.parent.trace_id:032x}" == PARENT[3:35]
        assert f"{span.parent.span_id:016x}" == PARENT[36:52]
    first, second = spans.get_finished_spans()
    assert first.parent.trace_state.get("x") == "1"
    assert second.parent.trace_state.get("x") is None


@pytest.mark.parametrize("parent", [b"", b"\xff\x00", b"00-zz", b"x" * 8000])
def test_a_broken_parent_is_none(tracer: Tracer, spans: Any, parent: bytes) -> None:
    answer(tracer, "/v1/completions", (b"traceparent", parent))
    [span] = spans.get_finished_spans()
    assert span.parent is None


def test_tokens_go_straight_to_who_counts_them(tracer: Tracer) -> None:
    metrics = Unobserved()
    observed = tracer.observing(metrics)
    assert observed.next_tokens == metrics.next_tokens
    assert observed.first_token == metrics.first_token
