"""Replicas in rotation: batches move from one whole model to the next, and the text is that of one process."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_rig import Rig, collect, tiny_decoder
from real_workers import until, write_tiny_model
from transports import pair

from lamina import LLM
from lamina.config import EngineConfig
from lamina.errors import InvalidRequest
from lamina.sampling_params import SamplingParams
from lamina_protocols.channels import sockets
from lamina_protocols.channels.channels import Channel
from lamina_protocols.channels.sockets import connect_unix
from lamina_protocols.errors import ProtocolError
from lamina_protocols.messages.layers import HolderConfig
from lamina_protocols.messages.messages import Exchange, Row
from lamina_protocols.messages.routes import HolderBatch, Route
from lamina_workers.attention_server.attention_server import AttentionServer, ServerConfig
from lamina_workers.attention_worker.attention_worker import AttentionWorker
from lamina_workers.checkpoints.model_checkpoint import fingerprint
from lamina_workers.decoder.sampler import RowSampling, sample
from lamina_workers.errors import RankLost
from lamina_workers.model_worker.attention_merge import LayerExchange
from lamina_workers.model_worker.interface import Waiting
from lamina_workers.model_worker.layer_slices import Waits, chosen, likeliest, plain_rows, rotates, rotation
from lamina_workers.model_worker.model_worker import ModelWorker
from lamina_workers.parallel import peer_messages
from lamina_workers.parallel.peer_worker import PeerWorker
from lamina_workers.parallel.peers import UNIX, Peer, PeerListener
from lamina_workers.parallel.replicas import PipelineReplicas
from lamina_workers.ports.port import AttentionPort
from lamina_workers.ports.remote import RemoteAttention, SeatOptions, connect

ENGINE = "5eed" * 8
rng = random.Random(41)
PROMPTS = [[rng.randrange(101) for _ in range(n)] for n in (3, 19, 40, 90)]


# What is pure.


def test_slice_k_of_batch_j_is_at_replica_j_plus_k() -> None:
    assert rotation(1, 5, 3) == [1, 2, 0, 1, 2, 0]
    assert rotation(0, 3, 1) == [0, 0, 0, 0]
    for turn in range(7):
        for replicas in range(1, 6):
            order = rotation(turn, 30, replicas)
            assert len(order) == 31  # before the first attention, between two, behind the last
            assert all(place == (turn + k) % replicas for k, place in enumerate(order))


def share(*rows: tuple[int, tuple[int, int] | None, bool]) -> HolderBatch:
    """Rows of one token at `start`, each with what it reads and whether it is stored."""
    routes = [
        Route(i, (0,), Row(i, start, 1, read, store), (start, start + 1) if store else (0, 0))
        for i, (start, read, store) in enumerate(rows)
    ]
    return HolderBatch(0, (), tuple(routes))


def test_what_may_rotate() -> None:
    decode, reads, stores = (9, (0, 9), True), (9, (0, 5), False), (9, None, True)
    fused = (9, (0, 10), True)
    assert rotates({1: share(decode)})
    assert rotates({1: share(reads), 2: share(decode)})
    assert rotates({1: share(decode, stores)})  # its keys travel with the other row's query
    assert rotates({1: share(decode), 2: share()})  # operations only, which the announcement brought
    assert not rotates({1: share(stores)})
    assert not rotates({1: share(reads), 2: share(stores)})
    assert rotates({1: share(fused)})  # stored before it is answered
    assert not rotates({0: share(decode), 1: share(decode)}, here=(0,))
    assert not rotates({1: share()})
    assert not rotates({})


def test_tokens_are_chosen_where_the_logits_are_unless_more_is_wanted() -> None:
    logits = torch.randn(7, 101, generator=torch.Generator().manual_seed(1))
    logits[4, 7] = torch.nan
    rows = [
        RowSampling(),
        RowSampling(temperature=0.8, seed=3),
        RowSampling(logprobs=2),
        RowSampling(suppressed=(5,)),
        RowSampling(),
        RowSampling(logit_bias={9: 100.0}),
        RowSampling(allowed=np.array([0, 6, 0, 0], np.int32)),  # a schema or grammar leaves tokens 33 and 34
    ]
    plain = plain_rows(rows)
    assert plain == (0, 4)
    tokens, rest = likeliest(logits, plain)
    assert len(rest) == 5
    assert tokens[1] == 0
    sampled = chosen(rows, tokens, rest)
    assert sampled == sample(logits, rows)
    assert sampled.tokens[6] in (33, 34)
    with pytest.raises(ProtocolError, match="1 tokens and 5 rows of logits, due 2 and 5"):
        chosen(rows, tokens[:1], rest)


# Waiting for whichever comes first.


class Replies:
    """Who replies over a channel."""

    def __init__(self, channel: Channel | None) -> None:
        self.channel = channel

    def ready(self, batch: int) -> bool:
        return self.channel is None or self.channel.ready()


@pytest.mark.parametrize("transport", ["local", "tcp+tls", "grpc"])
def test_the_first_of_several_is_waited_for(transport) -> None:
    frame = peer_messages.encode(peer_messages.Slice(1, 0, False, torch.zeros(40, 1000), torch.empty(0)))
    with pair(transport) as (near, far), pair("local") as (other, quiet):
        waits, waitings = Waits(), [Waiting(Replies(quiet), 1), Waiting(Replies(far), 1)]
        assert not waits.until_any(waitings, 0.05)
        threading.Timer(0.1, near.send, (frame,)).start()
        assert waits.until_any(waitings, 10.0)
        assert [waiting.over() for waiting in waitings] == [False, True]
        assert waits.until_any(waitings, 10.0)  # it has not been taken yet
        far.receive(0)
        assert not waits.until_any(waitings[1:], 0.05)
        threading.Timer(0.1, other.send, (frame,)).start()
        assert waits.until_any(waitings[1:], 10.0, beside=(quiet,))
        quiet.receive(0)
        threading.Timer(0.1, other.close).start()
        assert waits.until_any(waitings, 10.0)
        quiet.close()
        assert waits.until_any(waitings, 10.0)  # closed on this side, a moment ago
        assert not waits.until_any([*waitings, Waiting(Replies(None), 1)], 10.0)  # which will not come over a channel


# Replicas that are threads here, over real channels to real attention workers.


class Rotating:
    """A rig whose dense layers are computed by `replicas` replicas in threads, its attention by servers."""

    def __init__(
        self,
        stack: contextlib.ExitStack,
        model: Path,
        replicas: int,
        count: int,
        overrides: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.servers: list[AttentionServer] = []
        self.peers: list[Peer] = []
        self._stack, self._model = stack, model
        self._channels: list[Any] = []
        self.threads: list[threading.Thread] = []
        self.rig = Rig(
            tiny_decoder(**overrides or {}),
            weights=(1,) * count,
            port=self._served,
            around=lambda own, ports: self._around(own, ports, replicas),
            **{"shard": "heads", **options},
        )
        stack.callback(self.rig.close)
        self.workers: PipelineReplicas = self.rig.engine._worker  # type: ignore[assignment]

    def _served(self, worker: AttentionWorker) -> AttentionPort:
        config = worker.config
        server = AttentionServer(ServerConfig(f"w{len(self.servers)}", config.kv_memory))
        address = server.start()
        self._stack.callback(server.stop, 0.0)
        self.servers.append(server)
        port = connect(
            address, f"worker-{len(self.servers)}", config, "float32", fingerprint(self._model), SeatOptions(ENGINE)
        )
        self._stack.callback(port.close)
        return port

    def _around(self, own: ModelWorker, ports: dict[int, AttentionPort], replicas: int) -> PipelineReplicas:
        self.holder = replace(own._merge._config, kv_memory=1)
        self.peers = [self.replica(rank, self.holder) for rank in range(1, replicas)]
        workers = PipelineReplicas(own, self.peers, here=(0,), config=self.holder)
        for number, port in ports.items():
            workers.join(number, port)
        return workers

    def replica(self, rank: int, holder: HolderConfig) -> Peer:
        begin = peer_messages.Begin(
            rank=rank, ranks=1, folder=str(self._model), model=fingerprint(self._model), rope_scaling="",
            dtype="float32", packed=False, quantize="", device="cpu", attention_device="cpu", compile=False,
            threads=1, holder=holder, patience=10.0, engine=ENGINE, linger=0.0, local_channel=True,
            data_channel="grpc", lost_after=10.0, epoch=1,
        )  # fmt: skip
        ready: list[Peer] = []
        failed: list[Any] = []
        listener = PeerListener(
            lambda rank: begin, ready.append, lambda *why: failed.append(why), lambda name: None, lambda *progress: None
        )
        self._stack.callback(listener.close)
        channel = connect_unix(listener.address.removeprefix(UNIX), listener.invite(rank, f"model-{rank}"), 10.0)
        self._channels.append(channel)
        thread = threading.Thread(target=self._serve, args=(channel, f"model-{rank}"), daemon=True)
        thread.start()
        self.threads.append(thread)
        until(lambda: bool(ready or failed))
        assert not failed
        return ready[0]

    @staticmethod
    def _serve(channel: Any, name: str) -> None:
        with contextlib.suppress(Exception):
            PeerWorker(channel, name).serve()
        channel.close()

    def all_connected(self) -> bool:
        """Whether every replica has a channel to every attention worker."""
        return all(server.status().channels == 1 + len(self.peers) for server in self.servers)


@pytest.fixture(scope="module")
def expected() -> dict[str, list[list[list[int]]]]:
    rig = Rig(tiny_decoder())
    texts = {name: rig.generate(PROMPTS, **sampling) for name, sampling in SAMPLINGS.items()}
    rig.close()
    return texts


SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {"max_tokens": 12},
    "seeded": {"max_tokens": 12, "temperature": 0.9, "top_p": 0.9, "seed": 7, "n": 2},
    "penalised": {"max_tokens": 12, "repetition_penalty": 1.3, "frequency_penalty": 0.4, "logit_bias": {5: 1.0}},
}


@pytest.mark.parametrize("fuses", [True, False])
@pytest.mark.parametrize(
    ("replicas", "lanes", "count", "shard"), [(2, 1, 1, "heads"), (2, 3, 2, "sequence"), (3, 4, 2, "heads+sequence")]
)
def test_one_text(model, expected, replicas, lanes, count, shard, fuses):
    check_one_text(model, expected, replicas, lanes, count, shard, fuses)


def test_sinks_are_counted_once_wherever_a_batch_goes_on(tmp_path: Path) -> None:
    sinks = {"architectures": ["GptOssForCausalLM"], "num_local_experts": 3, "num_experts_per_tok": 2}
    model, alone = write_tiny_model(tmp_path, **sinks), Rig(tiny_decoder(**sinks))
    expected = alone.generate(PROMPTS, max_tokens=12)
    alone.close()
    with contextlib.ExitStack() as stack:
        rotating = Rotating(stack, model, 2, 2, sinks, lanes=2, shard="sequence", max_batch_tokens=32)
        until(rotating.all_connected)
        assert rotating.rig.generate(PROMPTS, max_tokens=12) == expected
        assert set(rotating.workers.slices) == {0, 1}


@pytest.mark.parametrize("replicas", [1, 2])
def test_q_goes_first_but_not_in_a_replicas_last_slice(model, expected, replicas, monkeypatch):
    """Its store must be answered before the next batch is announced over another channel."""
    early: list[tuple[int, bool]] = []
    begin = LayerExchange.begin

    def begun(self, layer, q):
        early.append((layer, False))
        begin(self, layer, q)

    def asked(self):
        early[-1] = early[-1][0], True
        ask(self)

    ask = LayerExchange.ask
    monkeypatch.setattr(LayerExchange, "begin", begun)
    monkeypatch.setattr(LayerExchange, "ask", asked)
    with contextlib.ExitStack() as stack:
        rotating = Rotating(stack, model, replicas, 1, fuses=False, local_pool=200)
        until(rotating.all_connected)
        (prompt, *_), sampling = PROMPTS, SAMPLINGS["greedy"]
        assert rotating.rig.generate([prompt], **sampling) == expected["greedy"][:1]
        decoded = early[-3 * 4 :]  # four steps of three layers
    first = [True, True, True] if replicas == 1 else [True, False, False]
    assert decoded == list(zip(range(3), first, strict=True)) * 4


EVERY = [
    (replicas, lanes, count, shard)
    for replicas in (2, 3)
    for lanes in range(1, replicas + 2)
    for count in (1, 2)
    for shard in ("heads", "sequence", "heads+sequence")
]


@pytest.mark.soak
@pytest.mark.parametrize(("replicas", "lanes", "count", "shard"), EVERY)
def test_one_text_in_every_way(model, expected, replicas, lanes, count, shard):
    check_one_text(model, expected, replicas, lanes, count, shard)


def check_one_text(model, expected, replicas, lanes, count, shard, fuses=True):
    with contextlib.ExitStack() as stack:
        rotating = Rotating(
            stack, model, replicas, count, lanes=lanes, shard=shard, fuses=fuses, max_batch_tokens=32, local_pool=200
        )
        until(rotating.all_connected)
        for name, sampling in SAMPLINGS.items():
            assert rotating.rig.generate(PROMPTS, **sampling) == expected[name], name
        slices = rotating.workers.slices
        assert set(slices) == set(range(replicas))
        assert all(count > 20 for count in slices.values())
        assert max(slices.values()) < 1.5 * min(slices.values())


def test_each_replica_asks_the_attention_workers_itself(model) -> None:
    """What crosses each channel: announcements on the first alone, queries and keys on all of them alike."""
    with contextlib.ExitStack() as stack:
        rotating = Rotating(stack, model, 3, 2, lanes=2)
        until(rotating.all_connected)
        rotating.rig.generate(PROMPTS, max_tokens=24)
        slices = rotating.workers.slices
        for server in rotating.servers:
            traffic = [session.traffic for session in server._leases._sessions.values()]
            assert len(traffic) == 3
            assert max(t.bytes_out for t in traffic) < 3 * min(t.bytes_out for t in traffic)
            assert server.status().queries > 0
        assert max(slices.values()) < 1.5 * min(slices.values())


@pytest.mark.parametrize("lanes", [1, 3])
def test_a_replica_that_goes_takes_nothing_along(model, expected, lanes) -> None:
    """Its channel breaks in the midst of batches, twice; the others go on, it comes back, nothing is computed again."""
    with contextlib.ExitStack() as stack:
        rotating = Rotating(stack, model, 2, 2, lanes=lanes)
        rig, workers = rotating.rig, rotating.workers
        until(rotating.all_connected)
        for _ in range(2):
            inboxes = [rig.submit(prompt, SamplingParams(max_tokens=12).with_defaults({})) for prompt in PROMPTS]
            until(lambda: workers.slices[1] > 8, 60.0)
            rotating.peers[0].close("killed")
            assert [collect(inbox) for _, inbox in inboxes] == expected["greedy"]
            assert workers.replicas == 1
            until(lambda: all(server.status().channels == 1 for server in rotating.servers), 60.0)
            rotating.peers = [rotating.replica(1, rotating.holder)]
            rig.engine.rank_back(rotating.peers[0])
            until(rotating.all_connected)
            workers.slices[1] = 0
            assert rig.generate(PROMPTS, max_tokens=12) == expected["greedy"]
            assert workers.slices[1] > 12
            workers.slices[1] = 0
        assert rig.scheduler.counters.rebuilt_tokens == 0
        assert rig.scheduler.counters.preempted == 0


def test_a_replica_that_stays_away_is_not_missed(model, expected) -> None:
    with contextlib.ExitStack() as stack:
        rotating = Rotating(stack, model, 2, 1, lanes=2)
        rotating.peers[0].close("killed")
        rotating.rig.engine.rank_gone(1, "killed", stays=True)
        assert rotating.rig.generate(PROMPTS, max_tokens=12) == expected["greedy"]
        assert rotating.workers.slices == {0: 0, 1: 0}


def test_a_replica_that_cannot_reach_an_attention_worker_is_left_out_and_tries_again(model, expected) -> None:
    """One replica's channel breaks, and nobody else's: no holder is lost, and the channel is made anew."""
    with contextlib.ExitStack() as stack:
        rotating = Rotating(stack, model, 3, 1, lanes=2)
        rig, workers, (server,) = rotating.rig, rotating.workers, rotating.servers
        until(rotating.all_connected)
        inboxes = [rig.submit(prompt, SamplingParams(max_tokens=12).with_defaults({})) for prompt in PROMPTS]
        until(lambda: workers.slices[2] > 8)
        session = list(server._leases._sessions.values())[-1]
        server._leases.end(session, "a test")
        assert [collect(inbox) for _, inbox in inboxes] == expected["greedy"]
        until(rotating.all_connected)
        assert rig.generate(PROMPTS, max_tokens=12) == expected["greedy"]
        assert rig.scheduler.counters.rebuilt_tokens == 0
        before = dict(workers.slices)
        rig.generate(PROMPTS, max_tokens=12)
        assert all(workers.slices[rank] > before[rank] + 10 for rank in range(3))


def test_a_replica_does_not_take_a_seat_that_model_worker_0_has_left(model) -> None:
    """It asked there for a batch that the worker had never seen, and the worker was blamed."""
    with contextlib.ExitStack() as stack:
        rotating = Rotating(stack, model, 2, 1, lanes=2)
        until(rotating.all_connected)
        server = AttentionServer(ServerConfig("left", rotating.servers[0].config.kv_memory))
        address = server.start()
        stack.callback(server.stop, 0.0)
        (peer,) = rotating.peers
        peer.answer(peer_messages.Joined, 10.0)  # to the rig's own, which nobody has read yet
        said = peer.ask(peer_messages.Join(7, "left", address), peer_messages.Joined, 10.0)
        assert isinstance(said, peer_messages.Failed)
        assert "model worker 0 has no place at attention worker left" in said.reason
        until(lambda: server.status().seats == 0)


@pytest.mark.fault("F15")
@pytest.mark.parametrize("stops", [True, False])
def test_replicas_leave_the_kv_to_the_next_engine_unless_they_are_told_to_stop(model, stops) -> None:
    with contextlib.ExitStack() as stack:
        rotating = Rotating(stack, model, 2, 1, lanes=2)
        until(rotating.all_connected)
        (server,), (peer,) = rotating.servers, rotating.peers
        (seat,) = server._leases._seats.values()
        seat.linger = 60.0
        server._leases.end(next(iter(seat.sessions.values())), "the engine was killed")
        if stops:
            peer.tell(peer_messages.Stop())
        else:
            peer.close("killed")
        rotating.threads[0].join(30.0)
        until(lambda: server.status().channels == 0)
        assert server.status().lingering == (0 if stops else 1)


def test_a_fault_at_a_replica_runs_the_batch_again(model, expected, monkeypatch) -> None:
    """An attention worker cannot answer one query: whoever asked says so, and the text is the same."""
    with contextlib.ExitStack() as stack:
        rotating = Rotating(stack, model, 2, 1, lanes=1)
        until(rotating.all_connected)
        handle, left = AttentionWorker.handle, [6, 13, 22]

        def fails(self: AttentionWorker, request: Any) -> Any:
            if isinstance(request, Exchange):
                left[:] = [n - 1 for n in left]
                if 0 in left:
                    raise ProtocolError("a test wants it")
            return handle(self, request)

        monkeypatch.setattr(AttentionWorker, "handle", fails)
        # so that each layer is handled
        monkeypatch.setattr(AttentionWorker, "layer_work", lambda self, batch, pool: None)
        assert rotating.rig.generate(PROMPTS, max_tokens=12) == expected["greedy"]
        assert max(left) < 0
        assert rotating.rig.engine._stats.failed_batches == 3
        assert rotating.workers.replicas == 2


# Replicas that are processes.


@contextlib.contextmanager
def processes(model: Path, **options: Any) -> Iterator[LLM]:
    common: dict[str, Any] = {
        "dtype": "float32", "threads": 1, "page_size": 16, "kv_memory": "4MiB", "max_batch_tokens": 32,
    }  # fmt: skip
    with LLM(model, **{**common, **options}) as llm:
        yield llm


def replicated(model: Path, replicas: int = 2, **options: Any) -> Any:
    common = {"attention_workers": 1, "model_workers": replicas, "model_parallel": "replicas"}
    return processes(model, **{**common, **options})


def connected(llm: LLM, replicas: int) -> bool:
    """Whether all replicas are there and have a channel to every attention worker."""
    replies = llm._runtime.engine._worker._worker._replies.values()
    remote = [reply.port for reply in replies if isinstance(reply.port, RemoteAttention)]
    return bool(remote) and all(port.status().channels == replicas for port in remote)


def replica_processes(llm: LLM) -> list[int]:
    return [
        s.process for s in llm._runtime.pools.models._processes.status() if s.state == "up" and s.process is not None
    ]


@pytest.fixture(scope="module")
def told(model) -> list[Any]:
    with processes(model) as llm:
        return [answers(llm, sampling) for sampling in TOLD]


TOLD: list[dict[str, Any]] = [
    {"temperature": 0, "logprobs": 3},
    {"temperature": 0.8, "seed": 5, "presence_penalty": 0.7, "repetition_penalty": 1.1, "n": 2},
    {"temperature": 0.8, "seed": 6, "min_p": 0.01, "stop_token_ids": [7, 8], "min_tokens": 9, "top_k": 20},
]


class LogProbability(float):
    """Equal up to rounding, which depends on how the parts of attention are merged, and by which CPU."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, float) and abs(float(self) - float(other)) < 1e-3

    __hash__ = float.__hash__


