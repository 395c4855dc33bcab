"""Who waits for KV, and who gets it next: by order, where there is room for all that a sequence has and will have.

Knows the residents, and the layouts there could be; knows nothing of batches.
"""

from __future__ import annotations

from bisect import bisect_right
from heapq import heappop, heappush

from lamina.errors import EngineError
from lamina.scheduling.kv_shares import NO_PAGES, Layout, Layouts, Pages
from lamina.scheduling.prefix_cache import Match
from lamina.scheduling.request import ScheduledSequence, SchedulerConfig
from lamina.scheduling.running import Order, RunningSequences


class Admission:
    """The queue. One that waits for a prefix to be computed is not in it: the prefix tree has that one."""

    def __init__(self, config: SchedulerConfig, layouts: Layouts, residents: RunningSequences) -> None:
        self._config = config
        self._layouts = layouts
        self._residents = residents
        self._waiting: list[tuple[Order, ScheduledSequence]] = []  # heap; a finished sequence stays until it is on top
        self._short: tuple[ScheduledSequence | None, tuple[Pages, ...]] = None, ()  # who waits for how many spare pages
        self._stranded: list[ScheduledSequence] = []

    @property
    def stranded(self) -> tuple[ScheduledSequence, ...]:
        """Those that wait for a holder to join, since those there are can never keep them."""
        return tuple(sequence for sequence in self._stranded if sequence.finish_reason is None)

    def longest_possible(self) -> int:
        """The most tokens of one sequence that the context and the holders' memory can ever hold."""
        most = self._config.max_model_len
        if not self._layouts.capacity:  # no holder, for now
            return most
        return bisect_right(range(1, most + 1), False, key=lambda length: not self._fits(length))

    def _fits(self, length: int) -> bool:
        return any(self._holds(layout, length) for layout in self._layouts.layouts(length))

    def _holds(self, layout: Layout, length: int) -> bool:
        """Whether so many tokens could ever be kept in this layout."""
        return self._layouts.capacity.covers(self._config.pages_for(layout, length))

    def queue(self, sequence: ScheduledSequence) -> None:
        """Let a sequence without KV wait for its turn."""
        heappush(self._waiting, (sequence.order, sequence))

    def give_back(self, sequence: ScheduledSequence) -> None:
        """Take an idle sequence's KV away; it waits until it fits whole, and computes what it had again."""
        self._residents.close(sequence)
        self.queue(sequence)

    def look_again(self) -> None:
        """Room is not what it was: holders have gone."""
        self._short = None, ()

    def joined(self) -> None:
        """There is one holder more, which may keep what nobody could."""
        self.look_again()
        for sequence in self._stranded:
            self.queue(sequence)
        self._stranded.clear()

    def admit(self) -> ScheduledSequence | None:
        """Give KV to the first waiting sequence, if it fits. Those that wait for a prefix are overtaken."""
        residents = self._residents
        while self._waiting and len(residents.sequences) < self._config.max_sequences:
            sequence = self._waiting[0][1]
            if sequence.finish_reason is not None:
                heappop(self._waiting)
                continue
            if self._still_short(sequence):
                return None  # and the tree is not searched again in every step
            match = residents.match(sequence)
            if residents.tree is not None and self._worth_waiting(sequence, match):
                residents.tree.wait(sequence, match)
                heappop(self._waiting)
                continue
            places = self._places(sequence, match)
            if not places:
                if not self._layouts.capacity:
                    return None
                self._stranded.append(heappop(self._waiting)[1])
                continue
            place = self._with_room(sequence, places)
            if place is None:
                return None
            layout, match = place
            heappop(self._waiting)
            if residents.tree is not None and sequence.preemptions == 0:
                residents.counters.looked_up_tokens += len(sequence.tokens)
                residents.counters.found_tokens += match.length
            residents.open(sequence, layout, match.node, match.length)
            return sequence
        return None

    def admit_siblings(self, first: ScheduledSequence) -> None:
        """Fork the other samples off the first, whose prompt is computed; those without room wait like anyone."""
        residents, length = self._residents, len(first.request.prompt) - 1
        for sibling in first.siblings:
            turn = not self._waiting or sibling.order < self._waiting[0][0]
            place = len(residents.sequences) < self._config.max_sequences
            room = residents.spare().covers(residents.needed(sibling, first.layout, None, length))
            if sibling.finish_reason is None and length > 0 and turn and place and room:
                residents.fork(sibling, first, length)
            else:
                self.queue(sibling)
        first.siblings = []

    def _still_short(self, sequence: ScheduledSequence) -> bool:
        """Whether there is still not the room that it was found to need before."""
        known, alternatives = self._short
        if sequence is not known or not self._residents.sequences:
            return False
        spare = self._residents.spare()
        return not any(spare.covers(needed) for needed in alternatives)

    def _worth_waiting(self, sequence: ScheduledSequence, match: Match) -> bool:
        """Whether a prefix being computed saves a page or more, and its writer comes first anyway.

        A writer that comes later could be held up by others that must not hold up this sequence.
        """
        writer = match.pending.writer if match.pending is not None else None
        gain = match.promised - match.length
        return writer is not None and writer.order < sequence.order and gain >= self._config.page_size

    def _places(self, sequence: ScheduledSequence, match: Match) -> list[tuple[Layout, Match]]:
        """Where the sequence could run to its end, and what it would have of the tree there; the best first. What
        was found in the tree is taken up where it is, unless there is room only elsewhere."""
        beside = ((running.layout, len(running.tokens)) for running in self._residents.sequences)
        layouts = self._layouts.layouts(sequence.longest, len(sequence.tokens), beside)
        anew = [(layout, Match()) for layout in layouts if self._holds(layout, sequence.longest)]
        if match.node is None or not self._holds(match.node.layout, sequence.longest):
            return anew
        there = {share.holder for share in match.node.layout}
        return [
            (match.node.layout, match),
            *((layout, none) for layout, none in anew if there.isdisjoint(share.holder for share in layout)),
        ]

    def _with_room(
        self, sequence: ScheduledSequence, places: list[tuple[Layout, Match]]
    ) -> tuple[Layout, Match] | None:
        """The first place that has the room now; whoever is alone fits."""
        residents = self._residents
        alone = not residents.sequences
        spare = NO_PAGES if alone else residents.spare()
        alternatives = tuple(residents.needed(sequence, layout, at.node, at.length) for layout, at in places)
        for place, needed in zip(places, alternatives, strict=True):
            if spare.covers(needed):
                return place
        if alone:
            return places[0]
        self._short = sequence, alternatives
        return None

    def check_integrity(self) -> None:
        """Raise EngineError if somebody waits that has KV."""
        for _, sequence in self._waiting:
            known = self._residents.tree is not None and self._residents.tree.knows(sequence)
            if sequence.handle is not None or sequence.computed or known:
                raise EngineError(f"sample {sequence.sample} of request {sequence.request.id} waits, but has KV")
