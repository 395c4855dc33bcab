"""A decode batch whose layers go to all holders and back in one compiled call each.

It is possible where every token of the batch is attended by holders, each of which is in this process with kernels that
compiled code can call, or elsewhere. Over a plain socket compiled code sends and receives frames; over other channels
Python carries them. What compiled code was not told of, it leaves on the socket: `Replies` reads it, with the errors
that it always has.

`ExchangeMaker` gives a batch its `CompiledExchange`, which has a `RemoteHolder` for each holder elsewhere, with the
memory of its frames, and for each holder in this process the work that its accepted announcement has brought.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Generator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from lamina_kernels.attention.merge import merge_block, merge_kernel
from lamina_kernels.exchange import exchange_blocks as blocks
from lamina_kernels.exchange.exchange_loop import exchange_kernel
from lamina_kernels.exchange.layer_work import LayerWork, functions
from lamina_kernels.paged.pages import FLOATS
from lamina_kernels.partial import Partial, with_sinks
from lamina_protocols.channels.versions import STATE_FRAMES
from lamina_protocols.errors import LaminaError
from lamina_protocols.frames.layer_frames import frames_between, seconds_stand, set_batch, set_layer
from lamina_protocols.frames.tensors import dtype_name
from lamina_protocols.messages.layers import STATES, LayerSpec
from lamina_protocols.messages.messages import Advanced, Attended
from lamina_protocols.messages.pools import Pool
from lamina_workers.decoder.model import KeyValueReady
from lamina_workers.devices.staging import DIRECT
from lamina_workers.model_worker.holder_traffic import HolderTraffic, check_answer
from lamina_workers.model_worker.interface import Suspended, Waiting
from lamina_workers.model_worker.state_traffic import join
from lamina_workers.ports.direct import Buffer, compiled, enabled
from lamina_workers.ports.port import Replies
from lamina_workers.ports.remote import RemoteAttention
from lamina_workers.ports.timing import Stopwatch, Times

_NOTHING = memoryview(b"")


class Gathered:
    """Which vectors of q, k and v go to a holder, as fields of its block."""

    def __init__(self, holder: HolderTraffic, spec: LayerSpec, tokens: int, itemsize: int) -> None:
        self.queries, self.fresh = counts_of(holder, spec, tokens)
        self.fields: dict[str, int] = {}
        state = spec.kind in STATES  # x is q, gates are k, and there is no v
        sides = (
            ("q", self.queries, holder.queries, itemsize),
            ("k", self.fresh, holder.fresh, 4 if state else itemsize),
            ("v", 0 if state else self.fresh, None if state else holder.fresh, itemsize),
        )
        self.answered = self.fresh if state else self.queries
        for (name, count, index, size), width in zip(sides, spec.widths, strict=True):
            self.fields |= {f"{name}_count": count, f"{name}_bytes": width * size}
            if count and index is not None:
                self.fields[f"{name}_index"] = index.data_ptr()


class RemoteHolder:
    """One holder elsewhere: its frames' memory and the block that expects its answers."""

    def __init__(
        self,
        holder: HolderTraffic,
        port: RemoteAttention,
        block: Any,
        spec: LayerSpec,
        layers: int,
        dtype: torch.dtype,
        tokens: int,
    ) -> None:
        gathered = Gathered(holder, spec, tokens, dtype.itemsize)
        name = dtype_name(dtype)
        query, answer = frames_between(gathered.queries, gathered.fresh, spec, name, name)
        self.holder = holder
        self.port = port
        self.direct = port.direct
        self.queries = gathered.queries
        self.largest = max(query.size, answer.size if holder.reads else 0)  # bytes of its frames
        places = query.places()
        self._sent = Buffer(query.size)
        self._sent.bytes[: blocks.HEAD] = memoryview(query.head(0))
        for field in places:
            gathered.fields[f"{field}_to"] = self._sent.address + places[field].at
        self._head = Buffer(blocks.HEAD)
        self._head.bytes[:] = memoryview(answer.head(0))
        self.frame = Buffer(answer.size)
        self.taken = np.zeros(layers, np.int64)
        self._block, self._state = block, spec.kind in STATES
        for field, value in gathered.fields.items():
            setattr(block, field, value)
        block.layers, block.head, block.frame = layers, self._head.address, self.frame.address
        block.size = answer.size if holder.reads else 0
        block.channel, block.timed = 0 if self.direct is None else self.direct.address, 1
        block.sent_frame, block.sent_size = self._sent.address, query.size
        block.taken = self.taken.ctypes.data
        out, lse = answer.places()["out"], answer.places().get("lse")  # what states give has no lse
        self.out = self.frame.tensor(out.at, out.size, dtype).view(-1, spec.d_v)
        self.lse = torch.empty(0) if lse is None else self.frame.tensor(lse.at, lse.size, torch.float32)

    def begin(self, holder: HolderTraffic, ids: tuple[int, int]) -> None:
        """A batch of the same shape, as the first or as the next one."""
        self.holder = holder
        for head in (self._sent.bytes, self._head.bytes):
            set_batch(head, *ids)
        self._block.timeout, self._block.live = int(holder.timeout * 1e9), 0
        self._block.sent = self._block.sent_size  # no frame is being sent until the first layer is asked for
        self.port.due += holder.reads  # one reply at a time, which compiled code may receive
        if holder.reads and self.direct is not None:
            self.direct.expect(ctypes.addressof(self._block), self.frame.bytes)

    def unsent(self) -> memoryview:
        """What is left of the frame that is being sent; from now on that is the channel's."""
        block = self._block
        if block.sent >= block.sent_size:
            return _NOTHING
        remainder = self._sent.bytes[block.sent : block.sent_size]
        block.sent = block.sent_size
        return remainder

    def left(self, asked: int) -> float:
        """Seconds that the holder still has for its answer, since it was `asked` by the clock of `monotonic_ns`; 0 for
        one that is not asked yet."""
        return max(0.0, self.holder.timeout - (time.monotonic_ns() - asked) * 1e-9) if asked else self.holder.timeout

    def settle(self, batch: int, layer: int, asked: int, waits: bool) -> bool:
        """Read what Python must read before compiled code can go on. False where that has not come yet, and this must
        not wait for it. Raises HolderFault, HolderLost."""
        replies = self.holder.replies
        while self.direct is not None and self.direct.channel.unsettled:
            if not (waits or replies.port.ready()):
                return False
            replies.read(self.left(asked))
        if asked and not self._block.arrived and replies.heard(batch):
            kind: type[Any] = Advanced if self._state else Attended
            reply = replies.take(kind, batch, layer, self.holder.timeout)
            self.port.due += 1  # of the next layer
            check_answer(replies, reply.out, tuple(self.out.shape), self.out.dtype)
            with torch.inference_mode():  # a suspended batch's answers are taken outside of its run
                self.out.copy_(reply.out)
                if not self._state:
                    self.lse.copy_(reply.lse)
            set_layer(self.frame.bytes, layer, reply.seconds)
            self._block.arrived = time.monotonic_ns()
        return True

    def carry(self) -> None:
        """Send the frame that is ready. Raises HolderLost."""
        self.port.send_frame((self._sent.bytes,))

    def fetch(self, asked: int) -> None:
        """Wait for a frame, and take it where it is the answer; else sort it in as a reply. Raises HolderLost."""
        frame = self.port.receive_frame(self.left(asked))
        block, head = self._block, self._head.bytes
        set_layer(head, block.layer)
        due = len(frame) == block.size and frame[: blocks.SAME + 4] == head[: blocks.SAME + 4]
        if due and seconds_stand(frame):
            self.frame.bytes[:] = frame
            block.arrived = time.monotonic_ns()
        else:
            self.holder.replies.sort(self.port.reply_of(frame))

    def close(self, asked: int) -> None:
        """The batch is over, or given up with a layer that was `asked` for."""
        if not asked or self._block.arrived:
            self.port.due -= self.holder.reads
        if self.direct is not None:
            self.direct.forget(ctypes.addressof(self._block))


