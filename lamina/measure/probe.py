"""A model whose tokens are given instead of sampled: for measuring, not for serving.

It drives the same decoder, attention merge and attention workers as the engine, one batch at a time. Measurements
(logits, what was read and kept, queries and keys) are therefore those of a real request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from lamina.config import EngineConfig
from lamina.errors import InvalidRequest
from lamina.launch.model_files import rescaled
from lamina.measure.batch_driver import BatchDriver
from lamina.messages.engine_request import KvSavings
from lamina.models.resolve import resolve
from lamina.system.machine import native_dtype, this_machine
from lamina.text.tokenizer import Tokenizer
from lamina_protocols.messages.layers import STATES, HolderConfig
from lamina_protocols.messages.messages import Announced, Close, Fork, Open, Operation, Row
from lamina_protocols.messages.pools import pools
from lamina_protocols.messages.routes import Route, Span
from lamina_workers.attention_worker.attention_worker import AttentionWorker
from lamina_workers.checkpoints.model_checkpoint import open_checkpoint
from lamina_workers.converted.models import decoder_of, load_model, model_config
from lamina_workers.decoder.model import Batch, Decoder, Forward, KeyValueReady, QueryReady, StateReady
from lamina_workers.model_config.config import ModelConfig
from lamina_workers.ports.port import LocalAttention

_HOLDER = 0

Tap = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Gets the number of each layer with attention, and its q `[T, heads, d]`, k and v `[T, kv_heads, d]`. To keep them it
must copy them."""

Outcome = Callable[[int, torch.Tensor], None]
"""Gets the number of each layer with attention, and its output `[T, heads * d_v]`. To keep it, it must copy it."""


@contextmanager
def loaded(name: str | Path, engine: EngineConfig) -> Iterator[tuple[Path, ModelConfig, Decoder, Tokenizer]]:
    """The folder, config, decoder and tokenizer of the model of that name, as `LLM(name, ...)` would load it."""
    path, machine = resolve(name), this_machine()
    torch.set_num_threads(engine.threads or machine.cores)
    model = rescaled(model_config(path), engine.rope_scaling)
    dtype: torch.dtype = getattr(torch, native_dtype(machine)[0] if engine.dtype == "auto" else engine.dtype)
    tokenizer = Tokenizer(path)
    try:
        with open_checkpoint(path) as checkpoint, torch.inference_mode():
            decoder = decoder_of(model, load_model(model, checkpoint, dtype, torch.device("cpu")))
        yield path, model, decoder, tokenizer
    finally:
        tokenizer.close()


