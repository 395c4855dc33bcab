"""The simulated link runs the real client and host: requests survive an engine, and no token comes twice."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

from server_link import ServerLink

from lamina.completions import FinishReason
from lamina.kv.request import Request
from lamina.messages.engine_request import EngineOutput, EngineRequest
from lamina.sampling_params import SamplingParams


class Agenda:
    """Calls by virtual second."""

    def __init__(self) -> None:
        self.now, self._count = 0.0, 0
        self._calls: list[tuple[float, int, Callable[[], object]]] = []

    def at(self, second: float, do: Callable[..., None], *arguments: object) -> None:
        self._count += 1
        heapq.heappush(self._calls, (second, self._count, lambda: do(*arguments)))

    def after(self, seconds: float, do: Callable[..., None], *arguments: object) -> None:
        self.at(self.now + seconds, do, *arguments)

    def run(self, until: float) -> None:
        while self._calls and self._calls[0][0] <= until:
            self.now, _, call = heapq.heappop(self._calls)
            call()
        self.now = until


class Life:
    """Of an engine's process."""

    def __init__(self, alive: bool = True, frozen_until: float = 0.0) -> None:
        self.alive, self.frozen_until = alive, frozen_until


class FakeEngine:
    """Keeps what it is asked; a test says what it answers."""

    alive, halted = True, False

    def __init__(self) -> None:
        self.submitted: list[EngineRequest] = []
        self.aborted: list[tuple[str, int | None, FinishReason]] = []

    def submit(self, request: EngineRequest) -> None:
        self.submitted.append(request)

    def abort(self, request: EngineRequest, sample: int | None = None, reason: FinishReason = "abort") -> None:
        self.aborted.append((request.id, sample, reason))

    def say(self, *tokens: int, end: FinishReason | None = None) -> None:
        request = self.submitted[-1]
        outputs = [EngineOutput(0, token) for token in tokens[:-1]]
        request.sink(request, [*outputs, EngineOutput(0, tokens[-1], end)])


class Rig:
    def __init__(self) -> None:
        self.time = Agenda()
        self.link = ServerLink(self.time, lambda: 0.001, 30.0)
        self.tokens: list[int | None] = []
        self.errors: list[str] = []

    def submit(self, number: int = 0) -> EngineRequest:
        params = SamplingParams(max_tokens=8)
        request = EngineRequest(Request(str(number), (1, 2, 3), 8), params, 0, self._sink)
        self.link.submit(request)
        return request

    def _sink(self, request: EngineRequest, outputs: Sequence[EngineOutput]) -> None:
        self.errors += [str(output.error) for output in outputs if output.error is not None]
        self.tokens += [output.token for output in outputs if output.token is not None]

    def wait(self, seconds: float = 0.01) -> None:
        self.time.run(self.time.now + seconds)


def test_a_request_waits_for_an_engine_and_goes_on_with_the_next() -> None:
    rig, first, second = Rig(), FakeEngine(), FakeEngine()
    rig.submit()
    rig.wait()
    rig.link.engine_up(first, Life())
    rig.wait()
    first.say(7, 8)
    rig.wait()
    first.say(9)  # it is under way when the engine dies
    rig.wait(0.0005)
    rig.link.engine_down()
    rig.wait()
    assert rig.tokens == [7, 8]
    rig.link.engine_up(second, Life())
    rig.wait()
    assert [request.received for request in second.submitted] == [(((7, 8), False),)]
    first.say(9)  # what a dead engine says is heard by nobody
    second.say(9, 10, end="length")
    rig.wait()
    assert rig.tokens == [7, 8, 9, 10]
    assert not rig.errors


def test_a_broken_connection_is_made_anew() -> None:
    rig, engine = Rig(), FakeEngine()
    rig.link.engine_up(engine, Life())
    rig.submit()
    rig.wait()
    engine.say(5)
    rig.wait()
    rig.link.reset()
    rig.wait()
    assert engine.aborted == [("0", None, "abort")]
    assert engine.submitted[-1].received == (((5,), False),)


def test_an_engine_that_stands_still_reads_its_frames_afterwards_and_in_order() -> None:
    rig, engine = Rig(), FakeEngine()
    rig.link.engine_up(engine, Life(frozen_until=1.0))
    for number in range(3):
        rig.submit(number)
    rig.wait(0.9)
    assert not engine.submitted
    rig.wait(0.2)
    assert [request.id for request in engine.submitted] == ["0", "1", "2"]
