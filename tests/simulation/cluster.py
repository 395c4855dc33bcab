"""The simulated cluster of one scenario: builds it, lets its events happen, and looks after what must always hold."""

from __future__ import annotations

import contextlib
import random
import time
from collections import Counter
from typing import Any
from unittest import mock

import scenario as events
import torch
from attention_host import AttentionHost
from disk import Disk
from engine_host import EngineHost, kv_config
from invariants import books, left_over
from network import Line
from scenario import Answer, Event, Outcome, Scenario, Submit, prompt_of
from server_link import ServerLink
from virtual_time import Time

from lamina.engine import kv_spares
from lamina.engine.engine import Engine
from lamina.errors import EngineError
from lamina.kv import relocation
from lamina.kv.request import Request
from lamina.messages.engine_request import EngineOutput, EngineRequest
from lamina.sampling_params import SamplingParams
from lamina_protocols.errors import LaminaError
from lamina_workers.model_worker.compiled_exchange import RemoteHolder

MOST_STEPS = 200_000  # of engines in one scenario; more means that one turns in place
SETTLE_S = 0.5  # after the last answer, for closes to leave, before it is looked whether anything is left
SETTLED_S = 20.0  # until nothing may be left any more
CHECK_EVERY = 64  # steps


# What is worth a move is so little that it comes about in short texts, and copies have all the time that there is.
_EAGER: tuple[tuple[Any, dict[str, Any]], ...] = (
    (relocation, {"MIN_GROWTH": 1}),
    (relocation, {"MIN_TOKENS": 1}),
    (kv_spares, {"BEHIND": 1, "SHARE": 2.0}),
)


def _sleeps(seconds: float) -> None:
    raise RuntimeError(f"something sleeps for {seconds} s that is not of virtual time")


def _left(holder: RemoteHolder, asked: int) -> float:
    """Seconds that a holder has for its answer. Compiled code notes by the machine's clock when it was asked: how fast
    that is must change nothing here."""
    return holder.holder.timeout


