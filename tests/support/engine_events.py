"""What may happen to an engine while it answers, wherever its KV lies and however its workers are reached. The answers
must be those of one process to which nothing happens."""

from __future__ import annotations

import contextlib
import functools
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
from engine_rig import BytesPort, Restless, Rig
from exchange_peers import Joints, exchanged
from real_workers import until
from running_streams import Streams, held
from tiny_decoders import CUT_BY_HEADS, ONE_HEAD, decoder_of

from lamina.sampling_params import SamplingParams
from lamina_workers.attention_worker.attention_worker import AttentionWorker
from lamina_workers.errors import KVError
from lamina_workers.model_worker.attention_merge import LayerExchange
from lamina_workers.model_worker.model_worker import ModelWorker
from lamina_workers.ports.port import AttentionPort, LocalAttention

_draw = random.Random(24)  # no choice of a token or expert of theirs is so near that rounding decides it
PROMPTS = [[_draw.randrange(97) for _ in range(n)] for n in (1, 40, 70, 150)]
SAMPLINGS: tuple[dict[str, Any], ...] = ({}, {"temperature": 0.9, "top_p": 0.9, "seed": 11})  # of one prompt, the next
TOKENS = 32
PLACEMENTS: dict[str, dict[str, Any]] = {
    "one holder, fused": {"lanes": 2},
    "one holder": {"shard": "heads"},
    "heads on three": {"shard": "heads", "weights": (2, 1, 1), "lanes": 2},
    "heads on two, prompts local": {"shard": "heads", "weights": (1, 1), "local_pool": 500},
    "ranges on three": {"shard": "sequence", "weights": (1, 1, 2)},
    "ranges on two, prompts local": {"shard": "sequence", "weights": (1, 2), "local_pool": 500, "lanes": 2},
    "heads and ranges": {"shard": "heads+sequence", "weights": (1, 1, 1, 2), "local_pool": 60, "lanes": 2},
}
# How workers are reached: whether compiled code or Python exchanges layers, and over which channel.
WORKERS: dict[str, tuple[str, str]] = {
    "in this process": ("compiled", ""),
    "bytes, q first": ("python", "bytes"),
    "local": ("compiled", "local"),
    "local, by Python": ("python", "local"),
    "tcp": ("compiled", "tcp"),
    "tcp with sums, by Python": ("python", "tcp+sum"),
    "tcp with TLS": ("compiled", "tcp+tls"),
    "grpc with TLS": ("compiled", "grpc+tls"),
}


class Stage:
    """An engine over workers of one kind. Its steps are announcements and layers, counted over all batches; actions
    `at` some of them run on the engine's thread, before the step."""

    def __init__(self, model: str, channel: str, options: dict[str, Any], seed: str) -> None:
        self.joints = Joints(channel) if channel not in ("", "bytes") else None
        self.model = model
        self.chance = random.Random(seed)
        self.at: dict[int, Callable[[], None]] = {}
        self.steps = 0
        self.dead: set[int] = set()
        self.struck = 0
        port: Callable[[AttentionWorker], AttentionPort]
        port = self.joints or {"": LocalAttention, "bytes": BytesPort}[channel]
        self.rig = Rig(decoder_of(model), port=port, max_batch_tokens=64, fuses=channel != "bytes", **options)

    @property
    def alive(self) -> list[int]:
        return [number for number in self.rig.ports if number not in self.dead]

    def step(self) -> None:
        self.steps += 1
        if self.steps in self.at:
            self.at.pop(self.steps)()
            self.struck += 1

    def kill(self) -> None:
        """One worker is gone, with all that it keeps. Where it was the last one, another joins."""
        if not self.alive:  # the next one has not come yet
            self.at[self.steps + 1] = self.kill
            self.struck -= 1
            return
        number = self.chance.choice(self.alive)
        self.dead.add(number)
        if self.joints is not None:
            self.joints.made[number - 1].kill()
        elif isinstance(self.rig.ports[number], BytesPort):
            self.rig.ports[number].close()
        else:
            self.rig.engine.leave(f"worker-{number}")
        if not self.alive:
            threading.Timer(0.05, self.rig.join).start()  # for a while there is none

    def fail(self) -> None:
        """The next message of one worker goes wrong there."""
        worker = self.rig.workers[self.chance.choice(self.alive)]
        handle = worker.handle

        def fails(request: Any) -> Any:
            worker.handle = handle  # type: ignore[method-assign]
            raise KVError("a fault of a test")

        worker.handle = fails  # type: ignore[method-assign]

    def stream(self) -> Streams:
        return Streams(self.rig, PROMPTS, TOKENS, 0, SAMPLINGS)

    def kept_pages(self, number: int) -> list[int]:
        return [pool.n_pages - pool.free_pages for pool in self.rig.workers[number].pools]

    def close(self) -> None:
        """End it. Every page must come back to the workers that the engine has."""
        rig = self.rig
        with held(rig):
            rig.scheduler.running.prefix_cache.clear()
        rig.generate([[1]], max_tokens=2)  # operations that waited go with it
        numbers = [number for number in rig.placement.holders if number not in self.dead]
        until(lambda: not any(any(self.kept_pages(number)) for number in numbers))
        self.end()
        rig.close()

    def end(self) -> None:
        self.rig.engine.close()
        if self.joints is not None:
            self.joints.close()


class Event:
    """Nothing happens."""

    options: ClassVar[dict[str, Any]] = {}

    def prepare(self, stage: Stage) -> None:
        """Before requests come."""

    def happen(self, stage: Stage, streams: Streams) -> None:
        """Once every request has a token."""

    def check(self, stage: Stage) -> None:
        """That it happened, once all requests have ended."""


