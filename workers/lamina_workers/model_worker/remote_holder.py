"""One holder elsewhere, as a compiled exchange sees it: its frames' memory, and the block that expects answers."""

from __future__ import annotations

import ctypes
import time
from typing import Any

import numpy as np
import torch

from lamina_kernels.exchange import exchange_blocks as blocks
from lamina_protocols.frames.fields import dtype_name
from lamina_protocols.frames.layer_frames import frames_between, seconds_stand, set_batch, set_layer
from lamina_protocols.messages.layers import LayerSpec
from lamina_protocols.messages.messages import Attended
from lamina_workers.model_worker.holder_traffic import HolderTraffic, check_answer
from lamina_workers.ports.direct import Buffer
from lamina_workers.ports.port import FramePort

_NOTHING = memoryview(b"")


class Gathered:
    """Which vectors of q, k and v go to a holder, as fields of its block."""

    def __init__(self, holder: HolderTraffic, spec: LayerSpec, tokens: int, itemsize: int) -> None:
        self.queries, self.fresh = counts_of(holder, spec, tokens)
        self.fields: dict[str, int] = {}
        sides = (
            ("q", self.queries, holder.queries, spec.query_width),
            ("k", self.fresh, holder.fresh, spec.key_width),
            ("v", self.fresh, holder.fresh, spec.own_v),
        )
        for name, count, index, width in sides:
            self.fields |= {f"{name}_count": count, f"{name}_bytes": width * itemsize}
            if count and index is not None:
                self.fields[f"{name}_index"] = index.data_ptr()


class RemoteHolder:
    """One holder elsewhere: its frames' memory and the block that expects its answers."""

    def __init__(
        self, holder: HolderTraffic, port: FramePort, block: Any, spec: LayerSpec, layers: int, dtype: torch.dtype,
        tokens: int,
    ) -> None:  # fmt: skip
        gathered = Gathered(holder, spec, tokens, dtype.itemsize)
        name = dtype_name(dtype)
        asked, answer = frames_between(gathered.queries, gathered.fresh, spec, name, name)
        self.holder = holder
        self.port = port
        self.direct = port.direct
        self.queries = gathered.queries
        self.largest = max(asked.size, answer.size if holder.reads else 0)  # bytes of its frames
        places = asked.places()
        self._sent = Buffer(asked.size)
        self._sent.bytes[: blocks.HEAD] = memoryview(asked.head(0))
        for field in places:
            gathered.fields[f"{field}_to"] = self._sent.address + places[field].at
        self._head = Buffer(blocks.HEAD)
        self._head.bytes[:] = memoryview(answer.head(0))
        self.frame = Buffer(answer.size)
        self.taken = np.zeros(layers, np.int64)
        self._block = block
        for field, value in gathered.fields.items():
            setattr(block, field, value)
        block.layers, block.head, block.frame = layers, self._head.address, self.frame.address
        block.size = answer.size if holder.reads else 0
        block.channel, block.timed = 0 if self.direct is None else self.direct.address, 1
        block.sent_frame, block.sent_size = self._sent.address, asked.size
        block.taken = self.taken.ctypes.data
        out, lse = (answer.places()[field] for field in ("out", "lse"))
        self.out = self.frame.tensor(out.at, out.size, dtype).view(-1, spec.d_v)
        self.lse = self.frame.tensor(lse.at, lse.size, torch.float32)

    def begin(self, holder: HolderTraffic, ids: tuple[int, int]) -> None:
        """A batch of the same shape, as the first or as the next one."""
        self.holder = holder
        for head in (self._sent.bytes, self._head.bytes):
            set_batch(head, *ids)
        self._block.timeout, self._block.live = int(holder.timeout * 1e9), 0
        self.port.due += holder.reads  # one reply at a time, which compiled code may receive
        if holder.reads and self.direct is not None:
            self.direct.expect(ctypes.addressof(self._block), self.frame.bytes)

    def unsent(self) -> memoryview:
        """What is left of the frame that is being sent; from now on that is the channel's."""
        block = self._block
        if block.sent >= block.sent_size:
            return _NOTHING
        rest = self._sent.bytes[block.sent : block.sent_size]
        block.sent = block.sent_size
        return rest

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
            reply = replies.take(Attended, batch, layer, self.holder.timeout)
            self.port.due += 1  # of the next layer
            check_answer(replies, reply.out, tuple(self.out.shape), self.out.dtype)
            with torch.inference_mode():  # a suspended batch's answers are taken outside of its run
                self.out.copy_(reply.out)
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
    queries = count_of(holder.queries, tokens * spec.heads) if holder.reads else 0
    return queries, count_of(holder.fresh, tokens * spec.kv_heads) if holder.stores else 0


def count_of(index: torch.Tensor | None, total: int) -> int:
    """How many vectors an index picks of `total`; None: all."""
    return total if index is None else len(index)
