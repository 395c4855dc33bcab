"""Bugs that are put into the running code, each in memory and for a while, to see that the simulation finds them.

Each is a mistake that somebody could make in a line or two, and that no test of one file would notice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from lamina.journal.history import KnownRequest
from lamina.kv.placement import Holder
from lamina.kv.request import Plan
from lamina.kv.running import RunningSequences
from lamina.scheduling.scheduler import Scheduler
from lamina_protocols.messages.messages import Announced, Announcement, Close, Operation, Reply
from lamina_workers.attention_worker.attention_worker import AttentionWorker
from lamina_workers.kv_pages.kv_store import KVStore
from lamina_workers.ports.port import Replies

Plant = Callable[[pytest.MonkeyPatch], None]


def operations_applied_twice(patch: pytest.MonkeyPatch) -> None:
    """A holder whose answer was lost applies the same operations again when they come again."""
    real = AttentionWorker._announce

    def announce(self: AttentionWorker, message: Announcement) -> Announced:
        self._next_operation = min(self._next_operation, message.first)
        return real(self, message)

    patch.setattr(AttentionWorker, "_announce", announce)


def survivor_keeps_a_cut_position(patch: pytest.MonkeyPatch) -> None:
    """A sequence whose batch was given up, since a holder is lost, goes on behind that batch at the others."""
    real = Scheduler._undo

    def undo(self: Scheduler, plan: Plan) -> None:
        ends = [(row.sequence, row.sequence.planned) for row in plan.rows]
        real(self, plan)
        for sequence, planned in ends:
            if sequence.handle is not None and sequence.rebuild is None:
                sequence.computed = sequence.planned = min(planned, len(sequence.tokens) - 1)

    patch.setattr(Scheduler, "_undo", undo)


def old_reply_accepted(patch: pytest.MonkeyPatch) -> None:
    """A reply to a batch that was given up is taken for one to the batch that is under way now."""

    def sort(self: Replies, reply: Reply) -> None:
        if waiting := self._waiting.get(reply.batch) or next(reversed(self._waiting.values()), None):
            waiting.append(reply)
        elif reply.batch in self._waiting:
            self._waiting[reply.batch].append(reply)
        elif self._waiting:
            next(reversed(self._waiting.values())).append(reply)

    patch.setattr(Replies, "sort", sort)


def close_lost(patch: pytest.MonkeyPatch) -> None:
    """Some parts are never closed."""
    real = Holder.queue

    def queue(self: Holder, operation: Operation, pool: int = 0, freed: int = 0) -> None:
        if not isinstance(operation, Close) or operation.handle % 5:
            real(self, operation, pool, freed)

    patch.setattr(Holder, "queue", queue)


def no_fence(patch: pytest.MonkeyPatch) -> None:
    """A worker takes messages of every epoch for those of the one that it knows."""
    patch.setattr(AttentionWorker, "outdated", lambda self, request: False)

    def batch(self: AttentionWorker, message: Any) -> Any:
        return self._batches.get(message.batch) or next(iter(self._batches.values()))

    patch.setattr(AttentionWorker, "_batch", batch)


def shared_page_written(patch: pytest.MonkeyPatch) -> None:
    """A page that forks share is written without a copy."""
    patch.setattr(KVStore, "_shared", lambda self, part, first, end: np.zeros((1, 1), bool))


def client_gets_a_token_again(patch: pytest.MonkeyPatch) -> None:
    """A client that comes back to the next engine gets the last token that it has received once more."""
    real = KnownRequest.missing

    def missing(self: KnownRequest, received: Sequence[tuple[Sequence[int], bool]]) -> Any:
        return real(self, [(tokens if over else tokens[:-1], over) for tokens, over in received])

    patch.setattr(KnownRequest, "missing", missing)


def prefix_kept_of_an_unsound_end(patch: pytest.MonkeyPatch) -> None:
    """A sequence of which a part is still to be computed again goes into the prefix cache all the same."""
    real = RunningSequences.retire

    def retire(self: RunningSequences, sequence: Any) -> None:
        sequence.rebuild = None
        real(self, sequence)

    patch.setattr(RunningSequences, "retire", retire)


PLANTS: dict[str, Plant] = {
    plant.__name__: plant
    for plant in (
        operations_applied_twice,
        survivor_keeps_a_cut_position,
        old_reply_accepted,
        close_lost,
        no_fence,
        shared_page_written,
        client_gets_a_token_again,
        prefix_kept_of_an_unsound_end,
    )
}