class Probe:
    """Sequences whose tokens are given. Everything happens on the caller's thread.

    `worker` is the attention worker behind it, with its counters.
    """

    def __init__(self, model: ModelConfig, decoder: Decoder, holder: HolderConfig, threads: int = 1) -> None:
        self.model = model
        self.holder = holder
        self._decoder = decoder
        self.worker = AttentionWorker(holder, threads)
        self._specs = [pool.config.layers[0] for pool in pools(holder)]  # of each pool, in which a sequence has a part
        self._driver = BatchDriver(
            holder, {_HOLDER: LocalAttention(self.worker)}, threads, decoder.device, decoder.state_constants()
        )
        self._operations: list[Operation] = []
        self._lengths: dict[int, int] = {}
        self._usages: dict[int, KvSavings] = {}
        self._handle = 0

    @property
    def dtype(self) -> torch.dtype:
        """Of K and V as the model computes them."""
        return self._decoder.dtype

    def open(self) -> int:
        """A new, empty sequence. Returns its handle."""
        self._handle += 1
        self._lengths[self._handle] = 0
        for pool, spec in enumerate(self._specs):
            heads, part = tuple(range(spec.kv_heads)), self._part(self._handle, pool)
            self._operations.append(Open(part, pool, heads, 0, self.model.max_position_embeddings))
        return self._handle

    def fork(self, handle: int) -> int:
        """A new sequence with the tokens of another, whose pages they share. Returns its handle."""
        self._handle += 1
        length = self._lengths[self._handle] = self._lengths[handle]
        for pool in range(len(self._specs)):
            self._operations.append(Fork(self._part(self._handle, pool), self._part(handle, pool), length))
        return self._handle

    def close(self, handle: int) -> None:
        """Forget a sequence."""
        del self._lengths[handle]
        self._usages.pop(handle, None)
        self._operations.extend(Close(self._part(handle, pool)) for pool in range(len(self._specs)))

    def _part(self, handle: int, pool: int) -> int:
        return handle * len(self._specs) + pool

    def usage(self, handle: int) -> KvSavings | None:
        """What was read and kept of a sequence up to the last batch. None where no head has a policy."""
        return self._usages.get(handle)

    def prefill(self, handle: int, token_ids: Sequence[int], chunk: int = 1024, tap: Tap | None = None) -> torch.Tensor:
        """Feed a prompt in chunks. Returns the logits after its last token, float32 `[vocab_size]`."""
        if not token_ids:
            raise InvalidRequest("the prompt is empty; at least one token is needed")
        logits = torch.empty(0)
        for first in range(0, len(token_ids), chunk):
            piece = token_ids[first : first + chunk]
            logits = self._run([(handle, piece)], [len(piece) - 1], tap)
        return logits[0]

    def store(self, handle: int, kv: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Append tokens whose K and V are known: of each layer k `[n, kv_heads, d_k]` and v `[n, kv_heads, d_v]`, as a
        `Tap` gets them. Raises InvalidRequest for a model with states, which follow from more than these."""
        if any(spec.kind in STATES for spec in self._specs):
            raise InvalidRequest("a layer keeps a state; allowed are models whose layers keep keys and values alone")
        start, count = self._lengths[handle], len(kv[0][0])
        routes = []
        for pool, spec in enumerate(self._specs):
            row = Row(self._part(handle, pool), start, count, None, True)
            routes.append(Route(0, tuple(range(spec.kv_heads)), row, (start, start), pool))
        self._announce(routes)
        for layer, (k, v) in enumerate(kv):
            if self.holder.layers[layer].kv_layer == layer:  # the others read its KV
                self._driver.store(_HOLDER, layer, k.flatten(0, 1), v.flatten(0, 1))
        self._driver.end()
        self._lengths[handle] += count

    def read(self, handle: int, token_ids: Sequence[int]) -> torch.Tensor:
        """Feed tokens of one sequence as one batch. Returns the logits after each, float32 `[n, vocab_size]`."""
        return self._run([(handle, token_ids)], list(range(len(token_ids))), None)

    def step(
        self, tokens: Sequence[tuple[int, int]], tap: Tap | None = None, outcome: Outcome | None = None
    ) -> torch.Tensor:
        """A decode step: feed (handle, token id) of each sequence. Returns logits, float32 `[sequences, vocab]`."""
        pieces = [(handle, [token]) for handle, token in tokens]
        return self._run(pieces, list(range(len(tokens))), tap, outcome, decode=True)

    @torch.inference_mode()
    def _run(
        self,
        pieces: Sequence[tuple[int, Sequence[int]]],
        sampled: list[int],
        tap: Tap | None,
        outcome: Outcome | None = None,
        decode: bool = False,
    ) -> torch.Tensor:
        spans = [Span(self._lengths[handle], len(ids)) for handle, ids in pieces]
        routes = []
        for pool, spec in enumerate(self._specs):
            for source, ((handle, _), span) in enumerate(zip(pieces, spans, strict=True)):
                end = span.start + span.count
                read = (0, span.start if spec.kind in STATES else end)
                part, heads = self._part(handle, pool), tuple(range(spec.kv_heads))
                row = Row(part, span.start, span.count, read if read[1] else None, True, chooses=decode)
                routes.append(Route(source, heads, row, (span.start, end), pool))
        answer = self._announce(routes)
        for index, (handle, _) in enumerate(pieces if answer.usages else ()):
            self._usages[handle] = KvSavings.of(answer.usages[index :: len(pieces)])
        positions = [p for span in spans for p in range(span.start, span.start + span.count)]
        dynamic = self.model.rope.by_length
        forward = self._decoder.forward(
            Batch(
                token_ids=torch.tensor([token for _, ids in pieces for token in ids]),
                positions=torch.tensor(positions),
                sampled=torch.tensor(sampled),
                rope_lengths=torch.tensor([p + 1 for p in positions]) if dynamic else None,
            )
        )
        if tap or outcome:
            forward = _tapped(forward, tap, outcome)
        logits = self._driver.drive_batch(forward, spans, {_HOLDER: routes})
        for handle, ids in pieces:
            self._lengths[handle] += len(ids)
        return logits

    def _announce(self, routes: Sequence[Route]) -> Announced:
        operations, self._operations = tuple(self._operations), []
        answer = self._driver.announce({_HOLDER: operations}, {_HOLDER: routes})[_HOLDER]
        if not answer.accepted:
            raise InvalidRequest(f"kv_memory is too small: {answer.reason}")
        return answer


def _tapped(forward: Forward, tap: Tap | None, outcome: Outcome | None) -> Forward:
    """`forward`, with q, k, v given to `tap` and attention outputs to `outcome`."""
    event = next(forward)
    while True:
        if isinstance(event, QueryReady):
            q = event.q
            yield event
            event = forward.send(None)
            if not isinstance(event, KeyValueReady):
                raise TypeError(f"the model yields KeyValueReady after QueryReady, got {type(event).__name__}")
            if tap is not None:
                tap(event.layer, q, event.k, event.v)
        elif not isinstance(event, StateReady):
            raise TypeError(f"the model yields QueryReady or StateReady in each layer, got {type(event).__name__}")
        attended = yield event
        if outcome is not None and isinstance(attended, torch.Tensor) and isinstance(event, KeyValueReady):
            outcome(event.layer, attended)
        try:
            event = forward.send(attended)
        except StopIteration as stop:
            logits: torch.Tensor = stop.value
            return logits
