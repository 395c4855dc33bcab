"""The metrics for Prometheus: requests as clients see them, HTTP responses, and the engine's own numbers.

Names and buckets are vLLM's where it has them, with `lamina:` as the prefix. No text of a request is in them.
"""

from __future__ import annotations

import platform
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from typing import get_args

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from lamina.completions import Completion
from lamina.errors import LaminaError
from lamina.messages.engine_request import EngineRequest
from lamina.server.metrics.engine_metrics import EngineMetrics, cumulative, family
from lamina.server.models import ModelState, Residence
from lamina.version import __version__

RESIDENCES: tuple[Residence, ...] = get_args(Residence)
MAX_VALUES = 64  # different values of a label that clients can choose; all others become "other"

_FIRST_TOKEN = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
)  # fmt: skip
_BETWEEN_TOKENS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
_LATENCY = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip
_TOKENS = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))
_SAMPLES = (1.0, 2.0, 5.0, 10.0, 20.0)
_HTTP = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class Distribution:
    """A histogram. The client library's own takes a lock per value, and four times as long."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times


class ModelMetrics:
    """The metrics of one model: an `Observer` of its requests. `name`, under which the model is served, is a label of
    each. For the event loop's thread."""

    def __init__(self, name: str) -> None:
        self._model = (name, "0")
        self._engine = EngineMetrics(name)
        self._restarts = 0
        self._loads = 0
        self._waiting = 0
        self._residence: Residence | None = None
        self._first_token = Distribution(_FIRST_TOKEN)
        self._token_gaps = Distribution(_BETWEEN_TOKENS)
        self._per_token = Distribution(_BETWEEN_TOKENS)
        self._e2e, self._queue, self._inference = (Distribution(_LATENCY) for _ in range(3))
        self._prefill, self._decode = (Distribution(_LATENCY) for _ in range(2))
        self._prompt, self._generated, self._longest, self._max_tokens = (Distribution(_TOKENS) for _ in range(4))
        self._n = Distribution(_SAMPLES)
        self._finished = dict.fromkeys(("stop", "length", "abort", "error"), 0)
        self._failures: dict[str, int] = {}

    # The methods of an Observer.

    def first_token(self, seconds: float) -> None:
        self._first_token.observe(seconds)

    def next_tokens(self, seconds: float, count: int) -> None:
        # Called for each token. Tokens that came together count as evenly spaced.
        self._token_gaps.observe(seconds / count, count)

    def ended(self, request: EngineRequest, completion: Completion, seconds: float) -> None:
        timing, usage = completion.timing, completion.usage
        for sample in completion.samples:
            self._finished[sample.finish_reason] = self._finished.get(sample.finish_reason, 0) + 1
        longest = max(len(sample.token_ids) for sample in completion.samples)
        self._e2e.observe(seconds)
        self._prompt.observe(usage.prompt_tokens)
        self._generated.observe(usage.completion_tokens)
        self._longest.observe(longest)
        self._n.observe(request.request.n)
        self._max_tokens.observe(request.request.max_tokens)
        if request.scheduled is None:  # it ended in the queue
            return
        self._queue.observe(timing.queued)
        self._inference.observe(max(0.0, timing.total - timing.queued))
        if not longest:  # it ended in its prompt
            return
        decode = max(0.0, timing.total - timing.first_token)
        self._prefill.observe(max(0.0, timing.first_token - timing.queued))
        self._decode.observe(decode)
        if longest > 1:
            self._per_token.observe(decode / (longest - 1))

    def failed(self, request: EngineRequest, error: LaminaError) -> None:
        self._finished["error"] += 1
        _count(self._failures, type(error).__name__)

    # For Prometheus.

    def see(self, now: ModelState) -> None:
        self._engine.see(now.snapshot, now.state in ("ready", "draining"))
        self._restarts = max(self._restarts, now.restarts)
        self._loads, self._waiting, self._residence = now.loads, now.waiting, now.residence

    def families(self) -> Iterator[Metric]:
        """Every metric, including those without a value."""
        yield self._counter("engine_restarts", "How often an engine was started again.", (), {(): self._restarts})
        yield self._counter("model_loads", "How often the model was loaded on demand.", (), {(): self._loads})
        where = family(GaugeMetricFamily, "model_state", "1 for the state that the model is in.", "state")
        for residence in RESIDENCES if self._residence else ():
            where.add_metric((*self._model, residence), residence == self._residence)
        yield where
        what = "Requests that wait until the model is loaded."
        waiting = family(GaugeMetricFamily, "num_requests_waiting_for_model", what)
        waiting.add_metric(self._model, self._waiting)
        yield waiting
        yield from self._engine.families()
        yield from self._requests()

    def _requests(self) -> Iterator[Metric]:
        histograms = {
            "time_to_first_token_seconds": (self._first_token, "From a prompt's submission to its first token."),
            "inter_token_latency_seconds": (self._token_gaps, "Between two tokens of a sample."),
            "request_time_per_output_token_seconds": (
                self._per_token,
                "A request's decode time by tokens after the first.",
            ),
            "e2e_request_latency_seconds": (self._e2e, "From a prompt's submission to its end."),
            "request_queue_time_seconds": (self._queue, "From a prompt's submission to its first batch."),
            "request_inference_time_seconds": (self._inference, "From a prompt's first batch to its last token."),
            "request_prefill_time_seconds": (self._prefill, "From a prompt's first batch to its first token."),
            "request_decode_time_seconds": (self._decode, "From a prompt's first token to its last."),
            "request_prompt_tokens": (self._prompt, "Tokens of a prompt."),
            "request_generation_tokens": (self._generated, "Tokens generated for a prompt, over all its samples."),
            "request_max_num_generation_tokens": (self._longest, "Tokens of a prompt's longest sample."),
            "request_params_n": (self._n, "Samples asked for."),
            "request_params_max_tokens": (self._max_tokens, "The most tokens of a sample that were asked for."),
        }
        for name, (distribution, text) in histograms.items():
            yield _histogram(f"lamina:{name}", text, ("model_name", "engine"), {self._model: distribution})
        yield self._counter("request_success", "Samples that ended, by why.", ("finished_reason",), self._finished)
        yield self._counter("request_failures", "Prompts that ended with an error.", ("error",), self._failures)

    def _counter(
        self, name: str, text: str, labels: tuple[str, ...], counts: dict[str, int] | dict[tuple[()], int]
    ) -> Metric:
        counter = family(CounterMetricFamily, name, text, *labels)
        for value, count in counts.items():
            counter.add_metric((*self._model, *((value,) if isinstance(value, str) else value)), count)
        return counter


