"""Holders die, join and drain while requests run: the text stays the same, and only lost KV is computed again."""

from __future__ import annotations

import random
import threading
import time

import pytest
from engine_rig import BytesPort, Rig, collect
from kv_pools import pool_of
from pairwise import crossing

from lamina.errors import EngineError, InvalidRequest
from lamina.kv.placement import Holder
from lamina.sampling_params import SamplingParams
from lamina_protocols.messages.messages import Announcement, Exchange, Fresh
from lamina_workers.attention_worker.attention_worker import AttentionWorker
from lamina_workers.errors import HolderLost
from lamina_workers.ports.port import LocalAttention

rng = random.Random(5)
PROMPTS = [[rng.randrange(101) for _ in range(n)] for n in (3, 40, 70, 150)]
GREEDY = {"max_tokens": 40}
PLACEMENTS = {
    "heads on three": {"shard": "heads", "weights": (1, 1, 1)},
    "heads on two, prompts local": {"shard": "heads", "weights": (1, 1), "local_pool": 500},
    "ranges on three": {"shard": "sequence", "weights": (1, 1, 1)},
    "ranges on two, prompts local": {"shard": "sequence", "weights": (1, 2), "local_pool": 500},
    "heads and ranges": {"shard": "heads+sequence", "weights": (1, 1, 1, 1), "local_pool": 60},
}
MODELS = ("full", "windowed")


@pytest.fixture(scope="module", params=MODELS)
def model(request, decoder, windowed):
    return decoder if request.param == "full" else windowed


@pytest.fixture(scope="module")
def expected(model):
    rig = Rig(model)
    tokens = rig.generate(PROMPTS, **GREEDY)
    rig.close()
    return tokens


class Mortal:
    """Ports of which some die at chosen messages, counted over all ports together.

    `deaths` are numbers of messages; the holder dies before it gets that message.
    """

    def __init__(self, *deaths: int, kinds: tuple[type, ...] = (Announcement, Exchange, Fresh)) -> None:
        self._deaths = set(deaths)
        self._kinds = kinds
        self.seen = 0
        self.died: list[BytesPort] = []
        self.stored: dict[int, int] = {}  # tokens stored since the first death, by port

    def __call__(self, worker: AttentionWorker) -> BytesPort:
        place = len(self.stored)
        self.stored[place] = 0
        port = BytesPort(worker, lambda request: self._before(port, place, request))
        return port

    def _before(self, port: BytesPort, place: int, request: object) -> None:
        if not isinstance(request, self._kinds):
            return
        self.seen += 1
        if self.seen in self._deaths:
            self.died.append(port)
            raise HolderLost("killed")
        if self.died and isinstance(request, Announcement):
            self.stored[place] += sum(row.count for row in request.rows if row.store)


@pytest.mark.fault("F01")
@crossing(("model",), model=MODELS, placement=PLACEMENTS, death=(1, 7, 60, 61, 62, 63, 64, 65, 150), lanes=(1, 2))
def test_holder_death_at_any_message_changes_no_token(model, expected, placement, death, lanes):
    mortal = Mortal(death)
    rig = Rig(model, port=mortal, max_batch_tokens=64, lanes=lanes, **placement)
    assert rig.generate(PROMPTS, **GREEDY) == expected
    assert len(mortal.died) == 1
    rig.close()


@pytest.mark.fault("F01")
@crossing(
    ("model",), model=MODELS, shard=("heads", "sequence", "heads+sequence"), deaths=((50, 51), (50, 90), (60, 61, 62))
)
def test_several_holder_deaths_change_no_token(model, expected, shard, deaths):
    mortal = Mortal(*deaths)
    rig = Rig(model, port=mortal, max_batch_tokens=64, shard=shard, weights=(1,) * 4, local_pool=500, prefix_cache=True)
    assert rig.generate(PROMPTS, **GREEDY) == expected
    assert len(mortal.died) == len(deaths)
    rig.close()


@pytest.mark.parametrize("local_pool", [500, 0])
def test_surviving_holders_store_nothing_again(decoder, local_pool):
    """By heads: the forward pass repeats, but only the lost heads' keys are sent and stored."""
    prompt = PROMPTS[3]
    alone = Rig(decoder)
    expected = alone.generate([prompt], max_tokens=30)
    alone.close()
    mortal = Mortal(150)
    rig = Rig(decoder, port=mortal, shard="heads", weights=(1, 1, 1), local_pool=local_pool)
    assert rig.generate([prompt], max_tokens=30) == expected
    (dead,) = mortal.died
    left = [stored for place, stored in mortal.stored.items() if rig.ports[place + 1] is not dead]
    generated_after = min(left)
    assert generated_after < 30  # the rerun of the dropped batch, and what came after it: one token a step
    assert max(left) >= len(prompt) + generated_after  # the holder that took over the lost heads
    assert rig.scheduler.counters.rebuilt_tokens >= len(prompt)
    rig.close()


def test_only_the_lost_range_of_positions_is_computed_again(decoder):
    prompt = PROMPTS[3]  # 150 tokens and 30: ranges of 64, 64, and the rest
    alone = Rig(decoder)
    expected = alone.generate([prompt], max_tokens=30)
    alone.close()
    rig = Rig(decoder, port=BytesPort, shard="sequence", weights=(1, 1, 1), local_pool=500)
    params = SamplingParams(max_tokens=30).with_defaults({})
    request, inbox = rig.submit(prompt, params)
    first = inbox.get(timeout=60)
    (middle,) = [share for share in request.sequences[0].layout if share.lo == 64]
    rig.engine.leave(f"worker-{middle.holder}")
    tokens = [output.token for output in first]
    while len(tokens) < 30:
        tokens += [output.token for output in inbox.get(timeout=60)]
    assert tokens == expected[0][0]
    assert rig.scheduler.counters.rebuilt_tokens == 64
    rig.close()


