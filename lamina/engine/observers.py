"""What the parts of an engine get after each batch, and their interface."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from lamina.kv.request import Plan
from lamina.messages.engine_request import EngineOutput
from lamina_workers.ports.timing import Times


@dataclass(frozen=True, slots=True)
class BatchDone:
    """A batch that is complete and recorded; its outputs have not left yet.

    `outputs` are by request id. `prompt_tokens` counts computed tokens of prompts, `sampled` the sampled tokens.
    `running` counts the sequences with KV, before the batch was recorded. `local_tokens` and `remote_tokens` are the
    tokens of KV that it read in either tier. `times` is what its attention took, `attended`
    the seconds of attention of all batches so far, `now` its end by the engine's clock.
    """

    plan: Plan
    outputs: Mapping[str, Sequence[EngineOutput]]
    prompt_tokens: int
    sampled: int
    running: int
    local_tokens: int
    remote_tokens: int
    times: Times
    attended: float
    now: float

    @property
    def prefill(self) -> bool:
        """Whether a row has more than one known token."""
        return any(row.known > 1 for row in self.plan.rows)


class BatchObserver(Protocol):
    """A part of the engine that learns from batches."""

    def batch_done(self, done: BatchDone) -> None:
        """Called on the engine's thread, before the outputs leave."""
