"""A whole engine on one thread, with holders that die, stall and break at moments that a seed decides.

Everything is counted in messages at the ports, so that a seed gives the same run every time: no thread, no socket, no
time. Knows the engine by its public parts and by its inbox; knows nothing of which tokens are right.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from engine_rig import LOCAL, holder_config
from kv_pools import pool_of

from lamina.engine.batch import Batch
from lamina.engine.engine import Engine
from lamina.kv import redundancy
from lamina.kv.placement import Holder, Placement
from lamina.kv.request import Request as TokenRequest
from lamina.kv.request import SchedulerConfig
from lamina.launch.kv_sizing import page_groups
from lamina.messages.engine_request import EngineOutput, EngineRequest
from lamina.sampling_params import SamplingParams
from lamina.scheduling.blame import REFUSALS
from lamina.scheduling.control_plane import ControlPlane
from lamina.scheduling.step_tuner import StepTuner
from lamina_protocols.channels.versions import FEATURES
from lamina_protocols.errors import LaminaError
from lamina_protocols.frames import codec
from lamina_protocols.messages.messages import Fault, Message, Reply, Request, answered
from lamina_workers.attention_worker.attention_worker import AttentionWorker
from lamina_workers.decoder.model import Decoder
from lamina_workers.errors import HolderFault, HolderLost, KVError, RankLost
from lamina_workers.model_worker.model_worker import ModelWorker
from lamina_workers.ports.port import LocalAttention

PAGE_SIZE = 16
MOST_STEPS = 20_000  # of the engine in one run; more means that it turns in place


class StuckError(Exception):
    """The engine has work and does nothing about it."""


@dataclass
class Setup:
    """What is built before anything goes wrong. `pages` are those of each holder, `local_pool` those of the local one
    (0: there is none), which keeps whole sequences where there is a `local_tier`. `lazy` holders handle a message when
    its reply is asked for; `as_bytes` lets only bytes cross the cut. After the last holder a new one joins, unless
    there is to be `despair`."""

    shard: str | None
    weights: tuple[int, ...]
    local_pool: int
    pages: int
    max_batch_tokens: int
    prefix_cache: bool
    lanes: int
    query_first: bool
    lazy: bool
    as_bytes: bool
    despair: bool
    wait: float = 0.02
    local_tier: bool = False
    redundancy: str = "none"


class BreakingWorker:
    """An attention worker whose next message goes wrong where `breaks` says so: "before" or "after" it is handled, or
    when what it left to do is settled."""

    def __init__(self, worker: AttentionWorker) -> None:
        self.worker = worker
        self.breaks = ""

    @property
    def page_layout(self) -> str:
        return self.worker.page_layout

    @property
    def unsettled(self) -> int | None:
        return self.worker.unsettled

    def settle(self) -> None:
        if self.worker.unsettled is not None:
            self._break("settle")
        self.worker.settle()

    def handle(self, request: Request) -> Reply | None:
        self._break("before")
        reply = self.worker.handle(request)
        self._break("after")
        return reply

    def outdated(self, request: Request) -> bool:
        return self.worker.outdated(request)

    def _break(self, where: str) -> None:
        if self.breaks == where:
            self.breaks = ""
            raise KVError(f"broken {where}")


class Port:
    """A port to a holder that dies when it is told to, and is slow for as many looks as `slow` says."""

    def __init__(self, world: World, number: int, worker: AttentionWorker) -> None:
        self.name = f"worker-{number}"
        self.number = number
        self.broken = BreakingWorker(worker)
        self.dead = False  # gone, whether the engine knows or not
        self.let_go = False  # by the engine: nothing may be sent any more
        self.slow = 0
        self.loses = False  # the next message that has no reply; nobody notices
        self._world = world
        self.page_layout = worker.page_layout
        self.features = FEATURES if world.rng.random() < 0.9 else frozenset[str]()
        self._inner = LocalAttention(self.broken, self.name)  # type: ignore[arg-type]  # it has what a port needs
        self._sent: deque[Request] = deque()
        self._noticed = False
        self._old: Reply | None = None  # the last one; it comes again, late, when a new epoch has begun
        self._next: Reply | None = None

    @property
    def closed(self) -> bool:
        return self._noticed or self.let_go

    def send(self, request: Request) -> None:
        if self.let_go:
            self._world.complain(f"{self.name} was let go and is sent a {type(request).__name__}")
        self._world.tick(self)
        self._check()
        if self._world.setup.as_bytes:
            request = codec.decode(_frame(request))  # type: ignore[assignment]  # a request comes back as one
        if self.loses and not answered(request):
            self.loses = False
            self._world.lost_messages += 1
            return
        self._sent.append(request)
        if not self._world.setup.lazy:
            self._work()

    def receive(self, timeout: float | None = None) -> Reply:
        self._world.tick(self)
        self._check()
        if self._next is not None:
            reply, self._next = self._next, None
            return reply
        self._work()
        reply = self._inner.receive()
        if self._world.setup.as_bytes:
            reply = codec.decode(_frame(reply))  # type: ignore[assignment]  # a reply comes back as one
        late, self._old = self._old, None if isinstance(reply, Fault) else reply  # what went wrong is told once
        if late is None or late.epoch == reply.epoch:
            return reply
        self._next = reply
        return late

    def ready(self) -> bool:
        if self.dead or self.let_go:
            return True
        if self.slow:
            self.slow -= 1
            return False
        self._work()
        return self._next is not None or self._inner.ready()

    def close(self) -> None:
        self.let_go = True
        self._world.gone()

    def settle(self) -> None:
        """Do what was put off, as a worker does once its reply has left."""
        if not self.dead:
            self._work()
            self._inner.settle()

    def die(self, noticed: bool) -> None:
        """Be gone; the engine sees it when it next asks, or at once by a heartbeat that failed."""
        self.dead, self._noticed = True, noticed
        self._world.gone()

    def _check(self) -> None:
        if self.dead or self.let_go:
            self._noticed = True
            raise HolderLost(f"{self.name} is gone")

    def _work(self) -> None:
        while self._sent:
            self._inner.send(self._sent.popleft())


def _frame(message: Message) -> bytearray:
    return bytearray(b"".join(codec.encode(message)))


class SteppedEngine(Engine):
    """An engine that the caller's thread drives."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.faults: list[HolderFault] = []
        self.losses = 0
        self.given_up: list[int] = []  # holders that still answered
        failed, left = self._failures.failed, self._deadline.left

        def noted(batch: Batch, fault: HolderFault) -> None:
            if isinstance(fault, HolderLost | RankLost):
                self.losses += 1
                self.given_up += list(getattr(fault, "holders", ()))
            else:
                self.faults.append(fault)
            failed(batch, fault)

        self._failures.failed = noted  # type: ignore[method-assign]
        self._deadline.left = lambda: left() or 0.0  # type: ignore[method-assign]  # nobody else brings any news

    def drive(self, more: Callable[[], bool], after_step: Callable[[], None]) -> None:
        """Do all there is to do; where there is nothing left ask for `more`, and end where there is none."""
        for _ in range(MOST_STEPS):
            while self._mailbox.empty and self._at_rest() and more():
                pass
            if self._mailbox.empty and self._at_rest() and not (self._holders.empty and self._registry.requests):
                return
            self._read_mail()
            self.step()
            after_step()
        raise StuckError(f"after {MOST_STEPS} steps there is still work")

    def _at_rest(self) -> bool:
        """Whether nothing goes on by itself; with nobody to keep KV requests wait for somebody to join."""
        waits = self._control.has_work or self._drains.under_way or self._spares.busy
        return not self._in_flight and (self._holders.empty or not waits)