@pytest.mark.fault("F02")
def test_requests_end_with_an_error_when_no_holder_is_left(decoder):
    rig = Rig(decoder, port=Mortal(40), shard="heads", wait=0.3)
    with pytest.raises(EngineError, match=r"no attention worker is left, and none has joined for 0\.3 s"):
        rig.generate(PROMPTS, **GREEDY)
    with pytest.raises(EngineError, match="no attention worker is left"):
        rig.generate(PROMPTS[:1], **GREEDY)
    assert rig.engine.alive
    rig.close()


@pytest.mark.fault("F02")
def test_new_holder_takes_over_when_none_was_left(decoder, expected_full):
    rig = Rig(decoder, port=Mortal(40), shard="heads")
    params = SamplingParams(**GREEDY).with_defaults({})
    inboxes = [rig.submit(prompt, params)[1] for prompt in PROMPTS]
    while not rig.ports[1].closed:
        time.sleep(0.01)
    rig.workers[9] = AttentionWorker(rig.holder)
    rig.engine.join(LocalAttention(rig.workers[9], "spare"), Holder((rig.pages,)))
    assert [collect(inbox) for inbox in inboxes] == expected_full
    assert rig.workers[9].counters.queries > 0
    rig.close()


@pytest.fixture(scope="module")
def expected_full(decoder):
    rig = Rig(decoder)
    tokens = rig.generate(PROMPTS, **GREEDY)
    rig.close()
    return tokens


def test_new_holder_gets_new_sequences(decoder, expected_full):
    rig = Rig(decoder, shard="heads")
    rig.workers[2] = AttentionWorker(rig.holder)
    rig.engine.join(LocalAttention(rig.workers[2], "second"), Holder((rig.pages,)))
    assert rig.generate(PROMPTS, **GREEDY) == expected_full
    assert rig.workers[1].counters.queries > 0
    assert rig.workers[2].counters.queries > 0
    rig.close()


@pytest.mark.fault("F18")
@crossing(("model",), model=MODELS, shard=("heads", "sequence", "heads+sequence"), lanes=(1, 2))
def test_drained_holder_hands_its_kv_over(model, expected, shard, lanes):
    rig = Rig(
        model, shard=shard, weights=(1, 1, 1), local_pool=500, max_batch_tokens=64, lanes=lanes, prefix_cache=True
    )
    params = SamplingParams(**GREEDY).with_defaults({})
    submitted = [rig.submit(prompt, params) for prompt in PROMPTS]
    begun = [inbox.get(timeout=60) for _, inbox in submitted]
    moved = rig.engine.drain("worker-2").result(timeout=60)
    after = rig.workers[2].counters.queries
    tokens = [[output.token for output in first] for first in begun]
    for (_, inbox), so_far in zip(submitted, tokens, strict=True):
        while len(so_far) < 40:
            so_far += [output.token for output in inbox.get(timeout=60)]
    assert tokens == [sample for (sample,) in expected]
    assert moved > 0
    assert rig.workers[2].counters.queries == after
    assert rig.scheduler.counters.rebuilt_tokens == rig.scheduler.counters.preempted == 0
    assert pool_of(rig.workers[2]).store.free_pages == rig.pages
    rig.close()


def test_drain_refuses_and_names_an_unknown_or_only_worker(decoder):
    rig = Rig(decoder, shard="heads")
    with pytest.raises(InvalidRequest, match="no attention worker is called 'unknown'; there are worker-1"):
        rig.engine.drain("unknown").result(timeout=60)
    with pytest.raises(InvalidRequest, match="the only attention worker"):
        rig.engine.drain("worker-1").result(timeout=60)
    rig.close()


@pytest.mark.parametrize("stops", [False, True])
def test_cancelled_drain_does_no_harm(decoder, stops):
    rig = Rig(decoder, shard="heads", weights=(1, 1))
    busy, gate = threading.Event(), threading.Event()
    rig.engine.snapshot(lambda _: (busy.set(), gate.wait(60)))
    busy.wait(60)
    if stops:
        rig.engine.close()
    assert rig.engine.drain("worker-2").cancel()
    _, inbox = rig.submit(PROMPTS[0], SamplingParams(**GREEDY))
    gate.set()
    if stops:
        assert isinstance(inbox.get(timeout=60)[0].error, EngineError)
    else:
        assert len(rig.generate(PROMPTS[:1], **GREEDY)[0][0]) == 40
    rig.close()


@pytest.mark.fault("F29")
def test_holders_keep_no_page_after_all_requests_ended(decoder):
    rig = Rig(decoder, shard="sequence", weights=(1, 2), local_pool=500, port=Mortal(100))
    rig.generate(PROMPTS, **GREEDY)
    rig.generate([[1]], max_tokens=1)
    rig.close()
    for number, worker in rig.workers.items():
        if number == 0 or not rig.ports[number].closed:
            assert pool_of(worker).store.free_pages == (500 if number == 0 else rig.pages)


def test_shared_kv_is_rebuilt_once(decoder):
    prompt = PROMPTS[3]
    alone = Rig(decoder)
    expected = alone.generate([prompt], n=4, temperature=1.0, seed=3, max_tokens=30)
    alone.close()
    rig = Rig(decoder, port=Mortal(150), shard="heads", weights=(1, 1, 1), local_pool=500)
    assert rig.generate([prompt], n=4, temperature=1.0, seed=3, max_tokens=30) == expected
    assert len(prompt) <= rig.scheduler.counters.rebuilt_tokens < 2 * len(prompt)
    rig.close()
