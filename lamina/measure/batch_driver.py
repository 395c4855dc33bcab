"""Batches driven by hand: announced to the holders as the engine announces them, then computed, one at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch

from lamina_kernels.states.operands import StateConstants
from lamina_protocols.messages.layers import HolderConfig
from lamina_protocols.messages.messages import Announced, Announcement, Fresh, Operation
from lamina_protocols.messages.routes import Route, Span
from lamina_workers.decoder.model import Forward
from lamina_workers.model_worker.attention_merge import AttentionMerge
from lamina_workers.model_worker.interface import result
from lamina_workers.model_worker.state_traffic import send_constants
from lamina_workers.ports.port import AttentionPort, Replies

PATIENCE = 60.0  # seconds for an announcement's answer
_EPOCH = 1


class BatchDriver:
    """What a model worker does for an engine, with a forward pass that the caller gives. One thread, one batch at a
    time. Each method raises HolderFault for a holder's fault, and HolderLost where a holder is gone.

    `ports` are the holders by number. `device` is the model's, `constants` those of its layers with states.
    """

    def __init__(
        self,
        config: HolderConfig,
        ports: Mapping[int, AttentionPort],
        threads: int,
        device: torch.device,
        constants: Mapping[int, StateConstants] = MappingProxyType({}),
    ) -> None:
        for port in ports.values():
            send_constants(port, _EPOCH, constants)
        self._replies = {number: Replies(port) for number, port in ports.items()}
        self._merge = AttentionMerge(config, threads, device=device)
        self._accepted = dict.fromkeys(ports, 0)  # operations
        self._batch = 0

    def announce(
        self, operations: Mapping[int, Sequence[Operation]], routes: Mapping[int, Sequence[Route]]
    ) -> dict[int, Announced]:
        """Begin a batch at every holder. Returns the answers; where one is a refusal, the batch must not go on."""
        self._batch += 1
        for number, replies in self._replies.items():
            batch_operations = tuple(operations.get(number, ()))
            rows = tuple(route.row for route in routes.get(number, ()))
            replies.expect(_EPOCH, self._batch)
            replies.port.send(Announcement(_EPOCH, self._batch, self._accepted[number], batch_operations, rows))
        answers = {n: replies.take(Announced, self._batch, timeout=PATIENCE) for n, replies in self._replies.items()}
        for number, answer in answers.items():
            self._accepted[number] += len(operations.get(number, ())) if answer.accepted else 0
        return answers

    def store(self, number: int, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Give a holder the KV of its rows in one layer, `[tokens * heads, d]`, without a forward pass."""
        self._replies[number].port.send(Fresh(_EPOCH, self._batch, layer, k, v))

    def drive_batch(
        self, forward: Forward, spans: Sequence[Span], routes: Mapping[int, Sequence[Route]]
    ) -> torch.Tensor:
        """Run the forward pass of the batch that was announced, and end the batch. Returns what the pass returns."""
        routed = {self._replies[number]: batch_routes for number, batch_routes in routes.items()}
        outcome = result(self._merge.run(forward, _EPOCH, self._batch, spans, routed, suspends=False))
        self.end()
        return outcome

    def end(self) -> None:
        """The batch is over, also where no forward pass ran."""
        for replies in self._replies.values():
            replies.forget(self._batch)
