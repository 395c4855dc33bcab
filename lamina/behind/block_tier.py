"""The client of attention workers that hold another engine's blocks (`BlockTier`).

KV heads are dealt among the workers, and each worker has all blocks, of its own heads. So every block is lost with any
worker: the worker in its place begins with empty blocks, and the engine computes again what it needs.
"""

from __future__ import annotations

import dataclasses
import logging
import secrets
import time
from collections.abc import Callable, Sequence

import torch

from lamina.errors import EngineError, InvalidRequest, LaminaError
from lamina.messages.engine_request import KvSavings
from lamina_kernels.partial import Partial, empty, with_sinks
from lamina_protocols.channels.channels import Credentials
from lamina_protocols.channels.grpc_client import WorkerClient
from lamina_protocols.messages.layers import BlockConfig
from lamina_protocols.messages.messages import Announced, BlockTables, Row, Usage
from lamina_protocols.messages.pools import Pool, pools
from lamina_protocols.messages.routes import Route, Span
from lamina_workers.attention_worker.page_layout import block_bytes
from lamina_workers.decoder.model import KeyValueReady
from lamina_workers.devices.staging import DIRECT, Staging, staging_for
from lamina_workers.errors import HolderLost
from lamina_workers.model_worker.compiled_exchange import CompiledExchange, ExchangeMaker
from lamina_workers.model_worker.holder_traffic import HolderTraffic, check_answer, holder_traffic
from lamina_workers.ports.data_channel import ChannelOptions
from lamina_workers.ports.port import Replies
from lamina_workers.ports.remote import RemoteAttention, SeatOptions, connect
from lamina_workers.ports.timing import Stopwatch, Times

logger = logging.getLogger("lamina")

_STATUS_S = 10.0


@dataclasses.dataclass(slots=True)
class TierWorker:
    """A worker of the tier. `address`: "host:port"; `credentials`: a client's, None where it takes any client. Both may
    change: they are read each time that the worker is connected to."""

    address: str
    credentials: Credentials | None = None


