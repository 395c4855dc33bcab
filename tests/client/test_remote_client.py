"""An engine behind a wire: the same tokens, times and errors as beside it. The wire is two queues in one process."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from engine_rig import Rig
from looped_wire import AHEAD, Loop

from lamina.client.remote import RemoteEngine
from lamina.completions import FinishReason
from lamina.errors import EngineError, InvalidRequest, LaminaError
from lamina.kv.request import Request
from lamina.messages.engine_messages import Submit, pack_commands, unpack_commands
from lamina.messages.engine_request import EngineOutput, EngineRequest, Received
from lamina.sampling_params import SamplingParams
from lamina.system.progress import Progressed
from lamina_workers.decoder.logprobs import PromptScores, RowLogprobs
from lamina_workers.decoder.model import Decoder


class FakeEngine:
    """Keeps what it is asked; a test plays the engine's thread with `say`."""

    def __init__(self) -> None:
        self.alive = True
        self.halted = False
        self.submitted: queue.SimpleQueue[EngineRequest] = queue.SimpleQueue()
        self.aborted: queue.SimpleQueue[tuple[str, int | None, FinishReason]] = queue.SimpleQueue()
        self.refuse: LaminaError | None = None

    def submit(self, request: EngineRequest) -> None:
        if self.refuse is not None:
            raise self.refuse
        self.submitted.put(request)

    def abort(self, request: EngineRequest, sample: int | None = None, reason: FinishReason = "abort") -> None:
        self.aborted.put((request.id, sample, reason))

    def close(self) -> None:
        self.alive = False


class Pair:
    """A remote engine in front of a fake one, and a request's sink."""

    def __init__(self) -> None:
        self.engine = FakeEngine()
        self.wire = Loop(self.engine, lambda: time.monotonic() + AHEAD)
        self.progress: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self.remote = RemoteEngine(self.wire, time.monotonic, lambda *news: self.progress.put(news))
        self.got: queue.SimpleQueue[list[EngineOutput]] = queue.SimpleQueue()

    def submit(self, request_id: str = "0", **params: Any) -> EngineRequest:
        sampling = SamplingParams(**params)
        request = EngineRequest(
            Request(request_id, (1, 2, 3), sampling.max_tokens, stop_token_ids=frozenset({5, 6}), n=sampling.n),
            sampling,
            seed=2**64 - 1,
            sink=lambda _request, outputs: self.got.put(outputs),
            submitted=time.monotonic(),
        )
        self.remote.submit(request)
        return request


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.remote.close()
    assert made.remote.join(5)


def test_a_request_survives_the_journey() -> None:
    params = SamplingParams(
        temperature=0.7,
        logit_bias={3: 1.5},
        stop=("a", "b"),
        stop_token_ids=(9,),
        n=2,
        logprobs=3,
        seed=1,
        min_tokens=2,
        prompt_logprobs=4,
    )
    core = Request("7", (1, 2), 10, 2, frozenset({5, 9}), 2, -3, "a salt", scored_from=1, pooled=True)
    for received in (None, (Received((1, 2), ended=True), Received())):
        submit = Submit(core, params, 2**63, received)
        [packed] = pack_commands([submit])
        assert unpack_commands(packed) == (submit,)


@pytest.mark.fault("F27")
def test_outputs_come_back_whole_on_the_callers_clock(pair: Pair) -> None:
    before = time.monotonic()
    request = pair.submit(n=2, logprobs=1)
    far = pair.engine.submitted.get(timeout=5)
    assert (far.request, far.seed) == (request.request, request.seed)
    far.scheduled, far.cached_tokens = far.submitted + 0.25, 17
    first = [EngineOutput(1, 42, None, RowLogprobs(-0.5, ((42, -0.5), (7, -1.25))), at=far.submitted + 0.5)]
    far.sink(far, first)
    [output] = pair.got.get(timeout=5)
    assert (output.sample, output.token, output.logprobs) == (1, 42, first[0].logprobs)
    scores = PromptScores(3, (RowLogprobs(-0.5, ((42, -0.5),)),), (7,)), PromptScores(0, hidden=(0.5, -1.0))
    far.sink(far, [EngineOutput(0, None, scores=each) for each in scores])
    assert tuple(each.scores for each in pair.got.get(timeout=5)) == scores
    assert before + 0.5 <= output.at <= time.monotonic() + 0.5
    assert request.scheduled is not None
    assert request.scheduled == pytest.approx(output.at - 0.25)
    assert request.cached_tokens == 17
    far.preemptions = 3
    far.sink(far, [EngineOutput(0, 1, "stop"), EngineOutput(1, 2, "length")])
    assert [(o.sample, o.token, o.finish_reason) for o in pair.got.get(timeout=5)] == [(0, 1, "stop"), (1, 2, "length")]
    assert request.preemptions == 3


def test_an_abort_never_overtakes_its_request(pair: Pair) -> None:
    for index in range(200):
        request = pair.submit(str(index))
        pair.remote.abort(request, 0, "stop")
    for index in range(200):
        assert pair.engine.aborted.get(timeout=5) == (str(index), 0, "stop")


