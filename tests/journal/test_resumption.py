"""An engine dies at any moment and another goes on: no token is lost, and none comes twice.

In one process first, where every moment can be chosen; then with real processes.
"""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from engine_process import EngineProcess
from engine_rig import holder_config, tiny_decoder
from kv_pools import pool_of
from real_workers import until, worker_process, write_tiny_model
from small_grammars import EOS, GRAMMARS, VOCABULARY

from lamina import LLM
from lamina.client.remote import RemoteEngine
from lamina.engine.engine import Engine
from lamina.errors import EngineError, JournalError
from lamina.journal.journal import Facts, Journal
from lamina.journal.recorder import Recorder
from lamina.kv import relocation
from lamina.kv.placement import Holder, Placement
from lamina.kv.request import Request, SchedulerConfig
from lamina.launch.journal_setup import recover
from lamina.launch.kv_sizing import RequestPolicies, page_groups
from lamina.messages.engine_request import EngineOutput, EngineRequest
from lamina.sampling_params import SamplingParams
from lamina.scheduling.control_plane import ControlPlane
from lamina.scheduling.step_tuner import StepTuner
from lamina_protocols.messages.messages import Surveyed
from lamina_workers.attention_worker.attention_worker import AttentionWorker
from lamina_workers.decoder.model import Decoder
from lamina_workers.model_worker.model_worker import ModelWorker
from lamina_workers.ports.data_channel import ChannelOptions
from lamina_workers.ports.port import LocalAttention, survey

FACTS = Facts("tiny", 16, "float32", 3)
PAGES = 2000


class Killed(BaseException):
    """An exception that no part of an engine catches."""


class Fate:
    """Counts messages to holders and deliveries to clients, and kills at the chosen one."""

    def __init__(self, at: int | None = None) -> None:
        self.at = at
        self.seen = 0

    def step(self) -> None:
        if self.seen == self.at:
            raise Killed
        self.seen += 1


class Port(LocalAttention):
    """A port to a holder that outlives the engine."""

    channel_kind = "test"
    bytes_sent = bytes_received = 0

    def __init__(self, worker: AttentionWorker, address: str, fate: Fate) -> None:
        super().__init__(worker)
        self.name = self.address = address
        self._fate = fate

    def layer_work(self, batch: int, pool: int) -> None:
        """Each message of a layer is a moment too, so none is left to compiled code."""

    def send(self, request: Any) -> None:
        self._fate.step()
        super().send(request)


class World:
    """Holders that stay, and engines that follow each other."""

    def __init__(
        self, decoder: Decoder, folder: Path, *, shard: str = "heads", workers: int = 2, local_pool: int = 0,
        lanes: int = 1, prefix_cache: bool = False, max_batch_tokens: int = 64, pages: int = PAGES,
    ) -> None:  # fmt: skip
        self.decoder, self.folder = decoder, folder
        self.shard, self.local_pool, self.lanes = shard, local_pool, lanes
        self.pages = pages
        self.holder = holder_config(decoder, pages, 16)
        self.workers = {f"host:{at}": AttentionWorker(self.holder) for at in range(workers)}
        self.limits = SchedulerConfig(
            max_batch_tokens=max_batch_tokens, max_sequences=64, max_model_len=2048, page_size=16,
            page_groups=page_groups(self.holder), prefix_cache=prefix_cache,
            of_policy=RequestPolicies(self.holder, partial(page_groups, self.holder)),
        )  # fmt: skip
        self.lives = 0
        self._last: Life | None = None

    def life(self, fate: Fate) -> Life:
        """The next engine; the previous one is dead."""
        self.lives += 1
        if self._last is not None and self._last.journal._lock is not None:
            os.close(self._last.journal._lock)  # as the kernel does
        self._last = Life(self, fate)
        return self._last