@dataclass
class Answer:
    """What one request came to: the tokens of each sample, how each ended, or an error for all. `key` is whatever
    the submitter knows it by."""

    key: int
    ticket: EngineRequest
    samples: list[list[int]]
    ends: list[str | None]
    error: LaminaError | None = None
    deaf: bool = False  # its client breaks at the next output
    aborted: bool = False

    @property
    def over(self) -> bool:
        return self.error is not None or all(self.ends)


Happening = tuple[int, Callable[["World", Port | None], None]]


@dataclass
class World:
    """One engine, its holders, and what is going to happen: at so many messages, something to the port in hand (None
    where the engine is idle) or to anything else."""

    decoder: Decoder
    setup: Setup
    rng: random.Random
    happenings: list[Happening] = field(default_factory=list)

    def __post_init__(self) -> None:
        setup = self.setup
        self.seen = 0
        self.lost_messages = 0
        self.complaints: list[str] = []
        self.answers: list[Answer] = []
        self.drained: list[tuple[Port, Any]] = []
        self._now = 0.0
        self.config = holder_config(self.decoder, setup.pages, PAGE_SIZE)
        limits = SchedulerConfig(
            max_batch_tokens=setup.max_batch_tokens,
            max_sequences=64,
            max_model_len=512,
            page_size=PAGE_SIZE,
            page_groups=page_groups(self.config),
            prefix_cache=setup.prefix_cache,
            redundancy=redundancy.parse(setup.redundancy),
        )
        holders, self.ports = {}, dict[int, Port]()
        for number, weight in enumerate(setup.weights, 1):
            holders[number] = Holder((setup.pages,), weight, fused=setup.shard is None)
            self.ports[number] = Port(self, number, AttentionWorker(self.config))
            holders[number].name = self.ports[number].name
            holders[number].features = self.ports[number].features
            holders[number].page_layout = self.ports[number].page_layout
        ports: dict[int, Any] = dict(self.ports)
        self.local = AttentionWorker(holder_config(self.decoder, setup.local_pool or 9, PAGE_SIZE))
        if setup.local_pool:
            holders[LOCAL], ports[LOCAL] = Holder((setup.local_pool,), fused=True), LocalAttention(self.local)
        self.placement = Placement(
            holders,
            heads=((self.decoder.config.num_key_value_heads,),),
            page_size=PAGE_SIZE,
            max_model_len=512,
            shard=setup.shard or "heads",
            local_pools=(LOCAL,) if setup.local_pool else (),
            local_tier=setup.local_tier,
        )
        self.tuner = StepTuner((setup.lanes,), 0.5, (not setup.query_first,))
        control = ControlPlane(limits, self.placement, self.tuner)
        self.scheduler = control.scheduler
        self.engine = SteppedEngine(
            ModelWorker(self.decoder, self.config, ports),
            control,
            self._clock,
            wait=setup.wait,
        )

    # What can happen.

    def submit(self, prompt: Sequence[int], params: SamplingParams, priority: int, deaf: bool, key: int) -> None:
        ticket = EngineRequest(
            TokenRequest(str(len(self.answers)), tuple(prompt), params.max_tokens, n=params.n, priority=priority),
            params,
            params.seed or 0,
            self._sink,
        )
        self.answers.append(Answer(key, ticket, [[] for _ in range(params.n)], [None] * params.n, deaf=deaf))
        self.engine.submit(ticket)

    def abort(self, which: int, sample: int | None) -> None:
        if self.answers:
            answer = self.answers[which % len(self.answers)]
            answer.aborted = True
            self.engine.abort(answer.ticket, sample)

    def join(self, weight: int) -> None:
        number = max(self.ports) + 1
        with torch.inference_mode(False):  # it is elsewhere, whatever goes on here
            port = self.ports[number] = Port(self, number, AttentionWorker(self.config))
        self.engine.join(port, Holder((self.setup.pages,), weight))

    def gone(self) -> None:
        """One holder fewer."""
        if not self.alive() and not self.setup.despair:
            self.join(1)

    def leave(self, port: Port) -> None:
        """Its process is known to have ended, before any message says so."""
        port.die(noticed=False)
        self.engine.leave(port.name)

    def drain(self, port: Port) -> None:
        self.drained.append((port, self.engine.drain(port.name)))

    def alive(self) -> list[Port]:
        return [port for port in self.ports.values() if not port.dead and not port.let_go]

    # The run.

    def run(self) -> None:
        """Let everything happen, then flush what the holders still have to be told."""
        self.happenings.sort(key=lambda happening: happening[0])
        self.engine.drive(self._more, self._after_step)
        for port in self.ports.values():
            port.settle()
        cached = self.scheduler.running.prefix_cache.evictable
        for number, port in self.ports.items():
            store = pool_of(port.broken.worker).store
            if not port.dead and not port.let_go and store.free_pages + cached.get((number, 0), 0) != store.n_pages:
                self.complain(
                    f"{port.name}: {store.free_pages} free, {cached.get((number, 0), 0)} cached of {store.n_pages}"
                )
        if self.engine.given_up and self.lost_messages < REFUSALS:
            self.complain(f"honest holders {self.engine.given_up} were given up")
        self.scheduler.running.prefix_cache.clear()
        self.engine.leave("nobody")  # wakes it
        self.engine.drive(lambda: False, self._after_step)

    def tick(self, port: Port) -> None:
        """One message more at a port."""
        self.seen += 1
        while self.happenings and self.happenings[0][0] <= self.seen:
            self.happenings.pop(0)[1](self, port)

    def complain(self, what: str) -> None:
        self.complaints.append(f"message {self.seen}: {what}")

    def _more(self) -> bool:
        if not self.happenings:
            return False
        self.happenings.pop(0)[1](self, None)
        return True

    def _after_step(self) -> None:
        if self.rng.random() < 0.1:
            self.scheduler.check_integrity()
            for port in self.alive():
                pool_of(port.broken.worker).store.check_integrity()

    def _clock(self) -> float:
        self._now += 0.001
        return self._now

    def _sink(self, ticket: EngineRequest, outputs: list[EngineOutput]) -> None:
        answer = self.answers[int(ticket.request.id)]
        if answer.deaf and any(answer.samples):
            answer.aborted = True
            answer.ends = [end or "deaf" for end in answer.ends]
            raise ConnectionResetError("the client is gone")
        for output in outputs:
            if answer.error is not None or (output.error is None and answer.ends[output.sample]):
                self.complain(f"request {ticket.request.id} had ended and gets {output}")
            if output.error is not None:
                answer.error = output.error
                return
            if output.token is not None:
                answer.samples[output.sample].append(output.token)
            answer.ends[output.sample] = output.finish_reason
