"""The snapshot of an engine adds up: pages, tokens, batches and seconds, in the same process and behind a wire."""

from __future__ import annotations

import json
import queue
import random
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
from engine_rig import BytesPort, Rig, collect
from faulty_ports import FaultyPorts, SpoiltPorts
from looped_wire import Loop
from policy_bench import TIGHT, under
from real_workers import until

from lamina.client.remote import RemoteEngine
from lamina.engine.holders import HolderChange
from lamina.engine.observers import BatchDone, EngineStats, take_snapshot
from lamina.errors import EngineError
from lamina.kv.placement import Holder, Placement
from lamina.messages.engine_request import KvSavings
from lamina.messages.snapshot import BATCH_BUCKETS, EXCHANGE_BUCKETS, Snapshot
from lamina.sampling_params import SamplingParams
from lamina.scheduling.control_plane import ControlPlane
from lamina_protocols.messages.messages import Announcement, Attended, Exchange, Query, Reply
from lamina_workers.attention_worker.attention_worker import AttentionWorker
from lamina_workers.decoder.model import Decoder
from lamina_workers.errors import HolderLost
from lamina_workers.ports.port import LocalAttention, Replies
from lamina_workers.ports.timing import Exchanges, Stopwatch, Times

rng = random.Random(3)
PROMPTS = [[rng.randrange(101) for _ in range(n)] for n in (3, 40, 70, 150)]
LAYERS = 3
SHAPES: dict[str, dict[str, Any]] = {
    "alone": {},
    "heads": {"shard": "heads", "weights": (1, 1)},
    "heads, prompts local": {"shard": "heads", "weights": (1, 1, 1), "local_pool": 500},
    "ranges, two lanes": {"shard": "sequence", "weights": (1, 2), "lanes": 2},
}


def look(engine: Any) -> Snapshot:
    seen: queue.SimpleQueue[Snapshot] = queue.SimpleQueue()
    engine.snapshot(seen.put)
    return seen.get(timeout=10)


def wait_until(engine: Any, condition: Callable[[Snapshot], bool]) -> Snapshot:
    deadline = time.monotonic() + 20
    while not condition(seen := look(engine)):
        assert time.monotonic() < deadline, seen
        time.sleep(0.005)
    return seen


def settled(engine: Any) -> Snapshot:
    """The snapshot after all requests ended and the holders closed them: every page is free or the prefix cache's."""

    def over(seen: Snapshot) -> bool:
        taken = sum(holder.total_pages - holder.free_pages for holder in seen.holders)
        return not seen.running and taken == sum(seen.cached_pages.values())

    return wait_until(engine, over)


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens).with_defaults({})


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_snapshot_adds_up_after_all_requests_ended(decoder: Decoder, shape: dict[str, Any], cached: bool) -> None:
    rig = Rig(decoder, max_batch_tokens=64, prefix_cache=cached, **shape)
    began = time.monotonic()
    texts = rig.generate(PROMPTS, max_tokens=9) + rig.generate(PROMPTS, max_tokens=9)
    seen = settled(rig.engine)
    made = sum(len(text) for samples in texts for text in samples)
    tokens = sum(len(prompt) for prompt in 2 * PROMPTS)
    assert seen.generation_tokens == made
    assert seen.prompt_tokens + seen.prefix_hits == tokens
    assert seen.prefix_queries == (tokens if cached else 0)
    assert (seen.prefix_hits > 0) == (sum(seen.cached_pages.values()) > 0) == cached
    assert seen.batch_tokens == seen.prompt_tokens + made - 2 * len(PROMPTS)  # a last token is never fed back
    assert sum(seen.batch_counts) == seen.batches > 9
    assert (seen.running, seen.waiting, seen.sequences, seen.failed_batches) == (0, 0, (), 0)
    for holder in seen.holders:
        assert 0 <= seen.cached_pages.get(holder.name, 0) == holder.total_pages - holder.free_pages
        assert sum(holder.exchange_counts) % LAYERS == 0
        assert (holder.exchange_seconds > 0) == (sum(holder.exchange_counts) > 0)
    assert [holder.name for holder in seen.holders if holder.name != "local"] == [f"worker-{n}" for n in rig.ports]
    exchanges = sum(sum(holder.exchange_counts) for holder in seen.holders)
    assert exchanges == LAYERS * seen.batches if not shape else exchanges > 0
    assert seen.attention_seconds > 0
    assert seen.model_seconds > 0
    assert seen.idle_seconds > 0
    assert seen.model_seconds + seen.attention_seconds + seen.idle_seconds == pytest.approx(seen.uptime)
    assert seen.uptime <= time.monotonic() - began + 1
    assert 0 < seen.plan_seconds < seen.uptime - seen.idle_seconds
    assert 0 < seen.announce_seconds < seen.uptime - seen.idle_seconds
    rig.close()