class Life:
    """One engine, whose steps the test makes."""

    def __init__(self, world: World, fate: Fate) -> None:
        self.fate = Fate()  # nothing happens before it runs
        first = 1 + 10 * world.lives  # an engine's numbers for its holders are its own
        ports = {first + at: Port(worker, name, self.fate) for at, (name, worker) in enumerate(world.workers.items())}
        holders, surveys = {}, dict[int, Surveyed]()
        for number, port in ports.items():
            surveys[number] = survey(port)
            holders[number] = Holder((world.pages,), name=port.name)
            holders[number].keeps(surveys[number])
        everybody: dict[int, LocalAttention] = dict(ports)
        if world.local_pool:
            holders[0] = Holder((world.local_pool,), fused=True)
            everybody[0] = LocalAttention(AttentionWorker(holder_config(world.decoder, world.local_pool, 16)))
        placement = Placement(
            holders, heads=((world.decoder.config.num_key_value_heads,),), page_size=16, max_model_len=2048,
            shard=world.shard, local_pools=(0,) if world.local_pool else (),
        )  # fmt: skip
        control = ControlPlane(world.limits, placement, StepTuner((world.lanes,)))
        self.scheduler = control.scheduler
        worker = ModelWorker(world.decoder, world.holder, everybody)
        self.journal = Journal(world.folder, FACTS)
        recorder = Recorder(self.journal, placement, worker.address)
        self.engine = Engine(worker, control, time.monotonic, grammars=GRAMMARS, recorder=recorder)
        worker.begin_after(max(kept.last_epoch for kept in surveys.values()))
        self.unfinished = recover(self.journal, self.engine, recorder, worker, placement, surveys)
        self.fate.at = fate.at
        self._told = fate

    def until(self, done: Callable[[], bool]) -> None:
        """Run until then. Raises Killed where that comes first; what the engine had in memory is lost then."""
        try:
            while not done():
                self.engine._read_mail()
                self.engine.step()
                self.scheduler.check_integrity()
        finally:
            self._told.seen = self.fate.seen

    @property
    def computed(self) -> int:
        return self.engine._stats.batch_tokens


class Client:
    """Asks for several prompts, and keeps what it gets of each sample."""

    def __init__(self, asked: Mapping[str, tuple[list[int], dict[str, Any]]]) -> None:
        self.asked = dict(asked)
        self.params = {name: SamplingParams(**params).with_defaults({}) for name, (_, params) in asked.items()}
        self.got: dict[str, list[list[EngineOutput]]] = {
            name: [[] for _ in range(p.n)] for name, p in self.params.items()
        }
        self.fate: Fate | None = None

    def ticket(self, name: str, resumed: bool) -> EngineRequest:
        params = self.params[name]
        stops = frozenset(params.stop_token_ids)
        prompt = tuple(self.asked[name][0])
        request = Request(
            name, prompt, params.max_tokens, params.min_tokens, stops, params.n, policy=params.policy or "",
            scored_from=None if params.prompt_logprobs is None else 0,
        )  # fmt: skip
        ticket = EngineRequest(request, params, params.seed or 0, sink=self.take)
        if resumed:
            ticket.received = tuple(
                (tuple(o.token for o in got if o.token is not None), any(o.finish_reason for o in got))
                for got in self.got[name]
            )
        return ticket

    def take(self, ticket: EngineRequest, outputs: list[EngineOutput]) -> None:
        if self.fate is not None:
            self.fate.step()
        for output in outputs:
            if output.error is not None:
                raise AssertionError(output.error)
            got = self.got[ticket.request.id][output.sample]
            assert not any(before.finish_reason for before in got)
            got.append(output)

    @property
    def open(self) -> list[str]:
        return [n for n, samples in self.got.items() if not all(any(o.finish_reason for o in s) for s in samples)]

    def submit(self, life: Life, resumed: bool) -> None:
        self.fate = life.fate
        for name in self.open:
            life.engine.submit(self.ticket(name, resumed))

    def run(self, life: Life, resumed: bool = False) -> None:
        self.submit(life, resumed)
        life.until(lambda: not self.open)

    def texts(self) -> dict[str, Any]:
        return {
            name: [([o.token for o in s if o.token is not None], s[-1].finish_reason) for s in samples]
            for name, samples in self.got.items()
        }

    def reports(self) -> list[float]:
        return [o.logprobs.chosen for samples in self.got.values() for s in samples for o in s if o.logprobs]

    def scores(self) -> list[float]:
        """The log probabilities of prompts' tokens, of which each has come at least once."""
        found: list[float] = []
        for name, samples in self.got.items():
            scores = [output.scores for output in samples[0] if output.scores is not None]
            places = {each.start + at: report.chosen for each in scores for at, report in enumerate(each.logprobs)}
            assert sorted(places) == list(range(len(places)))
            assert len(places) == (len(self.asked[name][0]) - 1 if "prompt_logprobs" in self.asked[name][1] else 0)
            found += [places[at] for at in sorted(places)]
        return found