def test_an_abort_of_what_has_ended_stays_here(pair: Pair) -> None:
    request = pair.submit()
    far = pair.engine.submitted.get(timeout=5)
    far.sink(far, [EngineOutput(0, 1, "stop")])
    pair.got.get(timeout=5)
    pair.remote.abort(request)
    pair.submit("1")
    pair.engine.submitted.get(timeout=5)
    assert pair.engine.aborted.empty()


@pytest.mark.parametrize("kind", [EngineError, InvalidRequest])
def test_an_error_over_there_is_the_same_error_here(pair: Pair, kind: type[LaminaError]) -> None:
    pair.engine.refuse = kind("3 is too much; allowed is 2")
    pair.submit()
    [output] = pair.got.get(timeout=5)
    assert type(output.error) is kind
    assert str(output.error) == "3 is too much; allowed is 2"


def test_when_the_wire_is_cut_every_request_ends_and_no_new_one_is_taken(pair: Pair) -> None:
    pair.submit("0")
    pair.submit("1")
    pair.wire.cut = True
    for _ in range(2):
        [output] = pair.got.get(timeout=5)
        assert isinstance(output.error, EngineError)
        assert "the wire is cut" in str(output.error)
    assert not pair.remote.alive
    with pytest.raises(EngineError, match="the wire is cut"):
        pair.submit("2")


def test_a_client_that_cannot_take_its_outputs_ends_alone(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    request = pair.submit("bad")
    bad = pair.engine.submitted.get(timeout=5)

    def refuse(_request: EngineRequest, _outputs: list[EngineOutput]) -> None:
        raise ValueError("no")

    request.sink = refuse
    bad.sink(bad, [EngineOutput(0, 1)])
    assert pair.engine.aborted.get(timeout=5) == ("bad", None, "abort")
    assert "what the engine sent it" in caplog.text
    pair.submit("good")
    good = pair.engine.submitted.get(timeout=5)
    good.sink(good, [EngineOutput(0, 1)])
    assert pair.got.get(timeout=5)[0].token == 1


def test_prefill_and_progress_are_told(pair: Pair) -> None:
    told: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
    request = pair.submit()
    request.prefilled = lambda done, total: told.put((done, total))
    pair.engine.submitted.get(timeout=5).prefilled(2, 3)
    assert told.get(timeout=5) == (2, 3)
    pair.wire.put(Progressed("loading", 5, None))
    assert pair.progress.get(timeout=5) == ("loading", 5, None)


def test_a_real_engine_gives_the_same_tokens_behind_a_wire(decoder: Decoder) -> None:
    rig = Rig(decoder)
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8], [9]]
    sampling: dict[str, Any] = {"max_tokens": 12, "temperature": 1.0, "seed": 3, "n": 2, "ignore_eos": True}
    expected = rig.generate(prompts, **sampling)
    local = rig.engine
    remote = RemoteEngine(Loop(local, time.monotonic), time.monotonic)
    rig.engine = remote  # type: ignore[assignment]  # it has what clients use
    try:
        assert rig.generate(prompts, **sampling) == expected
        many = threading.Thread(target=lambda: rig.generate(prompts * 5, **sampling))
        many.start()
        assert rig.generate(prompts, **sampling) == expected
        many.join()
    finally:
        rig.close()
    assert remote.join(5)
    assert not remote.alive


class Waiting(Pair):
    """A remote engine that waits for another engine, once its own is gone."""

    def __init__(self, patience: float = 30.0) -> None:
        super().__init__()
        self.remote.close()
        assert self.remote.join(5)
        self.wires = [Loop(FakeEngine(), time.monotonic)]
        self.remote = RemoteEngine(self.wires[0], time.monotonic, patience=patience)
        self.engine = self.wires[0]._engine

    def die(self) -> None:
        self.wires[-1].cut = True
        deadline = time.monotonic() + 5
        while self.remote.alive and time.monotonic() < deadline:
            time.sleep(0.005)
        assert not self.remote.alive

    def come_back(self) -> FakeEngine:
        engine = FakeEngine()
        self.wires.append(Loop(engine, lambda: time.monotonic() + AHEAD))
        assert self.remote.rejoin(self.wires[-1])
        assert self.remote.alive
        return engine


def tokens(inbox: queue.SimpleQueue[list[EngineOutput]], count: int) -> list[tuple[int, int | None, str | None]]:
    got: list[tuple[int, int | None, str | None]] = []
    while len(got) < count:
        got += [(output.sample, output.token, output.finish_reason) for output in inbox.get(timeout=5)]
    return got


