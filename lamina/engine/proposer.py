"""`Proposer`, what guesses the next tokens of sequences. The guesses are drafts, which the model verifies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from lamina.kv.request import ScheduledSequence
from lamina.messages.engine_request import EngineRequest


class Wanted(NamedTuple):
    """A sequence that decodes, its request, and how many drafts it should get, 1 or more. Drafts follow
    `sequence.tokens`."""

    sequence: ScheduledSequence
    request: EngineRequest
    depth: int


class Proposer(Protocol):
    """Guesses the next tokens. Called on the engine's thread, before a batch is planned. It raises nothing that a
    request could cause."""

    def propose(self, wanted: Sequence[Wanted]) -> list[tuple[int, ...]]:
        """For each entry its drafts, `depth` at most, fewer or none where nothing is likely. All are token ids of the
        model's vocabulary."""

    def ended(self, sequence: ScheduledSequence) -> None:
        """Forget a sequence. Harmless for one that is not known. It may come back, with other tokens."""
