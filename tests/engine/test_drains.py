"""Attention workers are drained while requests run: nothing is computed again where there is room, and nobody waits."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine_rig import Rig, one_process
from faulty_ports import FaultyPorts
from kv_pools import pool_of
from real_workers import until, worker_process, write_tiny_model
from running_streams import Streams, held

from lamina import LLM
from lamina.errors import EngineError, InvalidRequest
from lamina.scheduling.step_tuner import StepTuner
from lamina_protocols.messages.messages import Fetch, FetchPages
from lamina_workers.errors import HolderLost, KVError

chance = random.Random(11)
PROMPTS = [[chance.randrange(101) for _ in range(n)] for n in (3, 40, 70, 150)]
TOKENS = 150
PAGES = 9  # of 16 tokens of a sequence: three layers, three heads


@pytest.fixture(scope="module")
def expected(decoder: Any) -> list[list[int]]:
    return [sample for (sample,) in one_process(decoder, PROMPTS, max_tokens=TOKENS)]


def second_fetch(error: Exception) -> FaultyPorts:
    return FaultyPorts(2, error, (Fetch, FetchPages))


def streams_of(rig: Rig, begun: int = 1) -> Streams:
    return Streams(rig, PROMPTS, TOKENS, begun)


def counted(rig: Rig) -> tuple[int, int]:
    counters = rig.scheduler.counters
    return counters.preempted, counters.rebuilt_tokens


@pytest.mark.fault("F18")
@pytest.mark.parametrize("shard", ["heads", "sequence", "heads+sequence"])
@pytest.mark.parametrize("lanes", [1, 3])
def test_two_workers_are_drained_at_once_and_nothing_is_computed_again(decoder, expected, shard, lanes):
    rig = Rig(decoder, shard=shard, weights=(1, 1, 1, 1), lanes=lanes, prefix_cache=True)
    streams = streams_of(rig)
    with held(rig):
        done = [rig.engine.drain(name) for name in ("worker-2", "worker-3")]
        again = rig.engine.drain("worker-2")
    assert all(each.result(timeout=60) > 0 for each in done)
    with pytest.raises(InvalidRequest, match="worker-2 is being drained already"):
        again.result(timeout=60)
    assert streams.tokens() == expected
    assert counted(rig) == (0, 0)
    assert all(pool_of(rig.workers[number]).store.free_pages == rig.pages for number in (2, 3))
    rig.close()


@pytest.mark.fault("F18")
def test_others_get_tokens_while_a_worker_is_drained(decoder, expected, monkeypatch):
    """All batches were given up to before the first sequence moved, and waited until the last one had."""
    monkeypatch.setattr("lamina_workers.model_worker.kv_transfer._FRAME", 1)  # a layer each
    rig = Rig(decoder, shard="heads", weights=(1, 1))
    streams = streams_of(rig)
    migration, ledger = rig.engine._drains._migration, rig.scheduler.running
    step, lengths = migration.step, []

    def frame(seconds: float, waits: bool = False) -> None:
        lengths.append([len(each.tokens) for each in ledger])
        step(1e-9, waits)

    migration.step = frame
    assert rig.engine.drain("worker-1").result(timeout=60) > 0
    first, last = lengths[0], lengths[-1]
    assert len(lengths) > 5
    assert all(after > before for before, after in zip(first, last, strict=True))
    assert streams.tokens() == expected
    rig.close()


def test_the_last_worker_is_kept_when_two_are_to_go(decoder, expected):
    rig = Rig(decoder, shard="heads", weights=(1, 1))
    streams = streams_of(rig)
    with held(rig):
        one, two = rig.engine.drain("worker-1"), rig.engine.drain("worker-2")
    with pytest.raises(InvalidRequest, match="worker-2 is the only attention worker"):
        two.result(timeout=60)
    assert one.result(timeout=60) > 0
    assert streams.tokens() == expected
    rig.close()


def test_a_worker_stays_when_no_other_is_left_to_take_its_kv(decoder, expected):
    rig = Rig(decoder, shard="heads", weights=(1, 1))
    streams = streams_of(rig)
    with held(rig):
        done = rig.engine.drain("worker-1")
        rig.engine.leave("worker-2")
    with pytest.raises(EngineError, match="worker-1 could not be drained: no other attention worker is left"):
        done.result(timeout=60)
    assert streams.tokens() == expected
    assert set(rig.engine._holders.names.values()) == {"worker-1"}
    rig.close()


def test_a_worker_that_is_lost_meanwhile_is_not_drained(decoder, expected):
    rig = Rig(decoder, shard="heads", weights=(1, 1), port=second_fetch(HolderLost("killed")))
    streams = streams_of(rig)
    with pytest.raises(EngineError, match="worker-1 could not be drained: it is lost"):
        rig.engine.drain("worker-1").result(timeout=60)
    assert streams.tokens() == expected
    rig.close()


@pytest.mark.fault("F18")
def test_a_drain_ends_with_the_fault_of_a_move_and_may_be_tried_again(decoder, expected):
    rig = Rig(decoder, shard="heads", weights=(1, 1), port=second_fetch(KVError("broken")))
    streams = streams_of(rig)
    with pytest.raises(EngineError, match=r"worker-1 could not be drained: .*broken"):
        rig.engine.drain("worker-1").result(timeout=60)
    assert rig.engine.drain("worker-1").result(timeout=60) > 0
    assert streams.tokens() == expected
    assert counted(rig) == (0, 0)
    rig.close()


@pytest.mark.parametrize("breaks", [False, True])
def test_a_drain_ends_with_an_error_when_the_engine_stops(decoder, breaks):
    rig = Rig(decoder, shard="heads", weights=(1, 1))
    streams_of(rig)

    def broken(seconds: float, waits: bool = False) -> None:
        raise RuntimeError("a fault of our own")

    with held(rig):
        if breaks:
            rig.engine._drains._migration.step = broken
        done = rig.engine.drain("worker-1")
        if not breaks:
            rig.engine.close()
    with pytest.raises(EngineError, match="of our own" if breaks else "the engine has stopped"):
        done.result(timeout=60)
    rig.close()


def test_sequences_without_room_elsewhere_are_computed_again_and_the_others_move(decoder, expected):
    """The other worker has room for half of them."""
    rig = Rig(decoder, shard="heads", weights=(1, 1), pages=PAGES * 24, prefix_cache=True)
    streams = streams_of(rig, 90)
    assert counted(rig) == (0, 0)
    assert rig.engine.drain("worker-1").result(timeout=60) > 0
    assert rig.scheduler.counters.preempted > 0
    assert streams.tokens() == expected
    rig.close()


def test_cached_prefixes_elsewhere_make_room_for_a_move(decoder, expected):
    """Pages of prefixes that nobody used counted as taken: all that was drained was computed again."""
    longest = -(-(max(map(len, PROMPTS)) + TOKENS) // 16) + 1
    rig = Rig(decoder, shard="heads", weights=(1, 1), pages=PAGES * 2 * longest, prefix_cache=True)
    for _ in range(6):
        rig.generate([[chance.randrange(101) for _ in range(200)]], max_tokens=1)
    streams = streams_of(rig)
    evicted = rig.scheduler.counters.evicted
    assert rig.engine.drain("worker-1").result(timeout=60) > 0
    assert rig.scheduler.counters.evicted > evicted
    assert rig.scheduler.counters.preempted == 0
    assert streams.tokens() == expected
    rig.close()


def test_an_idle_engine_lets_a_worker_with_cached_prefixes_go(decoder):
    rig = Rig(decoder, shard="sequence", weights=(1, 1, 1), prefix_cache=True)
    rig.generate(PROMPTS, max_tokens=40)
    assert rig.engine.drain("worker-2").result(timeout=60) == 0
    assert pool_of(rig.workers[2]).store.free_pages == rig.pages
    assert len(rig.generate(PROMPTS[:1], max_tokens=5)[0][0]) == 5
    rig.close()


def test_a_worker_that_is_about_to_end_is_drained_or_is_warned_of_once(decoder, caplog):
    rig = Rig(decoder, shard="heads", weights=(1, 1))
    for _ in range(3):  # as its heartbeats ask
        rig.engine.leaving("worker-1")
    until(lambda: pool_of(rig.workers[1]).store.free_pages == rig.pages and len(rig.engine._holders.names) == 1)
    for name in ("worker-1", "worker-2", "worker-2"):
        rig.engine.leaving(name)
    rig.generate(PROMPTS[:1], max_tokens=5)
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "attention worker worker-2 is about to end with its KV: worker-2 is the only attention worker: there is none "
        "to move its KV to"
    ]
    rig.close()


def test_a_sequence_in_prefill_stays_until_its_prompt_is_computed(decoder, expected):
    rig = Rig(
        decoder,
        shard="heads",
        weights=(1, 1),
        max_batch_tokens=16,
        local_pool=2000,
        local_tier=True,
        tuner=StepTuner(share=0.0),
    )
    with held(rig):
        streams = streams_of(rig, 0)
    until(lambda: len(rig.scheduler.running) > 0)
    done = rig.engine.drain("worker-1")
    assert streams.tokens() == expected
    done.result(timeout=60)
    assert counted(rig) == (0, 0)
    rig.close()


@pytest.mark.fault("F18")
@pytest.mark.real
@pytest.mark.parametrize("how", ["drained", "SIGTERM"])
def test_streams_over_two_processes_keep_their_text_while_one_hands_its_kv_over(how: str, tmp_path: Path) -> None:
    """As an operator drains it, or since it is about to end."""
    model = write_tiny_model(tmp_path / "tiny")
    prompts = [[chance.randrange(101) for _ in range(20 + 11 * n)] for n in range(8)]
    options: dict[str, Any] = {"dtype": "float32", "threads": 1, "page_size": 16, "kv_memory": "16MiB", "lanes": 1}

    def tokens(llm: LLM, go: Callable[[], None] | None = None) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in prompts]
        for event in llm.stream(prompts, max_tokens=120 if how == "drained" else 400, temperature=0, ignore_eos=True):
            if go is not None and all(found):
                go()
                go = None
            found[event.prompt_index].append(event.token_id)
        return found

    with worker_process() as one, worker_process() as two:
        options["attention_workers"] = [one.address, two.address]
        with LLM(model, local_share=0, **options) as llm:
            engine: Any = llm._runtime.engine  # type: ignore[union-attr]
            undisturbed = tokens(llm)
            names, done = list(engine._holders.names.values()), list[Any]()
            if how == "drained":
                assert tokens(llm, lambda: done.append(engine.drain(names[0]))) == undisturbed
                assert done[0].result(timeout=60) > 0
                until(lambda: one.status().free_pages == one.status().total_pages)
            else:
                assert tokens(llm, lambda: one.process.send_signal(signal.SIGTERM)) == undisturbed
                assert one.process.wait(30) == 0
            assert list(engine._holders.names.values()) == names[1:]
            assert (engine._scheduler.counters.preempted, engine._scheduler.counters.rebuilt_tokens) == (0, 0)
            assert tokens(llm) == undisturbed