rng = random.Random(7)
LONG = [rng.randrange(4, 100) for _ in range(150)]
ASKED: dict[str, tuple[list[int], dict[str, Any]]] = {
    "greedy": ([5, 6, 7], {"max_tokens": 12}),
    "long": (LONG, {"max_tokens": 9, "logprobs": 2, "stop_token_ids": (3,)}),
    "three": (LONG[:40], {"max_tokens": 10, "n": 3, "temperature": 1.0, "seed": 11, "logprobs": 1}),
    "penalties": (LONG[:20], {"max_tokens": 14, "repetition_penalty": 1.3, "frequency_penalty": 0.7, "logprobs": 0}),
    "random": (LONG[7:31], {"max_tokens": 11, "temperature": 0.9, "top_p": 0.9, "seed": 3, "min_tokens": 4}),
    "window": (LONG, {"max_tokens": 9, "policy": "streaming(sink=4, recent=40)", "logprobs": 0}),
    "scored": (LONG[:100], {"max_tokens": 0, "prompt_logprobs": 1}),
    "scored, then more": (LONG[20:90], {"max_tokens": 6, "n": 2, "prompt_logprobs": 0}),
    "held": (
        LONG[:10],
        {"max_tokens": 16, "regex": "[ab]{5,9}", "temperature": 1.0, "seed": 5, "stop_token_ids": (EOS,)},
    ),
}
WORLDS: dict[str, dict[str, Any]] = {
    "heads": {},
    "ranges, prompts local": {"shard": "sequence", "local_pool": 500},
    "lanes, heads and ranges": {"shard": "heads+sequence", "workers": 4, "lanes": 3, "local_pool": 60},
    "prefixes": {"prefix_cache": True},
}


@pytest.fixture(scope="module", params=["full", "windowed"])
def model(request: pytest.FixtureRequest) -> Decoder:
    if request.param == "full":
        return tiny_decoder(vocab_size=VOCABULARY)
    return tiny_decoder(
        vocab_size=VOCABULARY,
        architectures=["Qwen3ForCausalLM"],
        model_type="qwen3",
        use_sliding_window=True,
        sliding_window=21,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    )


@pytest.fixture(scope="module")
def expected(model: Decoder, tmp_path_factory: pytest.TempPathFactory) -> Client:
    client = Client(ASKED)
    client.run(World(model, tmp_path_factory.mktemp("journal")).life(Fate()))
    return client


def same(client: Client, expected: Client) -> None:
    assert client.texts() == expected.texts()
    assert client.reports() == pytest.approx(expected.reports(), abs=1e-4)
    assert client.scores() == pytest.approx(expected.scores(), abs=1e-4)


def steps(model: Decoder, folder: Path, **options: Any) -> int:
    """How many moments a whole run has."""
    fate = Fate()
    Client(ASKED).run(World(model, folder, **options).life(fate))
    return fate.seen


