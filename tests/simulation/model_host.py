"""Model workers beyond 0 in the simulated cluster: whole replicas, each a process that the engine's process starts.

The real `PeerWorker` with a port of its own to each attention worker; it dies with the engine.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from attention_host import AttentionHost
from checksum_model import ChecksumDecoder
from network import Client, Connection, Line
from scenario import Model
from virtual_time import Process, Time, Wake

from lamina_protocols.channels import control
from lamina_protocols.channels.channels import Channel, Credentials
from lamina_protocols.errors import LaminaError
from lamina_workers.model_worker.layer_slices import Waits
from lamina_workers.model_worker.model_worker import ModelWorker
from lamina_workers.parallel import peer_messages
from lamina_workers.parallel.peer_worker import PeerWorker
from lamina_workers.parallel.peers import Peer, PeerListener
from lamina_workers.ports.data_channel import ChannelOptions
from lamina_workers.ports.port import AttentionPort
from lamina_workers.ports.remote import Edges

NOTICED_S = 0.002  # after a process has ended, its parent knows it


def edges(process: Process, time: Time, hosts: list[AttentionHost]) -> Edges:
    """How a process reaches attention workers, at 10.0.0.NUMBER."""

    def host(address: str) -> AttentionHost:
        return hosts[int(address.split(":")[0].split(".")[-1])]

    def client(address: str, credentials: Credentials) -> Any:
        at = host(address)
        return Client(address, at.line, time, process, lambda: at if at.up else None)

    def channel(client: Any, welcome: control.Welcome, session: str, options: ChannelOptions) -> tuple[Any, str]:
        process.check()
        return host(client.address).connect(process, session).engine, "grpc"

    return Edges(client, channel, process)


def part(process: Process, hosts: list[AttentionHost]) -> None:
    """A process is gone: its machine closes its connections to attention workers."""
    for host in hosts:
        for connection in host.line.connections:
            if connection.engine.owner is process:
                connection.engine.died()


class TaskWaiter:
    """As a `Waiter`, for a task of a process."""

    def __init__(self, process: Process) -> None:
        self._news = Wake(process)
        self._channels: list[Channel] = []

    def add(self, channel: Channel) -> None:
        channel.watch(self._news.notify)
        self._channels.append(channel)

    def remove(self, channel: Channel) -> None:
        self._channels.remove(channel)

    def wait(self, timeout: float | None = None) -> list[Channel]:
        if not any(channel.ready() for channel in self._channels):
            self._news.wait(timeout)
        return [channel for channel in self._channels if channel.ready()]

    def close(self) -> None:
        pass


def waits(process: Process) -> Waits:
    """Waits of a process's task for several channels."""
    waiter: Any = TaskWaiter(process)
    return Waits(waiter, process.monotonic)


class _Parts:
    """What a replica computes with."""

    device = torch.device("cpu")

    def __init__(self, process: Process, model: Model, begin: peer_messages.Begin) -> None:
        self._process = process
        self._model = model
        self._begin = begin

    def worker(self, group: object, ports: Mapping[int, AttentionPort], epoch: int) -> ModelWorker:
        decoder: Any = ChecksumDecoder(self._model)
        begin = self._begin
        return ModelWorker(decoder, begin.holder, ports, 1, begin.patience, self._process.monotonic, epoch)


class ReplicaHosts:
    """The replicas of one engine's process. `ready(peer)` and `gone(rank)` are called for each that is there, or not
    any more, in the engine's process."""

    def __init__(
        self, engine: Process, time: Time, rng: random.Random, latency: float, hosts: list[AttentionHost], model: Model,
        begin: Callable[[int], peer_messages.Begin], ready: Callable[[Peer], None], gone: Callable[[int], None],
    ) -> None:  # fmt: skip
        self._engine = engine
        self._time = time
        self._line = Line(time, rng, latency)
        self._hosts = hosts
        self._model = model
        self._begin = begin
        self._ready = ready
        self._gone = gone
        self._processes: dict[int, Process] = {}
        self._names: dict[str, int] = {}
        self._starts = 0

    def start(self, rank: int) -> None:
        """Start a process, unless there is one."""
        if not self._engine.alive or (rank in self._processes and self._processes[rank].alive):
            return
        self._starts += 1
        name = f"model-{rank}.{self._starts}"
        self._names[name] = rank
        process = self._processes[rank] = Process(self._time, name, lambda task, error: self._ended(process))
        connection = Connection(self._line, self._time, self._engine, process, lambda: None)
        process.start(lambda: self._serve(process, connection), name)
        self._engine.start(lambda: self._enlist(rank, name, connection), f"enlist-{name}")

    def kill(self, rank: int) -> bool:
        """Kill a process. Whether there was one."""
        process = self._processes.get(rank)
        if process is None or not process.alive:
            return False
        self._ended(process)
        return True

    def end(self) -> None:
        """The engine's process is gone, and all these with it."""
        for process in self._processes.values():
            if process.alive:
                process.kill()
                part(process, self._hosts)

    def _serve(self, process: Process, connection: Connection) -> None:
        channel: Any = connection.worker
        load: Any = lambda begin, folder, progress: _Parts(process, self._model, begin)  # noqa: E731
        with contextlib.suppress(LaminaError):
            PeerWorker(
                channel, process.name, load=load, waits=waits(process), edges=edges(process, self._time, self._hosts)
            ).serve()
        self._time.after(0.0, self._ended, process)

    def _ended(self, process: Process) -> None:
        if not process.alive:
            return
        process.kill()
        part(process, self._hosts)
        for connection in self._line.connections:
            if connection.worker.owner is process:
                connection.worker.died()
        rank = self._names[process.name]
        self._time.after(NOTICED_S, self._noticed, rank, process)

    def _noticed(self, rank: int, process: Process) -> None:
        if self._engine.alive and self._processes[rank] is process:
            self._gone(rank)

    def _enlist(self, rank: int, name: str, connection: Connection) -> None:
        channel: Any = connection.engine
        listener: Any = SimpleNamespace(_begin=self._begin, _progress=lambda *report: None)
        try:
            said = PeerListener._load(listener, rank, name, channel)
        except (LaminaError, TimeoutError):
            channel.close()
            return
        if isinstance(said, peer_messages.Ready):
            self._ready(Peer(rank, name, channel, said, self._given_up))

    def _given_up(self, name: str) -> None:
        process = self._processes.get(self._names[name])
        if process is not None and process.name == name:
            self._time.after(0.0, self._ended, process)