def test_requests_wait_for_the_next_engine_and_say_what_they_have() -> None:
    pair = Waiting()
    request = pair.submit(n=2, max_tokens=9)
    far = pair.engine.submitted.get(timeout=5)
    assert far.received is None
    far.sink(far, [EngineOutput(0, 7), EngineOutput(1, 8), EngineOutput(0, 9)])
    far.sink(far, [EngineOutput(1, 10, "stop")])
    assert tokens(pair.got, 4) == [(0, 7, None), (1, 8, None), (0, 9, None), (1, 10, "stop")]
    pair.die()
    with pytest.raises(EngineError, match="cut"):
        pair.submit("late")
    engine = pair.come_back()
    again = engine.submitted.get(timeout=5)
    assert (again.request, again.params, again.seed) == (request.request, request.params, request.seed)
    assert again.received == (((7, 9), False), ((8, 10), True))
    again.sink(again, [EngineOutput(0, 11), EngineOutput(0, 12, "length")])
    assert tokens(pair.got, 2) == [(0, 11, None), (0, 12, "length")]
    pair.die()
    assert pair.come_back().submitted.empty()  # it has ended
    pair.remote.close()
    assert pair.remote.join(5)


def test_what_was_never_sent_and_what_was_aborted_meanwhile_is_said_to_the_next_engine() -> None:
    pair = Waiting()
    first, second, third = pair.submit("a"), pair.submit("b", n=2), pair.submit("c")
    for _ in range(3):
        pair.engine.submitted.get(timeout=5)
    pair.remote.abort(second, 1, "stop")
    assert pair.engine.aborted.get(timeout=5) == ("b", 1, "stop")
    pair.die()
    pair.remote.abort(third)
    assert tokens(pair.got, 1) == [(0, None, "abort")]
    pair.remote.abort(second, 0, "stop")
    assert tokens(pair.got, 1) == [(0, None, "stop")]
    engine = pair.come_back()
    assert [engine.submitted.get(timeout=5).request.id for _ in range(2)] == ["a", "b"]
    assert engine.aborted.get(timeout=5) == ("b", 1, "stop")
    assert engine.submitted.empty()
    assert first.request.id == "a"
    pair.remote.close()
    assert pair.remote.join(5)


def test_who_is_waited_for_in_vain_is_an_error() -> None:
    pair = Waiting(patience=0.3)
    pair.submit()
    pair.engine.submitted.get(timeout=5)
    pair.die()
    [output] = pair.got.get(timeout=5)
    assert "no other engine came for 0.3 s" in str(output.error)
    assert pair.remote.join(5)
    assert not pair.remote.rejoin(Loop(FakeEngine(), time.monotonic))


def test_closing_while_nobody_is_there_ends_what_waits() -> None:
    pair = Waiting()
    pair.submit()
    pair.engine.submitted.get(timeout=5)
    pair.die()
    pair.remote.close()
    assert isinstance(pair.got.get(timeout=5)[0].error, EngineError)
    assert pair.remote.join(5)


def test_where_new_requests_are_held_nobody_notices_the_gap() -> None:
    pair = Waiting()
    pair.remote.close()
    assert pair.remote.join(5)
    first = Loop(FakeEngine(), time.monotonic)
    pair.remote = RemoteEngine(first, time.monotonic, patience=30.0, holds=True)
    first.cut = True
    for thread in pair.remote._threads:  # it has noticed
        thread.join(5)
    pair.submit("late")
    assert pair.remote.alive
    engine = pair.come_back()
    late = engine.submitted.get(timeout=5)
    assert late.request.id == "late"
    assert late.received == (((), False),)
    late.sink(late, [EngineOutput(0, 7, "length")])
    assert tokens(pair.got, 1) == [(0, 7, "length")]
    assert engine.submitted.empty()
    pair.submit("last")
    engine.submitted.get(timeout=5)
    pair.wires[-1].cut = True
    pair.remote.give_up("it cannot live")
    assert "it cannot live" in str(pair.got.get(timeout=5)[0].error)
    assert not pair.remote.alive
    with pytest.raises(EngineError, match="cannot live"):
        pair.submit("too late")
    pair.remote.give_up("again")
    assert pair.remote.join(5)


@pytest.mark.fault("F27")
def test_times_go_on_where_they_were() -> None:
    pair = Waiting()
    request = pair.submit(max_tokens=9)
    far = pair.engine.submitted.get(timeout=5)
    far.scheduled, far.cached_tokens = far.submitted + 0.001, 17
    far.sink(far, [EngineOutput(0, 7, at=far.submitted + 0.002)])
    first = pair.got.get(timeout=5)[0].at
    scheduled = request.scheduled
    pair.die()
    again = pair.come_back().submitted.get(timeout=5)
    again.scheduled = again.submitted + 0.01
    again.sink(again, [EngineOutput(0, 8, "stop", at=again.submitted + 0.02)])
    last = pair.got.get(timeout=5)[0].at
    assert first < last < time.monotonic() + 0.05
    assert (request.scheduled, request.cached_tokens) == (scheduled, 17)
    pair.remote.close()


def test_samples_that_were_received_must_be_those_of_the_request(pair: Pair) -> None:
    request = pair.submit()
    with pytest.raises(EngineError, match="2 samples were received of 1"):
        pair.wire._host.ask([Submit(request.request, request.params, 0, (Received(), Received()))])
