"""Decode batches of a model without an engine: the model as the engine loads it, and random KV at holders.

Files, weights, decoder and what holders are built from come from where an engine gets them. The caller gives the
forward pass of a batch: the model's own, or one of attention alone.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from lamina.config import EngineConfig
from lamina.errors import EngineError
from lamina.launch.kv_sizing import holder_config
from lamina.measure.batch_driver import BatchDriver
from lamina.models.resolve import resolve
from lamina.system.machine import native_dtype, this_machine
from lamina_kernels.dense import dense
from lamina_protocols.messages.layers import HolderConfig, LayerSpec
from lamina_protocols.messages.messages import Close, Open, Row
from lamina_protocols.messages.routes import Route, Span
from lamina_workers.attention_worker.page_layout import attention_kernels, page_cost, page_layout
from lamina_workers.checkpoints.model_checkpoint import fingerprint, open_checkpoint
from lamina_workers.decoder.decoder_weights import DecoderWeights, load_weights
from lamina_workers.decoder.model import Batch, Decoder, Forward, KeyValueReady, QueryReady
from lamina_workers.model_config.config import ModelConfig
from lamina_workers.ports.port import AttentionPort

_ROOM = 1 << 20  # tokens by which a sequence may grow; takes no memory by itself
_CHUNK = 1024  # tokens whose KV is stored at a time, as a prefill does


class Seconds(NamedTuple):
    """One batch: until all holders had accepted it, and until its forward pass was through."""

    announce: float
    run: float


def by_part(steps: Sequence[Seconds]) -> dict[str, list[float]]:
    """The seconds of several steps, by what they were spent on."""
    return {"announce": [step.announce for step in steps], "run": [step.run for step in steps]}


class Held:
    """Sequences at the holders of `ports`. Each holder keeps the KV heads `heads[number]` of all of them. KV is
    `dtype`, as the queries are."""

    def __init__(
        self,
        config: HolderConfig,
        ports: Mapping[int, AttentionPort],
        heads: Mapping[int, tuple[int, ...]],
        *,
        dtype: torch.dtype,
        threads: int,
    ) -> None:
        self._config = config
        self._names = {number: port.name for number, port in ports.items()}
        self._heads = heads
        self._dtype = dtype
        self._driver = BatchDriver(config, ports, threads, torch.device("cpu"))
        self._handles = 0
        self._sequences: list[int] = []
        self._length = 0

    def fill(self, batch: int, context: int) -> None:
        """Keep `batch` sequences of `context` tokens, in the place of the previous ones."""
        self.drop()
        spec = self._config.layers[0]
        for _ in range(batch):
            self._handles += 1
            opened = Open(self._handles, 0, (), 0, context + _ROOM)
            for start in range(0, context, _CHUNK):
                count = min(_CHUNK, context - start)
                self._announce([opened] if not start else [], [Row(self._handles, start, count, None, True)])
                k = torch.randn(count * spec.kv_heads, spec.key_width).to(self._dtype)
                v = torch.randn(count * spec.kv_heads, spec.own_v).to(self._dtype)
                for layer in range(len(self._config.layers)):
                    for number, heads in self._heads.items():
                        n = count * len(heads)
                        self._driver.store(number, layer, k[:n], v[:n])
                self._driver.end()
            self._sequences.append(self._handles)
        self._length = context

    def drop(self) -> None:
        """Free all sequences."""
        if self._sequences:
            self._announce([Close(handle) for handle in self._sequences], [])
            self._driver.end()
            self._sequences = []

    def step(self, forward: Forward, query_first: bool = False) -> Seconds:
        """One token more for each sequence, by a forward pass that has not begun. The holders attend it too, unless q
        goes first: then the pass computes q before k and v, and they attend the tokens before."""
        start, end = self._length, self._length + 1
        read = (0, start if query_first else end)
        began = time.perf_counter()
        routes = self._announce([], [Row(handle, start, 1, read, True, True) for handle in self._sequences])
        announced = time.perf_counter()
        self._driver.drive_batch(forward, [Span(start, 1)] * len(self._sequences), routes)
        done = time.perf_counter()
        self._length = end
        return Seconds(announced - began, done - announced)

    def _announce(self, operations: Sequence[Open | Close], rows: Sequence[Row]) -> dict[int, list[Route]]:
        """Begin a batch at all holders. Returns the rows with the heads of each holder."""
        operations_of = {
            number: [
                replace(operation, heads=heads) if isinstance(operation, Open) else operation
                for operation in operations
            ]
            for number, heads in self._heads.items()
        }
        routes = {
            number: [Route(index, heads, row, (row.start, row.start + row.count)) for index, row in enumerate(rows)]
            for number, heads in self._heads.items()
        }
        for number, answer in self._driver.announce(operations_of, routes).items():
            if not answer.accepted:
                raise EngineError(f"{self._names[number]} has no room: {answer.reason}")
        return routes


def attention_alone(layers: tuple[LayerSpec, ...], batch: int, dtype: torch.dtype) -> Forward:
    """A forward pass of `batch` tokens that has no dense layers: it asks the same of every layer's attention."""
    spec = layers[0]
    q = torch.randn(batch, spec.heads, spec.query_width).to(dtype)
    k, v = (
        torch.randn(batch, spec.kv_heads, spec.key_width).to(dtype),
        torch.randn(batch, spec.kv_heads, spec.own_v).to(dtype),
    )

    def run() -> Forward:
        for layer in range(len(layers)):
            yield QueryReady(layer, q)
            yield KeyValueReady(layer, k, v)
        return q

    return run()


STEPS = 256
"""Decode steps that a cell has room for."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """`threads`: of a step; `dtype`: of weights, queries and KV."""

    config: ModelConfig
    weights: DecoderWeights
    decoder: Decoder
    holder: HolderConfig
    fingerprint: str
    dtype: torch.dtype
    threads: int


def load(model: str, cells: Sequence[Sequence[int]], device: str = "cpu") -> Loaded:
    """The model by its name, in the dtype and with the threads that an engine would choose, and a holder with room for
    the largest of `cells`, each (batch, context). Raises what `LLM` raises for a model."""
    path = resolve(model)
    machine = this_machine()
    config = ModelConfig.from_folder(path)
    dtype: torch.dtype = getattr(torch, "bfloat16" if device == "cuda" else native_dtype(machine)[0])
    torch.set_num_threads(machine.cores)
    holder = holder_config(path, config, EngineConfig(), dtype, machine)
    tokens = max(batch * (context + STEPS + holder.page_size) for batch, context in cells)
    pages = -(-tokens // holder.page_size) * config.num_key_value_heads * len(holder.layers)
    holder = replace(holder, kv_memory=pages * page_cost(holder))
    for steps in (attention_kernels().prepare(page_layout(holder)), dense.prepare(dtype, torch.device(device))):
        for _ in steps:
            pass
    with open_checkpoint(path) as checkpoint, torch.inference_mode():
        weights = load_weights(config, checkpoint, dtype, torch.device(device))
    return Loaded(config, weights, Decoder(config, weights), holder, fingerprint(path), dtype, machine.cores)


def decode_batch(rows: int, position: int, device: torch.device) -> Batch:
    """One token each of `rows` sequences, all at the same position."""
    positions = torch.full((rows,), position, device=device)
    lengths = positions + 1  # read by dynamic RoPE alone
    return Batch(torch.zeros_like(positions), positions, torch.arange(rows, device=device), lengths)
