"""What asking attention workers costs: bare messages, and the model's layers with every attention asked elsewhere.

Real attention workers, each a process, on this machine. They share its cores, as the workers of an engine on this
machine do.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from itertools import accumulate, pairwise

import torch

from lamina.deploy.local import LocalAttentionWorkers
from lamina.deploy.worker_events import WorkerAddress
from lamina.errors import EngineError
from lamina.kv.kv_shares import apportion
from lamina.measure.batch_driver import PATIENCE
from lamina.measure.hardware.decode_bench import Held, by_part, decode_batch, load
from lamina_protocols.messages.messages import Announced, Announcement, Fault, Query, Request
from lamina_workers.ports.data_channel import ChannelOptions
from lamina_workers.ports.remote import RemoteAttention, connect

_NO_BATCH = 1 << 30  # a number that no batch has


class ExchangeBench:
    """Answers one measurement at a time; times are seconds. `counts`: how many workers are asked together, in turn;
    `cells`: the (batch, context) that will be measured, for which there must be room."""

    def __init__(self, model: str, counts: list[int], cells: list[list[int]]) -> None:
        self._loaded = load(model, cells)
        self._free = ExitStack()
        total = sum(counts) + 1
        cluster = LocalAttentionWorkers(total, kv_memory=self._loaded.holder.kv_memory, threads=self._loaded.threads)
        self._members = cluster.start()
        self._free.callback(cluster.close)
        self._sequences: dict[int, Held] = {}
        first = 0
        for count in counts:
            self._sequences[count] = self._at(self._members[first : first + count])
            first += count

    def close(self) -> None:
        """End the workers."""
        self._free.close()

    @torch.inference_mode()
    def layers(
        self, count: int, batch: int, context: int, steps: int, query_first: bool = False
    ) -> dict[str, list[float]]:
        """Of steps of the model's own forward pass, attended by `count` workers that share it by heads: "announce" and
        "run", as in `Seconds`."""
        sequences, seconds, decoder = self._sequences[count], [], self._loaded.decoder
        sequences.fill(batch, context)
        for _ in range(steps + 2):
            run = decoder.forward(decode_batch(batch, context, decoder.device), query_first=query_first)
            seconds.append(sequences.step(run, query_first))
        return by_part(seconds[2:])

    def messages(self, channel: str, sizes: list[int], times: int) -> dict[str, list[float]]:
        """Of small messages there and back ("0"), and of queries of so many bytes that the worker turns down, so that
        it reads them and does nothing else."""
        port = self._connect(self._members[-1], channel)
        try:
            if port.channel_kind != channel:
                raise EngineError(f"the channel is {port.channel_kind}, expected {channel}")
            port.send(Announcement(1, 1, 0, (), ()))
            if not isinstance(answer := port.receive(PATIENCE), Announced):
                raise EngineError(f"an empty announcement was answered by {answer!r:.200}")
            width = self._loaded.holder.layers[0].d_k
            by_size: dict[str, list[float]] = {"0": []}
            for number in range(2, times + 2):
                by_size["0"].append(self._there_and_back(port, Announcement(1, number, 0, (), ())))
            queries = [torch.zeros(max(1, size // width // 4), width) for size in sizes]
            for _ in range(times):
                for q in queries:
                    seconds = self._there_and_back(port, Query(1, _NO_BATCH, 0, q))
                    by_size.setdefault(str(q.nbytes), []).append(seconds)
            return by_size
        finally:
            port.close()

    def _there_and_back(self, port: RemoteAttention, request: Request) -> float:
        start = time.perf_counter()
        port.send(request)
        answer = port.receive(PATIENCE)
        seconds = time.perf_counter() - start
        if not isinstance(answer, Announced if isinstance(request, Announcement) else Fault):
            raise EngineError(f"{type(request).__name__} was answered by {answer!r:.200}")
        return seconds

    def _at(self, members: tuple[WorkerAddress, ...]) -> Held:
        """Sequences whose heads these workers share."""
        loaded = self._loaded
        counts = apportion(loaded.config.num_key_value_heads, [1] * len(members))
        ranges = pairwise(accumulate(counts, initial=0))
        heads = {number: tuple(range(first, last)) for number, (first, last) in enumerate(ranges, 1)}
        ports = {number: self._connect(member, "local") for number, member in enumerate(members, 1)}
        for port in ports.values():
            self._free.callback(port.close)
        return Held(loaded.holder, ports, heads, dtype=loaded.dtype, threads=loaded.threads)

    def _connect(self, member: WorkerAddress, channel: str) -> RemoteAttention:
        """A port to a worker over the channel "local" or "grpc", as an engine would open it."""
        return connect(
            member.address,
            member.name,
            self._loaded.holder,
            str(self._loaded.dtype).removeprefix("torch."),
            self._loaded.fingerprint,
            channel=ChannelOptions(credentials=member.credentials, local_channel=channel == "local"),
        )