def answers(llm: LLM, sampling: dict[str, Any]) -> list[Any]:
    got = llm.generate(PROMPTS, max_tokens=16, **sampling)
    return [
        (c.token_ids, c.text, [(r.token_id, LogProbability(r.logprob)) for r in c.logprobs or ()])
        for c in itertools.chain.from_iterable([one] if not isinstance(one, list) else one for one in got)
    ]


@pytest.mark.real
@pytest.mark.parametrize(
    ("replicas", "options"),
    [
        pytest.param(2, {"lanes": 3, "attention_workers": 2}, marks=pytest.mark.soak),
        (3, {"lanes": "auto", "shard": "sequence"}),
        pytest.param(2, {"lanes": 2, "local_channel": False}, marks=pytest.mark.soak),
        (2, {"lanes": 2, "local_channel": False, "data_channel": "tcp"}),
    ],
)
def test_processes_give_one_text(model, told, replicas, options) -> None:
    with replicated(model, replicas, **options) as llm:
        until(lambda: connected(llm, replicas))
        assert [answers(llm, sampling) for sampling in TOLD] == told
        slices = llm._runtime.engine._worker.slices
        assert min(slices.values()) > 30
        assert len(slices) == replicas


@pytest.mark.real
@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.soak) for n in (1, 2, 3))])
def test_killed_replicas_cost_no_token(model, seed) -> None:
    """SIGKILL at random steps, of replicas and once of an attention worker: every stream goes on, with the same text,
    and what is computed again is what the attention worker took along."""
    chance = random.Random(seed)
    prompts = [[chance.randrange(101) for _ in range(chance.randrange(2, 120))] for _ in range(6)]
    with processes(model) as llm:
        expected = [c.token_ids for c in llm.generate(prompts, max_tokens=250, temperature=0, ignore_eos=True)]
    workers = 1 + seed % 2
    with replicated(model, 2 + seed % 2, lanes=2 + seed % 2, attention_workers=workers) as llm:
        until(lambda: connected(llm, 2 + seed % 2), 60)
        engine = llm._runtime.engine
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(llm.generate, prompts, max_tokens=250, temperature=0, ignore_eos=True)
            for _ in range(3):
                before = engine._stats.generation_tokens + chance.randrange(20, 200)
                until(lambda at=before: engine._stats.generation_tokens > at or running.done(), 60)
                if up := replica_processes(llm):
                    os.kill(chance.choice(up), signal.SIGKILL)
            got = [c.token_ids for c in running.result(100)]
        assert got == expected
        assert engine._scheduler.counters.rebuilt_tokens == 0
        until(lambda: connected(llm, 2 + seed % 2), 60)
        slices = dict(engine._worker.slices)
        assert [c.token_ids for c in llm.generate(prompts[:2], max_tokens=40, temperature=0, ignore_eos=True)] == [
            tokens[:40] for tokens in expected[:2]
        ]
        assert all(engine._worker.slices[rank] > slices[rank] for rank in slices)


