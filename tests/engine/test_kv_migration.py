"""Sequences move between the tiers while they run: the text stays the same, and every page is counted once."""

from __future__ import annotations

import random
import time
from itertools import pairwise

import pytest
from engine_rig import LOCAL, BytesPort, Restless, Rig, collect
from kv_pools import pool_of
from pairwise import crossing

from lamina.kv.placement import Holder
from lamina.sampling_params import SamplingParams
from lamina.scheduling.step_tuner import MeasuredBatch, StepTuner
from lamina_protocols.messages.messages import Announcement, Close, Fetch, FetchPages, Fresh, FreshPages, Open
from lamina_workers.attention_worker.attention_worker import AttentionWorker
from lamina_workers.errors import HolderLost, KVError
from lamina_workers.ports.port import LocalAttention

rng = random.Random(5)
PROMPTS = [[rng.randrange(101) for _ in range(n)] for n in (3, 40, 70, 150)]
GREEDY = {"max_tokens": 60}
MODELS = ("full", "windowed")
PLACEMENTS = {
    "one worker": {"shard": "heads", "weights": (1,)},
    "heads on two": {"shard": "heads", "weights": (1, 1)},
    "ranges on three": {"shard": "sequence", "weights": (1, 1, 2)},
    "heads and ranges": {"shard": "heads+sequence", "weights": (1, 1, 1, 1)},
}


@pytest.fixture(scope="module", params=MODELS)
def model(request, decoder, windowed):
    return decoder if request.param == "full" else windowed


@pytest.fixture(scope="module")
def expected(model):
    return plain(model)


def plain(decoder):
    rig = Rig(decoder)
    tokens = rig.generate(PROMPTS, **GREEDY)
    rig.close()
    return tokens


def moved(rig: Rig) -> int:
    return rig.engine._tiering._migration.sequences


@crossing(("model",), model=MODELS, placement=PLACEMENTS, lanes=(1, 2))
def test_text_stays_the_same_while_sequences_move(model, expected, placement, lanes):
    rig = Rig(
        model, local_pool=1000, local_tier=True, tuner=Restless(lanes, lanes=lanes), max_batch_tokens=64,
        prefix_cache=True, port=BytesPort, **placement,
    )  # fmt: skip
    assert rig.generate(PROMPTS, **GREEDY) == expected
    assert moved(rig) > 3
    assert rig.scheduler.counters.preempted == 0
    assert rig.generate(PROMPTS, **GREEDY) == expected  # prefixes are found wherever they are by now
    rig.close()


@pytest.mark.parametrize("seed", range(6))
def test_text_stays_the_same_when_moving_sequences_fork_abort_or_are_preempted(decoder, seed):
    """Little memory on both sides, siblings, aborts at any moment."""
    chance = random.Random(seed)
    rig = Rig(
        decoder, shard="heads", weights=(1, 1), local_pool=420, local_tier=True, pages=160,
        tuner=Restless(seed, 0.6, 1 + seed % 2), max_batch_tokens=48, prefix_cache=seed % 3 > 0,
    )  # fmt: skip
    reference = Rig(decoder, pages=4000)
    params = SamplingParams(max_tokens=50, n=2).with_defaults({})
    submitted = []
    for _ in range(8):
        prompt = PROMPTS[chance.randrange(4)][: chance.randint(1, 120)]
        submitted.append((prompt, *rig.submit(prompt, params)))
        time.sleep(chance.random() * 0.05)
    kept = []
    for prompt, request, inbox in submitted:
        if chance.random() < 0.4:
            rig.engine.abort(request)
        else:
            kept.append((prompt, inbox))
    for prompt, inbox in kept:
        _, twin = reference.submit(prompt, params)
        assert collect(inbox, 2) == collect(twin, 2)
    assert moved(rig) > 0
    rig.close()
    reference.close()


class Fatal:
    """Ports of which one dies, or loses a message, at message number `at` of the kinds that only moves have."""

    def __init__(self, at: int, loses: bool) -> None:
        self._at, self._loses = at, loses
        self._seen = 0
        self.struck = False

    def __call__(self, worker: AttentionWorker) -> BytesPort:
        return BytesPort(worker, self._before)

    def _before(self, request: object) -> None:
        moves = isinstance(request, (Fetch, Fresh, FetchPages, FreshPages)) or (
            isinstance(request, Announcement) and any(isinstance(op, (Open, Close)) for op in request.operations)
        )
        self._seen += moves
        if moves and self._seen == self._at:
            self.struck = True
            raise KVError("lost on its way") if self._loses else HolderLost("gone")