def counts_of(holder: HolderTraffic, spec: LayerSpec, tokens: int) -> tuple[int, int]:
    """How many vectors of q go to a holder, and of k."""
    of_q, of_k = spec.vectors
    queries = count_of(holder.queries, tokens * of_q) if holder.reads else 0
    return queries, count_of(holder.fresh, tokens * of_k) if holder.stores else 0


def count_of(index: torch.Tensor | None, total: int) -> int:
    """How many vectors an index picks of `total`; None: all."""
    return total if index is None else len(index)


_KEPT_TOKENS = 512


class CompiledExchange:
    """The layers of one pool, of one batch at a time. Made by an `ExchangeMaker`; `close` it before holders forget the
    batch. Then it can `begin` another batch of the same shape."""

    def __init__(
        self,
        number: int,
        pool: Pool,
        holders: Sequence[tuple[HolderTraffic, RemoteAttention | LayerWork]],
        tokens: int,
        dtype: torch.dtype,
    ) -> None:
        spec = pool.config.layers[0]  # as any of them
        self._number, self._layers = number, np.array(pool.layers)
        self._spec, self._tokens = spec, tokens
        self._locals: list[tuple[HolderTraffic, LayerWork]] = [
            (holder, way) for holder, way in holders if isinstance(way, LayerWork)
        ]
        elsewhere = [(holder, way) for holder, way in holders if not isinstance(way, LayerWork)]
        self._blocks = (blocks.Remote * max(len(elsewhere), 1))()
        self._remotes = [
            RemoteHolder(holder, way, block, spec, pool.layers[-1] + 1, dtype, tokens)
            for (holder, way), block in zip(elsewhere, self._blocks, strict=False)
        ]
        self._lent = [(remote, remote.direct) for remote in self._remotes if remote.direct is not None]
        self._scratch = np.zeros(2 + max(len(elsewhere), 1), np.int64)
        self._keep: list[Any] = []
        self._taken_here: dict[Replies, Any] = {}  # nanoseconds of each layer
        answers = [(remote.holder, Partial(remote.out, remote.lse)) for remote in self._remotes if remote.queries]
        local_blocks = (blocks.Here * max(len(self._locals), 1))()
        for (holder, work), block in zip(self._locals, local_blocks, strict=False):
            answers.append((holder, self._place(block, holder, work, dtype)))
        address = self._scratch.ctypes.data
        self._block = blocks.Exchange(
            functions=functions().ctypes.data,
            scratch=address,
            polls=address + 16,
            n_remotes=len(elsewhere),
            remotes=ctypes.addressof(self._blocks),
            n_here=len(self._locals),
            here=ctypes.addressof(local_blocks),
            carried=len(elsewhere) - len(self._lent),
        )
        self._keep += [local_blocks, answers]
        self._joins: list[tuple[torch.Tensor, torch.Tensor | None]] = []  # of states: answers, and where they belong
        self._answer = self._merged(answers, dtype)
        self._result = blocks.WAITING  # of a call that was made while the batch was suspended, or its error
        self._failure: LaminaError | None = None
        self._batch, self._times = 0, Times()
        self._call = compiled(exchange_kernel())
        self._address = ctypes.addressof(self._block)

    def _place(self, block: Any, holder: HolderTraffic, work: LayerWork, dtype: torch.dtype) -> Partial:
        """Fill in the block of a holder here, and give where it answers."""
        spec = self._spec
        gathered = Gathered(holder, spec, self._tokens, dtype.itemsize)
        for name in "qkv":
            if f"{name}_index" in gathered.fields:
                room = Buffer(gathered.fields[f"{name}_count"] * gathered.fields[f"{name}_bytes"])
                gathered.fields[f"{name}_to"] = room.address
                self._keep.append(room)
        for field, value in gathered.fields.items():
            setattr(block, field, value)
        out = torch.empty(gathered.answered, spec.d_v, dtype=dtype)
        lse = torch.empty(gathered.answered)
        nanoseconds = self._taken_here[holder.replies] = np.zeros(work.layers[-1] + 1, np.int64)
        block.work, block.out, block.lse, block.taken = (
            work.address,
            out.data_ptr(),
            lse.data_ptr(),
            nanoseconds.ctypes.data,
        )
        return Partial(out, lse)

    def _merged(self, answers: Sequence[tuple[HolderTraffic, Partial]], dtype: torch.dtype) -> Partial:
        """Of all vectors, what all answers are merged into; the answer itself where one has everything."""
        spec = self._spec
        total = self._tokens * spec.heads
        state, (holder, answer) = spec.kind in STATES, answers[0]
        if len(answers) == 1 and len(answer.out) == total and (holder.fresh if state else holder.queries) is None:
            return answer
        merged = Partial(torch.empty(total, spec.d_v, dtype=dtype), torch.empty(total))
        if state:
            self._joins = [(of_holder.out, holder.fresh) for holder, of_holder in answers]
            return merged
        merges = []
        for holder, answer in answers:
            for piece, index in holder.pieces(answer):
                n = len(piece.lse)
                pointers = piece.out.data_ptr(), piece.lse.data_ptr()
                merges.append(merge_block(merged, pointers, piece.out.dtype, n, index))
                self._keep += [piece, index]
        addresses = np.array([ctypes.addressof(block) for block in merges], np.int64)
        x = self._block
        x.n_merges, x.merges, x.merge_kernel = len(merges), addresses.ctypes.data, merge_kernel()[0]
        x.whole, x.whole_lse, x.whole_out = total, merged.lse.data_ptr(), merged.out.data_ptr()
        x.whole_bytes = merged.out.nbytes
        self._keep += [merges, addresses, merged]
        return merged

    @property
    def fits(self) -> bool:
        """Whether no frame is larger than its channel takes."""
        return all(remote.largest <= direct.channel.max_frame for remote, direct in self._lent)

    def begin(self, traffic: Sequence[HolderTraffic], ids: tuple[int, int], times: Times) -> None:
        """A batch, of the holders in their order; ids: epoch and number."""
        self._batch, self._times = ids[1], times
        self._result, self._failure = blocks.WAITING, None
        x = self._block
        x.layer = x.begun = x.local = x.remote = x.answered = x.waited = 0
        elsewhere = [holder for holder in traffic if not holder.here]
        for remote, holder in zip(self._remotes, elsewhere, strict=True):
            remote.begin(holder, ids)

    def attend(self, layer: int, q: torch.Tensor, kv: KeyValueReady, suspends: bool, watch: Stopwatch) -> Suspended:
        """The attention output of a layer, `[T, heads * d_v]`, which stays until the next one is attended; or what its
        states give for x and gates, in the places of q and k. Raises HolderFault, HolderLost."""
        x = self._block
        q, k, v = q.contiguous(), kv.k.contiguous(), kv.v.contiguous()
        x.layer, x.waits = layer, int(not suspends)
        x.q, x.k, x.v = q.data_ptr(), k.data_ptr(), v.data_ptr()
        while (result := self._advance()) != 0:
            remote = self._remotes[x.at]
            unread = result in (blocks.OTHER, blocks.ENDED)
            if result == blocks.WAITING or (unread and not x.waits and not remote.holder.replies.port.ready()):
                watch.stop()  # an answer is not there, or a part of a frame alone
                remote.holder.replies.collected(self._batch, partial(self._collect, remote))
                yield Waiting(remote.holder.replies, self._batch)
                remote.holder.replies.collected(self._batch, None)
                watch.start()
                # A run that is resumed earlier waits, but not for a holder whose channel its caller did not watch.
                x.waits = int(self._remotes[x.at] is remote)
            elif result == blocks.CARRY:
                yield from self._carry(remote, suspends)
            elif result == blocks.TIMEOUT:
                raise remote.port.overdue(remote.holder.timeout)
            elif result != blocks.INTERRUPTED:
                remote.holder.replies.read(remote.left(self._asked))
        for answer, index in self._joins:
            join(self._answer.out, answer, index, 0)
        out = self._answer.out if kv.sinks is None else with_sinks(self._answer, kv.sinks)
        return out.view(self._tokens, -1)

    @property
    def _asked(self) -> int:
        """When the layer under way was asked for, by the clock of `monotonic_ns`; 0 where it was not yet."""
        return int(self._block.asked) if self._block.begun else 0

    def _carry(self, remote: RemoteHolder, suspends: bool) -> Generator[Waiting, None, None]:
        """Send the frames that Python carries, or receive the one that is due."""
        if self._block.begun == blocks.ASKED:
            for other in self._remotes:
                if other.direct is None:
                    other.carry()
            return
        replies = remote.holder.replies
        if suspends and not replies.ready(self._batch):
            yield Waiting(replies, self._batch)
        if not replies.heard(self._batch):
            remote.fetch(self._asked)

    def _collect(self, watched: RemoteHolder) -> bool:
        """Take what has come, without waiting, while the caller of the suspended batch watches a holder's channel.
        Whether the batch can go on: with an error too, and to wait for another holder, whose channel must then be
        watched."""
        try:
            while (result := self._advance()) in (blocks.OTHER, blocks.ENDED):
                remote = self._remotes[self._block.at]
                if not remote.holder.replies.port.ready():  # a part of a frame
                    return remote is not watched
                remote.holder.replies.read(remote.holder.timeout)
        except LaminaError as error:  # what was read to find it does not come again
            self._failure = error
            return True
        self._result = result
        if result == blocks.WAITING:
            return self._remotes[self._block.at] is not watched
        return result != blocks.INTERRUPTED

    def _advance(self) -> int:
        """One compiled call, with all channels lent; or its result, where it was made while the batch was suspended."""
        x, lent = self._block, 0
        if self._failure is not None:
            raise self._failure
        if self._result == 0:
            self._result = blocks.WAITING
            return 0
        for number, remote in enumerate(self._remotes):
            if not remote.settle(self._batch, x.layer, self._asked, bool(x.waits)):
                x.at = number
                return blocks.WAITING
        try:
            for remote, direct in self._lent:
                if not direct.lend():  # closed by another thread: to read it says why
                    x.at = self._remotes.index(remote)
                    return blocks.ENDED
                lent += 1
            self._call(self._address)
        finally:
            for remote, direct in self._lent[:lent]:
                direct.reclaim(remote.unsent())
        result: int = x.result
        if result != blocks.TIMEOUT:  # a holder that does not read would be waited for
            for remote, _ in self._lent:
                remote.port.flush()
        return result

    def close(self) -> None:
        """No more frames are expected. Counts what the batch took."""
        x = self._block
        done = self._layers[: int(np.searchsorted(self._layers, x.layer))]
        for remote in self._remotes:
            remote.close(self._asked)
            if remote.queries:
                remote.holder.replies.measured((remote.taken[done] * 1e-9).tolist())
        for holder, work in self._locals:
            replies = holder.replies
            if replies.here is not None:
                replies.here.worked(self._batch, self._number, range(len(done)), work)
            if holder.reads:
                replies.measured((self._taken_here[replies][done] * 1e-9).tolist())
        times = self._times
        times.local, times.remote = times.local + x.local * 1e-9, times.remote + x.remote * 1e-9
        times.answered, times.waited = times.answered + x.answered * 1e-9, times.waited + x.waited * 1e-9