@pytest.mark.real
@pytest.mark.fault("F04")
def test_a_replica_that_stands_still_in_the_midst_of_a_slice_holds_nobody_up(model, monkeypatch) -> None:
    """The engine's thread waited for room in the socket for as long as the replica was stopped."""
    monkeypatch.setattr(sockets, "BUFFER", 1)  # the least that the system gives
    monkeypatch.setattr(sockets, "_LINUX", False)
    prompts = [[n, 5, 9] for n in range(24)]
    with processes(model) as llm:
        expected = [c.token_ids for c in llm.generate(prompts, max_tokens=200, temperature=0, ignore_eos=True)]
    with replicated(model, 2, lanes=2, max_batch_tokens=64, worker_timeout=2.0) as llm:
        until(lambda: connected(llm, 2), 60)
        engine = llm._runtime.engine
        (peer,) = (replica.peer for replica in engine._worker._replicas.values())
        tell, stopped, paused, why = peer.tell, list[int](), list[float](), list[str]()

        def stops(command: Any, timeout: float = 60.0) -> None:
            if isinstance(command, peer_messages.Slice) and engine._stats.generation_tokens > 400 and not stopped:
                stopped.extend(replica_processes(llm))
                os.kill(stopped[0], signal.SIGSTOP)
                until(lambda: "T" in Path(f"/proc/{stopped[0]}/stat").read_text().rpartition(")")[2].split()[0])
                paused.append(time.monotonic())
            try:
                tell(command, timeout)
            except RankLost as error:
                paused.append(time.monotonic())
                why.append(str(error))
                raise

        peer.tell = stops
        got = llm.generate(prompts, max_tokens=200, temperature=0, ignore_eos=True)
        assert [c.token_ids for c in got] == expected
        assert "no heartbeat for 2 s" in why[0]
        began, noticed, *_ = paused
        assert noticed - began < 10  # and not as long as a slice may take
        until(lambda: connected(llm, 2), 60)  # another process has taken its place


# What cannot be.


def test_what_replicas_cannot_do_is_refused(model) -> None:
    with pytest.raises(InvalidRequest, match='lanes is 4 with 2 replicas; allowed are 1 to 3, or "auto"'):
        EngineConfig(model_workers=2, model_parallel="replicas", lanes=4)
    with pytest.raises(InvalidRequest, match='lanes is 9; allowed are 1 to 8, or "auto"'):
        EngineConfig(model_parallel="replicas", lanes=9)
    with pytest.raises(InvalidRequest, match=r"local_share is 0.5 with 2 replicas.*allowed are 0 and"):
        EngineConfig(model_workers=2, model_parallel="replicas", local_share=0.5)
    with pytest.raises(InvalidRequest, match="model_workers is 2 replicas without attention_workers"):
        LLM(model, model_workers=2, model_parallel="replicas")
