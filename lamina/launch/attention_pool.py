"""The attention workers of an engine: where they are, a port to each, and their joining and leaving for the engine.

The number of an engine's attention workers follows its load: a clock asks, `Autoscaler` decides, and workers are
started, or drained and ended.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

from lamina.config import EngineConfig
from lamina.deploy.breakers import WorkerBreakers
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

PERIOD = 0.5  # seconds between two decisions


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
        self._asked = False  # the engine, which may be in a long batch
        self._leaving: set[str] = set()  # workers that are drained; none of them is in the number that is wanted

    def begin(self) -> None:
        """Decide from now on."""
        threading.Thread(target=self._run, name="lamina-autoscaling", daemon=True).start()

    def close(self) -> None:
        """Decide nothing more."""
        self._closed.set()

    def _run(self) -> None:
        while not self._closed.wait(PERIOD) and self._engine.alive:
            if not self._asked:
                self._asked = True
                self._engine.look(self.decide)

    def decide(self, control: ControlPlane, stats: EngineStats) -> None:
        """Decide, and do what follows. For the engine's thread."""
        self._asked = False
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


_TRIAL = 2  # times `worker_timeout`, for which a worker on trial must answer heartbeats
_LOOK = 0.1  # seconds between two looks at a worker on trial

LOCAL = 0  # the number of the holder in the engine's own process


class AttentionPool:
    """The attention workers of one engine: `begin`, `join`, `watch`, `close`, in this order.

    `holder` is what the holders of rank 0 are built from, `model` the model's fingerprint. Each rank gets its part of
    the workers' memory by its number of KV heads in `heads`.
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
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._ports: list[RemoteAttention] = []
        self._autoscaling: Autoscaling | None = None
        self.breakers = WorkerBreakers(lambda: all(port.closed for port in list(self._ports)))

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
        gone, connected = "none is up", False
        futures = [(worker, self._threads.submit(self._connect, worker)) for worker in self._started.result()]
        for worker, future in futures:
            try:
                port = future.result()
                own = self._seat(port)
            except (WorkerUnreachable, HolderFault) as error:
                gone = str(error)
                self._give_up(worker, error)
                continue
            except LaminaError as error:
                raise EngineError(f"an attention worker cannot be used: {error}") from error
            connected = True
            try:
                others = workers.join(number, port, self._credentials[port.name])
            except HolderFault as error:
                raise EngineError(str(error)) from error
            for each in (own, *others):
                yield number, port.name, seated(each, port.page_layout), each.kept
                number += 1
        if not connected and not self.workers.optional:
            raise WorkersUnavailable(f"no attention worker can be used: {gone}")

    def watch(self, engine: Engine) -> None:
        """Notify the engine from now on of workers that join and leave, and have their number follow its load where the
        config says so. Workers are connected to on threads of their own: a handshake may take long, and the thread of
        the events starts other workers again. A worker that leaves before its handshake is over does not join."""
        expected: set[str] = set()

        def joined(worker: WorkerAddress) -> None:
            try:
                trial = self.breakers.on_trial(worker)
                port = self._connect(worker)
                if trial:
                    self._try(port)
                own = self._seat(port)
            except LaminaError as error:
                self._give_up(worker, error)
                return
            with self._lock:
                if worker.name in expected:
                    engine.join(port, seated(own, port.page_layout), worker.credentials)
                    port.watch(engine.leave, engine.leaving)
                    return
            port.close()

        def joins(worker: WorkerAddress) -> None:
            with self._lock:
                expected.add(worker.name)
            self.breakers.admit(worker, partial(self._run, joined, worker))

        def leaves(name: str) -> None:
            self.breakers.left(name)
            with self._lock:
                expected.discard(name)
                engine.leave(name)

        for port in self._ports:
            port.watch(engine.leave, engine.leaving)
        self.workers.watch(joins, leaves)
        if self._config.autoscale is not None:
            self._autoscaling = Autoscaling(engine, self.workers, Autoscaler(*self._config.autoscale))
            self._autoscaling.begin()

    def _run(self, do: Callable[[WorkerAddress], None], worker: WorkerAddress) -> None:
        with contextlib.suppress(RuntimeError):  # the pool is closed
            self._threads.submit(do, worker)

    def close(self) -> None:
        """Close the ports to all workers, and end those workers that were started here."""
        if self._autoscaling is not None:
            self._autoscaling.close()
        self.breakers.close()
        self._over.set()
        self._threads.shutdown(cancel_futures=True)
        try:
            for port in self._ports:
                port.close()
            for port in self._ports:
                port.parted()
        finally:
            self.workers.close()

    def _try(self, port: RemoteAttention) -> None:
        """Wait until a worker on trial has answered heartbeats for a while. Raises HolderLost where it has not."""
        end = time.monotonic() + _TRIAL * self._config.worker_timeout
        while time.monotonic() < end and not self._over.wait(_LOOK):
            if port.closed:
                port.close()
                raise HolderLost(f"attention worker {port.name} was lost on trial, before it had any KV")

    def lost(self, name: str) -> None:
        """The engine has lost a worker, or has given it up."""
        self.breakers.failed(name)
        self.workers.lost(name)

    def _give_up(self, worker: WorkerAddress, error: LaminaError) -> None:
        logger.warning("attention worker %s cannot be used: %s", worker.name, error)
        self.lost(worker.name)

    def _connect(self, worker: WorkerAddress) -> RemoteAttention:
        self.breakers.known(worker)
        port = connect(
            worker.address,
            worker.name,
            self._holder,
            self._compute_dtype,
            self._model,
            SeatOptions(self._identity.engine, seat_share=self._share, linger=self._config.linger),
            ChannelOptions(
                credentials=worker.credentials,
                local_channel=self._config.local_channel,
                data_channel=self._config.data_channel,
                lost_after=self._config.worker_timeout,
            ),
        )
        port.on_corrupt = partial(self.breakers.corrupt, port.name)
        self._credentials[port.name] = worker.credentials
        with self._lock:
            self._ports = [*(known for known in self._ports if not known.closed), port]
        return port

    def _seat(self, port: RemoteAttention) -> Seat:
        """Rank 0's seat behind a port. Raises HolderFault where what it keeps cannot be listed."""
        own = seat(0, port.capacity, self._holder)
        if not port.resumed:
            return own
        return own._replace(kept=survey(port, self._config.worker_timeout, self._identity.past_epochs))


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

        count, most = config.first_workers, config.most_workers
        if not most:
            return None
        devices = [str(device) for device in attention_devices(config)]
        kv_memory = sizes.holder.kv_memory
        threads = max(1, sizes.threads // max(1, count))  # they attend a layer at the same time
        cold = sizes.holder.cold
        return LocalAttentionWorkers(count, kv_memory=kv_memory, threads=threads, most=most, devices=devices, cold=cold)
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