class OthersLeave(Event):
    """Clients of further requests, of several samples each, go away: some at once, some after their first token."""

    def happen(self, stage: Stage, streams: Streams) -> None:
        params = SamplingParams(max_tokens=TOKENS, n=3, temperature=0.9, seed=5).with_defaults({"do_sample": True})
        for number, prompt in enumerate(PROMPTS):
            ticket, inbox = stage.rig.submit(prompt, params)
            if number % 2:
                inbox.get(timeout=60)
            stage.rig.engine.abort(ticket)


class Strikes(Event):
    """Something happens at steps that are drawn, one from each of the ranges."""

    def __init__(self, action: Callable[[Stage], None], *ranges: range) -> None:
        self._action, self._ranges = action, ranges

    def prepare(self, stage: Stage) -> None:
        for steps in self._ranges:
            stage.at[stage.chance.choice([step for step in steps if step not in stage.at])] = functools.partial(
                self._action, stage
            )

    def check(self, stage: Stage) -> None:
        assert stage.struck == len(self._ranges)


class Faults(Strikes):
    """Batches that fail run again."""

    def check(self, stage: Stage) -> None:
        super().check(stage)
        assert stage.rig.engine._stats.failed_batches > 0
        assert stage.rig.scheduler.counters.rebuilt_tokens == 0


class Drained(Event):
    """A worker goes, and hands over all that it has."""

    def happen(self, stage: Stage, streams: Streams) -> None:
        if len(stage.alive) == 1:
            stage.rig.join()
        while not (keeping := [number for number in stage.alive if any(stage.kept_pages(number))]):
            stage.stream().read(1)  # on a busy machine the texts have ended
        number = keeping[0]
        assert stage.rig.engine.drain(f"worker-{number}").result(timeout=60) > 0
        assert not any(stage.kept_pages(number))
        stage.dead.add(number)
        self._counters = stage.rig.workers[number].counters
        self._queries = self._counters.queries

    def check(self, stage: Stage) -> None:
        assert self._counters.queries == self._queries
        counters = stage.rig.scheduler.counters
        assert (counters.preempted, counters.rebuilt_tokens) == (0, 0)


class Joins(Event):
    """One worker more, which takes part from then on."""

    def happen(self, stage: Stage, streams: Streams) -> None:
        with held(stage.rig):
            self._number = stage.rig.join()

    def check(self, stage: Stage) -> None:
        again = stage.stream()
        assert again.tokens() == expected(stage.model)
        assert stage.rig.workers[self._number].counters.queries > 0 or stage.model in ONE_HEAD


class Cached(Event):
    """The same prompts come again, and their KV is found."""

    options: ClassVar[dict[str, Any]] = {"prefix_cache": True}

    def check(self, stage: Stage) -> None:
        assert stage.stream().tokens() == expected(stage.model)
        assert stage.rig.scheduler.counters.reused_tokens > 100


class Moves(Cached):
    """Sequences move between the local tier and the workers."""

    options: ClassVar[dict[str, Any]] = {"prefix_cache": True, "local_pool": 1000, "local_tier": True}

    def check(self, stage: Stage) -> None:
        super().check(stage)
        assert stage.rig.engine._tiering._migration.sequences > 0
        assert stage.rig.scheduler.counters.preempted == 0


EVENTS: dict[str, Event] = {
    "others leave": OthersLeave(),
    "the same prompts again": Cached(),
    "a worker dies while prompts are read": Strikes(Stage.kill, range(1, 18)),
    "a worker dies in decode": Strikes(Stage.kill, range(24, 100)),
    "two workers die": Strikes(Stage.kill, range(40, 80), range(40, 80)),
    "batches fail": Faults(Stage.fail, range(1, 18), range(24, 80), range(84, 100)),
    "a worker is drained": Drained(),
    "a worker joins": Joins(),
    "sequences move": Moves(),
}


@functools.cache
def expected(model: str) -> list[list[int]]:
    """The texts of one process, by Python."""
    with exchanged("python"):
        rig = Rig(decoder_of(model))
        texts = Streams(rig, PROMPTS, TOKENS, 0, SAMPLINGS).tokens()
        rig.close()
    return texts


@contextlib.contextmanager
def staged(model: str, placement: str, workers: str, event: Event) -> Iterator[Stage]:
    way, channel = WORKERS[workers]
    options = PLACEMENTS[placement] | event.options
    if "local_pool" in options:
        options = {"shard": "heads"} | options  # beside a local pool no worker fuses
    if model in CUT_BY_HEADS and "shard" in options:
        options["shard"] = "heads"
    if event.options.get("local_tier"):
        options["tuner"] = Restless(len(workers), 0.5, lanes=options.get("lanes", 1))
    with exchanged(way), pytest.MonkeyPatch.context() as patch:
        stage = Stage(model, channel, options, f"{model} {placement} {workers}")
        begin, announce = LayerExchange.begin, ModelWorker.announce

        def begins(self: LayerExchange, *given: Any) -> None:
            stage.step()
            begin(self, *given)

        def announces(self: ModelWorker, *given: Any, **options: Any) -> Any:
            stage.step()
            return announce(self, *given, **options)

        patch.setattr(LayerExchange, "begin", begins)
        patch.setattr(ModelWorker, "announce", announces)
        try:
            yield stage
        except BaseException:
            stage.end()
            raise
        stage.close()
