"""From a config to the attention workers of an engine: who they are, a port to each, and news of them to the engine.

Knows members and ports by their constructors; knows nothing of batches.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from lamina.config import EngineConfig
from lamina.errors import EngineError, InvalidRequest, LaminaError, WorkersUnavailable
from lamina.members import FixedMembers, Member, Members, answers
from lamina.model_cache import Progress
from lamina.placement import Holder
from lamina_protocols.channels import is_loopback, split_address
from lamina_protocols.messages import HolderConfig
from lamina_protocols.service import WorkerUnreachable
from lamina_workers.credentials import load_credentials
from lamina_workers.layout import page_cost
from lamina_workers.remote_attention import RemoteAttention, connect

if TYPE_CHECKING:
    from lamina.engine import Engine

logger = logging.getLogger("lamina")

LOCAL = 0  # the number of the holder in the engine's own process
_WEIGHT_UNIT = 1 << 20  # bytes of KV memory that one unit of a holder's weight stands for


class Attachment:
    """The attention workers of one engine: `begin`, `ports`, `watch`, `close`, in this order."""

    def __init__(
        self, members: Members, config: EngineConfig, holder: HolderConfig, model: str, compute_dtype: str
    ) -> None:
        self.members = members
        self._config = config
        self._holder = holder
        self._page_bytes = page_cost(holder)
        self._model = model
        self._compute_dtype = compute_dtype
        self._pool = ThreadPoolExecutor(max_workers=8, thread_name_prefix="lamina-connect")
        self._started: Future[tuple[Member, ...]] | None = None
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
            connected = True
            yield port, self._as_holder(port)
        if not connected:
            raise WorkersUnavailable(f"no attention worker can be used: {gone}")

    def watch(self, engine: Engine) -> None:
        """Tell the engine from now on who joins and who leaves."""

        def joined(member: Member) -> None:
            try:
                port = self._connect(member)
            except LaminaError as error:
                logger.warning("attention worker %s cannot be used: %s", member.name, error)
                self.members.lost(member.name)
                return
            engine.join(port, self._as_holder(port))

        self.members.watch(joined, engine.leave)

    def close(self) -> None:
        """Let all workers go, and end those that were started here."""
        self._pool.shutdown(cancel_futures=True)
        for port in self._ports:
            port.close()
        self.members.close()

    def _connect(self, member: Member) -> RemoteAttention:
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
        )
        self._ports = [*(known for known in self._ports if not known.closed), port]
        return port

    def _as_holder(self, port: RemoteAttention) -> Holder:
        return Holder(port.capacity // self._page_bytes, weight=max(1, port.capacity // _WEIGHT_UNIT))


def attach(
    config: EngineConfig,
    holder: HolderConfig,
    model: str,
    compute_dtype: str,
    threads: int,
    members: Members | None,
) -> Attachment | None:
    """The attention workers that the config asks for, or `members`; None where attention is computed here.

    `model` is the model's fingerprint. Nothing is started or connected yet.
    """
    if members is None:
        members = _members(config, holder, threads)
    return Attachment(members, config, holder, model, compute_dtype) if members is not None else None


def _members(config: EngineConfig, holder: HolderConfig, threads: int) -> Members | None:
    workers = config.attention_workers
    if isinstance(workers, int):
        from lamina.local_cluster import LocalCluster

        return LocalCluster(workers, kv_memory=holder.kv_memory, threads=threads) if workers else None
    credentials = load_credentials(config.tls_dir, config.token_file)
    for address in workers:
        guarded = credentials.ca and credentials.token
        if not guarded and not config.insecure and not is_loopback(split_address(address)[0]):
            raise InvalidRequest(
                f"the attention worker at {address} is on another host: give tls_dir and token_file, or insecure=True"
            )
    return FixedMembers(workers, credentials=credentials, answers=answers, clock=time.monotonic)