class ExchangeMaker:
    """Makes the compiled exchanges of one batch after the other in the layers of the pool `number`, from an earlier
    one where they are alike. Those that were used last are kept, of `_KEPT_TOKENS` tokens together."""

    def __init__(self, number: int, pool: Pool) -> None:
        self._number, self._pool = number, pool
        # By what they are made from, with what keeps that; the last one used comes last.
        self._exchanges: dict[tuple[Any, ...], tuple[CompiledExchange, Sequence[HolderTraffic]]] = {}

    def begin(
        self, traffic: Sequence[HolderTraffic], ids: tuple[int, int], tokens: int, dtype: torch.dtype, times: Times
    ) -> CompiledExchange | None:
        """The exchange of a batch of `tokens`, every one of which holders attend; ids: epoch and batch, dtype: of q, k
        and v. None where a holder, or this process, cannot do that. The one before must be closed."""
        traffic = [holder for holder in traffic if holder.reads or holder.stores]  # the others are sent nothing
        if not enabled() or dtype not in FLOATS or not traffic:
            return None
        ways = [self._way(holder, ids[1], dtype, tokens) for holder in traffic]
        holders = [(holder, way) for holder, way in zip(traffic, ways, strict=True) if way is not None]
        if len(holders) < len(traffic):
            return None
        key = (tokens, dtype, *map(_shape, holders))
        exchange, origin = self._exchanges.pop(key, (None, traffic))
        if exchange is None:
            exchange = CompiledExchange(self._number, self._pool, holders, tokens, dtype)
        self._exchanges[key] = exchange, origin
        while len(self._exchanges) > 1 and sum(tokens for tokens, *_ in self._exchanges) > _KEPT_TOKENS:
            del self._exchanges[next(iter(self._exchanges))]
        if not exchange.fits:
            return None
        exchange.begin(traffic, ids, times)
        return exchange

    def _way(
        self, holder: HolderTraffic, batch: int, dtype: torch.dtype, tokens: int
    ) -> RemoteAttention | LayerWork | None:
        replies = holder.replies
        if holder.way is not DIRECT:
            return None
        spec = self._pool.config.layers[0]
        state = spec.kind in STATES
        if state and holder.fresh is not None and spec.widths[1] % 2:  # vectors are gathered by 8 bytes
            return None
        if replies.here is None:
            return replies.frames if not state or STATE_FRAMES in replies.port.features else None
        work = replies.work(batch, self._number)
        if work is None or not work.query == work.loaded == dtype:
            return None
        # Compiled code checks nothing: what the holder planned must be what it gets. Where it is not, Python says so.
        counts = counts_of(holder, spec, tokens)
        return work if (work.queries, work.fresh, work.layers) == (*counts, self._pool.layers) else None


def _shape(holder_way: tuple[HolderTraffic, RemoteAttention | LayerWork]) -> tuple[Any, ...]:
    """What an exchange is made from, of one holder. Indices of the same rows are the same object."""
    holder, way = holder_way
    rounds = tuple((piece.start, piece.stop) for piece in holder.rounds)
    return id(way), holder.reads, holder.stores, id(holder.queries), id(holder.fresh), rounds
