"""Model workers 1 and up of an engine: what each loads, their channels, and their losses and returns for the engine."""

from __future__ import annotations

import contextlib
import json
import logging
import queue
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lamina.config import EngineConfig
from lamina.deploy.supervision import ModelSupervisor
from lamina.errors import EngineError, InvalidRequest, ModelFileError, PolicyError, UnsupportedModelError
from lamina.launch.journal_setup import Identity
from lamina.launch.kv_sizing import Sizes
from lamina.launch.model_files import ModelFiles
from lamina.system.progress import Progress
from lamina.system.timers import later
from lamina_protocols.channels.sockets import listen_tcp
from lamina_protocols.errors import LaminaError
from lamina_workers.errors import DeviceError, KernelsUnavailable, NotEnoughMemory, RanksError
from lamina_workers.parallel import peer_messages
from lamina_workers.parallel.collectives import Meeting
from lamina_workers.parallel.peers import SLACK, Peer, PeerListener, RankGroup

if TYPE_CHECKING:
    import torch

    from lamina.engine.engine import Engine

logger = logging.getLogger("lamina")

WAITING = "model workers"  # what is reported to progress while they start
_CONNECTING_S = 120.0  # until a process that was started connects; then what it reports is waited for
_DOWNLOADING_S = 3 * 3600.0  # the same on another machine, which gets the model first

_HOPELESS: dict[str, type[LaminaError]] = {
    error.__name__: error
    for error in (
        DeviceError, InvalidRequest, KernelsUnavailable, ModelFileError, NotEnoughMemory, PolicyError, RanksError,
        UnsupportedModelError,
    )
}  # fmt: skip
"""The errors of a model worker that another try would not change."""


