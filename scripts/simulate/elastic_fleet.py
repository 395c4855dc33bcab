"""A fleet that grows and shrinks with its load, in simulated time: by whole instances, each with the weights, or by
attention workers beside one instance, which have none.

What is counted is what is paid: every device from when it is asked for until it is let go. Decode alone is simulated;
a prompt's KV is there as soon as it is admitted. The seconds before a first token beside all steps are in its TTFT.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, replace
from heapq import heappop, heappush

from lamina.errors import InvalidRequest
from lamina.simulator.costs.systems import Colocated, Offloaded, before_first_token, price
from lamina.simulator.event_loop.instance import Instance, Life, Totals
from lamina.simulator.event_loop.results import Distribution, distribution, weighted_distribution
from lamina.simulator.traces.arrivals import Trace


@dataclass(frozen=True, slots=True)
class Scaling:
    """When a fleet grows and shrinks. Its load is the tokens of all that decode or wait.

    It grows as soon as the load is above `high` of the KV that there is and is asked for, to as much as brings it
    below; what is asked for is there `start` seconds later. It shrinks by one once less would have done for `patience`
    seconds and what it keeps has gone. It is looked at `every` so many seconds, and has at most `most` instances or
    attention workers. Raises InvalidRequest.
    """

    start: float
    high: float = 0.8
    patience: float = 30.0
    every: float = 1.0
    most: int = 64

    def __post_init__(self) -> None:
        for name, least in (("start", 0.0), ("patience", 0.0), ("every", 1e-3)):
            value = getattr(self, name)
            if type(value) not in (int, float) or not least <= value < math.inf:
                raise InvalidRequest(
                    f"{name} of the scaling is {value!r:.80}; allowed are finite seconds from {least:g} on"
                )
        if not 0 < self.high <= 1:
            raise InvalidRequest(f"high of the scaling is {self.high!r:.80}; allowed are shares above 0, up to 1")
        if type(self.most) is not int or not 1 <= self.most <= 4096:
            raise InvalidRequest(f"most of the scaling is {self.most!r:.80}; allowed are 1 to 4096")


@dataclass(frozen=True, slots=True)
class ElasticResult:
    """What a fleet that scales has cost and given. Times are seconds."""

    system: str
    finished: int
    output_tokens: int
    seconds: float
    dollars: float
    mean_units: float
    """Instances or attention workers that were paid for, in the mean over time."""
    peak_units: int
    started: int
    """How many were asked for, beyond the first."""
    ttft: Distribution
    tpot: Distribution
    tbt: Distribution

    @property
    def dollars_per_million(self) -> float:
        """Dollars for a million output tokens."""
        return 1e6 * self.dollars / self.output_tokens if self.output_tokens else math.inf


def simulate_elastic(system: Colocated | Offloaded, trace: Trace, scaling: Scaling) -> ElasticResult:
    """Serve a trace by a fleet that begins with one instance, or one attention worker, and scales.

    A co-located system grows by instances of itself; each request waits for room at the one with the least load. One
    whose attention is elsewhere grows by attention devices. Raises InvalidRequest where the model fits nowhere.
    """
    return _Fleet(system, trace, scaling).run()


class _Fleet:
    """A fleet that serves a trace. Its units are instances, or the attention devices of one."""

    def __init__(self, system: Colocated | Offloaded, trace: Trace, scaling: Scaling) -> None:
        self._system = replace(system, attention_count=1) if isinstance(system, Offloaded) else system
        self._trace, self._scaling = trace, scaling
        self._room = self._system.capacity.tokens
        if not self._room:
            raise InvalidRequest(f"system {self._system.name!r} has no room for KV; allowed is more memory")
        self._totals, self._lives = Totals(), list[Life]()
        self._followers: dict[int, list[int]] = {}
        for number, arrival in enumerate(trace.arrivals):
            if arrival.after is not None:
                self._followers.setdefault(arrival.after, []).append(number)
        self._arrivals = [(a.at, number) for number, a in enumerate(trace.arrivals) if a.after is None]
        self._waiting: deque[tuple[float, int]] = deque()  # for room at an instance: since when, and which
        self._instances = [self._instance()]
        self._leaving: list[Instance] = []  # they get nothing new
        self._serving = 1
        self._coming: list[float] = []  # seconds at which units that were asked for are there
        self._paid = 0.0  # unit seconds
        self._peak, self._started, self._less_since = 1, 0, math.inf

    def run(self) -> ElasticResult:
        look = before = begun = self._trace.arrivals[0].at
        while True:
            ready = min(instance.next_at for instance in self._instances)
            arrives = self._arrivals[0][0] if self._arrivals else math.inf
            if min(ready, arrives) == math.inf:
                break
            if look <= min(ready, arrives):
                self._paid += (look - before) * self._units
                before = look
                self._look(look)
                look += self._scaling.every
            elif arrives <= ready:
                self._waiting.append(heappop(self._arrivals))
                self._place(arrives)
            else:
                min(self._instances, key=lambda instance: instance.next_at).step()
        end = max((life.last for life in self._lives), default=begun)
        self._paid += max(0.0, end - before) * self._units
        return self._result(begun, end)

    @property
    def _units(self) -> int:
        """Units that are paid for."""
        return self._serving + len(self._coming)

    def _instance(self) -> Instance:
        return Instance(
            self._system, self._trace, False, False, self._totals, offered=True, pooled=True, ended=self._ended
        )

    def _place(self, now: float) -> None:
        """Give requests that wait, first come, first served, to the instance with the least load, if it has room."""
        while self._waiting:
            since, number = self._waiting[0]
            taking = [instance for instance in self._instances if instance not in self._leaving]
            least = min(taking, key=lambda instance: instance.load)
            full = least.load and least.load + self._trace.arrivals[number].prompt > self._room
            if full and not isinstance(self._system, Offloaded):
                return
            self._waiting.popleft()
            least.offer(number, now, since)

    def _ended(self, number: int, life: Life) -> None:
        self._lives.append(life)
        self._place(life.last)
        for after in self._followers.get(number, ()):
            arrival = self._trace.arrivals[after]
            heappush(self._arrivals, (max(arrival.at, life.last + arrival.gap), after))

    def _look(self, now: float) -> None:
        """Take what has come, let go what has nothing left, and compare the load with what there is."""
        scaling = self._scaling
        while self._coming and self._coming[0] <= now:
            heappop(self._coming)
            self._resized(self._serving + 1)
        for instance in [each for each in self._leaving if each.next_at == math.inf]:
            self._leaving.remove(instance)
            self._instances.remove(instance)
            self._serving -= 1
        self._place(now)
        load = sum(instance.load for instance in self._instances)
        load += sum(self._trace.arrivals[number].prompt for _, number in self._waiting)
        wanted = min(scaling.most, max(1, math.ceil(load / (scaling.high * self._room))))
        staying = self._units - len(self._leaving)
        while staying < wanted and self._leaving:
            self._leaving.pop()
            staying += 1
        for _ in range(wanted - staying):
            heappush(self._coming, now + scaling.start)
            self._started += 1
        self._peak = max(self._peak, self._units)
        self._less_since = min(self._less_since, now) if wanted < staying else math.inf
        if now - self._less_since >= scaling.patience and not self._coming:
            self._resized(self._serving - 1)
            self._less_since = now

    def _resized(self, units: int) -> None:
        """So many units are to serve: one more, or one fewer where what it keeps has gone."""
        if isinstance(self._system, Offloaded):
            if self._instances[0].resize(replace(self._system, attention_count=units)):
                self._serving = units
        elif units > self._serving:
            self._instances.append(self._instance())
            self._serving = units
        elif len(self._instances) - len(self._leaving) > 1:
            taking = [instance for instance in self._instances if instance not in self._leaving]
            self._leaving.append(min(taking, key=lambda instance: instance.load))

    def _result(self, begun: float, end: float) -> ElasticResult:
        lives, system = self._lives, self._system
        unit = system.attention_device.price if isinstance(system, Offloaded) else price(system)
        fixed = price(system) - unit  # the weights beside one attention device
        return ElasticResult(
            system=system.name,
            finished=len(lives),
            output_tokens=sum(life.tokens for life in lives),
            seconds=end - begun,
            dollars=(fixed * (end - begun) + unit * self._paid) / 3600,
            mean_units=self._paid / (end - begun) if end > begun else 1.0,
            peak_units=self._peak,
            started=self._started,
            ttft=distribution(life.first - life.at + before_first_token(system, life.arrival.prompt) for life in lives),
            tpot=distribution((life.last - life.first) / (life.tokens - 1) for life in lives if life.tokens > 1),
            tbt=weighted_distribution(self._totals.gaps),
        )
