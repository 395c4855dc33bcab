"""Bugs that are put into the running code, each in memory and for a while, to see that the simulation finds them.

Each is a mistake that somebody could make in a line or two, and that no test of one file would notice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lamina.journal.history import KnownRequest
from lamina.kv import prefix_cache
from lamina.kv.kv_rebuild import KvRebuild
from lamina.kv.kv_shares import Part, Place
from lamina.kv.page_ledger import PageLedger
from lamina.kv.placement import Holder, Routing
from lamina.kv.prefix_cache import PrefixCache
from lamina.kv.prefix_nodes import Match
from lamina.kv.relocation import GrowingShare, Growth
from lamina.kv.request import Plan, PlannedRow, ScheduledSequence
from lamina.kv.running import RunningSequences
from lamina.kv.spares import SpareCopy, Spares
from lamina.scheduling.scheduler import RowPlanner, Scheduler
from lamina_protocols.messages.messages import Announced, Announcement, Close, Operation, Reply
from lamina_protocols.messages.routes import HolderBatch, Route
from lamina_workers.attention_worker.attention_worker import AttentionWorker
from lamina_workers.kv_pages.kv_store import KVStore
from lamina_workers.kv_pages.parts import NO_PAGE
from lamina_workers.kv_pages.state_store import Records, StatePart, StateStore
from lamina_workers.policies.policy import View, Windowed
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


def last_key_of_an_ended_share_not_read(patch: pytest.MonkeyPatch) -> None:
    """Where growth went elsewhere, rows read one key less of the share that has ended."""
    real = Routing._routes

    def short(route: Route, end: int) -> Route:
        read = route.row.read
        if read is None or read[1] != end or read[0] + 1 == end:
            return route
        return route._replace(row=replace(route.row, read=(read[0], end - 1)))

    def routes(
        self: Routing, source: int, row: PlannedRow, parts: Sequence[Part], fuses: bool
    ) -> list[tuple[Place, Route]]:
        ends = {part.handle: part.share.hi for part in parts}
        every = real(self, source, row, parts, fuses)
        return [(at, short(route, ends.get(route.row.handle, -1))) for at, route in every]

    patch.setattr(Routing, "_routes", routes)


def growth_below_what_is_planned(patch: pytest.MonkeyPatch) -> None:
    """Growth goes elsewhere from the page on that is being written, not from the next one."""
    real = Growth._growing

    def growing(self: Growth, sequence: ScheduledSequence) -> list[GrowingShare]:
        size = self._config.page_size
        return [share._replace(at=max(0, share.at - size)) for share in real(self, sequence)]

    patch.setattr(Growth, "_growing", growing)


def spare_counts_a_page_too_many(patch: pytest.MonkeyPatch) -> None:
    """A spare is said to have a page more than was copied to it."""
    real = Spares.copied

    def copied(self: Spares, copy: SpareCopy) -> None:
        real(self, copy)
        copy.spare.stored += self._config.page_size

    patch.setattr(Spares, "copied", copied)


def older_states_never_freed(patch: pytest.MonkeyPatch) -> None:
    """Of the two records of a state that a part has, the older one is never given back."""

    def owned(self: StatePart) -> Iterator[Records]:
        yield from [self.last] if self.last.position else []

    patch.setattr(StatePart, "owned", owned)


def shared_states_written(patch: pytest.MonkeyPatch) -> None:
    """A state's record that forks share is written over."""
    patch.setattr(StateStore, "_shared", lambda self, records: False)


def window_a_token_short(patch: pytest.MonkeyPatch) -> None:
    """The oldest key of a sliding window is not read."""
    real = Windowed.views

    def views(self: Windowed, start: int, count: int) -> Iterator[View]:
        for view in real(self, start, count):
            yield replace(view, window=view.window - (view.window == self.window))

    patch.setattr(Windowed, "views", views)