class ServerMetrics:
    """The metrics of all models, which are observed by `of`, and counts of HTTP responses. For the event loop's
    thread."""

    def __init__(self, *models: str) -> None:
        self._models = {name: ModelMetrics(name) for name in models}
        self._first = (models[0], "0")
        self._rejections: dict[str, int] = {}
        self._responses: dict[tuple[str, str, str], int] = {}
        self._durations: dict[tuple[str, str], Distribution] = {}
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def of(self, model: str) -> ModelMetrics:
        return self._models[model]

    # Of HTTP.

    def rejected(self, reason: str) -> None:
        """A request was refused before it reached the engine."""
        _count(self._rejections, reason)

    def http(self, handler: str, method: str, status: int, seconds: float) -> None:
        """A response has ended. `handler` is the route's template, not the path of the request."""
        if (handler, method) not in self._durations and len(self._durations) >= MAX_VALUES:
            handler, method = "other", "other"
        key = (handler, method, str(status))
        self._responses[key] = self._responses.get(key, 0) + 1
        if (handler, method) not in self._durations:
            self._durations[handler, method] = Distribution(_HTTP)
        self._durations[handler, method].observe(seconds)

    # For Prometheus.

    def render(self, models: Mapping[str, ModelState]) -> tuple[bytes, str]:
        """The text of a scrape, and its content type, from the present states of the models, by name."""
        for name, now in models.items():
            self._models[name].see(now)
        return generate_latest(self._registry), CONTENT_TYPE_PLAIN_0_0_4

    def collect(self) -> Iterator[Metric]:
        """All metrics; the registry calls this."""
        build = GaugeMetricFamily("lamina:build_info", "What runs here.", labels=("version", "python_version"))
        build.add_metric((__version__, platform.python_version()), 1)
        yield build
        families: dict[str, Metric] = {}  # of all models together: a family comes once
        for model in self._models.values():
            for metric in model.families():
                if metric.name in families:
                    families[metric.name].samples += metric.samples
                else:
                    families[metric.name] = metric
        yield from families.values()
        yield from self._http_families()

    def _http_families(self) -> Iterator[Metric]:
        rejections = family(CounterMetricFamily, "rejections", "Requests turned away before the engine.", "reason")
        for reason, count in self._rejections.items():
            rejections.add_metric((*self._first, reason), count)
        yield rejections
        responses = CounterMetricFamily("http_requests", "Responses.", labels=("handler", "method", "status"))
        for values, count in self._responses.items():
            responses.add_metric(values, count)
        yield responses
        yield _histogram(
            "http_request_duration_seconds",
            "From a request to the end of its response.",
            ("handler", "method"),
            self._durations,
        )


def _histogram(
    name: str, text: str, labels: tuple[str, ...], distributions: dict[tuple[str, str], Distribution]
) -> Metric:
    histogram = HistogramMetricFamily(name, text, labels=labels)
    for values, distribution in distributions.items():
        histogram.add_metric(values, cumulative(distribution.bounds, distribution.counts), distribution.total)
    return histogram


def _count(counts: dict[str, int], value: str) -> None:
    """Count `value` once more, or "other" once there are too many different values for a series each."""
    if value not in counts and len(counts) >= MAX_VALUES:
        value = "other"
    counts[value] = counts.get(value, 0) + 1
