"""Sequences move between the tiers while they run: the text stays the same, and every page is counted once."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from engine_rig import LOCAL, Restless, Rig, collect, one_process
from faulty_ports import FaultyPorts
from kv_pools import pool_of
from pairwise import crossing
from running_streams import Streams

from lamina.errors import EngineError
from lamina.sampling_params import SamplingParams
from lamina.scheduling.step_tuner import MeasuredBatch, StepTuner
from lamina_protocols.messages.messages import Announcement, Close, Fetch, FetchPages, Fresh, FreshPages, Open
from lamina_workers.errors import HolderLost, KVError

rng = random.Random(5)
PROMPTS = [[rng.randrange(101) for _ in range(n)] for n in (3, 40, 70, 150)]
GREEDY = {"max_tokens": 60}
SMALL = {"shard": "heads", "local_pool": 60, "local_tier": True, "max_batch_tokens": 64}


@pytest.fixture(scope="module")
def expected(decoder):
    return one_process(decoder, PROMPTS, **GREEDY)


def of_a_move(request):
    opens = isinstance(request, Announcement) and any(isinstance(op, Open | Close) for op in request.operations)
    return opens or isinstance(request, Fetch | Fresh | FetchPages | FreshPages)


@crossing(fault=(HolderLost("gone"), KVError("lost")), at=(2, 9, 14, 23, 31, 44), lanes=(1, 2))
def test_text_stays_the_same_when_a_holder_is_lost_during_a_move(decoder, expected, at, fault, lanes, monkeypatch):
    monkeypatch.setattr("lamina_workers.model_worker.kv_transfer._FRAME", 1)  # a layer each
    ports = FaultyPorts(at, fault, of_a_move)
    rig = Rig(
        decoder, shard="heads", weights=(1, 1), local_pool=1500, local_tier=True, tuner=Restless(at, 0.6, lanes),
        max_batch_tokens=64, port=ports,
    )  # fmt: skip
    assert rig.generate(PROMPTS, **GREEDY) == expected
    assert ports.struck
    rig.scheduler.check_integrity()
    rig.engine.close()
    rig._thread.join()
    pool_of(rig.workers[LOCAL]).store.check_integrity()


@pytest.mark.fault("F18")
@pytest.mark.parametrize("drained", [False, True])
def test_local_holder_takes_over_when_the_last_worker_leaves_or_is_drained(decoder, expected, drained):
    rig = Rig(decoder, **SMALL | {"local_pool": 2500}, tuner=StepTuner(share=0.0))
    streams = Streams(rig, PROMPTS, 60)
    if drained:
        assert rig.engine.drain("worker-1").result(timeout=60) > 0
    else:
        rig.engine.leave("worker-1")
    assert streams.tokens() == [sample for (sample,) in expected]
    assert rig.workers[LOCAL].counters.queries > 0
    assert rig.scheduler.counters.preempted == 0 or not drained
    rig.close()


def test_long_sequence_waits_for_a_new_worker_when_the_local_holder_is_too_small(decoder, expected):
    """The other sequences go on meanwhile."""
    rig = Rig(decoder, **SMALL, tuner=StepTuner(share=0.0), wait=30.0)
    long, short = Streams(rig, PROMPTS[3:], 60), Streams(rig, PROMPTS[:1], 60, 0)
    rig.engine.leave("worker-1")
    short.tokens()
    rig.join()
    assert long.tokens() == expected[3]
    rig.close()


def test_stranded_request_ends_with_an_error_and_others_go_on(decoder):
    rig = Rig(decoder, **SMALL, tuner=StepTuner(share=0.0), wait=0.2)
    long, short = Streams(rig, PROMPTS[3:], 60), Streams(rig, PROMPTS[:1], 60, 0)
    rig.engine.leave("worker-1")
    short.tokens()
    with pytest.raises(EngineError, match=r"no attention worker has room for this, and none has joined for 0\.2 s"):
        long.tokens()
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


def test_pages_of_a_move_are_counted_once(decoder, expected):
    """A move takes many batches, and with each of them holders report their free pages. The pages of the first sequence
    are in use at its new place while the second is copied."""
    rig = Rig(decoder, shard="heads", local_pool=1000, local_tier=True, tuner=Pushed(share=1.0), max_batch_tokens=64)
    step, moved = rig.engine._tiering._migration.step, rig.scheduler.running.moved
    counts: list[tuple[int, int]] = []

    def look(sequence, layout, starts):
        moved(sequence, layout, starts)
        counts.extend(
            (rig.scheduler.ledger.free[at.at], pool_of(rig.workers[at.holder]).store.free_pages) for at in layout
        )

    rig.engine._tiering._migration.step = lambda seconds, waits=False: step(1e-9, waits)  # a frame a time
    rig.scheduler.running.moved = look
    assert rig.generate(PROMPTS[2:], **GREEDY) == expected[2:]
    assert len(counts) == 2
    assert all(counted == there < rig.pages for counted, there in counts)
    rig.close()


def test_moves_to_holders_with_room_go_on_when_another_refuses(decoder, expected, monkeypatch):
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
    assert rig.generate(PROMPTS[2:], **GREEDY) == expected[2:]
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
