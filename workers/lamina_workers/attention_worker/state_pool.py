"""The states of one pool: an arena of records, the plan of a batch, and the kernel that advances them.

All layers of a batch go through one plan. Records that a batch reads are not written by it, so it can run again.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from lamina_kernels.exchange.layer_work import LayerWork, state_layer_work
from lamina_kernels.paged import memory
from lamina_kernels.states import advance as kernel
from lamina_kernels.states.operands import StateConstants, StateRows
from lamina_protocols.errors import ProtocolError
from lamina_protocols.frames.bounds import MAX_PAYLOAD
from lamina_protocols.messages.layers import LayerSpec
from lamina_protocols.messages.messages import (
    Advance,
    Advanced,
    Constants,
    Fetch,
    FetchedPages,
    FetchPages,
    FetchSample,
    FreshPages,
    Operation,
    PartHeld,
    Reply,
    Row,
    Usage,
)
from lamina_protocols.messages.pools import Pool
from lamina_workers.attention_worker.batch import Counters
from lamina_workers.attention_worker.page_layout import state_layout, state_pages
from lamina_workers.attention_worker.pool import Layered, LayerPool
from lamina_workers.devices.available import room_for
from lamina_workers.errors import KVError, UnsupportedModelError
from lamina_workers.kv_pages.state_store import NO_RECORD, StateStep, StateStore

_WORKS = 16  # of batches that took turns last


@dataclass(slots=True)
class StateBatch:
    """Of a batch, the rows of one pool of states: the kernels' plan, None where there are no rows, and the layers whose
    inputs have not come yet. `turned`: the plan that reads what this one writes, and the other way round."""

    rows: Sequence[Row]
    plan: kernel.Plan | None
    turned: kernel.Plan | None
    missing: set[int]
    vectors: int  # tokens times heads
    delay: float  # seconds to add to each layer


class StatePool(LayerPool[StateBatch]):
    """Of layers that keep states. `number`: which pool of the worker it is. What it does is counted in
    `counters`.

    Raises UnsupportedModelError for layers that its records cannot keep, KVError for too little memory,
    NotEnoughMemory where the device lacks it.
    """

    def __init__(self, number: int, pool: Pool, threads: int, device: torch.device, counters: Counters) -> None:
        config = pool.config
        shape = state_layout(config)
        if device.type != "cpu":
            raise UnsupportedModelError(f"{shape.kind} layers on {device}; their states are kept on a CPU")
        self.config = config
        self.n_pages = state_pages(config)
        for _ in kernel.prepare():
            pass
        self.layout = f"{shape.kind} {shape.d_k} {shape.d_v} {shape.conv}"
        # of the rows of a batch: their outputs in two bytes a number and their gates fill a frame
        self.most_heads = MAX_PAYLOAD // (2 * shape.d_v + 4 * shape.gates)
        self._number = number
        self._shape = shape
        self._threads = threads
        self._counters = counters
        with room_for("states", self.n_pages * shape.page_bytes, device):
            self.store: StateStore = StateStore(config, self.n_pages, shape.drafts)
            flat = memory.allocate(self.n_pages * shape.page_bytes)
        self._arena = flat.view(torch.float32).view(self.n_pages, shape.record)
        self._places = {layer: place for place, layer in enumerate(pool.layers)}
        self._constants = {layer: _constants(spec) for layer, spec in enumerate(config.layers) if not spec.conv}
        self._steps: tuple[StateStep, ...] = ()  # of the last update
        self._dtype: torch.dtype | None = None  # of the last inputs
        self._works: dict[tuple[int, torch.dtype], LayerWork | None] = {}

    # Parts.

    def held(self, handle: int) -> PartHeld:
        part = self.store.part(handle)
        return PartHeld(handle, self._number, part.heads, 0, part.hi, part.stored, part.before)

    def usage(self, handle: int) -> Usage:
        """States are read in full, and there is nothing to leave out."""
        part = self.store.part(handle)
        pages = sum(records.pages.size for records in part.owned())
        pages += part.inputs.size if part.inputs is not None else 0
        return Usage(0, 0, 0.0, 0, 0.0, pages, pages, pages)

    def update(self, operations: Sequence[Operation], rows: Sequence[Row]) -> tuple[int, ...]:
        self._steps = self.store.update(operations, rows)
        return tuple(row.start for row in rows)

    def commit(self) -> None:
        self.store.commit()

    def check_integrity(self) -> None:
        self.store.check_integrity()

    # Batches.

    def begin(self, rows: Sequence[Row], delay: float) -> StateBatch:
        layers, vectors = set(range(len(self.config.layers))), self.size(rows)
        if not rows:
            return StateBatch(rows, None, None, layers, vectors, delay)
        spec, steps = self.config.layers[0], self._steps
        count, heads = [step.count for step in steps], [np.array(step.heads, np.int64) for step in steps]
        counted = StateRows(
            np.array(count, np.int64),
            heads,
            spec.kv_heads // spec.key_heads,
            np.array([step.replay for step in steps], np.int64),
            np.array([step.keeps for step in steps]),
            np.array([step.start for step in steps], np.int64),
        )
        source = np.concatenate([step.source for step in steps], axis=1)
        target = np.concatenate([step.target for step in steps], axis=1)
        inputs: npt.NDArray[np.int32] | None = None
        if any(step.keeps or step.replay for step in steps):
            nothing = [np.full_like(step.source, NO_RECORD) if step.kept is None else step.kept for step in steps]
            inputs = np.concatenate(nothing, axis=1)
        plan = kernel.plan(self._shape, self._arena, counted, source, target, self._threads, inputs)
        return StateBatch(rows, plan, None, layers, vectors, delay)

    def follows(self, batch: StateBatch, rows: Sequence[Row]) -> bool:
        alike = (batch.plan is None or batch.plan.kept is None) and len(rows) == len(batch.rows)
        alike = alike and all(
            new.handle == old.handle and old.count == 1 for new, old in zip(rows, batch.rows, strict=True)
        )
        return alike and not (rows and batch.missing) and self.store.follows(rows)

    def follow(self, batch: StateBatch, rows: Sequence[Row], delay: float) -> StateBatch:
        self.store.follow(rows)
        plan, was = batch.turned, batch.plan
        if plan is None and was is not None:
            plan = kernel.with_pages(was, was.target, was.source)
        layers = set(range(len(self.config.layers)))
        return StateBatch(rows, plan, was, layers, batch.vectors, delay)

    def floors(self, batch: StateBatch) -> Sequence[int]:
        return (0,) * len(batch.rows)

    def end(self, batch: StateBatch) -> None:
        """There is nothing to give back: records are their parts' own."""

    def work(self, batch: StateBatch) -> kernel.StateWork | None:
        """The work of a batch in flight, for a model that has all its inputs; None where messages are needed."""
        if batch.plan is None or batch.delay or len(self._constants) < len(self.config.layers):
            return None
        return kernel.StateWork(batch.plan, self._places, self._constants, partial(self._computed, batch))

    def layer_work(self, batch: StateBatch) -> LayerWork | None:
        """It needs Python until inputs have come, which alone say the model's dtype."""
        if self._dtype is None or (work := self.work(batch)) is None:
            return None
        key = id(work.plan), self._dtype  # in decode, plans take turns
        if key not in self._works:
            vectors = work.plan.sizes[0] // self.config.layers[0].widths[0], batch.vectors
            newest = state_layer_work(work, tuple(self._places), self._dtype, vectors)
            # What recent works are made of stays, so no plan's number comes again.
            self._works = {**dict(list(self._works.items())[1 - _WORKS :]), key: newest}
        return self._works[key]

    def worked(self, batch: StateBatch, layers: range, work: LayerWork) -> None:
        self._computed(batch, layers)

    # Messages.

    def constants(self, layer: int, message: Constants) -> None:
        spec = self.config.layers[layer]
        for name, dimensions in (("conv", 2), ("bias", 1), ("skip", 1)):
            x = getattr(message, name)
            if x.numel() and (x.ndim != dimensions or x.dtype != torch.float32):
                raise ProtocolError(
                    f"{name} of layer {message.layer} is {x.dtype} {list(x.shape)}, allowed: float32, {dimensions}-D"
                )
        copies = (x.clone() if x.numel() else None for x in (message.conv, message.bias, message.skip))
        constants = _constants(spec, *copies)
        try:
            constants.check(self._shape, spec.kv_heads // spec.key_heads, spec.kv_heads)
        except ValueError as error:
            raise ProtocolError(f"constants of layer {message.layer}: {error}") from error
        self._constants[layer] = constants
        self._works.clear()

    def handle(self, batch: StateBatch, layer: int, message: Layered) -> Advanced:
        constants = self._constants.get(layer)
        if not isinstance(message, Advance):
            raise self._refused(message)
        if batch.plan is None or constants is None:
            lacks = "rows" if batch.plan is None else "constants"
            raise ProtocolError(f"inputs of layer {message.layer} for batch {message.batch}, which has no {lacks}")
        start_time = time.perf_counter()
        try:
            out = kernel.advance(batch.plan, layer, message.x, message.gates, constants)
        except ValueError as error:
            raise ProtocolError(f"inputs of batch {message.batch}: {error}") from error
        if batch.delay:
            time.sleep(batch.delay)
        self._dtype = message.x.dtype
        self._computed(batch, (layer,))
        return Advanced(message.epoch, message.batch, message.layer, out, time.perf_counter() - start_time)

    def settle(self) -> None:
        """A state is read after it was updated, so nothing waits to be stored."""

    def fetch(self, layer: int, message: Fetch | FetchSample) -> Reply:
        raise self._refused(message)

    def fetch_pages(self, message: FetchPages) -> FetchedPages:
        part = self.store.part(message.handle)
        records = part.at(message.hi)
        if records is None or message.lo != 0 or message.hi == 0:
            positions = sorted({record.position for record in part.written()})
            raise KVError(
                f"states of part {message.handle} at [{message.lo}, {message.hi}), it has those that end at {positions}"
            )
        index = torch.from_numpy(records.pages[self._layers_of(message)].reshape(-1).astype(np.int64))
        pages = self._arena[index].view(torch.uint8)
        return FetchedPages(message.epoch, message.batch, message.layer, pages)

    def store_pages(self, batch: StateBatch, message: FreshPages) -> None:
        layers = self._layers_of(message)
        if batch.plan is None:
            raise ProtocolError(f"{len(message.pages)} fresh pages for batch {message.batch}, which stores 0")
        target = batch.plan.target[layers].reshape(-1)
        due = len(target), self._shape.page_bytes
        if message.pages.shape != due or message.pages.dtype != torch.uint8:
            actual = f"{message.pages.dtype} {list(message.pages.shape)}"
            raise ProtocolError(f"fresh pages of batch {message.batch} are {actual}, allowed: uint8 {list(due)}")
        self._arena[torch.from_numpy(target.astype(np.int64))] = message.pages.view(torch.float32)
        self._stored(batch, range(layers.start, layers.stop))
        self._counters.vectors_stored += message.layers * batch.vectors

    def _layers_of(self, message: FetchPages | FreshPages) -> slice:
        first, end, layer_count = message.layer, message.layer + message.layers, len(self.config.layers)
        if not 0 <= first < end <= layer_count:
            raise ProtocolError(f"states of layers [{first}, {end}), there are {layer_count}")
        return slice(first, end)

    def _stored(self, batch: StateBatch, layers: Iterable[int]) -> None:
        """These layers have all that a batch writes."""
        batch.missing.difference_update(layers)
        if not batch.missing:
            self.store.stored(batch.rows)

    def _computed(self, batch: StateBatch, layers: Sequence[int]) -> None:
        self._stored(batch, layers)
        self._counters.queries += len(layers) * batch.vectors
        self._counters.vectors_stored += len(layers) * batch.vectors

    def _refused(self, message: Layered | Fetch | FetchSample) -> ProtocolError:
        name = type(message).__name__
        return ProtocolError(f"{name} for layer {message.layer}, whose kind is {self._shape.kind}; allowed: Advance")


def _constants(
    spec: LayerSpec,
    conv: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    skip: torch.Tensor | None = None,
) -> StateConstants:
    decays = torch.tensor(spec.decays) if spec.decays else None
    return StateConstants(spec.kv_heads, spec.key_heads, spec.scale, conv, bias, skip, decays)
