"""The attention workers of an engine: a port to each, and their joining and leaving while it runs.

`AttentionPool` takes each worker that joins through its states, from its first connection until the engine uses it. Its
place's breakers (`lamina/deploy/breakers.py`) decide whether it is held back before. With `Autoscaling` their number
follows the engine's load.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

from lamina.config import EngineConfig
from lamina.deploy.breakers import FLAPPING, QUARANTINE, BreakerLimits, HeldBack, PlaceBreakers
from lamina.deploy.listed_attention import ListedWorkers, answers
from lamina.deploy.worker_events import AttentionWorkers, WorkerAddress
from lamina.engine.holders import seated
from lamina.errors import EngineError, InvalidRequest, LaminaError, WorkersUnavailable
from lamina.kv.placement import Holder
from lamina.launch.journal_setup import Identity
from lamina.launch.kv_sizing import Sizes, attention_devices
from lamina.launch.model_files import ModelFiles
from lamina.scheduling.autoscaling import Autoscaler, kv_load
from lamina.scheduling.control_plane import ControlPlane
from lamina.system.progress import Progress
from lamina.system.timers import Cancellable, later
from lamina_protocols.channels.channels import Credentials, is_loopback, split_address
from lamina_protocols.channels.grpc_client import WorkerUnreachable
from lamina_protocols.messages.layers import HolderConfig
from lamina_protocols.messages.messages import Surveyed
from lamina_workers.errors import HolderFault, HolderLost
from lamina_workers.model_worker.interface import Seat
from lamina_workers.parallel.tensor_parallel import seat
from lamina_workers.ports.data_channel import ChannelOptions
from lamina_workers.ports.port import survey
from lamina_workers.ports.remote import RemoteAttention, SeatOptions, connect
from lamina_workers.process.credentials import CredentialFiles

if TYPE_CHECKING:
    from lamina.engine.engine import Engine
    from lamina.engine.observers import EngineStats
    from lamina_workers.model_worker.interface import Workers
    from lamina_workers.parallel.peers import Peer

logger = logging.getLogger("lamina")
choices = logging.getLogger("lamina.choices")  # what the engine chose and why, for people

LOCAL = 0  # the number of the holder in the engine's own process
PERIOD = 0.5  # seconds between two decisions
_TRIAL = 2  # times `worker_timeout`, for which a worker on trial must answer heartbeats
_LOOK = 0.1  # seconds between two looks at a worker on trial


@dataclass(eq=False)
class _Member:
    """A worker of the pool, from when it is known until it is lost.

    held back    a breaker of its place is open: it is not used until `timer` is over, or the engine has no other
    connecting   its handshake is made, and its KV of the previous engine is listed
    on trial     a breaker of its place is half-open: it must answer heartbeats for a while before it gets KV
    used         the engine has it
    left         it is gone; its loss may still be reported
    """

    address: WorkerAddress
    state: Literal["held back", "connecting", "on trial", "used", "left"] = "connecting"
    timer: Cancellable | None = None


class AttentionPool:
    """The attention workers of one engine: `begin`, `join`, `watch`, `close`, in this order.

    `holder` is what the holders of rank 0 are built from, `model` the model's fingerprint. Each rank gets its part of
    the workers' memory by its number of KV heads in `heads`. `limits` are those of the breakers of each place.
    """

    def __init__(
        self,
        workers: AttentionWorkers,
        config: EngineConfig,
        holder: HolderConfig,
        model: str,
        compute_dtype: str,
        identity: Identity,
        heads: Sequence[int] = (1,),
        limits: tuple[BreakerLimits, BreakerLimits] = (FLAPPING, QUARANTINE),
    ) -> None:
        self.workers = workers
        self._identity = identity
        self._share = (heads[0], sum(heads)) if len(heads) > 1 else (1, 1)
        self._credentials: dict[str, Credentials | None] = {}  # by port
        self._config = config
        self._holder = holder
        self._model = model
        self._compute_dtype = compute_dtype
        self._threads = ThreadPoolExecutor(max_workers=8, thread_name_prefix="lamina-connect")
        self._started: Future[tuple[WorkerAddress, ...]] | None = None
        self._lock = threading.RLock()
        self._engine: Engine | None = None  # it is notified of workers that join and leave
        self._members: dict[str, _Member] = {}  # by name
        self._limits = limits
        self._breakers: dict[str, PlaceBreakers] = {}  # by place, of workers that ever failed
        self._over = threading.Event()
        self._ports: list[RemoteAttention] = []
        self._autoscaling: Autoscaling | None = None

    def begin(self, progress: Progress | None) -> None:
        """Start the workers. Returns at once."""
        self._started = self._threads.submit(self.workers.start, progress)

    def join(self, workers: Workers[Peer], number: int) -> Iterator[tuple[int, str, Holder, Surveyed | None]]:
        """Join all attention workers to the model workers, once they are up. Gives each holder's number (from `number`
        on), its worker's name, the holder, and what it keeps of the previous engine.

        An attention worker that is gone again is given up if others are there, or none is needed. Raises EngineError
        where they do not start or refuse.
        """
        if self._started is None:
            raise EngineError("the attention workers were not begun")
        failure, connected = "none is up", False
        members = self._members = {worker.name: _Member(worker) for worker in self._started.result()}
        futures = [(member, self._threads.submit(self._connect, member.address)) for member in members.values()]
        for member, future in futures:
            try:
                port = future.result()
                first_seat = self._seat(port)
            except (WorkerUnreachable, HolderFault) as error:
                failure = str(error)
                self._give_up(member, error)
                continue
            except LaminaError as error:
                raise EngineError(f"an attention worker cannot be used: {error}") from error
            connected, member.state = True, "used"
            try:
                others = workers.join(number, port, self._credentials[port.name])
            except HolderFault as error:
                raise EngineError(str(error)) from error
            for worker_seat in (first_seat, *others):
                yield number, port.name, seated(worker_seat, port.page_layout), worker_seat.kept
                number += 1
        if not connected and not self.workers.optional:
            raise WorkersUnavailable(f"no attention worker can be used: {failure}")

    def watch(self, engine: Engine) -> None:
        """Notify the engine from now on of workers that join and leave, and have their number follow its load where the
        config says so."""
        self._engine = engine
        for port in self._ports:
            port.watch(engine.leave, engine.leaving)
        self.workers.watch(self._joined, self._left)
        if self._config.autoscale is not None:
            self._autoscaling = Autoscaling(engine, self.workers, Autoscaler(*self._config.autoscale))
            self._autoscaling.begin()

    def held_back(self) -> dict[str, HeldBack]:
        """The workers that are there and not used, by name, and why."""
        with self._lock:
            now = time.monotonic()
            members = [member.address for member in self._members.values() if member.state == "held back"]
            return {worker.name: self._breakers[worker.at].held_back(now) or "open" for worker in members}

    # Events. Those of `workers` come on the thread that starts others again, which they must not hold up.

    def _joined(self, worker: WorkerAddress) -> None:
        """A worker is there: use it, at once or once it is no longer held back."""
        with self._lock:
            previous, member = self._members.get(worker.name), _Member(worker)
            if previous is not None and previous.timer is not None:
                previous.timer.cancel()
            self._members[worker.name] = member
            breakers, now = self._breakers.get(worker.at), time.monotonic()
            reason = None if breakers is None else breakers.held_back(now)
            if breakers is None or reason is None or (reason == "open" and self._alone()):
                self._submit(member)
            elif not self._over.is_set():
                member.state = "held back"
                member.timer = later(breakers.seconds(now), partial(self._release, member))

    def _left(self, name: str) -> None:
        """A worker is gone. One that leaves before its handshake is over does not join."""
        with self._lock:
            if (member := self._members.get(name)) is not None:
                if member.timer is not None:
                    member.timer.cancel()
                if member.state == "held back":
                    del self._members[name]
                member.state = "left"
            if self._engine is not None:
                self._engine.leave(name)

    def lost(self, name: str) -> None:
        with self._lock:
            if (member := self._members.get(name)) is not None:
                self._count(member.address)
                if member.state in ("used", "left"):  # it may have joined again meanwhile
                    del self._members[name]
            if self._alone():
                for waiting, reason in self.held_back().items():
                    if reason == "open":
                        self._release(self._members[waiting])
        self.workers.lost(name)

    def corrupt(self, name: str) -> None:
        """A frame of a worker, or one that it got, came with changed bits; its loss follows."""
        with self._lock:
            if (member := self._members.get(name)) is not None:
                self._count(member.address, corrupt=True)

    # A worker that is used.

    def _release(self, member: _Member) -> None:
        """Use a worker that was held back, unless it has left."""
        with self._lock:
            if member.timer is not None:
                member.timer.cancel()
            if member.state == "held back":
                member.state, member.timer = "connecting", None
                self._submit(member)

    def _submit(self, member: _Member) -> None:
        with contextlib.suppress(RuntimeError):  # the pool is closed
            self._threads.submit(self._use, member)

    def _use(self, member: _Member) -> None:
        """Connect to a worker, try it where it is on trial, and have the engine use it. On a thread of its own: a
        handshake may take long."""
        worker = member.address
        with self._lock:
            breakers = self._breakers.get(worker.at)
            trial = breakers is not None and breakers.on_trial(time.monotonic()) and not self._alone()
        try:
            port = self._connect(worker)
            if trial:
                with self._lock:
                    if member.state == "connecting":
                        member.state = "on trial"
                self._try(port)
            first_seat = self._seat(port)
        except LaminaError as error:
            self._give_up(member, error)
            return
        with self._lock:
            if self._engine is not None and member.state != "left" and self._members.get(worker.name) is member:
                member.state = "used"
                self._engine.join(port, seated(first_seat, port.page_layout), worker.credentials)
                port.watch(self._engine.leave, self._engine.leaving)
                return
        port.close()

    def _try(self, port: RemoteAttention) -> None:
        """Wait until a worker on trial has answered heartbeats for a while. Raises HolderLost where it has not."""
        end = time.monotonic() + _TRIAL * self._config.worker_timeout
        while time.monotonic() < end and not self._over.wait(_LOOK):
            if port.closed:
                port.close()
                raise HolderLost(f"attention worker {port.name} was lost on trial, before it had any KV")

    def _give_up(self, member: _Member, error: LaminaError) -> None:
        logger.warning("attention worker %s cannot be used: %s", member.address.name, error)
        member.state = "left"
        self.lost(member.address.name)

    def _alone(self) -> bool:
        return all(port.closed for port in list(self._ports))

    def _count(self, worker: WorkerAddress, corrupt: bool = False) -> None:
        """Count a failure of a worker for its place. The caller has the lock."""
        breakers, now = self._breakers.setdefault(worker.at, PlaceBreakers(*self._limits)), time.monotonic()
        if corrupt:
            if breakers.quarantine.failed(now):
                logger.error(
                    "attention worker %s is quarantined for %.0f min: frames to or from it came with changed bits "
                    "again; look at its line, network card and memory",
                    worker.name,
                    breakers.quarantine.seconds(now) / 60,
                )
        elif breakers.flapping.failed(now):
            logger.warning(
                "attention worker %s was lost too often lately: it is not used for %.0f s, if there is another",
                worker.name,
                breakers.flapping.seconds(now),
            )

    def close(self) -> None:
        """Close the ports to all workers, and end those workers that were started here."""
        if self._autoscaling is not None:
            self._autoscaling.close()
        self._over.set()
        with self._lock:
            for member in self._members.values():
                if member.timer is not None:
                    member.timer.cancel()
        self._threads.shutdown(cancel_futures=True)
        try:
            for port in self._ports:
                port.close()
            for port in self._ports:
                port.parted()
        finally:
            self.workers.close()

    def _connect(self, worker: WorkerAddress) -> RemoteAttention:
        port = connect(
            worker.address,
            worker.name,
            self._holder,
            self._compute_dtype,
            self._model,
            SeatOptions(self._identity.engine, seat_share=self._share, linger=self._identity.linger),
            ChannelOptions(
                credentials=worker.credentials,
                local_channel=self._config.local_channel,
                data_channel=self._config.data_channel,
                lost_after=self._config.worker_timeout,
            ),
        )
        port.on_corrupt = partial(self.corrupt, port.name)
        self._credentials[port.name] = worker.credentials
        with self._lock:
            self._ports = [*(open_port for open_port in self._ports if not open_port.closed), port]
        return port

    def _seat(self, port: RemoteAttention) -> Seat:
        """Rank 0's seat behind a port. Raises HolderFault where what it keeps cannot be listed."""
        first_seat = seat(0, port.capacity, self._holder)
        if not port.resumed:
            return first_seat
        return first_seat._replace(kept=survey(port, self._config.worker_timeout, self._identity.past_epochs))


