"""The process that asked for an engine on a Ray cluster: starts its actor and its attention workers, and ends them.

The workers belong to this process and not to the engine, so they keep their KV when the engine's actor dies. Another
actor is started, anywhere on the cluster, and gets their addresses. All actors end with this process.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import queue
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from lamina.config import EngineConfig
from lamina.deploy.relayed_attention import AttentionRelay, Drained, Retire, Wish
from lamina.deploy.supervision import Backoff
from lamina.deploy.worker_events import WorkerAddress
from lamina.errors import EngineError, JournalError, LaminaError, WorkersUnavailable
from lamina.journal.journal import Run
from lamina.messages.engine_messages import Command, Event, Stopped, pack_commands, unpack_events
from lamina.ray_cluster.actor import EngineActor
from lamina.ray_cluster.attention import RayAttentionWorkers, environment
from lamina.ray_cluster.connection import (
    ATTENTION,
    MODEL,
    NAMESPACE,
    TIMEOUT,
    explain,
    prefer,
    ray_module,
    require,
    shortage,
)
from lamina.system.progress import Progress

if TYPE_CHECKING:
    from lamina.client.remote import RemoteEngine

logger = logging.getLogger("lamina")

STOPPING = 10.0  # seconds for the engine's last batch
_POLL = 0.5  # seconds
_NAME_FREE = 10.0  # seconds until Ray has forgotten a dead actor's name


class EngineOwner:
    """The actors of one engine: `place`, `attach`, `load`, and in the end `stop`.

    When the engine's actor dies it is started again, a few times a minute, and the attached `RemoteEngine` gets
    another wire.
    """

    def __init__(self, model: str, config: EngineConfig) -> None:
        self.name = f"engine-{secrets.token_hex(2)}"
        self._run = secrets.token_hex(16)  # the id by which attention workers know it through all its starts
        self._journal = secrets.token_hex(8)  # of its journals: folders' names are no secret, the id is
        self._starts = 0
        self._node = ""  # where it is, or was
        self._nodes = 0  # how many it has been on: each has a journal of its own
        self._model = model
        self._config = config
        self._user: RemoteEngine | None = None
        self._count = config.first_workers  # a list is refused
        self._has_workers = config.most_workers > 0
        self._workers: RayAttentionWorkers | None = None
        self._failure: LaminaError | None = None  # why the attention workers did not come up
        self._actor: Any = None
        self._serves = False  # it has started once
        self._died: tuple[Any, str] | None = None  # an actor that died before that, and why
        self._progress: Progress | None = None
        self._relay = AttentionRelay(self._count, config.most_workers)
        self._updates = itertools.count(1)  # of an actor's attention workers
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()  # for the thread of the relay
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._ending = threading.Lock()
        self._backoff = Backoff()
        self._restarter: threading.Thread | None = None
        self._relaying = threading.Thread(target=self._relay_workers, name="lamina-owner", daemon=True)

    def place(self) -> RayWire:
        """Start the engine's actor. Raises EngineError where the cluster has too little."""
        resources = {MODEL: self._config.model_workers} | ({ATTENTION: self._count} if self._count else {})
        require(resources)
        return self._place()

    def attach(self, engine: RemoteEngine) -> None:
        """The client of the engine, which gets another wire after a restart, or the error where there is none."""
        self._user = engine

    def load(self, progress: Progress | None) -> dict[str, Any]:
        """Start the attention workers, and have the engine load its model meanwhile. Returns what `EngineActor.start`
        returns. Raises the errors of both."""
        if self._has_workers:
            config = self._config
            memory, resident = (
                size if isinstance(size, int) else None for size in (config.kv_memory, config.kv_resident)
            )
            device = self._config.attention_device
            self._workers = RayAttentionWorkers(
                self._count,
                kv_memory=memory,
                threads=self._config.threads,
                most=None if config.autoscale is None else config.most_workers,
                device="cpu" if device == "auto" else str(device),  # the engine refuses a name for each
                engine=self.name,
                kv_cold=None if config.kv_cold is None else str(config.kv_cold),
                kv_resident=resident,
            )
            self._progress = progress
            self._relaying.start()
        facts = self._load()
        with self._lock:
            self._serves, died = True, self._died
        if died is not None:
            self.actor_died(*died)
        return facts

    def files(self) -> dict[str, bytes]:
        files: dict[str, bytes] = result(self._actor.files.remote())
        return files

    def stop(self) -> None:
        """End the engine, and then its workers. Harmless the second time."""
        ray = ray_module()
        self._ended.set()
        self._calls.put(lambda: None)  # wakes the thread
        with self._ending:
            if not ray.is_initialized():  # Python is ending, and Ray ended first: the cluster ends our actors
                return
            if self._actor is not None:
                with contextlib.suppress(ray.exceptions.RayError):
                    ray.get(self._actor.stop.remote(), timeout=STOPPING)
                ray.kill(self._actor)
                self._actor = None
            if self._workers is not None:
                self._workers.close()
        for thread in (self._relaying, self._restarter):  # they must not call Ray once it is gone
            if thread is not None and thread.is_alive() and thread is not threading.current_thread():
                thread.join(STOPPING)

    # Calls of the wire.

    def actor_died(self, actor: Any, why: str) -> None:
        """An actor does not answer: have it started again."""
        with self._lock:
            if actor is not self._actor or self._ended.is_set():
                return
            if not self._serves:
                self._died = (actor, why)
                return
            self._actor = None
            self._calls.put(lambda: self._relay.serve(None))
            self._restarter = threading.Thread(
                target=self._restart, args=(actor, why), name="lamina-restart", daemon=True
            )
            self._restarter.start()

    def take_wish(self, wish: Wish) -> None:
        if isinstance(wish, Drained) and self._config.autoscale is not None:
            wish = Retire(wish.name)
        self._calls.put(lambda: self._do(wish))

    def engine_stopped(self) -> None:
        threading.Thread(target=self.stop, name="lamina-stop", daemon=True).start()

    # The engine's actor.

    def _place(self) -> RayWire:
        ray = ray_module()
        actor = self._create(ray)
        self._actor = actor
        if self._ended.is_set():  # `stop` did not see it
            ray.kill(actor)
            raise EngineError("the engine has stopped")
        where = actor.where.remote()
        if not ray.wait([where], timeout=max(TIMEOUT, self._config.recovery_timeout))[0]:
            raise EngineError(shortage(MODEL, 1))
        node, host, process = result(where)
        if node != self._node:
            self._node, self._nodes = node, self._nodes + 1
        logger.info("%s: process %d at %s", self.name, process, host)
        self._calls.put(lambda: self._relay.serve(partial(self._update, actor)))
        return RayWire(self, actor)

    def _create(self, ray: Any) -> Any:
        options: dict[str, Any] = {
            "name": self.name,
            "namespace": NAMESPACE,
            "resources": {MODEL: 1},
            "num_cpus": 0,
            "max_concurrency": 16,
            "enable_task_events": False,  # there would be one for each batch of outputs, and they are not read
            "runtime_env": {"env_vars": environment(self._config.threads)},
        }
        if self._node:  # its journal is there
            options["scheduling_strategy"] = prefer(self._node)
        deadline = time.monotonic() + _NAME_FREE
        while True:
            try:
                return ray.remote(EngineActor).options(**options).remote()
            except ValueError as error:  # the previous actor still has the name
                if time.monotonic() >= deadline or self._ended.wait(_POLL):
                    raise EngineError(f"{self.name} cannot be started again: {explain(error)}") from error

    def _load(self) -> dict[str, Any]:
        ray = ray_module()
        call = self._actor.start.remote(
            self._model, self._config, self._has_workers, Run(self._run, self._starts), f"{self._journal}-{self._nodes}"
        )
        self._starts += 1
        while not ray.wait([call], timeout=_POLL)[0]:
            if self._failure is not None:
                raise self._failure
        facts: dict[str, Any] = result(call)
        return facts

    def _restart(self, actor: Any, why: str) -> None:
        """On a thread of its own, which ends with an engine that serves, or with no engine."""
        user = self._user
        try:
            wire = self._another(actor, why)
        except Exception as error:  # any error: requests must not wait for ever
            if not isinstance(error, LaminaError):
                logger.exception("the engine could not start again")
            if user is not None:
                user.give_up(str(error))
            self.stop()
            return
        if user is not None and user.rejoin(wire):
            logger.warning("%s serves again", self.name)

    def _another(self, actor: Any, why: str) -> RayWire:
        """A new actor that serves in place of `actor`. Raises EngineError where there can be none."""
        ray = ray_module()
        while True:
            delay = self._backoff.delay(time.monotonic())
            if delay is None:
                raise EngineError(f"{why}, too often to start it again")
            logger.warning("%s; it starts again in %g s", why, delay)
            if self._ended.wait(delay) or not ray.is_initialized():
                raise EngineError("the engine has stopped")
            ray.kill(actor)  # it may only be out of reach
            try:
                wire = self._place()
                self._load()
                return wire
            except (WorkersUnavailable, _Died) as error:  # the workers are being started again, too
                actor, why = self._actor or actor, str(error)
            except JournalError as error:  # it goes on without a journal: clients send what they have received
                self._nodes += 1
                actor, why = self._actor or actor, str(error)
            except LaminaError as error:
                raise EngineError(f"the engine could not start again: {error}") from error

    # The attention workers, on a thread that sends their addresses to the engine's actor.

    def _relay_workers(self) -> None:
        pool = self._workers
        if pool is None:
            return
        try:
            workers = pool.start(self._progress)
        except LaminaError as error:
            self._failure = error
            return
        except Exception as error:  # any error: the engine would wait for them
            logger.exception("cannot start the attention workers")
            self._failure = EngineError(f"cannot start the attention workers: {error}")
            return
        pool.watch(
            lambda worker: self._calls.put(lambda: self._relay.joined(worker)),
            lambda name: self._calls.put(lambda: self._relay.left(name)),
        )
        try:
            self._relay.begin(pool, workers)
            slots = pool.described()
            while not self._ended.is_set():
                with contextlib.suppress(queue.Empty):
                    self._calls.get(timeout=_POLL)()
                self._relay.introduce()
                if slots != (slots := pool.described()):
                    self._relay.update()
        except Exception:  # Ray's connection may be gone; the engine goes on with the workers it has
            logger.exception("cannot send the engine its attention workers")

    def _update(self, actor: Any, workers: Sequence[WorkerAddress]) -> None:
        slots = () if self._workers is None else self._workers.described()
        actor.update_workers.remote(next(self._updates), slots, workers)

    def _do(self, wish: Wish) -> None:
        self._relay.take(wish)
        self._relay.update()


