"""Spares of sequences and prefixes: what they lack, what they take, and who takes a lost part's place."""

from __future__ import annotations

from collections.abc import Iterator

from lamina.kv.kv_shares import GONE, Pages
from lamina.kv.pages import PageGroup
from lamina.kv.placement import Holder, Placement
from lamina.kv.redundancy import parse
from lamina.kv.request import Request, ScheduledSequence, SchedulerConfig
from lamina.kv.spares import Owner
from lamina.scheduling.control_plane import ControlPlane
from lamina_protocols.messages.messages import Announced, Close, Fork, Open

PAGE, END, PAGES = 4, 64, 400


class World:
    """A control plane whose holders accept all; copies to spares are made as soon as they are due."""

    def __init__(self, redundancy: str, holders: int = 3, heads: int = 2, pages: int = PAGES) -> None:
        self.placement = Placement(
            {number: Holder((pages,)) for number in range(1, holders + 1)},
            heads=((heads,),), page_size=PAGE, max_model_len=END,
        )  # fmt: skip
        config = SchedulerConfig(
            max_batch_tokens=64, max_sequences=8, max_model_len=END, page_size=PAGE,
            page_groups=((PageGroup(1),),), redundancy=parse(redundancy),
        )  # fmt: skip
        self.control = ControlPlane(config, self.placement)
        self.spares, self.running = self.control.spares, self.control.scheduler.running
        self.rebuilds = self.control.scheduler.rebuilds

    def add(self, name: str, tokens: int, more: int = 20) -> ScheduledSequence:
        (sequence,) = self.control.scheduler.add(Request(name, tuple(range(tokens)), more))
        return sequence

    def step(self) -> None:
        """One batch. Whatever is sampled is 7."""
        step = self.control.plan()
        assert step is not None
        free = self.control.scheduler.ledger.room()
        answers = {
            number: Announced(0, 0, True, tuple(free.get((number, 0), 0) for _ in (0,)), (0,) * len(batch.routes))
            for number, batch in step.batches.items()
        }
        step.accepted(answers)
        if step.plan is not None:
            step.recorded([7] * sum(row.samples for row in step.rows))
        self.control.scheduler.check_integrity()

    def owners(self) -> Iterator[tuple[Owner, int]]:
        yield from ((sequence, sequence.computed) for sequence in self.running)
        yield from ((node, node.length) for node in self.running.prefix_cache)

    def protect(self, room: Pages | None = None) -> int:
        """Make all copies that are due. Returns how many tokens were copied."""
        left = self.placement.pages if room is None else room
        tokens = 0
        for owner, length in [*self.owners()]:
            while copy := self.spares.next_copy(owner, length, PAGE, 99, left, lambda: (o for o, _ in self.owners())):
                self.spares.begins(copy)
                self.spares.took(copy)
                self.spares.copied(copy)
                tokens += copy.hi - copy.lo
        self.control.scheduler.check_integrity()
        return tokens

    def covered(self) -> float:
        counts = [self.spares.covered(owner, length) for owner, length in self.owners()]
        return sum(covered for covered, _ in counts) / sum(total for _, total in counts)


def test_each_share_has_a_replica_elsewhere_of_its_whole_pages() -> None:
    world = World("replica")
    sequence = world.add("a", 10)
    world.step()
    world.protect()
    spares = world.spares.of(sequence.handle or 0)
    assert {spare.of for spare in spares} == {(share,) for share in sequence.layout}
    assert all(spare.stored == 8 and spare.part.share.holder != spare.of[0].holder for spare in spares)
    assert world.protect() == 0
    assert world.covered() == (8 + 8) / (10 + 8)  # of the sequence, and of the prefix that was entered


def test_a_prefix_that_several_share_is_kept_once_in_spares_too() -> None:
    world = World("replica", heads=1)
    world.add("a", 17)
    world.step()
    world.protect()
    before = world.spares.pages
    world.add("b", 17)
    world.step()
    assert world.protect() == 0
    assert world.spares.pages == before
    assert sum(before.values()) == 4


def test_an_owner_without_spare_gets_a_fork_of_one_that_has_its_pages() -> None:
    world = World("replica", heads=1)
    world.add("a", 16)
    world.step()  # the prefix is entered before there are spares
    assert world.protect() == 16
    spares = list(world.spares)
    assert len(spares) == 2
    assert sum(world.spares.pages.values()) == 4
    forks = [op for holder in world.placement.holders.values() for op in holder.outbox if isinstance(op, Fork)]
    assert any(fork.length == 12 or fork.length == 16 for fork in forks)


def test_spares_go_before_prefixes_where_pages_are_short() -> None:
    world = World("replica", heads=1)
    world.add("a", 16)
    world.step()
    world.protect()
    place = next(iter(world.spares)).part.share.at
    assert world.running.prefix_cache.evictable[place] == 4
    nodes = len([*world.running.prefix_cache])
    while any(spare.part.share.at == place for spare in world.spares):
        assert world.running.evict({place})
    assert len([*world.running.prefix_cache]) == nodes
    assert not world.running.prefix_cache.evictable.get(place, 0)
    closes = [op for op in world.placement.holders[place[0]].outbox if isinstance(op, Close)]
    assert len(closes) == 2
    assert world.placement.closing[place] == 4


def test_no_spare_is_made_where_there_is_no_room() -> None:
    world = World("replica", heads=1)
    world.add("a", 16)
    world.step()
    assert world.protect(Pages()) == 0
    assert not [*world.spares]


