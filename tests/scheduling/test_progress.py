"""While there is work, there is a next batch, or something with a name is waited for: also with full pools, suspects,
losses, and engines that are gone."""

from __future__ import annotations

from contextlib import suppress
from itertools import count, groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pools import END, LAYERS, PAGE, Pool, World

from lamina.errors import InvalidRequest
from lamina.kv.kv_shares import Part
from lamina.kv.placement import Holder, Placement
from lamina.kv.request import RetainedKv, ScheduledSequence
from lamina_protocols.messages.messages import PartHeld, Surveyed

PAGE_SET = 4 * LAYERS  # pages of PAGE tokens, of all heads
LONGEST = END // PAGE  # page sets of a sequence, at most
ACTIONS = ["turn", "turn", "turn", "add", "fail", "fail all", "lose", "join", "restart", "hold", "abort"]


class Faulty(World):
    """A world in which batches fail, pools come and go, and the engine ends and begins anew."""

    def __init__(self, pages: tuple[int, ...], **options: object) -> None:
        super().__init__(pages, **options)  # type: ignore[arg-type]
        self._numbers = count(20)  # of pools that join

    @property
    def unfinished(self) -> list[ScheduledSequence]:
        return [sequence for sequence in self.samples if sequence.finish_reason is None]

    def turn(self) -> bool:
        """Begin a batch where a lane is free, else compute the oldest. False where neither can be."""
        if len(self.in_flight) < self.control.tuner.lanes and self.begin():
            return True
        if self.in_flight:
            self.finish()
            return True
        return False

    def fail(self, count: int) -> None:
        """The oldest batches under way fail. A request that is to blame ends."""
        failed, self.in_flight = self.in_flight[:count], self.in_flight[count:]
        for step in failed:
            step.dropped()
        culprit = self.control.scheduler.blame.failed([row for step in failed for row in step.rows])
        if culprit is not None:
            self.control.scheduler.abort(culprit.request.id)

    def join(self, pages: int) -> None:
        number = next(self._numbers)
        self.pools[number], self.said[number] = Pool(pages), pages
        self.control.joined(number, Holder((pages,)))
        self.control.scheduler.growth.joined([number])

    def restart(self) -> None:
        """The engine is gone. The next one takes up what the pools have, and suspects every request."""
        before, self.control = self.control.placement, self.engine()
        self.in_flight.clear()
        placement, handles = self.control.placement, [0]
        for number, pool in self.pools.items():
            parts = [PartHeld(handle, 0, (), part.lo, part.hi, part.hi, 0) for handle, part in pool.parts.items()]
            placement.holders[number].keeps(Surveyed(0, 0, 0, pool.applied, tuple(parts)))
            handles += pool.parts
        placement.number_from(max((sequence.handle or 0 for sequence in self.samples), default=0), max(handles))
        unfinished = self.unfinished
        self.samples = [sequence for sequence in self.samples if sequence.finish_reason is not None]
        for _, samples in groupby(unfinished, key=lambda sequence: sequence.request):
            self._take_up(list(samples), before)
        step = self.control.inquiry(self.pools)
        step.accepted(answers := self.announce(step))
        self.said |= {number: answer.free_pages[0] for number, answer in answers.items()}

    def _take_up(self, samples: list[ScheduledSequence], before: Placement) -> None:
        scheduler, placement, request = self.control.scheduler, self.control.placement, samples[0].request
        kept = {}
        for sequence in samples:
            parts = before.parts(sequence.handle or 0)
            if sequence.handle and sequence.computed and sequence.rebuild is None and all(map(self._stores, parts)):
                placement.adopt(sequence.handle, parts)
                kept[sequence.sample] = RetainedKv(sequence.handle, sequence.layout, sequence.computed, 0)
        known = {sequence.sample: tuple(sequence.tokens[len(request.prompt) :]) for sequence in samples}
        for sequence in scheduler.add(request, known, kept):
            self.samples.append(sequence)
            scheduler.blame.suspect(sequence, 1, sequence.computed, len(sequence.tokens))

    def _stores(self, part: Part) -> bool:
        """Whether a pool has heard of a part, and of its range."""
        pool = self.pools.get(part.share.holder)
        stored = pool.parts.get(part.handle) if pool is not None else None
        return stored is not None and (stored.lo, stored.hi) == (part.share.lo, part.share.hi)

    def go_on(self) -> None:
        """Until nothing is left to do. A constraint that is late comes where nothing else can be done."""
        for _ in range(3000):
            if self.turn():
                self.control.scheduler.check_integrity()
                continue
            late = [sequence for sequence in self.unfinished if sequence.held]
            if not late:
                break
            for sequence in late:
                sequence.held = False
        waits = bool(self.control.scheduler.admission.stranded) or not self.control.placement.capacity
        assert waits or not self.control.has_work, "there is work, and nothing is waited for"