class Autoscaling:
    """Runs an `Autoscaler` for an engine, every `PERIOD` seconds from `begin` to `close`. `clock` is in seconds.

    It decides on the engine's thread, between two batches; what it asks of the workers returns at once.
    """

    def __init__(
        self,
        engine: Engine,
        workers: AttentionWorkers,
        autoscaler: Autoscaler,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._workers = workers
        self._autoscaler = autoscaler
        self._clock = clock
        self._closed = threading.Event()
        self._waits = False  # for the engine's thread, which may be in a long batch
        self._leaving: set[str] = set()  # workers that are drained; none of them is in the number that is wanted

    def begin(self) -> None:
        threading.Thread(target=self._run, name="lamina-autoscaling", daemon=True).start()

    def close(self) -> None:
        self._closed.set()

    def _run(self) -> None:
        while not self._closed.wait(PERIOD) and self._engine.alive:
            if not self._waits:
                self._waits = True
                self._engine.look(self.decide)

    def decide(self, control: ControlPlane, stats: EngineStats) -> None:
        """Decide, and do what follows. For the engine's thread."""
        self._waits = False
        if self._closed.is_set():
            return
        try:
            self._decide(control, stats)
        except Exception:  # the engine goes on with the workers that it has
            logger.exception("the number of attention workers could not be decided")

    def _decide(self, control: ControlPlane, stats: EngineStats) -> None:
        load = kv_load(control, stats.generation_tokens)
        if load is None:
            return
        decision = self._autoscaler.decide(load, self._clock())
        stats.workers_wanted, stats.kv_full_in = decision.wanted, decision.full_in
        if not decision.reason:
            return
        choices.info("%s", decision.reason)
        if decision.leaves:
            self._drain(decision.leaves)
        else:
            self._grow()

    def _grow(self) -> None:
        self._workers.grow(self._autoscaler.wanted + len(self._leaving))

    def _drain(self, name: str) -> None:
        def over(done: Future[int]) -> None:
            self._leaving.discard(name)
            if (error := done.exception()) is None:
                self._workers.retire(name)
                self._grow()  # more may be wanted by now than there was room for beside the one that goes
            else:
                logger.warning("%s", error)

        self._leaving.add(name)
        self._engine.drain(name).add_done_callback(over)


def connect_attention(
    config: EngineConfig, files: ModelFiles, sizes: Sizes, identity: Identity, workers: AttentionWorkers | None
) -> AttentionPool | None:
    """The attention workers that the config asks for, or `workers`; None where attention is computed in this process.
    Nothing is started or connected yet. Raises InvalidRequest, CredentialsError."""
    workers = workers or _workers(config, sizes)
    if workers is None:
        return None
    return AttentionPool(
        workers, config, sizes.ranks[0], files.fingerprint, sizes.dtype_name, identity, sizes.first_heads
    )


def _workers(config: EngineConfig, sizes: Sizes) -> AttentionWorkers | None:
    workers = config.attention_workers
    if isinstance(workers, int):
        from lamina.deploy.local import LocalAttentionWorkers

        count, limit = config.first_workers, config.most_workers
        if not limit:
            return None
        devices = [str(device) for device in attention_devices(config)]
        kv_memory = sizes.holder.kv_memory
        threads = max(1, sizes.threads // max(1, count))  # they attend a layer at the same time
        cold = sizes.holder.cold
        return LocalAttentionWorkers(
            count, kv_memory=kv_memory, threads=threads, most=limit, devices=devices, cold=cold
        )
    files = CredentialFiles(config.tls_dir, config.token_file)
    for address in workers:
        guarded = files.current.ca and files.current.token
        if not guarded and not config.insecure and not is_loopback(split_address(address)[0]):
            raise InvalidRequest(
                f"the attention worker at {address} is on another host: give tls_dir and token_file, or insecure=True"
            )
    return ListedWorkers(
        workers, credentials=lambda: files.renewed() or files.current, answers=answers, clock=time.monotonic
    )
