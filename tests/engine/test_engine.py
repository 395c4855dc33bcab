"""The engine over a real decoder and a real attention worker: chunks, orders, preemption, and requests that end early.
That the text does not depend on where KV is kept is in `test_one_text`."""

from __future__ import annotations

import random

import pytest
from engine_rig import BytesPort, Rig, collect, tiny_decoder
from faulty_ports import FaultyPorts, SpoiltPorts
from kv_pools import pool_of
from pairwise import crossing

from lamina.engine.failures import MAX_IN_VAIN
from lamina.errors import EngineError, InvalidRequest
from lamina.sampling_params import SamplingParams
from lamina.scheduling.step_tuner import StepTuner
from lamina_protocols.errors import ProtocolError
from lamina_protocols.messages.messages import Announcement, Exchange, Fresh, Query

rng = random.Random(7)
PROMPTS = [[rng.randrange(101) for _ in range(n)] for n in (1, 2, 15, 16, 17, 33, 70, 150)]
SPLIT = {"shard": "heads"}
MODELS = ("full", "windowed")
SAMPLINGS = {"greedy": {}, "seeded": {"temperature": 0.9, "top_p": 0.9, "seed": 11}}


@pytest.fixture(scope="module", params=MODELS)
def model(request, decoder, windowed):
    return decoder if request.param == "full" else windowed


@pytest.fixture(scope="module", params=SAMPLINGS)
def sampling(request):
    return SAMPLINGS[request.param] | {"max_tokens": 40}


@pytest.fixture(scope="module")
def known():
    """What `expected` has found: pytest may come back to a model."""
    return {}


@pytest.fixture
def expected(model, sampling, known):
    """Each prompt alone, in one chunk, fused in one holder."""
    key = id(model), tuple(sampling.items())
    if key not in known:
        known[key] = [answer for prompt in PROMPTS for answer in answers(model, sampling, [prompt])]
    return known[key]


def answers(model, sampling, prompts=PROMPTS, **options):
    rig = Rig(model, **options)
    try:
        return rig.generate(prompts, **sampling)
    finally:
        rig.close()


def each_model(**axes):
    return crossing(("model", "sampling"), model=MODELS, sampling=tuple(SAMPLINGS), **axes)


@each_model(chunk=(1, 7, 512))
def test_text_stays_the_same_at_any_chunk_size(model, sampling, expected, chunk):
    assert answers(model, sampling, max_batch_tokens=chunk) == expected


@pytest.mark.parametrize("shard", ["heads", "sequence"])
def test_text_stays_the_same_while_both_orders_take_turns(model, sampling, expected, shard):
    """Between two batches of the same sequences, also while one of the other order is under way."""
    sent = set()

    class Seen(BytesPort):
        def send(self, request):
            sent.add(type(request))
            super().send(request)

    rig = Rig(model, shard=shard, weights=(1, 2), local_pool=60, lanes=2, port=Seen)
    tuner = rig.engine._control.tuner
    planned = rig.engine._control.plan

    def plan(alone=True):
        tuner.fused = not tuner.fused
        return planned(alone)

    rig.engine._control.plan = plan
    try:
        assert rig.generate(PROMPTS, **sampling) == expected
    finally:
        rig.close()
    assert sent >= {Exchange, Query, Fresh}