@pytest.mark.fault("F15")
@pytest.mark.parametrize(("running", "waiting"), [(2, 0), (2, 5), (3, 20), (4, 10), (6, 30)])
@pytest.mark.parametrize("free", [0, 1])
@pytest.mark.parametrize("length", [17, 19, 20])
def test_next_engine_goes_on_where_the_pools_are_full(running: int, waiting: int, free: int, length: int) -> None:
    """Suspects that are tried together did not make room for each other."""
    world = Faulty((PAGE_SET * (running * -(-length // PAGE) + free),), batch=64)
    for number in range(running):
        world.add([100 * number + at for at in range(7)], 30)
    while any(sequence.computed < length for sequence in world.samples):
        assert world.turn()
    for number in range(waiting):
        world.add([5000 + 100 * number + at for at in range(5)], 6)
    world.restart()
    assert len(world.control.scheduler.running) == running
    assert world.control.scheduler.ledger.room().get((1, 0), 0) == free * PAGE_SET
    world.go_on()
    assert all(sequence.finish_reason == "length" for sequence in world.samples)
    world.check_end()


@pytest.mark.fault("F15")
@pytest.mark.parametrize(("requests", "samples"), [(2, 1), (1, 2), (3, 1), (2, 2)])
@pytest.mark.parametrize("sets", range(9, 16))
def test_batch_that_fails_where_it_took_the_last_pages_runs_again(requests: int, samples: int, sets: int) -> None:
    for place in range(12, 28, 4):
        world = Faulty((PAGE_SET * sets,), batch=64)
        for number in range(requests):
            world.add([100 * number + at for at in range(7)], 26, n=samples)
        while not (world.in_flight and any(row.start >= place for row in world.in_flight[0].rows)):
            assert world.turn()
        world.fail(1)
        world.go_on()
        world.check_end()


@pytest.mark.fault("F15")
@given(
    sets=st.lists(st.integers(LONGEST // 2, 2 * LONGEST), min_size=1, max_size=3),
    shard=st.sampled_from(["heads", "sequence", "heads+sequence"]),
    lanes=st.integers(1, 3),
    prefix_cache=st.booleans(),
    actions=st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 40)), min_size=10, max_size=80),
)
@settings(max_examples=200, deadline=None)
def test_work_goes_on_or_waits_for_something_with_a_name(
    sets: list[int], shard: str, lanes: int, prefix_cache: bool, actions: list[tuple[str, int]]
) -> None:
    world = Faulty(tuple(PAGE_SET * count for count in sets), shard=shard, lanes=lanes, prefix_cache=prefix_cache)
    world.add(list(range(10)), 20)
    for action, number in actions:
        match action:
            case "turn":
                for _ in range(number):
                    world.turn()
            case "add":
                shared = list(range(number % 3 * 6))
                own = [100 * number + at for at in range(1 + number % 16)]
                with suppress(InvalidRequest):  # it is too long for these pools
                    world.add([*shared, *own], 1 + number % 30, 1 + number % 2)
            case "fail":
                world.fail(1)
            case "fail all":
                world.fail(lanes)
            case "lose" if len(world.pools) > 1:
                world.fail(lanes)
                world.lose(list(world.pools)[number % len(world.pools)])
            case "join" if len(world.pools) < 3:
                world.join(PAGE_SET * (LONGEST + number))
            case "restart":
                world.restart()
            case "hold" | "abort" if world.unfinished:
                sequence = world.unfinished[number % len(world.unfinished)]
                if action == "abort":
                    world.control.scheduler.end(sequence, "abort")
                else:
                    sequence.held = sequence.handle is not None and not sequence.in_flight
        world.control.scheduler.check_integrity()
    world.go_on()
    assert not world.given_up, "an honest pool is let go"
    if world.control.scheduler.admission.stranded:
        world.join(PAGE_SET * 4 * LONGEST)
        world.go_on()
    world.check_end(restarted="restart" in dict(actions))