@crossing(loses=(False, True), at=(2, 9, 14, 23, 31, 44), lanes=(1, 2))
def test_text_stays_the_same_when_a_holder_is_lost_during_a_move(decoder, at, loses, lanes, monkeypatch):
    monkeypatch.setattr("lamina_workers.model_worker.kv_transfer._FRAME", 1)  # a layer each
    fatal = Fatal(at, loses)
    rig = Rig(
        decoder, shard="heads", weights=(1, 1), local_pool=1500, local_tier=True, tuner=Restless(at, 0.6, lanes),
        max_batch_tokens=64, port=fatal,
    )  # fmt: skip
    assert rig.generate(PROMPTS, **GREEDY) == plain(decoder)
    assert fatal.struck
    rig.scheduler.check_integrity()
    rig.engine.close()
    rig._thread.join()
    pool_of(rig.workers[LOCAL]).store.check_integrity()


def test_local_holder_takes_over_when_the_last_worker_leaves(decoder):
    rig = Rig(decoder, shard="heads", local_pool=2000, local_tier=True, tuner=StepTuner(share=0.0), max_batch_tokens=64)
    params = SamplingParams(**GREEDY).with_defaults({})
    submitted = [rig.submit(prompt, params)[1] for prompt in PROMPTS]
    first = [inbox.get(timeout=60) for inbox in submitted]
    rig.engine.leave("worker-1")
    rest = [[o.token for o in outputs] for outputs in first]
    for inbox, tokens in zip(submitted, rest, strict=True):
        while len(tokens) < 60:
            tokens += [output.token for output in inbox.get(timeout=60)]
    assert rest == [sample for (sample,) in plain(decoder)]
    assert rig.workers[LOCAL].counters.queries > 0
    rig.close()


@pytest.mark.fault("F18")
def test_last_worker_drains_to_the_local_holder(decoder):
    rig = Rig(decoder, shard="heads", local_pool=2500, local_tier=True, tuner=StepTuner(share=0.0), max_batch_tokens=64)
    params = SamplingParams(**GREEDY).with_defaults({})
    submitted = [rig.submit(prompt, params)[1] for prompt in PROMPTS]
    first = [inbox.get(timeout=60) for inbox in submitted]
    assert rig.engine.drain("worker-1").result(timeout=60) > 0
    rest = [[o.token for o in outputs] for outputs in first]
    for inbox, tokens in zip(submitted, rest, strict=True):
        while len(tokens) < 60:
            tokens += [output.token for output in inbox.get(timeout=60)]
    assert rest == [sample for (sample,) in plain(decoder)]
    assert rig.scheduler.counters.preempted == 0
    rig.close()


def test_long_sequence_waits_for_a_new_worker_when_the_local_holder_is_too_small(decoder):
    """The other sequences go on meanwhile."""
    rig = Rig(
        decoder,
        shard="heads",
        local_pool=60,
        local_tier=True,
        tuner=StepTuner(share=0.0),
        wait=30.0,
        max_batch_tokens=64,
    )
    params = SamplingParams(**GREEDY).with_defaults({})
    (_, long), (_, short) = rig.submit(PROMPTS[3], params), rig.submit(PROMPTS[0], params)
    begun = [output.token for output in long.get(timeout=60)]
    rig.engine.leave("worker-1")
    assert len(collect(short)[0]) == 60
    rig.workers[2] = AttentionWorker(rig.holder)
    rig.engine.join(LocalAttention(rig.workers[2], "second"), Holder((rig.pages,)))
    while len(begun) < 60:
        begun += [output.token for output in long.get(timeout=60)]
    assert [begun] == plain(decoder)[3]
    rig.close()


def test_stranded_request_ends_with_an_error_and_others_go_on(decoder):
    from lamina.errors import EngineError

    rig = Rig(
        decoder,
        shard="heads",
        local_pool=60,
        local_tier=True,
        tuner=StepTuner(share=0.0),
        wait=0.2,
        max_batch_tokens=64,
    )
    params = SamplingParams(**GREEDY).with_defaults({})
    (_, long), (_, short) = rig.submit(PROMPTS[3], params), rig.submit(PROMPTS[0], params)
    long.get(timeout=60)
    rig.engine.leave("worker-1")
    assert len(collect(short)[0]) == 60
    with pytest.raises(EngineError, match=r"no holder that is left has room for this, and none has joined for 0\.2 s"):
        collect(long)
    rig.close()


class Pushed(StepTuner):
    """A local share of 1 at first, and of 0 after the first batch."""

    def completed(self, batch: MeasuredBatch, moving: bool = False) -> None:
        self.share = 0.0