@pytest.mark.parametrize("shape", [SHAPES["heads"], SHAPES["heads, prompts local"]], ids=["heads", "prompts local"])
def test_snapshot_pages_in_use_are_those_of_the_sequences(decoder: Decoder, shape: dict[str, Any]) -> None:
    rig = Rig(decoder, **shape)
    running = [rig.submit(prompt, greedy(1500)) for prompt in PROMPTS]
    rest = [rig.submit([7] * 5, greedy(2)) for _ in range(3)]
    for _, inbox in rest:
        collect(inbox)

    def steady(seen: Snapshot) -> bool:  # ended sequences are closed with the next batch
        return seen.running == len(PROMPTS) and not any(each.prefill for each in seen.sequences) and seen.batches > 9

    seen = wait_until(rig.engine, steady)
    kept = {holder.name: 0 for holder in seen.holders}
    for sequence in seen.sequences:
        assert sequence.tokens > len(PROMPTS[int(sequence.request) - 1])
        for name, pages in sequence.pages.items():
            kept[name] += pages
    assert kept == {holder.name: holder.total_pages - holder.free_pages for holder in seen.holders}
    assert seen.lanes == 1
    for request, _ in running:
        rig.engine.abort(request)
    assert settled(rig.engine).sequences == ()
    rig.close()


def test_snapshot_counts_pages_of_a_prompt_at_the_local_holder_during_prefill(decoder: Decoder) -> None:
    rig = Rig(decoder, **SHAPES["heads, prompts local"] | {"local_pool": 3000}, max_batch_tokens=16)
    request, _ = rig.submit([5] * 1800, greedy(2))
    seen = wait_until(rig.engine, lambda seen: any(each.tokens == 1800 for each in seen.sequences))
    assert seen.sequences[0].prefill
    local = seen.holders[0]
    assert (local.name, local.total_pages) == ("local", 3000)
    assert local.free_pages < 3000
    rig.engine.abort(request)
    settled(rig.engine)
    rig.close()


def test_snapshot_counts_waiting_samples(decoder: Decoder) -> None:
    rig = Rig(decoder, pages=9 * 40, max_model_len=600)
    requests = [rig.submit([n] * 100, greedy(480))[0] for n in range(12)]
    seen = wait_until(rig.engine, lambda seen: seen.running > 0 and seen.running + seen.waiting == 12)
    assert seen.waiting > 0
    assert len(seen.sequences) == seen.running
    for request in requests:
        rig.engine.abort(request)
    settled(rig.engine)
    rig.close()


def test_snapshot_lists_a_lost_holder_as_missing_until_another_joins(decoder: Decoder) -> None:
    rig = Rig(decoder, shard="heads", weights=(1, 1, 1), port=BytesPort)
    request, inbox = rig.submit(PROMPTS[3], greedy(1500))
    inbox.get(timeout=20)

    def killed(request: object) -> None:
        if isinstance(request, Exchange):
            raise HolderLost("killed")

    port: Any = rig.ports[2]
    port.before = killed
    seen = wait_until(rig.engine, lambda seen: seen.lost_holders == 1 and seen.rebuilt_tokens > 0)
    assert seen.missing == ("worker-2",)
    assert [holder.name for holder in seen.holders] == ["worker-1", "worker-3"]
    assert seen.failed_batches == 1
    assert seen.rebuilt_tokens >= 150
    worker = AttentionWorker(rig.holder)
    rig.workers[4] = worker
    rig.engine.join(LocalAttention(worker, "worker-9"), Holder((rig.pages,)))
    seen = wait_until(rig.engine, lambda seen: seen.joined_holders == 1)
    assert seen.missing == ()
    assert [holder.name for holder in seen.holders] == ["worker-1", "worker-3", "worker-9"]
    rig.engine.abort(request)
    settled(rig.engine)
    rig.workers.pop(2)
    rig.close()