@pytest.mark.fault("F11")
def test_preemption_changes_no_token(model, sampling, expected):
    longest = max(len(p) for p in PROMPTS) + 40
    pages = 9 * (-(-longest // 16) + 3)
    rig = Rig(model, pages=pages)
    assert rig.generate(PROMPTS, **sampling) == expected
    assert rig.scheduler.counters.preempted > 0
    rig.close()


def test_samples_of_one_prompt_share_its_kv(decoder):
    rig = Rig(decoder)
    one_by_one = []
    prompt = PROMPTS[-1]
    (samples,) = rig.generate([prompt], temperature=1.0, seed=5, n=4, max_tokens=20)
    assert len({tuple(sample) for sample in samples}) > 1
    assert rig.scheduler.counters.reused_tokens == 3 * (len(prompt) - 1)
    (first,) = rig.generate([prompt], temperature=1.0, seed=5, max_tokens=20)
    one_by_one += first
    assert samples[0] == one_by_one[0]
    rig.close()


@pytest.mark.parametrize(("kind", "at"), [(Announcement, 15), (Query, 1), (Fresh, 1), (Exchange, 15)])
def test_holders_stay_in_step_when_one_loses_a_message(decoder, kind, at):
    ports = FaultyPorts(at, ProtocolError("cut off"), kind)
    placement = {"shard": "sequence", "weights": (1, 1, 1)} if at == 1 else {"shard": "heads", "weights": (1, 1)}
    got = answers(decoder, {"max_tokens": 10}, port=ports, max_batch_tokens=64, **placement)
    assert got == answers(decoder, {"max_tokens": 10})
    assert len(ports.struck) == 1


def test_engine_goes_on_when_the_sink_of_a_client_raises(decoder):
    rig = Rig(decoder)
    params = SamplingParams(max_tokens=5).with_defaults({})
    request, _ = rig.submit([1, 2], params)
    request.sink = None
    assert rig.generate([[3]], max_tokens=5)
    assert rig.engine.alive
    rig.close()
    assert pool_of(rig.workers[1]).store.free_pages == 2000


def test_requests_end_with_an_error_when_a_holder_always_fails(decoder):
    rig = Rig(decoder, port=FaultyPorts(range(1, 1000), ProtocolError("gone"), (Fresh, Exchange)))
    with pytest.raises(EngineError, match="3 batches in a row failed"):
        rig.generate([[1, 2, 3]], max_tokens=4)
    assert rig.engine.alive
    rig.close()


@pytest.mark.fault("F25")
def test_row_without_finite_logits_fails_alone(decoder):
    ports = SpoiltPorts(lambda out: out[:6] if len(out) == 2 * 6 else out[:0])  # the first row of two, six heads
    rig = Rig(decoder, **SPLIT, port=ports)
    good, bad = [5, 6, 7], [1, 2, 3]
    (alone,) = rig.generate([good], max_tokens=8)
    ports.on = True
    params = SamplingParams(max_tokens=8).with_defaults({})
    _, first = rig.submit(bad, params)
    _, second = rig.submit(good, params)
    with pytest.raises(EngineError, match="not finite"):
        collect(first)
    assert collect(second) == alone
    rig.close()


def test_abort_frees_the_pages_of_a_running_request(decoder):
    rig = Rig(decoder)
    params = SamplingParams(max_tokens=1500, n=3).with_defaults({})
    request, inbox = rig.submit(PROMPTS[-1], params)
    inbox.get(timeout=60)
    rig.engine.abort(request)
    rig.engine.abort(request)  # twice is harmless
    reasons = []
    while len(reasons) < 3:
        reasons += [output.finish_reason for output in inbox.get(timeout=60) if output.finish_reason]
    assert reasons == ["abort"] * 3
    rig.generate([[1]], max_tokens=2)
    rig.close()
    assert pool_of(rig.workers[1]).store.free_pages == 2000


def test_urgent_request_overtakes(decoder):
    rig = Rig(decoder, max_batch_tokens=8)
    params = SamplingParams(max_tokens=1).with_defaults({})
    slow = [rig.submit(PROMPTS[-1], params) for _ in range(4)]
    _, urgent = rig.submit(PROMPTS[2], params, priority=-1)
    collect(urgent)
    assert any(request.unfinished for request, _ in slow)
    for _, inbox in slow:
        collect(inbox)
    rig.close()


def test_requests_end_with_an_error_when_the_engine_stops(decoder):
    rig = Rig(decoder)
    _, inbox = rig.submit([1, 2], SamplingParams(max_tokens=2000).with_defaults({}))
    inbox.get(timeout=60)
    rig.close()
    with pytest.raises(EngineError, match="stopped"):
        collect(inbox)
    with pytest.raises(EngineError, match="stopped"):
        rig.submit([1], SamplingParams().with_defaults({}))


@pytest.mark.fault("F11")
def test_request_is_refused_when_it_can_never_fit(decoder):
    rig = Rig(decoder, pages=9 * 4, max_model_len=1000)
    with pytest.raises(InvalidRequest, match="the KV memory holds no more"):
        rig.generate([[1] * 60], max_tokens=30)
    assert len(rig.generate([[1] * 30], max_tokens=30)[0][0]) == 30
    rig.close()


@pytest.mark.fault("F15")
def test_request_ends_where_nothing_can_be_planned_and_nothing_is_waited_for(decoder, monkeypatch):
    """The engine turned in place for ever, and /health said 200."""
    rig = Rig(decoder)
    with monkeypatch.context() as patch:
        patch.setattr(rig.scheduler, "plan", lambda lanes=1: None)
        with pytest.raises(EngineError, match="cannot go on: no batch can be planned"):
            rig.generate([[1, 2, 3]], max_tokens=4)
    assert rig.engine.alive
    assert len(rig.generate([[1, 2, 3]], max_tokens=4)[0][0]) == 4
    assert rig.engine._stats.blocked == 1
    monkeypatch.setattr(rig.scheduler, "plan", lambda lanes=1: None)
    for _ in range(MAX_IN_VAIN):
        with pytest.raises(EngineError, match="cannot go on: no batch can be planned"):
            rig.generate([[1, 2, 3]], max_tokens=4)
    rig._thread.join(timeout=20)
    assert not rig.engine.alive


def test_dynamic_rope_does_not_depend_on_chunks():
    dynamic = tiny_decoder(
        max_position_embeddings=64, rope_scaling={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    )
    greedy = {"max_tokens": 30}
    assert answers(dynamic, greedy, max_batch_tokens=7, max_model_len=256) == answers(
        dynamic, greedy, max_model_len=256
    )


def test_the_samples_of_one_request_are_worth_a_second_lane(decoder):
    """Lanes were told how many requests there are, so that eight samples of one never tried a second lane."""

    class Tuner(StepTuner):
        tried = 1

        def completed(self, batch, moving=False):
            """Half of a step waits, whatever this machine does beside it."""
            times = {"seconds": 0.01, "answered": 0.005, "waited": 0.005, "remote_seconds": 0.004}
            super().completed(batch._replace(**times), moving)
            self.tried = max(self.tried, self.lanes)

    tuner = Tuner((1, 2), 0.0)
    rig = Rig(decoder, shard="heads", weights=(1,), tuner=tuner, max_batch_tokens=64)
    rig.generate([[1, 2, 3]], max_tokens=150, n=8, temperature=1.0, seed=1)
    rig.close()
    assert tuner.tried == 2