def test_a_promoted_replica_leaves_only_the_tail_to_be_computed() -> None:
    world = World("replica", heads=2)
    sequence = world.add("a", 10)
    world.step()
    world.protect()
    lost = sequence.layout[0]
    rebuilt = world.control.lost([lost.holder])
    world.control.scheduler.check_integrity()
    assert rebuilt == (2, 0, 8)
    assert sequence.rebuild is not None
    assert (sequence.rebuild.at, sequence.rebuild.end) == (8, 10)
    assert lost.holder not in {share.holder for share in sequence.layout}
    parts = {part.share for part in world.placement.parts(sequence.handle or 0)}
    assert parts == set(sequence.layout)
    for _ in range(3):
        world.step()
    assert sequence.rebuild is None
    assert world.protect() > 0


def test_prefixes_with_spares_outlive_a_loss_and_others_do_not() -> None:
    for protected, found in ((True, 12), (False, 0)):
        world = World("replica", heads=1)
        first = world.add("a", 13, more=1)
        world.step()
        if protected:
            world.protect()
        (node,) = world.running.prefix_cache
        world.control.lost([node.layout[0].holder])
        world.control.scheduler.check_integrity()
        assert first.finish_reason == "length"
        match = world.running.prefix_cache.match(tuple(range(13)))
        assert match.length == found


def test_two_replicas_outlive_two_losses_at_once() -> None:
    world = World("replica(2)", holders=4, heads=1)
    sequence = world.add("a", 10)
    world.step()
    world.protect()
    (share,) = sequence.layout
    one = world.spares.of(sequence.handle or 0)[0].part.share.holder
    assert world.control.lost([share.holder, one]) == (2, 0, 8)
    world.control.scheduler.check_integrity()
    for _ in range(3):
        world.step()
    assert sequence.rebuild is None


def test_one_loss_too_many_is_computed_again() -> None:
    world = World("replica", holders=3, heads=2)
    sequence = world.add("a", 10)
    world.step()
    world.protect()
    lost, kept = sequence.layout
    (spare,) = [spare for spare in world.spares.of(sequence.handle or 0) if spare.of == (lost,)]
    if spare.part.share.holder == kept.holder:
        assert world.control.lost([lost.holder]).tokens == 2
    else:
        assert world.control.lost([lost.holder, spare.part.share.holder]).tokens == 10
    world.control.scheduler.check_integrity()


def test_a_drained_holder_keeps_no_spares() -> None:
    world = World("replica", heads=1)
    world.add("a", 10)
    world.step()
    world.protect()
    (spare,) = [spare for spare in world.spares if spare.stored == 8][:1]
    world.control.drain([spare.part.share.holder])
    assert all(each.part.share.holder != spare.part.share.holder for each in world.spares)
    world.protect()
    assert [*world.spares]
    assert all(each.part.share.holder != spare.part.share.holder for each in world.spares)


def test_parity_takes_a_share_for_several_and_gives_one_back() -> None:
    world = World("parity", holders=4, heads=2)
    sequence = world.add("a", 10)
    world.step()
    world.protect()
    (spare,) = world.spares.of(sequence.handle or 0)
    assert spare.of == sequence.layout
    assert len(spare.part.share.heads) == 1
    lost, kept = sequence.layout
    rebuilt = world.control.lost([lost.holder])
    assert rebuilt == (2, 0, 8)
    assert not world.rebuilds.ready(sequence)
    read = world.rebuilds.reads.next()
    assert read is not None
    assert read.part is not None
    assert read.share.holder not in {lost.holder, kept.holder, spare.part.share.holder}
    assert (read.at, read.end) == (0, 8)
    assert world.rebuilds.reads.readable(read)
    read.at = read.end
    world.rebuilds.read_back(read)
    assert world.rebuilds.ready(sequence)
    for _ in range(3):
        world.step()
    assert sequence.rebuild is None
    assert world.spares.of(sequence.handle or 0)[0].of == sequence.layout


def test_what_cannot_be_read_back_is_computed_again() -> None:
    world = World("parity", holders=4, heads=2)
    sequence = world.add("a", 10)
    world.step()
    world.protect()
    world.control.lost([sequence.layout[0].holder])
    while (read := world.rebuilds.reads.next()) is not None:
        world.rebuilds.not_read(read)
    world.running.prefix_cache.clear({GONE})
    world.control.scheduler.check_integrity()
    assert sequence.rebuild is not None
    assert (sequence.rebuild.at, sequence.rebuild.end, sequence.rebuild.read) == (0, 10, ())
    assert not [*world.running.prefix_cache]
    for _ in range(4):
        world.step()
    assert sequence.rebuild is None


def test_prefixes_are_read_back_once_for_all_that_share_them() -> None:
    world = World("parity", holders=4, heads=2)
    one = world.add("a", 13)
    world.step()
    world.protect()
    other = world.add("b", 13)
    world.step()
    world.protect()
    (node,) = world.running.prefix_cache
    world.control.lost([one.layout[0].holder])
    world.control.scheduler.check_integrity()
    assert node.read
    assert world.running.prefix_cache.match(tuple(range(13))).node is None
    tokens = 0
    while (read := world.rebuilds.reads.next()) is not None:
        tokens += read.end - read.at
        world.rebuilds.reads.took(read, read.end)
        read.at = read.end
        world.rebuilds.read_back(read)
        world.control.scheduler.check_integrity()
    assert tokens == 12
    assert not node.read
    assert world.running.prefix_cache.match(tuple(range(13))).node is node
    opened = [op for holder in world.placement.holders.values() for op in holder.outbox if isinstance(op, Open)]
    assert opened
    assert world.rebuilds.ready(one)
    assert world.rebuilds.ready(other)