def test_an_engine_without_holders_is_halted_for_clients_far_away_too(decoder: Decoder) -> None:
    """Nothing outside of the engine knew that nobody could be served any more."""
    rig = Rig(decoder, shard="heads", weights=(1,), port=BytesPort)
    near = RemoteEngine(Loop(rig.engine, time.monotonic), time.monotonic)
    far = RemoteEngine(Loop(near, time.monotonic), time.monotonic)
    (only,) = look(rig.engine).holders
    assert not far.halted
    rig.engine.leave(only.name)
    until(lambda: far.halted)
    assert rig.engine.halted
    assert rig.engine.alive
    worker = AttentionWorker(rig.holder)
    rig.workers[2] = worker
    rig.engine.join(LocalAttention(worker, "worker-8"), Holder((0,)))
    time.sleep(0.1)
    assert far.halted  # it has no page
    rig.engine.leave("worker-8")
    rig.workers[3] = AttentionWorker(rig.holder)
    rig.engine.join(LocalAttention(rig.workers[3], "worker-9"), Holder((rig.pages,)))
    until(lambda: not far.halted)
    rig.workers.pop(1)
    rig.workers.pop(2)
    rig.close()


@pytest.mark.fault("F25")
def test_snapshot_counts_samples_without_finite_logits(decoder: Decoder) -> None:
    ports = SpoiltPorts(lambda out: out)
    ports.on = True
    rig = Rig(decoder, shard="heads", weights=(1, 1), port=ports)
    with pytest.raises(EngineError, match="not finite"):
        rig.generate([PROMPTS[1]], max_tokens=3)
    assert look(rig.engine).corrupted == 1
    rig.close()


def test_snapshot_counts_preemptions(decoder: Decoder) -> None:
    rig = Rig(decoder, pages=9 * 30, max_model_len=400)
    rig.generate([[n] * 20 for n in range(6)], max_tokens=150, ignore_eos=True)
    seen = settled(rig.engine)
    assert seen.preemptions > 0
    assert 6 * 20 < seen.prompt_tokens <= (6 + seen.preemptions) * 20  # tokens that were generated before are no prompt
    rig.close()


