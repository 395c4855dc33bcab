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
from lamina.measure.batch_driver import BatchDriver
from lamina.models.resolve import resolve
from lamina.system.machine import native_dtype, this_machine
from lamina.text.tokenizer import Tokenizer
from lamina_protocols.messages import Close, HolderConfig, Open, Operation, Row, Usage
from lamina_protocols.routes import Route, Span
from lamina_workers.attention_worker.attention_worker import AttentionWorker
from lamina_workers.decoder.checkpoint import Checkpoint
from lamina_workers.decoder.config import ModelConfig
from lamina_workers.decoder.model import Batch, Decoder, Forward, KeyValueReady, QueryReady
from lamina_workers.ports.port import LocalAttention

_HOLDER = 0

Tap = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Gets each layer's number, q `[T, heads, d]`, k and v `[T, kv_heads, d]` before attention. To keep them it must copy
them."""

Outcome = Callable[[int, torch.Tensor], None]
"""Gets each layer's number and attention output `[T, heads * d_v]`. To keep it, it must copy it."""


class Probe:
    """Sequences whose tokens are given. Everything happens on the caller's thread.

    `worker` is the attention worker behind it, with its counters.
    """

    def __init__(self, model: ModelConfig, decoder: Decoder, holder: HolderConfig, threads: int = 1) -> None:
        self.model = model
        self.holder = holder
        self._decoder = decoder
        self.worker = AttentionWorker(holder, threads)
        self._driver = BatchDriver(holder, {_HOLDER: LocalAttention(self.worker)}, threads, decoder.device)
        self._operations: list[Operation] = []
        self._lengths: dict[int, int] = {}
        self._usages: dict[int, Usage] = {}
        self._handle = 0

    @classmethod
    @contextmanager
    def load(cls, name: str | Path, config: EngineConfig) -> Iterator[tuple[Probe, Tokenizer]]:
        """The model of that name, set up as `LLM(name, ...)` would, and its tokenizer."""
        from lamina.launch.kv_sizing import holder_config
        from lamina.launch.model_files import rescaled

        path = resolve(name)
        machine = this_machine()
        threads = config.threads or machine.cores
        torch.set_num_threads(threads)
        model = rescaled(ModelConfig.from_folder(path), config.rope_scaling)
        dtype: torch.dtype = getattr(torch, native_dtype(machine)[0] if config.dtype == "auto" else config.dtype)
        holder = holder_config(path, model, config, dtype, machine)
        tokenizer = Tokenizer(path)
        try:
            with Checkpoint(path) as checkpoint, torch.inference_mode():
                decoder = Decoder.load(model, checkpoint, dtype)
            yield cls(model, decoder, holder, threads), tokenizer
        finally:
            tokenizer.close()

    def open(self) -> int:
        """A new, empty sequence. Returns its handle."""
        self._handle += 1
        self._lengths[self._handle] = 0
        heads = tuple(range(self.model.num_key_value_heads))
        self._operations.append(Open(self._handle, heads, 0, self.model.max_position_embeddings))
        return self._handle

    def close(self, handle: int) -> None:
        """Forget a sequence."""
        del self._lengths[handle]
        self._usages.pop(handle, None)
        self._operations.append(Close(handle))

    def length(self, handle: int) -> int:
        """The number of tokens of a sequence so far."""
        return self._lengths[handle]

    def usage(self, handle: int) -> Usage | None:
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
        heads = tuple(range(self.model.num_key_value_heads))
        routes = []
        for source, ((handle, _), span) in enumerate(zip(pieces, spans, strict=True)):
            end = span.start + span.count
            row = Row(handle, span.start, span.count, (0, end), True, chooses=decode)
            routes.append(Route(source, heads, row, (span.start, end)))
        operations, self._operations = tuple(self._operations), []
        answer = self._driver.announce({_HOLDER: operations}, {_HOLDER: routes})[_HOLDER]
        if not answer.accepted:
            raise InvalidRequest(f"kv_memory is too small: {answer.reason}")
        for route, usage in zip(routes, answer.usages, strict=False):
            self._usages[route.row.handle] = usage
        positions = [p for span in spans for p in range(span.start, span.start + span.count)]
        dynamic = self.model.rope.kind == "dynamic"
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


def _tapped(forward: Forward, tap: Tap | None, outcome: Outcome | None) -> Forward:
    """`forward`, with q, k, v given to `tap` and attention outputs to `outcome`."""
    event = next(forward)
    while True:
        if not isinstance(event, QueryReady):
            raise TypeError(f"the model yields QueryReady first in each layer, got {type(event).__name__}")
        q = event.q
        yield event
        event = forward.send(None)
        if not isinstance(event, KeyValueReady):
            raise TypeError(f"the model yields KeyValueReady after QueryReady, got {type(event).__name__}")
        layer = event.layer
        if tap is not None:
            tap(layer, q, event.k, event.v)
        attended = yield event
        if outcome is not None and attended is not None:
            outcome(layer, attended)
        try:
            event = forward.send(attended)
        except StopIteration as stop:
            logits: torch.Tensor = stop.value
            return logits