def pages_behind_a_cut_never_freed(patch: pytest.MonkeyPatch) -> None:
    """A part that is cut back forgets the pages behind, so that no other part can have them."""
    real = KVStore._cut_back

    def cut_back(self: KVStore, part: Any, start: int) -> None:
        used = self._slots(max(part.lo, min(part.held, start)) - part.lo)
        part.table[:, :, used:] = NO_PAGE
        real(self, part, start)

    patch.setattr(KVStore, "_cut_back", cut_back)


def last_page_of_a_closed_part_never_freed(patch: pytest.MonkeyPatch) -> None:
    """Some parts that are closed keep their last page."""
    real = KVStore._apply

    def apply(self: KVStore, operation: Operation) -> None:
        if isinstance(operation, Close) and operation.handle % 4 == 0:
            self.part(operation.handle).table[:, :, -1:] = NO_PAGE
        real(self, operation)

    patch.setattr(KVStore, "_apply", apply)


def operation_too_many_counted_as_applied(patch: pytest.MonkeyPatch) -> None:
    """Once a holder has accepted a batch, the operation behind those of the batch leaves the outbox too."""
    real = Holder.accepted

    def accepted(self: Holder, batch: HolderBatch) -> list[int]:
        freed = real(self, batch)
        if len(self.outbox) > 1:
            del self.outbox[0], self._freed[0]
        return freed

    patch.setattr(Holder, "accepted", accepted)


def prefix_never_released(patch: pytest.MonkeyPatch) -> None:
    """Some sequences that end leave their prefix in use."""
    real = PrefixCache.release

    def release(self: PrefixCache, sequence: ScheduledSequence) -> None:
        if sequence.arrival % 3:
            real(self, sequence)
        else:
            self._deepest.pop(sequence, None)

    patch.setattr(PrefixCache, "release", release)


def fork_a_token_too_long(patch: pytest.MonkeyPatch) -> None:
    """A prefix is said to have one token more in common with a prompt."""
    real = prefix_cache.longest_match

    def longest(*arguments: Any) -> Match:
        match = real(*arguments)
        longer = match.node is not None and match.length < match.node.length
        return match._replace(length=match.length + 1) if longer else match

    patch.setattr(prefix_cache, "longest_match", longest)


def pages_of_an_undone_plan_never_given_back(patch: pytest.MonkeyPatch) -> None:
    """The ledger waits for ever for the answer to a plan that was given up."""
    patch.setattr(PageLedger, "forget", lambda self, plan: plan in self._unanswered)


def rebuild_writes_pages_that_count_as_shared(patch: pytest.MonkeyPatch) -> None:
    """What a rebuild writes again in pages of its own still counts as shared with others."""
    patch.setattr(KvRebuild, "_rewrites", lambda self, sequence: None)


def suspects_make_no_room(patch: pytest.MonkeyPatch) -> None:
    """Suspects that are tried together do not give up pages for each other, and are tried in no other way."""
    trials, make_room = RowPlanner.trials, RowPlanner._make_room
    tried: list[ScheduledSequence] = []

    def first_trial(self: RowPlanner) -> list[list[ScheduledSequence]]:
        trial = trials(self)[:1]
        tried[:] = trial[0] if trial else []
        return trial

    def room(self: RowPlanner, sequence: ScheduledSequence, want: int, younger: deque[ScheduledSequence]) -> int:
        others = deque(other for other in younger if other not in tried) if sequence in tried else younger
        return make_room(self, sequence, want, others)

    patch.setattr(RowPlanner, "trials", first_trial)
    patch.setattr(RowPlanner, "_make_room", room)


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
        last_key_of_an_ended_share_not_read,
        growth_below_what_is_planned,
        spare_counts_a_page_too_many,
        older_states_never_freed,
        shared_states_written,
        window_a_token_short,
        pages_behind_a_cut_never_freed,
        last_page_of_a_closed_part_never_freed,
        operation_too_many_counted_as_applied,
        prefix_never_released,
        fork_a_token_too_long,
        pages_of_an_undone_plan_never_given_back,
        rebuild_writes_pages_that_count_as_shared,
        suspects_make_no_room,
    )
}