def test_snapshot_sums_what_policies_save(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    for cost in ("CALL", "BYTE"):
        monkeypatch.setattr(f"lamina_workers.policies.retrieval.{cost}", 0)
    rig = Rig(under(decoder, TIGHT["retrieval"]), shard="heads", weights=(1, 1))
    rig.generate([PROMPTS[3]] * 2, max_tokens=24)
    seen = look(rig.engine)
    assert 0 < seen.kv_read < seen.kv_whole
    assert 0 < seen.missed_mass < seen.missed_queries
    rig.close()


def test_snapshot_counts_the_time_of_announcements(decoder: Decoder) -> None:
    ports = FaultyPorts(range(1000), lambda port: time.sleep(0.02), Announcement)
    rig = Rig(decoder, shard="heads", weights=(1, 1), port=ports)
    rig.generate([[5] * 20], max_tokens=5)
    seen = look(rig.engine)
    assert seen.batches == 5
    assert seen.announce_seconds >= 5 * 2 * 0.02  # two holders, one after the other
    assert seen.plan_seconds < seen.announce_seconds
    rig.close()


def test_stats_never_fall_when_the_savings_of_a_part_restart() -> None:
    stats = EngineStats(0.0)
    stats.spared(KvSavings(), KvSavings(read=10, whole=40, missed=0.5, queries=10))
    stats.spared(
        KvSavings(read=10, whole=40, missed=0.5, queries=10), KvSavings(read=3, whole=8, missed=0.1, queries=2)
    )
    assert (stats.kv_read, stats.kv_whole, stats.missed_queries) == (13, 48, 12)
    assert stats.missed_mass == pytest.approx(0.6)


def batch_done(tokens: int) -> BatchDone:
    plan = cast(Any, SimpleNamespace(rows=(SimpleNamespace(count=tokens),)))
    return BatchDone(plan, {}, 0, 1, 1, 0, 0, Times(), 0.0, 0.0)


def test_stats_count_batches_by_their_tokens() -> None:
    stats = EngineStats(0.0)
    for tokens in (1, 8, 9, 10**6):
        stats.batch_done(batch_done(tokens))
    assert stats.batch_counts[:3] == [1, 1, 1]
    assert stats.batch_counts[-1] == 1
    assert len(stats.batch_counts) == len(BATCH_BUCKETS) + 1


def test_stats_count_lost_and_joined_holders() -> None:
    stats = EngineStats(0.0)
    stats.holders_changed(HolderChange("lost", ("a", "b")))
    stats.holders_changed(HolderChange("drained", ("c",)))
    for name in ("d", "e", "f"):
        stats.holders_changed(HolderChange("joined", (name,)))
    assert (stats.lost_holders, stats.joined_holders, stats.missing) == (2, 3, [])


def test_snapshot_sums_the_holders_of_one_worker_over_ranks(decoder: Decoder) -> None:
    rig = Rig(decoder)
    placement = Placement(
        {0: Holder((50,)), 1: Holder((40,), rank=1), 2: Holder((20,)), 3: Holder((30,), rank=1)},
        heads=((2,), (1,)), page_size=16, max_model_len=100, local_pools=(0, 1),
    )  # fmt: skip
    links = rig.engine._worker.links()
    links = {0: links[1], 2: links[1]._replace(in_process=False, channel="tcp")}
    control = ControlPlane(rig.scheduler.config, placement)
    seen = take_snapshot(
        EngineStats(0.0, returned_workers=2),
        control,
        links=links,
        names={2: "a", 3: "a"},
        attention_seconds=0.0,
        experts_read=(8, 3),
        local_share=1.0,
        now=1.0,
    )
    rig.close()
    assert (seen.returned_workers, seen.expert_bytes, seen.expert_rows) == (2, 8, 3)
    shown = {holder.name: (holder.local, holder.channel, holder.total_pages) for holder in seen.holders}
    assert shown == {
        "local": (True, "in process", 50), "a": (False, "tcp", 50), "rank-1": (True, "in process", 40)
    }  # fmt: skip
    assert all(holder.free_pages == holder.total_pages for holder in seen.holders)
    assert all(len(holder.exchange_counts) == len(EXCHANGE_BUCKETS) + 1 for holder in seen.holders)


def test_idle_engine_answers_snapshots_after_a_sink_raised(decoder: Decoder, caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig(decoder)

    def refuse(seen: Snapshot) -> None:
        raise ValueError("no")

    rig.engine.snapshot(refuse)
    assert look(rig.engine).batches == 0
    assert "could not take its snapshot" in caplog.text
    assert len(rig.generate([[1, 2]], max_tokens=3)[0][0]) == 3
    rig.close()
    rig.engine.snapshot(refuse)  # no answer comes any more


def test_snapshot_survives_json(decoder: Decoder) -> None:
    rig = Rig(decoder, shard="heads", weights=(1, 1), prefix_cache=True)
    request, inbox = rig.submit(PROMPTS[2], greedy(1000))
    inbox.get(timeout=20)
    seen = wait_until(rig.engine, lambda seen: bool(seen.sequences))
    assert Snapshot.from_dict(json.loads(json.dumps(seen.as_dict()))) == seen
    rig.engine.abort(request)
    settled(rig.engine)
    rig.close()


def test_snapshot_crosses_two_remote_engines(decoder: Decoder) -> None:
    rig = Rig(decoder, shard="heads", weights=(1, 1))
    near = RemoteEngine(Loop(rig.engine, time.monotonic), time.monotonic)
    far = RemoteEngine(Loop(near, time.monotonic), time.monotonic)
    rig.generate([[1, 2, 3]], max_tokens=5)
    seen = look(far)
    assert (seen.generation_tokens, [holder.name for holder in seen.holders]) == (5, ["worker-1", "worker-2"])
    assert look(far).uptime > seen.uptime
    assert look(far).began == look(rig.engine).began == seen.began
    rig.close()
    assert near.join(5)
    assert far.join(5)
    far.snapshot(lambda _: pytest.fail("a stopped engine answered"))
    near.snapshot(lambda _: pytest.fail("a stopped engine answered"))
    assert not near._snapshot_sinks
    assert not far._snapshot_sinks


class Deaf:
    """An engine that answers nothing."""

    alive = True
    halted = False

    def snapshot(self, sink: Callable[[Snapshot], None]) -> None: ...

    def close(self) -> None:
        self.alive = False


def test_snapshot_request_is_forgotten_when_the_engine_stops() -> None:
    remote = RemoteEngine(Loop(Deaf(), time.monotonic), time.monotonic)
    remote.snapshot(lambda _: pytest.fail("a snapshot was taken"))
    assert len(remote._snapshot_sinks) == 1
    remote.close()
    assert remote.join(5)
    assert not remote._snapshot_sinks


class Clock:
    """Goes on by a second each time it is read."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


def test_stopwatch_sums_the_time_between_start_and_stop() -> None:
    watch = Stopwatch(Clock())
    watch.start()
    watch.stop()
    watch.stop()
    watch.start()
    watch.stop()
    assert watch.seconds == 2


def test_exchanges_are_counted_in_the_bucket_that_bounds_them() -> None:
    exchanges = Exchanges()
    for seconds in (0.0, EXCHANGE_BUCKETS[0], EXCHANGE_BUCKETS[1], 99.0):
        exchanges.add(seconds)
    assert exchanges.counts[:2] == [2, 1]
    assert exchanges.counts[-1] == 1
    assert exchanges.seconds == pytest.approx(99 + EXCHANGE_BUCKETS[0] + EXCHANGE_BUCKETS[1])


class Echo:
    """A port that answers each query with an empty answer, and has crossed some bytes."""

    name, address, channel_kind, closed = "w", "host:1", "tcp", False
    bytes_sent, bytes_received = 7, 9

    def __init__(self) -> None:
        self.sent: list[Query] = []

    def send(self, request: Any) -> None:
        self.sent.append(request)

    def receive(self, timeout: float | None = None) -> Reply:
        query = self.sent.pop(0)
        return Attended(query.epoch, query.batch, query.layer, query.q, query.q)

    def ready(self) -> bool:
        return bool(self.sent)

    def close(self) -> None: ...


def test_exchange_is_timed_for_each_batch_in_flight() -> None:
    port: Any = Echo()
    replies = Replies(port, clock := Clock())
    nothing: Any = None
    for batch in (1, 2):
        replies.expect(1, batch)
        replies.asked(batch)  # at 1 and 2 seconds
        port.send(Query(1, batch, 0, nothing))
    clock.now = 10
    replies.take(Attended, 2, 0)  # reads both, at 11 and 12 seconds
    replies.take(Attended, 1, 0)
    link = replies.link()
    assert (link.seconds, sum(link.counts), link.counts[-1]) == ((11 - 1) + (12 - 2), 2, 2)
    assert (link.address, link.channel, link.in_process) == ("host:1", "tcp", False)
    assert (link.bytes_sent, link.bytes_received) == (7, 9)
    replies.asked(2)
    replies.forget(2)
    assert not replies._query_times
    port.send(Query(1, 2, 1, nothing))
    replies.expect(1, 3)
    assert not replies.ready(3)
    assert sum(replies.link().counts) == 2  # no batch waited for it
    replies.asked(3)
    replies.expect(2, 4)
    assert not replies._query_times