def dealt(holder: BlockConfig, workers: int) -> list[tuple[BlockConfig, tuple[range, ...]]]:
    """For each worker its config, and of each layer the KV heads that it has. Raises InvalidRequest where a layer has
    fewer KV heads than there are workers."""
    fewest = min(spec.kv_heads for spec in holder.layers)
    if fewest < workers:
        raise InvalidRequest(f"{workers} attention workers for layers of {fewest} KV heads; allowed: up to {fewest}")
    shares = []
    for worker in range(workers):
        layers, heads = [], []
        for spec in holder.layers:
            share = range(spec.kv_heads * worker // workers, spec.kv_heads * (worker + 1) // workers)
            policies = spec.policies[share.start : share.stop]
            layers.append(
                dataclasses.replace(spec, kv_heads=len(share), heads=len(share) * spec.group, policies=policies)
            )
            heads.append(share)
        shares.append((dataclasses.replace(holder, layers=tuple(layers)), tuple(heads)))
    return shares


def room(workers: Sequence[TierWorker], holder: BlockConfig) -> int:
    """How many blocks the workers have memory for, whatever `holder.blocks` is. Raises WorkerUnreachable,
    WorkerRefused, InvalidRequest."""
    blocks = []
    for worker, (config, _) in zip(workers, dealt(dataclasses.replace(holder, blocks=1), len(workers)), strict=True):
        client = WorkerClient(worker.address, worker.credentials or Credentials())
        try:
            blocks.append(client.status(_STATUS_S).kv_memory // block_bytes(config))
        finally:
            client.close()
    return min(blocks)


@dataclasses.dataclass(slots=True)
class _Lane:
    """The step under way in the layers of one pool: its batch, and what it is exchanged by once the first layer has
    come. None: by messages of Python."""

    table: int
    pool: Pool
    exchanges: ExchangeMaker
    batch: int = 0
    compiled: CompiledExchange | None = None
    traffic: tuple[HolderTraffic, ...] | None = None
    due: int = 0  # layers that have not come


class BlockTier:
    """Attends the steps of an engine that owns its blocks. One thread uses it.

    `holder` describes all layers, with their policies; each worker gets its share of the KV heads. `compute_dtype`: of
    q, k, v and the outputs. `model` names what workers show in their status. `staging_of` makes what copies between a
    device of the engine and this host; on a GPU it has not been run. Raises WorkerUnreachable, WorkerRefused,
    InvalidRequest.
    """

    def __init__(
        self,
        workers: Sequence[TierWorker],
        holder: BlockConfig,
        compute_dtype: str,
        model: str,
        channel: ChannelOptions | None = None,
        clock: Callable[[], float] = time.perf_counter,
        staging_of: Callable[[torch.device], Callable[[], Staging]] = staging_for,
    ) -> None:
        self.holder = holder
        self._staging_of = staging_of
        self._ways: dict[torch.device, Staging] = {}
        self._workers = tuple(workers)
        self._shares = dealt(holder, len(workers))
        self._dtype, self._model = compute_dtype, model
        self._channel = channel or ChannelOptions()
        self._engine = secrets.token_hex(16)
        self._epoch, self._batch = 1, 0
        self._watch = Stopwatch(clock)
        self._lanes = [
            _Lane(holder.tables[pool.layers[0]], pool, ExchangeMaker(number, pool))
            for number, pool in enumerate(pools(holder))
        ]
        self._lane_of = {layer: lane for lane in self._lanes for layer in lane.pool.layers}
        self._announced: dict[int, int] = {}  # by block table, the batch whose answers have not been read
        self._last: dict[int, int] = {}  # by block table, the last batch
        self._rows: dict[int, list[tuple[int, int]]] = {}  # by block table: start and count of each row of the step
        self._tokens: dict[int, int] = {}  # by block table: of all rows of the step
        self._usages: dict[int, list[Usage]] = {}  # by block table: of the rows of the last step
        self._ports: list[RemoteAttention] = []
        try:
            for number in range(len(workers)):
                self._ports.append(self._connected(number))
        except BaseException:
            self.close()
            raise
        self._replies = [Replies(port) for port in self._ports]

    def _connected(self, number: int) -> RemoteAttention:
        worker, (config, _) = self._workers[number], self._shares[number]
        channel = dataclasses.replace(self._channel, credentials=worker.credentials)
        seat = SeatOptions(self._engine)
        return connect(worker.address, worker.address, config, self._dtype, self._model, seat, channel)

    def announce(
        self, table: int, query_start_loc: torch.Tensor, seq_lens: torch.Tensor, block_table: torch.Tensor
    ) -> None:
        """A step begins in the layers of one block table; the tensors, int32 on the host, are those of `BlockTables`,
        and may change afterwards. Raises HolderLost."""
        self._batch += 1
        tensors = (x.clone() for x in (query_start_loc, seq_lens, block_table))
        message = BlockTables(self._epoch, self._batch, table, *tensors)
        ends = query_start_loc.tolist()
        self._tokens[table] = ends[-1]
        self._rows[table] = [
            (length - end + begin, end - begin)
            for length, begin, end in zip(seq_lens.tolist(), ends, ends[1:], strict=False)
        ]
        for lane in self._lanes_of(table):
            self._end(lane)
            lane.batch, lane.due, lane.traffic = self._batch, len(lane.pool.layers), None
        for replies in self._replies:
            replies.forget(self._last.get(table, 0))
            replies.expect(self._epoch, self._batch)
            replies.port.send(message)
        self._announced[table] = self._last[table] = self._batch

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None = None,
        target: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The attention output of a layer for the step that was announced to its table: q `[tokens, heads, d_k]`, k
        `[tokens, KV heads, d_k]`, v `[tokens, KV heads, d_v]`, all on one device. The answer `[tokens, heads * d_v]` is
        there too: in `target`, or where the next call may change it. `sinks`: as in `KeyValueReady`, on the host.

        From a device each tensor is copied once, and the thread waits once for the three, without Python's lock; not
        for the copy back. Raises HolderLost, HolderFault, EngineError."""
        lane = self._lane_of[layer]
        table = lane.table
        tokens = self._tokens[table]
        if len(q) != tokens:
            raise EngineError(f"layer {layer} has {len(q)} tokens, its step was announced with {tokens}")
        self._take_answers(table)
        if lane.traffic is None:
            lane.traffic = self._traffic(lane)
            ids = self._epoch, lane.batch
            lane.compiled = lane.exchanges.begin(lane.traffic, ids, tokens, q.dtype, Times())
        if q.device not in self._ways:
            self._ways[q.device] = self._staging_of(q.device)()
        way = self._ways[q.device]
        way.turn()
        q, k, v = (way.down(x).view(x.shape) for x in (q, k, v))
        way.landed()
        key_value = KeyValueReady(layer, k, v, sinks=sinks)
        if lane.compiled is None:
            out = self._exchanged(lane, layer, q, key_value)
        else:
            out = self._compiled(lane.compiled, layer, q, key_value)
        lane.due -= 1
        if not lane.due:
            self._end(lane)
        return way.up(out, target)

    def _lanes_of(self, table: int) -> list[_Lane]:
        return [lane for lane in self._lanes if lane.table == table]

    def _take_answers(self, table: int) -> None:
        """Read whether the workers have accepted a step. Raises EngineError where one has not."""
        batch = self._announced.pop(table, None)
        if batch is None:
            return
        usages: list[Usage] = []
        for replies in self._replies:
            answer = replies.take(Announced, batch, None, self._channel.lost_after)
            if not answer.accepted:
                raise EngineError(f"attention worker {replies.port.name} refuses a step: {answer.reason}")
            usages += answer.usages
        self._usages[table] = usages

    def savings(self) -> dict[str, float]:
        """What policies that choose have read, kept and missed of the rows of the last step, since these began, as
        shares (`KvSavings.stats`); empty where there are none."""
        return KvSavings.of([usage for of_table in self._usages.values() for usage in of_table]).stats()

    def _traffic(self, lane: _Lane) -> tuple[HolderTraffic, ...]:
        rows = self._rows[lane.table]
        spans = [Span(start, count) for start, count in rows]
        traffic = []
        for replies, (_, layer_heads) in zip(self._replies, self._shares, strict=True):
            heads = tuple(layer_heads[lane.pool.layers[0]])
            routes = [
                Route(number, heads, Row(number, start, count, (0, start + count), True), (start, start + count))
                for number, (start, count) in enumerate(rows)
            ]
            spec = lane.pool.config.layers[0]
            holder = holder_traffic(spec, DIRECT, True, self._channel.lost_after, replies, spans, routes)
            if replies.frames is not None:
                replies.frames.patience = max(replies.frames.patience, holder.timeout)
            traffic.append(holder)
        return tuple(traffic)

    def _compiled(
        self, exchange: CompiledExchange, layer: int, q: torch.Tensor, key_value: KeyValueReady
    ) -> torch.Tensor:
        running = exchange.attend(layer, q, key_value, False, self._watch)
        try:
            while True:
                next(running)
        except StopIteration as stop:
            out: torch.Tensor = stop.value
            return out

    def _exchanged(self, lane: _Lane, layer: int, q: torch.Tensor, key_value: KeyValueReady) -> torch.Tensor:
        """The same by messages that Python sends and reads."""
        spec, traffic = lane.pool.config.layers[0], lane.traffic or ()
        for holder in traffic:
            holder.send_both(self._epoch, lane.batch, layer, q, key_value)
        merged: Partial | None = None
        for holder in traffic:
            answer, _ = holder.take(lane.batch, layer)
            count = holder.rounds[0].stop
            check_answer(holder.replies, answer.out, (count, spec.d_v), q.dtype)
            if holder.queries is None:
                merged = answer
                continue
            if merged is None:
                merged = empty(len(q) * spec.heads, spec.d_v, q.dtype)
            merged.out[holder.queries], merged.lse[holder.queries] = answer.out, answer.lse
        if merged is None:
            raise EngineError(f"no attention worker attends layer {layer}")
        out = merged.out if key_value.sinks is None else with_sinks(merged, key_value.sinks)
        return out.view(len(q), -1)

    def _end(self, lane: _Lane) -> None:
        if lane.compiled is not None:
            lane.compiled.close()
            lane.compiled = None

    def restore(self, seconds: float, pause: float = 0.1) -> None:
        """After a HolderLost: connect again to the workers that are lost, for so many seconds at most. All blocks are
        empty then. Raises HolderLost where one does not come back."""
        deadline = time.monotonic() + seconds
        for lane in self._lanes:
            self._end(lane)
        self._announced.clear()
        self._epoch += 1
        for number, port in enumerate(self._ports):
            if not port.closed:
                continue
            port.close()
            while True:
                try:
                    self._ports[number] = self._connected(number)
                    break
                except LaminaError as error:
                    if time.monotonic() + pause > deadline:
                        raise HolderLost(f"attention worker {port.name} does not come back: {error}") from error
                    time.sleep(pause)
            self._replies[number] = Replies(self._ports[number])

    def close(self) -> None:
        """Let the workers go. They free all blocks."""
        for port in self._ports:
            port.close()
        for port in self._ports:
            port.parted()