def test_pages_that_a_move_will_take_are_not_promised_to_new_requests(decoder):
    """New requests may use exactly the pages that will be left when the move is over."""
    rig = Rig(decoder, shard="heads", local_pool=1000, local_tier=True, tuner=Pushed(share=1.0), max_batch_tokens=64)
    mover, config = rig.engine._tiering._migration, rig.scheduler.config
    step, rooms = mover.step, []

    def look(seconds, waits=False):
        step(1e-9, waits)
        if rig.engine._in_flight or not mover._queue or any(each.due > each.taken for each in mover._queue):
            return
        holders = rig.engine._control.placement.holders
        left = {
            (number, 0): pool_of(worker).store.free_pages + holders[number].closing[0]
            for number, worker in rig.workers.items()
        }
        for journey in mover._queue:
            fresh = tuple(part.share for part in journey.new)
            due = config.pages_for(fresh, len(journey.sequence.tokens))
            for number, pages in (due - config.held(fresh, 0, journey.taken, 0, journey.sequence.floor)).items():
                left[number] -= pages
        rooms.extend((left[number], pages) for number, pages in rig.scheduler.ledger.unpromised().items())

    mover.step = look
    rig.generate([prompt * 3 for prompt in PROMPTS[2:]], **GREEDY)
    rig.close()
    assert len(rooms) > 5
    assert [mine for mine, _ in rooms] == [promised for _, promised in rooms]


def test_pages_of_a_move_are_counted_once(decoder):
    """A move takes many batches, and with each of them holders report their free pages. The pages of the first sequence
    are in use at its new place while the second is copied."""
    rig = Rig(decoder, shard="heads", local_pool=1000, local_tier=True, tuner=Pushed(share=1.0), max_batch_tokens=64)
    step, moved = rig.engine._tiering._migration.step, rig.scheduler.running.moved
    counts: list[tuple[int, int]] = []

    def look(sequence, layout):
        moved(sequence, layout)
        counts.extend(
            (rig.scheduler.ledger.free[at.at], pool_of(rig.workers[at.holder]).store.free_pages) for at in layout
        )

    rig.engine._tiering._migration.step = lambda seconds, waits=False: step(1e-9, waits)  # a frame a time
    rig.scheduler.running.moved = look
    assert rig.generate(PROMPTS[2:], **GREEDY) == plain(decoder)[2:]
    assert len(counts) == 2
    assert all(counted == there < rig.pages for counted, there in counts)
    rig.close()


def test_moves_to_holders_with_room_go_on_when_another_refuses(decoder, monkeypatch):
    """Any refusal gave up all moves, wherever they went: under pressure at one holder none would ever end."""
    monkeypatch.setattr("lamina_workers.model_worker.kv_transfer._FRAME", 1)  # a layer each
    rig = Rig(decoder, shard="heads", local_pool=1000, local_tier=True, tuner=Pushed(share=1.0), max_batch_tokens=64)
    mover = rig.engine._tiering._migration
    step, kept = mover.step, []

    def look(seconds, waits=False):
        step(1e-9, waits)
        if mover._queue:
            to = {part.share.holder for part in mover._queue[0].new}
            mover.abandon({max(rig.workers) + 1})
            kept.append(bool(mover._queue))
            if len(kept) == 5:
                mover.abandon(to)
                assert not mover._queue

    mover.step = look
    assert rig.generate(PROMPTS[2:], **GREEDY) == plain(decoder)[2:]
    rig.close()
    assert len(kept) > 5
    assert all(kept)


def test_batches_run_between_the_frames_of_a_copy(decoder, monkeypatch):
    """Where a step leaves no time, one frame of a long sequence is copied between two batches, and the last tokens."""
    monkeypatch.setattr("lamina_workers.model_worker.kv_transfer._FRAME", 1)  # a layer each
    monkeypatch.setattr("lamina.engine.kv_migration.CHUNK", 256)
    rig = Rig(decoder, shard="heads", local_pool=6000, local_tier=True, pages=4000, tuner=StepTuner(share=0.0))
    mover = rig.engine._tiering._migration
    vectors: list[int] = []  # that were stored in the local pool, before each batch
    advance = mover.step

    def step(seconds: float, waits: bool = False) -> None:
        advance(1e-9, waits)
        vectors.append(rig.workers[LOCAL].counters.vectors_stored)

    mover.step = step  # type: ignore[method-assign]
    long = [rng.randrange(101) for _ in range(1200)]
    params = SamplingParams(max_tokens=150).with_defaults({})
    _, inbox = rig.submit(long, params)
    inbox.get(timeout=60)
    rig.engine._control.tuner.share = 1.0
    text = collect(inbox)[0]
    assert len(text) == 149
    assert mover.sequences == 1
    heads, layers = 3, 3
    most = max(after - before for before, after in pairwise(vectors))
    assert vectors[-1] >= 1200 * heads * layers
    assert most <= max(256 * heads, 64 * heads * layers)
    rig.close()
