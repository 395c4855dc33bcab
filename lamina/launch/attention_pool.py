"""From a config to the attention workers of an engine: who they are, a port to each, and news of them to the engine.

Knows members and ports by their constructors; knows nothing of batches.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from lamina.config import EngineConfig
from lamina.deploy.listed_attention import ListedWorkers, answers
from lamina.deploy.worker_events import AttentionWorkers, WorkerAddress
from lamina.engine.holders import seated
from lamina.errors import EngineError, InvalidRequest, LaminaError, WorkersUnavailable
from lamina.launch.kv_sizing import attention_devices
from lamina.scheduling.placement import Holder
from lamina.system.progress import Progress
from lamina_protocols.channels import Credentials, is_loopback, split_address
from lamina_protocols.messages import HolderConfig, Surveyed
from lamina_protocols.service import WorkerUnreachable
from lamina_workers.attention_worker.page_layout import page_cost
from lamina_workers.errors import HolderFault
from lamina_workers.ports.port import survey
from lamina_workers.ports.remote import RemoteAttention, connect
from lamina_workers.process.credentials import load_credentials

if TYPE_CHECKING:
    from lamina.engine.engine import Engine
    from lamina_workers.model_worker.interface import Workers
    from lamina_workers.parallel.peers import Peer

logger = logging.getLogger("lamina")

LOCAL = 0  # the number of the holder in the engine's own process
_WEIGHT_UNIT = 1 << 20  # bytes of KV memory that one unit of a holder's weight stands for


class AttentionPool:
    """The attention workers of one engine: `begin`, `ports`, `watch`, `close`, in this order."""

    def __init__(
        self,
        members: AttentionWorkers,
        config: EngineConfig,
        holder: HolderConfig,
        model: str,
        compute_dtype: str,
        engine: str | None = None,
        heads: Sequence[int] = (1,),
        past: int = 0,
    ) -> None:
        self.members = members
        self.found: dict[str, Surveyed] = {}  # by port: what workers keep from before, which is closed unless adopted
        self._engine = engine
        self._past = past
        self._share = (heads[0], sum(heads)) if len(heads) > 1 else (1, 1)
        self._credentials: dict[str, Credentials | None] = {}  # by port
        self._config = config
        self._holder = holder
        self._page_bytes = page_cost(holder)
        self._model = model
        self._compute_dtype = compute_dtype
        self._pool = ThreadPoolExecutor(max_workers=8, thread_name_prefix="lamina-connect")
        self._started: Future[tuple[WorkerAddress, ...]] | None = None
        self._ports: list[RemoteAttention] = []

    def begin(self, progress: Progress | None) -> None:
        """Have the workers brought up, while the caller does something else."""
        self._started = self._pool.submit(self.members.start, progress)

    def ports(self) -> Iterator[tuple[RemoteAttention, Holder]]:
        """A connected port to each, once all are up; one that has gone again since is given up, while others are there.
        Raises EngineError where they do not come up or refuse."""
        if self._started is None:
            raise EngineError("the attention workers were not begun")
        gone, connected = "none is up", False
        futures = [(member, self._pool.submit(self._connect, member)) for member in self._started.result()]
        for member, future in futures:
            try:
                port = future.result()
            except WorkerUnreachable as error:
                gone = str(error)
                logger.warning("attention worker %s cannot be used: %s", member.name, gone)
                self.members.lost(member.name)
                continue
            except LaminaError as error:
                raise EngineError(f"an attention worker cannot be used: {error}") from error
            try:
                holder = self._as_holder(port)
            except HolderFault as fault:
                gone = str(fault)
                logger.warning("attention worker %s cannot be used: %s", member.name, gone)
                self.members.lost(member.name)
                continue
            connected = True
            yield port, holder
        if not connected:
            raise WorkersUnavailable(f"no attention worker can be used: {gone}")

    def seats(self, workers: Workers[Peer], number: int) -> Iterator[tuple[int, str, Holder, Surveyed | None]]:
        """Have `workers` join all of `ports`: the holders by number, from `number` on, those of one attention worker
        together. With each its name, and what it keeps from before. Raises as `ports` does."""
        for port, holder in self.ports():
            try:
                seats = workers.join(number, port, self._credentials[port.name])
            except HolderFault as error:
                raise EngineError(str(error)) from error
            yield number, port.name, holder, self.found.get(port.name)
            for at, seat in enumerate(seats, number + 1):
                yield at, port.name, seated(seat), seat.kept
            number += 1 + len(seats)

    def watch(self, engine: Engine) -> None:
        """Tell the engine from now on who joins and who leaves."""

        def joined(member: WorkerAddress) -> None:
            try:
                port = self._connect(member)
                holder = self._as_holder(port)
            except LaminaError as error:
                logger.warning("attention worker %s cannot be used: %s", member.name, error)
                self.members.lost(member.name)
                return
            engine.join(port, holder, member.credentials)

        self.members.watch(joined, engine.leave)

    def close(self) -> None:
        """Let all workers go, and end those that were started here."""
        self._pool.shutdown(cancel_futures=True)
        try:
            closing = [thread for port in self._ports if (thread := _closing(port)) is not None]
            for thread in closing:
                thread.join()
        finally:
            self.members.close()

    def _connect(self, member: WorkerAddress) -> RemoteAttention:
        port = connect(
            member.address,
            name=member.name,
            layers=self._holder.layers,
            page_size=self._holder.page_size,
            kv_dtype=self._holder.dtype,
            compute_dtype=self._compute_dtype,
            model=self._model,
            credentials=member.credentials,
            local_channel=self._config.local_channel,
            data_channel=self._config.data_channel,
            lost_after=self._config.worker_timeout,
            engine=self._engine,
            seat_share=self._share,
            linger=self._config.linger,
        )
        self._credentials[port.name] = member.credentials
        self._ports = [*(known for known in self._ports if not known.closed), port]
        return port

    def _as_holder(self, port: RemoteAttention) -> Holder:
        holder = Holder(port.capacity // self._page_bytes, weight=max(1, port.capacity // _WEIGHT_UNIT))
        if port.resumed:
            kept = self.found[port.name] = survey(port, self._config.worker_timeout, self._past)
            holder.keeps(kept)
        return holder


def connect_attention(
    config: EngineConfig,
    holder: HolderConfig,
    model: str,
    compute_dtype: str,
    threads: int,
    members: AttentionWorkers | None,
    engine: str | None = None,
    own: HolderConfig | None = None,
    heads: Sequence[int] = (1,),
    past: int = 0,
) -> AttentionPool | None:
    """The attention workers that the config asks for, or `members`; None where attention is computed here.

    `model` is the model's fingerprint, `engine` the id by which workers know an engine that may be gone on from. With
    several ranks `heads` are the KV heads of each, and `own` is what rank 0's holders are built from. Epochs up to
    `past` are those of an engine before, of which workers take nothing any more. Nothing is started or connected yet.
    """
    if members is None:
        members = _members(config, holder, threads)
    if members is None:
        return None
    return AttentionPool(members, config, own or holder, model, compute_dtype, engine, heads, past)


def _members(config: EngineConfig, holder: HolderConfig, threads: int) -> AttentionWorkers | None:
    workers = config.attention_workers
    if isinstance(workers, int):
        from lamina.deploy.local_attention import LocalAttentionWorkers

        if not workers:
            return None
        devices = [str(device) for device in attention_devices(config)]
        return LocalAttentionWorkers(workers, kv_memory=holder.kv_memory, threads=threads, devices=devices)
    credentials = load_credentials(config.tls_dir, config.token_file)
    for address in workers:
        guarded = credentials.ca and credentials.token
        if not guarded and not config.insecure and not is_loopback(split_address(address)[0]):
            raise InvalidRequest(
                f"the attention worker at {address} is on another host: give tls_dir and token_file, or insecure=True"
            )
    return ListedWorkers(workers, credentials=credentials, answers=answers, clock=time.monotonic)


def _closing(port: RemoteAttention) -> threading.Thread | None:
    """A thread that closes the port, for one may not answer for seconds; None where that is done. A plain thread: when
    Python ends there are no pools any more, nor, in some versions, threads."""
    thread = threading.Thread(target=port.close, name="lamina-closing")
    try:
        thread.start()
    except RuntimeError:
        port.close()
        return None
    return thread