class RayWire:
    """The way to one engine's actor: a `client.interface.Wire`."""

    def __init__(self, owner: EngineOwner, actor: Any) -> None:
        self._owner = owner
        self._actor = actor

    def ask(self, commands: Sequence[Command]) -> None:
        for packed in pack_commands(commands):
            self._call(self._actor.ask, packed)

    def events(self) -> Sequence[Event]:
        packed, wishes = self._call(self._actor.events)
        for wish in wishes:
            self._owner.take_wish(wish)
        events = unpack_events(packed)
        if any(isinstance(event, Stopped) for event in events):
            self._owner.engine_stopped()
        return events

    def _call(self, method: Any, *arguments: Any) -> Any:
        ray = ray_module()
        if not ray.is_initialized():  # a call would start a cluster of its own
            raise EngineError("the connection to the Ray cluster is closed")
        try:
            return ray.get(method.remote(*arguments))
        except ray.exceptions.RayTaskError as error:
            raise EngineError(f"the engine's process did not understand: {explain(error)}") from error
        except ray.exceptions.RayError as error:
            why = f"the engine's process is gone: {explain(error)}"
            self._owner.actor_died(self._actor, why)
            raise EngineError(why) from error


class _Died(EngineError):
    """The engine's actor died while it started."""


def result(call: Any) -> Any:
    """The result of a call to the engine's actor. Raises the LaminaError that it raised there, else EngineError."""
    ray = ray_module()
    try:
        return ray.get(call)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, LaminaError):
            raise error.cause from error
        raise EngineError(f"the engine did not start: {explain(error)}") from error
    except ray.exceptions.RayError as error:
        raise _Died(f"the engine did not start: {explain(error)}") from error
