"""What a plan promises beside what is measured (`check`): `lamina serve --plan`, a client, and the requests it was made
for.

The promise is the event loop's for the very requests that were sent: their times, and their tokens as the server
counted them. How steady the machine was stands beside both. `Served` is the server, a process of this one: started,
found, ended.
"""

from __future__ import annotations

import math
import os
import re
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lamina.errors import EngineError, InvalidRequest
from lamina.measure.bench.measures import Outcome, meets, percentile
from lamina.measure.bench.running import run_loop
from lamina.measure.bench.serve import Result, bench
from lamina.measure.bench.workloads import Settings
from lamina.measure.hardware.busy import Beside
from lamina.measure.hardware.child import Child
from lamina.measure.hardware.fitting import BUSY, DRIFT
from lamina.simulator.costs.uncertainty import spread
from lamina.simulator.event_loop.results import RunResult
from lamina.simulator.event_loop.simulate import Slo, simulate
from lamina.simulator.planning.plan_file import Plan, read
from lamina.simulator.traces.arrivals import Arrival, Trace
from lamina.simulator.traces.catalogue import at_rate, windows
from lamina.system.child_process import ChildProcess, module_command
from lamina.system.progress import Progress

LEAST, _USUAL = 20, 48
"""Requests of a check, at least and where no minutes are given: fewer than the first have no 99th percentile worth the
name."""
_READ = 1 << 28  # bytes of a reading of the memory's rate


@dataclass(frozen=True, slots=True)
class Figure:
    """One number: what was promised, the interval around it, and what was measured. `unit` is ms, %, tok/s or $."""

    name: str
    unit: str
    promised: float
    low: float
    high: float
    measured: float

    @property
    def difference(self) -> float:
        """Of what was promised from what was measured, as a share of the latter; in points where the unit is %."""
        if self.unit == "%":
            return (self.promised - self.measured) / 100
        return self.promised / self.measured - 1 if self.measured else math.inf

    @property
    def holds(self) -> bool:
        """Whether the interval has what was measured."""
        return self.low <= self.measured <= self.high


@dataclass(frozen=True, slots=True)
class Noise:
    """How steady the machine was: the share of the cores that others used during the run, and the bytes a second that
    a plain read reached before and after it; `planned` is the rate that the plan counts on."""

    others: float
    before: float
    after: float
    planned: float

    @property
    def remarks(self) -> list[str]:
        """What may make the numbers wrong, a sentence each."""
        sentences = []
        if self.others > BUSY:
            sentences.append(f"busy: other processes used {self.others:.0%} of the cores during the run")
        low, high = sorted((self.before, self.after))
        if high - low > DRIFT * high:
            sentences.append(
                f"unsteady: memory was read at {self.before / 1e9:.1f} GB/s before and {self.after / 1e9:.1f} after"
            )
        mean = (low + high) / 2
        if self.planned and abs(mean - self.planned) > DRIFT * self.planned:
            sentences.append(
                f"other than planned: memory is read at {mean / 1e9:.1f} GB/s, the plan has {self.planned / 1e9:.1f}"
            )
        return sentences


@dataclass(frozen=True, slots=True)
class Check:
    """A plan's figures over `seconds` of `requests`; `notes` are the client's, one line each."""

    trace: str
    requests: int
    seconds: float
    figures: tuple[Figure, ...]
    noise: Noise
    failed: Mapping[str, int]
    notes: tuple[str, ...]


def check(
    path: Path, trace: Trace, *, minutes: float | None = None, progress: Progress | None = None, seed: int | None = None
) -> Check:
    """Serve a plan's file here for so many minutes, with requests of `trace` at the rate of one replica.

    The prediction is for the plan's devices; what is measured is this machine, so the two say something of each other
    where the plan was made with this machine's calibration. Raises InvalidRequest for a plan that no engine can run or
    a trace too short, EngineError where the server does not come up or answers nothing.
    """
    plan = read(path)
    plan.one_replica().keywords()  # raises where no engine can do it, before anything is started
    load = excerpt(trace, plan, minutes)
    with Child("reading", {"size": _READ}) as memory, Served(path, progress) as server:
        before = memory.ask("read")
        other_load = Beside(os.getpid())  # whose descendants the server's processes are
        settings = Settings(
            base_url=server.url,
            endpoint="completions",
            dataset="trace",
            num_warmups=2,
            ignore_eos=True,
            seed=seed,
            slo=_milliseconds(plan.slo),
        )
        result = run_loop(bench(settings, progress, load))
        others, after = other_load.share(), memory.ask("read")
    if result.run.unfinished:
        raise KeyboardInterrupt
    device = plan.system.devices[0][0]
    noise = Noise(others, before, after, device.bandwidth if device.kind == "cpu" else 0.0)
    return compare(plan, load.name, result, noise)