class Cluster:
    """One run of one scenario."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.time = Time()
        self.rng = random.Random(scenario.seed)
        self.counts: Counter[str] = Counter()
        self.complaints: list[str] = []
        self.log: list[str] = []
        self.answers: dict[int, Answer] = {}
        self.hosts: list[AttentionHost] = []
        self._requests: dict[int, EngineRequest] = {}
        self._aborts: dict[int, list[int | None]] = {}
        self._broken: set[int] = set()
        self._engine: Engine | None = None
        self._wall_clock = 1.8e9  # at second 0
        self._faults_over = scenario.mode == "safety"
        self._finishing = False
        self._disk = Disk() if scenario.setup.journal else None
        texts = self._texts() if scenario.setup.drafts else {}
        self.engine_host = EngineHost(scenario, self.time, self.hosts, self, self._disk, texts)
        self._link: ServerLink | None = None
        if scenario.setup.link:
            rng, latency = random.Random(scenario.seed), scenario.setup.latency
            self._link = ServerLink(self.time, lambda: latency * (0.5 + rng.random()), scenario.setup.wait)

    def _wall(self) -> float:
        return self._wall_clock + self.time.now

    def _texts(self) -> dict[tuple[tuple[int, ...], int], list[int]]:
        model = self.scenario.setup.model
        return {
            (prompt_of(event), sample): events.reference_text(event, sample, model)
            for event in self.scenario.events
            if isinstance(event, Submit)
            for sample in range(event.samples)
        }

    def run(self) -> Outcome:
        """Let everything happen."""
        with contextlib.ExitStack() as patched:
            # The mode of an engine's thread. All tasks share this thread, and a killed task would not restore its mode.
            patched.enter_context(torch.inference_mode())
            patched.enter_context(mock.patch.multiple(time, time=self._wall, sleep=_sleeps))
            patched.enter_context(mock.patch.object(RemoteHolder, "left", _left))
            for module, constants in _EAGER if self.scenario.setup.eager else ():
                patched.enter_context(mock.patch.multiple(module, **constants))
            return self._run()

    def _run(self) -> Outcome:
        scenario = self.scenario
        try:
            for pages in scenario.setup.workers:
                self._add_host(pages)
            self.engine_host.start()
            for event in sorted(scenario.events, key=lambda each: each.at):
                self.time.at(event.at, self._happen, event)
            if scenario.mode == "liveness":
                self.time.at(scenario.heals, self._heal)
            self.time.run(scenario.ends)
            if scenario.mode == "liveness":
                for number, answer in self.answers.items():
                    if not answer.over:
                        self.complain(
                            f"request {number} has not ended: {[len(each) for each in answer.samples]} tokens"
                        )
        finally:
            self._close()
        self.counts["tokens"] = sum(len(each) for answer in self.answers.values() for each in answer.samples)
        self.counts["slices"] = self.engine_host.slices
        self.counts += self.engine_host.reached
        self.counts["frames"] = sum(host.line.frames for host in self.hosts)
        return Outcome(self.answers, self.complaints, self.counts, self.log, self.time.now)

    def _close(self) -> None:
        if self.engine_host.alive:
            self.engine_host.kill()
        for host in self.hosts:
            if host.alive:
                host.kill(silent=True)
        self.time.stopped = False
        self.time.due.sort()
        end = self.time.now
        self.time.due = [each for each in self.time.due if each[2].__name__ == "_throw"]
        self.time.run(end)
        if self._disk is not None:
            self._disk.close()

    # As the engines' owner.

    def engine_up(self, engine: Engine) -> None:
        """Clients come, or come back."""
        self._engine = engine
        self.say(f"engine {self.engine_host.starts} is up")
        if self._link is not None:
            self._link.engine_up(engine, self.engine_host.process)
            return
        for number, answer in self.answers.items():
            if not answer.over:
                self._submit(number, resumed=True)

    def engine_failed(self, error: BaseException) -> None:
        """The engine ended by an error of its own, which must not be."""
        self.complain(f"the engine ended: {error!r}")
        import traceback

        self.log += traceback.format_exception(error)
        self.time.stop()

    def step(self) -> None:
        """An engine is about to make a step."""
        self.counts["steps"] += 1
        if self.counts["steps"] % CHECK_EVERY == 0:
            self._check_books()
        if self.counts["steps"] > MOST_STEPS:
            self.complain(f"after {MOST_STEPS} steps there is still work")
            self.time.stop()

    def say(self, what: str) -> None:
        self.log.append(f"{self.time.now:9.4f} {what}")

    def complain(self, what: str) -> None:
        self.say(f"COMPLAINT {what}")
        self.complaints.append(what)

    # Clients.

    def _submit(self, number: int, resumed: bool = False) -> None:
        answer = self.answers[number]
        submit = answer.submit
        params = SamplingParams(
            n=submit.samples,
            max_tokens=submit.tokens,
            temperature=1.0 if submit.samples > 1 else 0.0,
            seed=number,
            ignore_eos=True,
        ).with_defaults({"do_sample": True} if submit.samples > 1 else {})
        request = EngineRequest(
            Request(str(number), prompt_of(submit), submit.tokens, n=submit.samples, priority=submit.priority),
            params,
            number,
            self._sink,
            submitted=self.time.now,
        )
        if resumed:
            received = zip(answer.samples, answer.ends, strict=True)
            request.received = tuple((tuple(tokens), end is not None) for tokens, end in received)
        self._requests[number] = request
        engine = self._engine if self._link is None else self._link
        if engine is None:
            return
        try:
            engine.submit(request)
        except LaminaError as error:
            self._over(answer, error)
        for sample in self._aborts.get(number, ()):
            engine.abort(request, sample)

    def _sink(self, request: EngineRequest, outputs: list[EngineOutput]) -> None:
        number = int(request.id)
        answer = self.answers[number]
        if self._requests[number] is not request:
            self.complain(f"request {number}: an engine that is gone has sent {outputs}")
            return
        if number in self._broken:
            answer.ends = [end or "broken" for end in answer.ends]
            self._look()
            raise ConnectionResetError("the client is gone")
        for output in outputs:
            if answer.error or (output.error is None and answer.ends[output.sample]):
                self.complain(f"request {number} had ended and gets {output}")
            if output.error is not None:
                self._over(answer, output.error)
                return
            if output.token is not None:
                answer.samples[output.sample].append(output.token)
            answer.ends[output.sample] = output.finish_reason
        self._look()

    def _over(self, answer: Answer, error: LaminaError) -> None:
        answer.error = f"{type(error).__name__}: {error}"
        self.say(f"request {answer.submit.request}: {answer.error}")
        self._look()

    def _look(self) -> None:
        """Whether all is over."""
        if (
            self._faults_over
            and not self._finishing
            and self._expected()
            and all(a.over for a in self.answers.values())
        ):
            self._finishing = True
            self.time.after(SETTLE_S, self._finish, self.time.now)

    def _expected(self) -> bool:
        return len(self.answers) == sum(isinstance(event, Submit) for event in self.scenario.events)

    # What must hold.

    def _check_books(self) -> None:
        for each in books(self.engine_host, self.hosts):
            self.complain(each)

    def _finish(self, since: float, cleared: bool = False) -> None:
        """All requests are over: soon nothing may be left of them, and without cached prefixes nothing at all."""
        left = left_over(self.engine_host, self.hosts, cleared) if self.scenario.mode == "liveness" else []
        if left and self.time.now < since + SETTLED_S:
            self.time.after(SETTLE_S, self._finish, since, cleared)
            return
        for each in left:
            self.complain(each)
        if left or cleared or self.scenario.mode == "safety" or self.engine_host.engine is None:
            self.time.stop()
            return
        self.engine_host.engine.clear_prefixes()
        self.time.after(SETTLE_S, self._finish, self.time.now, True)

    # Events.

    def _add_host(self, pages: int) -> AttentionHost:
        setup = self.scenario.setup
        line = Line(self.time, random.Random(self.rng.random()), setup.latency)
        memory = kv_config(pages, setup.model).kv_memory
        number = len(self.hosts)
        old = number < setup.old_workers
        host = AttentionHost(number, self.time, line, memory, setup.lease, self._thread_failed, old)
        self.hosts.append(host)
        host.start()
        return host

    def _thread_failed(self, task: Any, error: Exception) -> None:
        self.complain(f"a thread of {task.process.name} ended: {error!r}")

    def _happen(self, event: Event) -> None:
        handler = getattr(self, "_on_" + type(event).__name__)
        if handler(event) is not False:
            self.counts[type(event).__name__] += 1
            self.say(str(event))

    def _host(self, number: int) -> AttentionHost | None:
        return self.hosts[number % len(self.hosts)] if self.hosts else None

    def _on_Submit(self, event: Submit) -> None:
        self.answers[event.request] = Answer(event, [[] for _ in range(event.samples)], [None] * event.samples)
        self._submit(event.request)

    def _on_Leave(self, event: events.Leave) -> bool | None:
        answer = self.answers.get(event.request)
        if answer is None or answer.over:
            return False
        answer.left = True
        if event.how == "break":
            self._broken.add(event.request)
            return None
        self._aborts.setdefault(event.request, []).append(event.sample)
        engine = self._engine if self._link is None else self._link
        if engine is not None:
            engine.abort(self._requests[event.request], event.sample)
        return None

    def _on_KillWorker(self, event: events.KillWorker) -> bool | None:
        host = self._host(event.worker)
        if host is None or not host.alive:
            return False
        host.kill(event.silent)
        self.counts["deaths"] += 1
        self.time.after(event.back, self._start_worker, host)
        return None

    def _start_worker(self, host: AttentionHost) -> None:
        if not host.alive and host.number not in self.engine_host.retired:
            host.start()
            self.say(f"worker {host.number} starts")

    def _on_KillModelWorker(self, event: events.KillModelWorker) -> bool | None:
        replicas = self.engine_host.replicas
        self.engine_host.replica_back = event.back
        if replicas is None or not self.engine_host.alive or not replicas.kill(event.rank):
            return False
        self.counts["deaths"] += 1
        return None

    def _on_KillEngine(self, event: events.KillEngine) -> bool | None:
        if not self.engine_host.alive:
            return False
        self._engine_dies()
        if self._disk is not None:
            self._disk.tear(event.torn)
        self.counts["deaths"] += 1
        self.time.after(event.back, self._start_engine)
        return None

    def _engine_dies(self) -> None:
        self.engine_host.kill()
        self._engine = None
        if self._link is not None:
            self._link.engine_down()

    def engine_gave_up(self, why: str) -> None:
        """It did not start. Its supervisor starts another."""
        folder = "" if self._disk is None else str(self._disk.folder)  # its name is another in each run
        self.say(f"the engine does not start: {why.replace(folder, 'DISK')}")
        self._engine_dies()
        self.time.after(self.scenario.setup.again, self._start_engine)

    def _on_KillServer(self, event: events.KillServer) -> bool | None:
        if self._link is None:
            return False
        self.counts["deaths"] += 1
        for answer in self.answers.values():
            if not answer.over:
                answer.left = True
                answer.ends = [end or "gone" for end in answer.ends]
        self._link.client_restarts()
        self._look()
        return None

    def _on_ResetLink(self, event: events.ResetLink) -> bool | None:
        if self._link is None:
            return False
        self._link.reset()
        return None

    def _on_Disk(self, event: events.Disk) -> bool | None:
        if self._disk is None:
            return False
        self._disk.fail(event.what, room=self.rng.randrange(200))
        self.time.after(event.seconds, self._disk.mend)
        return None

    def _start_engine(self) -> None:
        if not self.engine_host.alive:
            self.engine_host.start()

    def _on_Freeze(self, event: events.Freeze) -> bool | None:
        host = self._host(event.worker)
        if host is None or not host.alive:
            return False
        host.process.freeze(self.time.now + event.seconds)
        return None

    def _on_FreezeEngine(self, event: events.FreezeEngine) -> bool | None:
        if not self.engine_host.alive:
            return False
        self.engine_host.process.freeze(self.time.now + event.seconds)
        return None

    def _on_Slow(self, event: events.Slow) -> None:
        if (host := self._host(event.worker)) is not None:
            host.slow = event.factor, self.time.now + event.seconds

    def _on_Delay(self, event: events.Delay) -> None:
        if (host := self._host(event.worker)) is not None:
            host.line.delay(event.extra, self.time.now + event.seconds)

    def _on_Cut(self, event: events.Cut) -> None:
        if (host := self._host(event.worker)) is not None:
            host.line.cut(event.way, self.time.now + event.seconds)

    def _on_Reset(self, event: events.Reset) -> None:
        if (host := self._host(event.worker)) is not None:
            for connection in host.line.connections:
                connection.reset()

    def _on_Flip(self, event: events.Flip) -> bool | None:
        host = self._host(event.worker)
        if host is None or host.line.flips:
            return False  # else flips would pile up, and no frame get through at all
        host.line.flips.append((event.way, event.bit))
        return None

    def _on_Lose(self, event: events.Lose) -> bool | None:
        host = self._host(event.worker)
        if host is None or host.line.losses:
            return False
        host.line.losses += 1
        return None

    def _on_Break(self, event: events.Break) -> bool | None:
        host = self._host(event.worker)
        if host is None or not host.workers:
            return False
        host.fail_once(event.when)
        return None

    def _on_JumpClock(self, event: events.JumpClock) -> None:
        self._wall_clock += event.seconds

    def _on_Join(self, event: events.Join) -> None:
        host = self._add_host(event.pages)
        self.engine_host.joins(host.number)

    def _on_Drain(self, event: events.Drain) -> bool | None:
        host = self._host(event.worker)
        port = None if host is None else self.engine_host.ports.get(host.number)
        if host is None or port is None or self._engine is None or len(self.engine_host.ports) == 1:
            return False  # nobody drains the last one
        number = host.number
        with contextlib.suppress(EngineError):
            self._engine.drain(port.name).add_done_callback(lambda done: self._drained(number, done))
        return None

    def _drained(self, number: int, done: Any) -> None:
        if done.exception() is None:
            self.engine_host.retired.add(number)
            self.engine_host._lost[number].set()
            self.say(f"worker {number} is drained")
        else:
            self.say(f"worker {number} is not drained: {done.exception()}")

    def _on_Move(self, event: events.Move) -> bool | None:
        if not self.scenario.setup.local_tier:
            return False
        self.engine_host.share = event.share
        if self._engine is not None:
            self.engine_host.control.tuner.share = event.share
        return None

    def _heal(self) -> None:
        """Faults are over: everything dead starts again, everything gets through."""
        self._wall_clock = 1.8e9  # at second 0
        self._faults_over = True
        self.say("faults are over")
        for host in self.hosts:
            host.line.heal()
            host.slow = (1.0, 0.0)
            if host.alive:
                host.process.frozen_until = min(host.process.frozen_until, self.time.now)
            self._start_worker(host)
        if self.engine_host.alive:
            self.engine_host.process.frozen_until = self.time.now
        if self._disk is not None:
            self._disk.mend()
        self._start_engine()
        self._look()
