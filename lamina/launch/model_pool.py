"""From a config to the model workers beyond 0: what each loads, their channels, and news of them to the engine.

Knows members and channels by their constructors; knows nothing of batches.
"""

from __future__ import annotations

import json
import logging
import queue
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from lamina.config import EngineConfig
from lamina.deploy.worker_events import ModelWorkerProcesses
from lamina.errors import EngineError, InvalidRequest, ModelFileError, PolicyError, UnsupportedModelError
from lamina.system.progress import Progress
from lamina_protocols.errors import LaminaError
from lamina_protocols.messages import HolderConfig
from lamina_protocols.socket_channel import listen_tcp
from lamina_workers.decoder.config import ModelConfig
from lamina_workers.decoder.shard import Shard, rank_shape
from lamina_workers.errors import DeviceError, KernelsUnavailable, NotEnoughMemory, RanksError
from lamina_workers.parallel import peer_messages
from lamina_workers.parallel.collectives import Meeting
from lamina_workers.parallel.peers import Peer, PeerListener
from lamina_workers.parallel.rank_group import SLACK, RankGroup

if TYPE_CHECKING:
    import torch

    from lamina.engine.engine import Engine

logger = logging.getLogger("lamina")

WAITING = "model workers"  # what progress is told while they come up

_HOPELESS: dict[str, type[LaminaError]] = {
    error.__name__: error
    for error in (
        DeviceError, InvalidRequest, KernelsUnavailable, ModelFileError, NotEnoughMemory, PolicyError, RanksError,
        UnsupportedModelError,
    )
}  # fmt: skip
"""What a model worker may say that another try would not change."""


def rank_holders(holder: HolderConfig, model: ModelConfig, ranks: int) -> tuple[HolderConfig, ...]:
    """What the holders of each rank are built from: its own heads of every layer, and its part of the memory. `model`
    is that of `with_ranks`."""
    if ranks == 1:
        return (holder,)
    shapes = [rank_shape(model, Shard(rank, ranks)) for rank in range(ranks)]
    return tuple(
        replace(
            holder,
            layers=tuple(
                replace(
                    spec,
                    heads=len(shape.heads),
                    kv_heads=len(shape.kv_heads),
                    policies=spec.policies[shape.kv_heads.start : shape.kv_heads.stop],
                )
                for spec in holder.layers
            ),
            kv_memory=holder.kv_memory * len(shape.kv_heads) // model.num_key_value_heads,
        )
        for shape in shapes
    )


class ModelWorkerPool:
    """Model workers 1 and up of one engine: `begin`, `mates`, `watch`, `close`, in this order.

    `begins` says what each of them loads, by rank from 1 on.
    """

    def __init__(self, members: ModelWorkerProcesses, begins: Sequence[peer_messages.Begin]) -> None:
        self._members = members
        self._begins = {begin.rank: begin for begin in begins}
        self._host = members.host
        self._progress: Progress | None = None
        self._news: queue.SimpleQueue[Peer | EngineError | LaminaError] = queue.SimpleQueue()
        self._engine: Engine | None = None
        self._group: RankGroup | None = None
        self._crew = PeerListener(
            self._begins.__getitem__,
            self._ready,
            self._failed,
            members.lost,
            self._loads,
            members.host,
            members.credentials,
        )

    def begin(self, progress: Progress | None) -> None:
        """Have them brought up, while the caller does something else."""
        self._progress = progress
        self._members.start(self._crew.address, self._crew.invite, self._ended)

    def mates(self) -> list[Peer]:
        """All of them, once they are ready. Raises what one of them says that it lacks, or EngineError where one ends
        instead."""
        mates: dict[int, Peer] = {}
        while len(mates) < len(self._begins):
            news = self._news.get()
            if not isinstance(news, Peer):
                raise news
            mates[news.rank] = news
            if self._progress is not None:
                self._progress(WAITING, len(mates), len(self._begins))
        return [mates[rank] for rank in sorted(mates)]

    def group(self, device: torch.device, patience: float) -> RankGroup:
        """All ranks, once they are ready, and how they find each other. `patience` is what they have with holders."""
        self._group = RankGroup(self.mates(), self._meeting, device, 2 * patience + SLACK)
        return self._group

    def _meeting(self, generation: int) -> Meeting:
        if self._host is None:
            return Meeting(generation, path=str(self._crew.folder / "group"))
        return Meeting(generation, host=self._host, port=_free_port(self._host), address=self._host)

    def watch(self, engine: Engine) -> None:
        """Tell the engine from now on who goes and who is back."""
        self._engine = engine
        while not self._news.empty():
            news = self._news.get()
            if isinstance(news, Peer):
                engine.rank_back(news)

    def close(self) -> None:
        """Let all go, and end their processes. No batch may be under way."""
        if self._group is not None:
            self._group.leave()
        self._crew.close()
        self._members.close()

    # On threads of the members' and the crew's.

    def _ready(self, mate: Peer) -> None:
        logger.info("model worker %d: %s, on %s", mate.rank, mate.name, mate.said.device)
        if self._engine is not None:
            self._engine.rank_back(mate)
        else:
            self._news.put(mate)

    def _failed(self, rank: int, said: peer_messages.Failed) -> None:
        if kind := _HOPELESS.get(said.kind):
            error = kind(f"model worker {rank}: {said.reason}")
            if self._engine is None:
                self._news.put(error)
                return
            self._engine.rank_gone(rank, said.reason, True)
        logger.warning("model worker %d cannot begin: %s", rank, said.reason or "its channel closed")

    def _ended(self, rank: int, name: str, how: str, stays: bool) -> None:
        self._crew.revoke(name)
        if self._engine is not None:
            self._engine.rank_gone(rank, how, stays)
        else:  # while it loads, one that ends will end again
            self._news.put(EngineError(f"model worker {rank} did not start, {how}"))

    def _loads(self, rank: int, what: str, done: int, total: int) -> None:
        logger.debug("model worker %d: %s %d of %d", rank, what, done, total)


def begins(
    config: EngineConfig,
    holders: Sequence[HolderConfig],
    *,
    folder: str,
    fingerprint: str,
    dtype: str,
    devices: Sequence[str],
    attention_device: str,
    threads: int,
    early_query: bool,
    engine: str,
    epoch: int,
) -> list[peer_messages.Begin]:
    """What each model worker beyond 0 is to load and to be; `holders` are those of all ranks, one where all are
    replicas, and `devices` has one for each model worker."""
    ranks = len(holders)
    return [
        peer_messages.Begin(
            rank=rank,
            ranks=ranks,
            folder=folder,
            model=fingerprint,
            rope_scaling=json.dumps(dict(config.rope_scaling)) if config.rope_scaling is not None else "",
            dtype=dtype,
            device=devices[rank],
            attention_device=attention_device,
            compile=config.compile,
            threads=threads,
            holder=holders[rank % ranks],
            early_query=early_query and ranks > 1,  # a replica's stores must be answered
            patience=config.worker_timeout,
            engine=engine,
            linger=config.linger,
            local_channel=config.local_channel,
            data_channel=config.data_channel,
            lost_after=config.worker_timeout,
            epoch=epoch,
        )
        for rank in range(1, config.model_workers)
    ]


def _free_port(host: str) -> int:
    """A TCP port of this host where nobody listens now."""
    with listen_tcp(host, 0) as sock:
        port: int = sock.getsockname()[1]
    return port