class ModelWorkerPool:
    """Model workers 1 and up of one engine: `begin`, `peers` or `group`, `watch`, `close`, in this order.

    `begins` has what each of them loads. Methods that begin with an underscore and take a rank are called on threads of
    the processes and the listener.
    """

    def __init__(self, processes: ModelSupervisor[Any], begins: Sequence[peer_messages.Begin]) -> None:
        self._processes = processes
        self._begins = {begin.rank: begin for begin in begins}
        self._host = processes.host
        self._progress: Progress | None = None
        self._started: queue.SimpleQueue[Peer | EngineError | LaminaError] = queue.SimpleQueue()
        self._engine: Engine | None = None
        self._group: RankGroup | None = None
        self._listener = PeerListener(
            self._begins.__getitem__,
            self._ready,
            self._failed,
            processes.lost,
            self._loads,
            processes.host,
            processes.credentials,
        )

    def begin(self, progress: Progress | None) -> None:
        """Start the processes. Returns at once."""
        self._progress = progress
        self._processes.start(self._listener.address, self._invite, self._ended)

    def peers(self) -> list[Peer]:
        """All of them by rank, once they are ready. Raises the error that one of them reports, or EngineError if one
        ends instead, or does not connect."""
        peers: dict[int, Peer] = {}
        limit = self._connecting_s
        while len(peers) < len(self._begins):
            try:
                started = self._started.get(timeout=limit)
            except queue.Empty:
                if absent := self._listener.absent():
                    raise EngineError(f"{', '.join(absent)} did not connect within {limit:g} s") from None
                continue
            if not isinstance(started, Peer):
                raise started
            peers[started.rank] = started
            if self._progress is not None:
                self._progress(WAITING, len(peers), len(self._begins))
        return [peers[rank] for rank in sorted(peers)]

    @property
    def _connecting_s(self) -> float:
        """Seconds in which a process that was started connects."""
        return _CONNECTING_S if self._host is None else _DOWNLOADING_S

    def group(self, device: torch.device, patience: float) -> RankGroup:
        """The group of all ranks, once they are ready. `patience` is how many seconds they wait for a holder."""
        self._group = RankGroup(self.peers(), self._meeting, device, 2 * patience + SLACK)
        return self._group

    def _meeting(self, generation: int) -> Meeting:
        if self._host is None:
            return Meeting(generation, path=str(self._listener.folder / "group"))
        return Meeting(generation, host=self._host, port=_free_port(self._host), address=self._host)

    def watch(self, engine: Engine) -> None:
        """Notify the engine from now on of model workers that are gone or back."""
        self._engine = engine
        self._tell(engine)

    def _tell(self, engine: Engine) -> None:
        """Notify the engine of all that are ready. Several threads may do it: each worker is told once."""
        with contextlib.suppress(queue.Empty):
            while True:
                started = self._started.get_nowait()
                if isinstance(started, Peer):
                    engine.rank_back(started)

    def close(self) -> None:
        """Close all channels and end the processes. No batch may be under way."""
        if self._group is not None:
            self._group.leave()
        self._listener.close()
        self._processes.close()

    def _invite(self, rank: int, name: str) -> bytes:
        """Where `peers` does not wait for it any more, a process that does not connect is ended, for another one."""
        if self._engine is not None:
            later(self._connecting_s, lambda: self._look_for(name))
        return self._listener.invite(rank, name)

    def _look_for(self, name: str) -> None:
        if name in self._listener.absent():
            logger.warning("%s did not connect within %g s", name, self._connecting_s)
            self._processes.lost(name)

    def _ready(self, peer: Peer) -> None:
        logger.info("model worker %d: %s, on %s", peer.rank, peer.name, peer.said.device)
        self._started.put(peer)  # first, so that `watch` finds it, or is over before the engine is looked for here
        if self._engine is not None:
            self._tell(self._engine)

    def _failed(self, rank: int, said: peer_messages.Failed) -> None:
        if kind := _HOPELESS.get(said.kind):
            error = kind(f"model worker {rank}: {said.reason}")
            if self._engine is None:
                self._started.put(error)
                return
            self._engine.rank_gone(rank, said.reason, True)
        logger.warning("model worker %d cannot begin: %s", rank, said.reason or "its channel closed")

    def _ended(self, rank: int, name: str, how: str, stays: bool) -> None:
        self._listener.revoke(name)
        if self._engine is not None:
            self._engine.rank_gone(rank, how, stays)
        else:  # a process that ends while it loads would end again
            self._started.put(EngineError(f"model worker {rank} did not start, {how}"))

    def _loads(self, rank: int, what: str, done: int, total: int) -> None:
        logger.debug("model worker %d: %s %d of %d", rank, what, done, total)


def begins(config: EngineConfig, files: ModelFiles, sizes: Sizes, identity: Identity) -> list[peer_messages.Begin]:
    """What each model worker beyond 0 is to load and to be."""
    ranks = len(sizes.ranks)  # 1 where all model workers are replicas
    scaling = config.rope_scaling
    return [
        peer_messages.Begin(
            rank=rank,
            ranks=ranks,
            folder=str(files.path),
            model=files.fingerprint,
            rope_scaling="" if scaling is None else json.dumps(dict(scaling)),
            dtype=sizes.dtype_name,
            packed=sizes.packing.packed,
            quantize=sizes.packing.quantize,
            device=str(sizes.devices[rank]),
            attention_device=str(sizes.kv_device(rank)),
            compile=False,
            threads=sizes.own_threads,
            holder=sizes.ranks[rank % ranks],
            patience=config.worker_timeout,
            engine=identity.engine or "",
            linger=identity.linger,
            local_channel=config.local_channel,
            data_channel=config.data_channel,
            lost_after=config.worker_timeout,
            epoch=identity.past_epochs + 1,
        )
        for rank in range(1, config.model_workers)
    ]


def _free_port(host: str) -> int:
    """A TCP port of this host that is free now."""
    with listen_tcp(host, 0) as sock:
        port: int = sock.getsockname()[1]
    return port