@pytest.mark.fault("F15")
@pytest.mark.parametrize("times", [1, pytest.param(12, marks=pytest.mark.soak)])
@pytest.mark.parametrize("name", WORLDS)
def test_tokens_stay_the_same_when_an_engine_dies_at_any_moment(
    name: str, times: int, model: Decoder, expected: Client, tmp_path: Path
) -> None:
    total = steps(model, tmp_path / "whole", **WORLDS[name])
    moments = random.Random(f"{name} {times}")
    for number in range(times):
        world, client = World(model, tmp_path / str(number), **WORLDS[name]), Client(ASKED)
        with pytest.raises(Killed):
            client.run(world.life(Fate(moments.randrange(total))))
        with contextlib.suppress(Killed):  # and once more, soon after, unless it is done by then
            client.run(world.life(Fate(moments.randrange(total // 20))), resumed=True)
        client.run(world.life(Fate()), resumed=True)
        same(client, expected)


def test_engine_finishes_recovered_requests_before_a_client_returns(
    model: Decoder, expected: Client, tmp_path: Path
) -> None:
    world, client = World(model, tmp_path, local_pool=500), Client(ASKED)
    with pytest.raises(Killed):
        client.run(world.life(Fate(steps(model, tmp_path / "whole", local_pool=500) // 2)))
    life = world.life(Fate())
    assert [ticket.request.id for ticket in life.unfinished] == client.open
    life.until(lambda: not life.engine._registry.requests)
    client.run(life, resumed=True)  # all of it is in the journal by now
    same(client, expected)


def test_kv_that_holders_kept_is_not_computed_again(model: Decoder, tmp_path: Path) -> None:
    world, client = World(model, tmp_path, max_batch_tokens=512), Client({"a": (LONG, {"max_tokens": 20})})
    client.submit(first := world.life(Fate()), resumed=False)
    first.until(lambda: len(client.got["a"][0]) == 5)
    second = world.life(Fate())
    client.run(second, resumed=True)
    assert second.computed == 15
    assert all(pool_of(worker).store.free_pages < PAGES for worker in world.workers.values())
    third = world.life(Fate())
    assert third.unfinished == ()
    client = Client({"b": ([1], {"max_tokens": 2})})
    client.run(third)  # what was left over is closed with the first batch
    third.until(lambda: not third.engine._control.has_work)
    assert all(pool_of(worker).store.free_pages == PAGES for worker in world.workers.values())


def test_kv_stays_when_an_engine_dies_around_a_join(
    model: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where sequences grow from now on is in the journal with the next batch. Until then a part may have been ended
    that the journal believes to be open."""
    monkeypatch.setattr(relocation, "MIN_GROWTH", 1)
    asked = {"long": (LONG, {"max_tokens": 30, "logprobs": 0}), "short": (LONG[:20], {"max_tokens": 30, "n": 2})}
    Client(asked).run(World(model, tmp_path / "alone", workers=1).life(Fate()), resumed=False)

    def joined(folder: str, fate: Fate, after: int | None = None) -> tuple[World, Client, Life, int]:
        world, client = World(model, tmp_path / folder, workers=1), Client(asked)
        client.submit(life := world.life(fate), resumed=False)
        life.until(lambda: len(client.got["long"][0]) == 3)
        before = fate.seen
        life.fate.at = None if after is None else before + after
        world.workers["host:new"] = AttentionWorker(world.holder)
        life.engine.join(Port(world.workers["host:new"], "host:new", life.fate), Holder((world.pages,)))
        with contextlib.suppress(Killed):
            life.until(lambda: not client.open if after is None else False)
        return world, client, life, fate.seen - before

    _, whole, _, _ = joined("whole", Fate())
    for after in (0, 1, 2, 3, 9, 20, 40, 100):
        world, client, _, _ = joined(str(after), Fate(), after)
        life = world.life(Fate())
        client.run(life, resumed=True)
        same(client, whole)
        assert life.computed < 100  # no prompt again
        life.until(lambda life=life: not life.engine._control.has_work)  # type: ignore[misc]
        assert all(pool_of(worker).store.free_pages == PAGES for worker in world.workers.values())


def test_engine_believes_a_client_that_has_more_tokens_than_the_journal(
    model: Decoder, expected: Client, tmp_path: Path
) -> None:
    """The journal was off for a while, because the disk was full."""
    world, client = World(model, tmp_path), Client(ASKED)
    client.submit(life := world.life(Fate()), resumed=False)
    life.until(lambda: len(client.got["long"][0]) == 2)
    copy = (tmp_path / "journal").read_bytes()
    os.close(life.journal._file or 0)
    again = Client(ASKED)
    again.got = {name: [list(sample) for sample in samples] for name, samples in expected.got.items()}
    for name in ("long", "penalties", "random", "held"):
        again.got[name] = [[o for o in sample if not o.finish_reason][:4] for sample in again.got[name]]
    (tmp_path / "journal").write_bytes(copy)
    again.run(world.life(Fate()), resumed=True)
    same(again, expected)


def test_requests_without_a_client_end_and_free_their_kv(model: Decoder, tmp_path: Path) -> None:
    world, client = World(model, tmp_path), Client(ASKED)
    client.submit(first := world.life(Fate()), resumed=False)
    first.until(lambda: len(client.got["greedy"][0]) == 3)
    life = world.life(Fate())
    wanted = Client({"greedy": ASKED["greedy"]})
    wanted.got["greedy"] = client.got["greedy"]
    wanted.submit(life, resumed=True)
    life.engine.disclaim()
    life.until(lambda: not wanted.open and not life.engine._control.has_work)
    assert all(pool_of(worker).store.free_pages == PAGES for worker in world.workers.values())
    assert world.life(Fate()).unfinished == ()


def test_samples_without_a_token_share_their_prompt_after_a_restart(model: Decoder, tmp_path: Path) -> None:
    asked = {"a": (LONG, {"max_tokens": 4, "n": 3, "temperature": 1.0, "seed": 3})}
    wanted = Client(asked)
    wanted.run(World(model, tmp_path / "whole").life(Fate()))
    world, client = World(model, tmp_path), Client(asked)
    client.submit(first := world.life(Fate()), resumed=False)
    first.until(lambda: first.computed >= 128)  # two of its three chunks
    second = world.life(Fate())
    client.run(second, resumed=True)
    same(client, wanted)
    assert second.computed <= len(LONG) - 128 + 3 * 4


def test_request_is_refused_when_all_its_samples_have_ended(model: Decoder, tmp_path: Path) -> None:
    life, client = World(model, tmp_path).life(Fate()), Client({"a": ([1], {"max_tokens": 4})})
    ticket = client.ticket("a", resumed=False)
    told: list[EngineOutput] = []
    ticket.received, ticket.sink = (((1, 2), True),), lambda _, outputs: told.extend(outputs)
    life.engine.submit(ticket)
    life.engine.close()
    life.engine.run()
    assert "no sample that has not ended" in str(told[0].error)


def test_engine_leaves_nothing_unfinished_when_it_is_closed(model: Decoder, tmp_path: Path) -> None:
    world = World(model, tmp_path)
    life = world.life(Fate())
    tickets = Client(ASKED)
    told: list[EngineOutput] = []
    ticket = tickets.ticket("long", resumed=False)
    ticket.sink = lambda _, outputs: told.extend(outputs)
    life.engine.submit(ticket)
    life.engine.close()
    life.engine.run()
    assert told[-1].error is not None
    assert world.life(Fate()).unfinished == ()


# Real processes.


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


class Streams(Client):
    """The same client, for an engine in another process."""

    def ask(self, remote: RemoteEngine) -> None:
        for name in self.asked:
            remote.submit(self.ticket(name, resumed=False))

    def wait(self, done: Callable[[], bool]) -> None:
        until(done, 100.0)

    @property
    def tokens(self) -> int:
        return sum(len(sample) for samples in self.got.values() for sample in samples)


def real(asked: dict[str, tuple[list[int], dict[str, Any]]]) -> dict[str, tuple[list[int], dict[str, Any]]]:
    """What the tiny model on disk can do: no text of its tokenizer ends by itself. Longer, so that there is time."""
    longer = {
        name: (prompt, params | {"max_tokens": 150}) for name, (prompt, params) in asked.items() if name != "held"
    }
    return longer | {"reading": ([n % 90 for n in range(1500)], {"max_tokens": 60, "logprobs": 1})}


@pytest.mark.real
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("options", "seed"),
    [
        ({}, 1),
        *(
            pytest.param(options, seed, marks=pytest.mark.soak)
            for options in ({}, {"shard": "sequence"}, {"lanes": 2, "prefix_cache": False})
            for seed in (1, 2)
            if options or seed == 2
        ),
    ],
)
def test_next_engine_process_goes_on_after_a_kill(
    tiny: Path, options: dict[str, Any], seed: int, tmp_path: Path
) -> None:
    asked = real(ASKED)
    chance = random.Random(f"{seed} {options}")
    with worker_process() as one, worker_process() as two:
        settings = {
            "attention_workers": [one.address, two.address], "local_share": 0, "dtype": "float32", "threads": 1,
            "max_batch_tokens": 128, "max_model_len": 2048, **options,
        }  # fmt: skip
        whole, wanted = EngineProcess(tmp_path, tiny, **settings), Streams(asked)
        wanted.ask(whole.start())
        wanted.wait(lambda: not wanted.open)
        whole.kill()
        folder = tmp_path / "journal"
        folder.mkdir()
        engine, client = EngineProcess(folder, tiny, journal=str(folder), **settings), Streams(asked)
        client.ask(engine.start())
        time.sleep(chance.uniform(0, 0.15))  # the long prompt is being read
        for _ in range(3):
            engine.kill()
            had = client.tokens
            engine.start()
            client.wait(lambda had=had: client.tokens > had or not client.open)  # type: ignore[misc]
            time.sleep(chance.uniform(0, 0.3))
        client.wait(lambda: not client.open)
        same(client, wanted)
        until(lambda: one.status().seats == 1, 5)
        engine.kill()


@pytest.mark.real
@pytest.mark.timeout(400)
def test_next_llm_resumes_what_a_killed_program_left(tiny: Path, tmp_path: Path) -> None:
    """In one process: an `LLM` finishes the requests that the previous one left open, from where they were."""
    code = """
import os, sys, threading
from lamina import LLM
llm = LLM(sys.argv[1], attention_workers=[sys.argv[2]], journal=sys.argv[3], local_share=0, dtype="float32", threads=1)
prompts = [[1, 2, 3], list(range(60))]
seen = 0
for event in llm.stream(prompts, max_tokens=400, ignore_eos=True, temperature=0.0):
    seen += 1
    if seen == 60:
        os.kill(os.getpid(), 9)
"""
    with worker_process() as worker:
        program = [sys.executable, "-c", code, str(tiny), worker.address, str(tmp_path)]
        assert subprocess.run(program, timeout=100, check=False).returncode == -9
        settings = {"attention_workers": [worker.address], "local_share": 0, "dtype": "float32", "threads": 1}
        with LLM(tiny, journal=tmp_path, **settings) as llm:
            assert llm.unfinished == 2
            found = llm.resume()
            assert llm.unfinished == 0
            assert llm.resume() == []
            batches = llm._runtime.engine._stats.batch_tokens  # type: ignore[union-attr]
            assert batches < 800  # the prompts are not read again
            expected = llm.generate([[1, 2, 3], list(range(60))], max_tokens=400, ignore_eos=True, temperature=0.0)
        assert isinstance(expected, list)
        assert [c.samples[0].token_ids for c in found] == [c.samples[0].token_ids for c in expected]
        with LLM(tiny, journal=tmp_path, **settings) as llm:
            assert llm.unfinished == 0


@pytest.mark.real
def test_second_engine_and_foreign_journal_are_refused(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with worker_process() as worker:
        settings = {"attention_workers": [worker.address], "local_share": 0, "dtype": "float32", "threads": 1}
        with LLM(tiny, journal=tmp_path / "a", **settings):
            with pytest.raises(JournalError, match="in use by process"):
                LLM(tiny, journal=tmp_path / "a", **settings)
            monkeypatch.setattr("lamina.launch.attention_pool.ChannelOptions", partial(ChannelOptions, timeout=2.0))
            with pytest.raises(EngineError, match=worker.address):
                LLM(tiny, journal=tmp_path / "b", **settings)
            monkeypatch.undo()
        other = write_tiny_model(tmp_path / "other", num_hidden_layers=2)
        with pytest.raises(JournalError, match="its model is"):
            LLM(other, journal=tmp_path / "a", **settings)
        with pytest.raises(JournalError, match="page_size is 32, this one's 16"):
            LLM(tiny, journal=tmp_path / "a", page_size=16, **settings)


def test_pages_that_samples_share_are_counted_once_after_recovery(model: Decoder, tmp_path: Path) -> None:
    asked = {"eight": (LONG, {"max_tokens": 12, "n": 8, "temperature": 1.0, "seed": 4})}
    whole, fate = Client(asked), Fate()
    whole.run(World(model, tmp_path / "whole", pages=200).life(fate))
    world, client = World(model, tmp_path / "killed", pages=200), Client(asked)
    with pytest.raises(Killed):
        client.run(world.life(Fate(fate.seen * 3 // 4)))
    life = world.life(Fate())
    client.run(life, resumed=True)
    same(client, whole)
    assert life.engine._scheduler.counters.preempted == 0


class Forgiving(Client):
    """A client that takes errors, too."""

    def __init__(self, asked: Mapping[str, tuple[list[int], dict[str, Any]]]) -> None:
        super().__init__(asked)
        self.errors: dict[str, str] = {}

    def take(self, ticket: EngineRequest, outputs: list[EngineOutput]) -> None:
        for output in outputs:
            if output.error is not None:
                self.errors[ticket.request.id] = str(output.error)
        super().take(ticket, [output for output in outputs if output.error is None])

    @property
    def open(self) -> list[str]:
        return [name for name in super().open if name not in self.errors]


@pytest.mark.fault("F15")
@pytest.mark.parametrize("at_first_token", [False, True])
def test_request_that_kills_engines_is_taken_up_twice_and_no_other_is_lost(
    at_first_token: bool, model: Decoder, expected: Client, tmp_path: Path
) -> None:
    """Each new engine took up the request of which the last one had died, and died of it too."""
    world = World(model, tmp_path, max_batch_tokens=512)
    client = Forgiving({**ASKED, "deadly": (LONG[:30], {"max_tokens": 20})})

    def next_life() -> Life:
        life = world.life(Fate())
        scheduled = life.engine._registry.scheduled

        def die(requests: Mapping[Any, EngineRequest]) -> None:
            deadly = [s for s, request in requests.items() if request.id == "deadly"]
            if any(at_first_token or len(sequence.tokens) > 33 for sequence in deadly):
                raise Killed
            scheduled(requests)

        life.engine._registry.scheduled = die  # type: ignore[method-assign]
        return life

    for deaths in range(3):
        with pytest.raises(Killed):
            client.run(next_life(), resumed=deaths > 0)
    client.run(next_life(), resumed=True)
    assert client.errors == {"deadly": "3 engines died with this request, the last of it alone"}
    del client.got["deadly"]
    same(client, expected)


@pytest.mark.fault("F15")
def test_two_engines_that_die_while_a_long_prompt_is_computed_are_not_counted_as_more(
    model: Decoder, tmp_path: Path
) -> None:
    """Each batch of a suspect's prompt counted as an engine that may die of it, so the next engine refused it."""
    asked = {"long": (LONG, {"max_tokens": 8})}
    whole, client = Client(asked), Forgiving(asked)
    whole.run(World(model, tmp_path / "whole").life(Fate()))
    world = World(model, tmp_path / "killed", max_batch_tokens=16)

    def life_of(batches: int) -> Life:
        life, seen = world.life(Fate()), list[object]()
        scheduled = life.engine._registry.scheduled

        def count(requests: Mapping[Any, EngineRequest]) -> None:
            seen.append(requests)
            if len(seen) == batches:
                raise Killed
            scheduled(requests)

        life.engine._registry.scheduled = count  # type: ignore[method-assign]
        return life

    for resumed, batches in enumerate((2, 5)):
        with pytest.raises(Killed):
            client.run(life_of(batches), resumed=resumed > 0)
    client.run(life_of(-1), resumed=True)
    assert client.errors == {}
    same(client, whole)