def excerpt(trace: Trace, plan: Plan, minutes: float | None = None) -> Trace:
    """The part of a trace that lasts so many minutes at the rate that the plan has for one replica; None: two, or as
    long as `_USUAL` requests take. Raises InvalidRequest where it has fewer than `LEAST` requests, or more than the
    trace, and for a plan that promises none."""
    # The plan's requests a second are those in time: a share of what is sent.
    rate_of_plan = plan.predicted.requests_per_second / max(0.01, plan.predicted.slo_share)
    rate = min(plan.trace.rate or math.inf, rate_of_plan) / plan.replicas
    if not rate:
        raise InvalidRequest("the plan promises 0 requests a second; allowed is a plan that serves some")
    minutes = max(2.0, _USUAL / rate / 60) if minutes is None else minutes
    if not 0.1 <= minutes <= 24 * 60:
        raise InvalidRequest(f"minutes is {minutes!r}; allowed are 0.1 to 1440")
    count = round(rate * minutes * 60)
    if not LEAST <= count <= len(trace.arrivals):
        raise InvalidRequest(
            f"{minutes:g} minutes at {rate:.3g} requests a second are {count} requests; allowed are {LEAST} to "
            f"{len(trace.arrivals)}, as {trace.name} has: --minutes from {LEAST / rate / 60:.2g} to "
            f"{len(trace.arrivals) / rate / 60:.0f}"
        )
    return at_rate(windows(trace, count), rate)


def compare(plan: Plan, name: str, result: Result, noise: Noise) -> Check:
    """What was promised for a run's own requests, beside the run. Raises EngineError where nothing was answered."""
    answered = [outcome for outcome in result.run.outcomes if not outcome.error]
    if not answered:
        why = "; ".join(f"{kind}: {words}" for kind, words in result.details.items())
        raise EngineError(f"the server answered none of {len(result.run.outcomes)} requests: {why:.500}")
    promised = simulate(plan.system, sent(name, answered), slo=plan.slo)
    figures = tuple(_figures(plan, promised, answered, result))
    return Check(name, len(answered), result.run.seconds, figures, noise, result.summary.failures, result.notes)


def sent(name: str, outcomes: Sequence[Outcome]) -> Trace:
    """The requests of a run as a trace: when each was due, its tokens as the server counted them."""
    ordered = sorted(outcomes, key=lambda outcome: outcome.due)
    return Trace(
        name, tuple(Arrival(outcome.due, outcome.prompt_tokens, max(1, outcome.output_tokens)) for outcome in ordered)
    )


def _figures(plan: Plan, promised: RunResult, answered: Sequence[Outcome], result: Result) -> list[Figure]:
    limits, factors = _milliseconds(plan.slo), spread(plan.system)
    ttft = sorted(outcome.ttft for outcome in answered)
    tpot = sorted(outcome.tpot for outcome in answered if outcome.tpot is not None)
    figures = []
    for what, distribution, range_of, values in (
        ("TTFT", promised.ttft, factors.ttft, ttft),
        ("TPOT", promised.tpot, factors.tpot, tpot),
    ):
        if not values:  # every answer is one token
            continue
        low, high = range_of
        for name, seconds, measured in (
            ("mean", distribution.mean, sum(values) / len(values)),
            ("p50", distribution.p50, percentile(values, 50)),
            ("p99", distribution.p99, percentile(values, 99)),
        ):
            ms = seconds * 1e3
            figures.append(Figure(f"{what} {name}", "ms", ms, ms * low, ms * high, measured * 1e3))
    share = sum(meets(outcome, limits) for outcome in answered) / len(answered)
    low, high = factors.goodput
    for name, unit, value, measured in (
        ("in time", "%", promised.slo_share * 100, share * 100),
        ("output", "tok/s", promised.tokens_per_second, result.summary.output_throughput),
    ):
        upper = min(100.0, value * high) if unit == "%" else value * high
        figures.append(Figure(name, unit, value, value * low, upper, measured))
    if price := promised.price:
        cost = price / 3600 / max(1e-9, result.summary.output_throughput) * 1e6
        value = promised.dollars_per_million
        figures.append(Figure("$/M tokens", "$", value, value / high, value / low, cost))
    return figures


def _milliseconds(slo: Slo) -> dict[str, float]:
    return {name: value * 1e3 for name, value in (("ttft", slo.ttft), ("tpot", slo.tpot)) if value is not None}


_MODULE = "lamina.measure.bench.served_main"
PATIENCE = 600.0
"""Seconds for the model to load, a download included."""
_LAST = 8  # lines of its output that an error shows
_GRACE = 45.0  # seconds to end in order
_SERVING = re.compile(r"serving .* at (http://\S+)")


class Served:
    """A server on a free port of this host. Use it as a context manager. `url` is where it listens.

    Raises EngineError with its last words where it does not come up.
    """

    def __init__(self, plan: Path, progress: Progress | None = None, patience: float = PATIENCE) -> None:
        self.url = ""
        self._last_lines: deque[str] = deque(maxlen=_LAST)
        self._up = threading.Event()
        if progress is not None:
            progress("starting the server", 0, None)
        command = module_command(_MODULE, "serve", "--plan", str(plan.absolute()), "--host", "127.0.0.1", "--port", "0")
        self._process = ChildProcess("serve", command, self._heard, lambda _: self._up.set(), merge_stderr=True)
        try:
            if not self._up.wait(patience) or not self.url:
                output = " | ".join(self._last_lines)
                raise EngineError(f"lamina serve did not come up in {patience:g} s: {output:.1000}")
        except BaseException:
            self.close()
            raise
        if progress is not None:
            progress("starting the server", 1, 1)

    def close(self) -> None:
        """End it, requests under way included. Harmless the second time."""
        self._process.terminate()
        if not self._process.wait(_GRACE):
            self._process.kill()
            self._process.wait(_GRACE)

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _heard(self, _: ChildProcess, line: str) -> None:
        """On a thread of the child's."""
        self._last_lines.append(line)
        if (match := _SERVING.search(line)) is not None:
            self.url = match[1]
            self._up.set()
