"""The prefix cache: the longest match against brute force, waiting requests, and the order of eviction."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.kv.kv_shares import Layout, Pages, Share
from lamina.kv.pages import PageGroup, PageRuns
from lamina.kv.prefix_cache import Match, PrefixCache
from lamina.kv.prefix_nodes import BlocksCleared, BlocksRemoved, BlocksStored, PrefixEvent
from lamina.kv.request import Request, ScheduledSequence, SchedulerConfig


class Keeper:
    """A cache, and the tokens of each handle that the holders keep for it. A page of tokens is one page of KV."""

    def __init__(self, page_size: int = 4) -> None:
        self.page_size = page_size
        self.held: dict[int, tuple[int, ...]] = {}
        self.closed: list[tuple[int, ...]] = []
        self.awake: list[ScheduledSequence] = []
        self.running: list[ScheduledSequence] = []
        self.handles = 0
        self.runs = PageRuns(page_size, self.weigh)
        config = SchedulerConfig(1, 1, 1, page_size, ((PageGroup(1),),))
        self.tree = PrefixCache(config, self.runs, self.fork, self.close, self.awake.append)

    def weigh(self, layout: Layout, lo: int, hi: int, floor: int) -> Pages:
        return Pages({(0, 0): max(0, -(-hi // self.page_size) - -(-lo // self.page_size))})

    def fork(self, parent: int, length: int) -> int:
        assert length <= len(self.held[parent])
        return self.hold(self.held[parent][:length])

    def hold(self, tokens: tuple[int, ...]) -> int:
        self.handles += 1
        self.held[self.handles] = tokens
        return self.handles

    def close(self, handle: int, freed: Pages) -> None:
        self.closed.append(self.held.pop(handle))

    def start(self, tokens: tuple[int, ...], match: Match | None = None, salt: str | None = None) -> ScheduledSequence:
        """A sequence whose computed tokens are those of the match, or none."""
        sequence = ScheduledSequence(Request("0", tokens, 1, salt=salt), 0, self.handles, list(tokens))
        sequence.handle, sequence.layout = self.hold(tokens), (Share(0, (0,), 0, 1 << 20),)
        sequence.runs = (
            self.runs.fork(match.node.runs, match.length) if match and match.node else self.runs.open(sequence.layout)
        )
        self.running.append(sequence)
        self.tree.enter(sequence)
        if match and match.node:
            sequence.computed = match.length
            self.tree.hold(sequence, match.node, match.length)
        self.check_integrity()
        return sequence

    def compute(self, sequence: ScheduledSequence, length: int) -> None:
        sequence.computed = length
        self.tree.advance(sequence)
        self.check_integrity()

    def finish(self, sequence: ScheduledSequence) -> None:
        self.tree.keep(sequence)
        self.tree.release(sequence)
        self.runs.close(sequence.runs)
        self.running.remove(sequence)
        assert sequence.handle is not None
        del self.held[sequence.handle]
        self.check_integrity()

    def keep(self, tokens: tuple[int, ...]) -> None:
        sequence = self.start(tokens)
        self.compute(sequence, len(tokens))
        self.finish(sequence)

    def check_integrity(self) -> None:
        handles = self.tree.check_integrity(self.running)
        assert set(handles) == self.held.keys() - {sequence.handle for sequence in self.running}


@st.composite
def prompts(draw: st.DrawFn) -> list[tuple[int, ...]]:
    """Prompts that often begin like another."""
    found: list[tuple[int, ...]] = [()]
    for _ in range(draw(st.integers(1, 8))):
        before = draw(st.sampled_from(found))
        cut = draw(st.integers(0, len(before)))
        tail = draw(st.lists(st.integers(0, 2), max_size=12)) * draw(st.sampled_from([1, 1, 20]))
        found.append((*before[:cut], *tail))
    return found


def common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    return next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@given(prompts(), prompts(), st.sampled_from([1, 2, 5]))
@settings(max_examples=150)
def test_match_finds_the_longest_prefix(
    kept: list[tuple[int, ...]], asked: list[tuple[int, ...]], page_size: int
) -> None:
    keeper = Keeper(page_size)
    for tokens in kept:
        keeper.keep(tokens)
    for tokens in kept + asked:
        match = keeper.tree.match(tokens)
        reach = max(common(tokens[:-1], other[: len(other) // page_size * page_size]) for other in kept)
        tail = reach % page_size
        assert match.length == (reach if 2 * tail >= page_size else reach - tail)
        if match.node is not None:
            assert match.node.handle is not None
            assert keeper.held[match.node.handle][: match.length] == tokens[: match.length]
        assert match.pending is None


@given(prompts(), st.data())
@settings(max_examples=100)
def test_every_unused_node_can_be_evicted(kept: list[tuple[int, ...]], data: st.DataObject) -> None:
    keeper = Keeper()
    for tokens in kept:
        keeper.keep(tokens)
    users = []
    for tokens in data.draw(st.lists(st.sampled_from(kept), max_size=3)):
        users.append(keeper.start(tokens, keeper.tree.match(tokens)))
        keeper.tree.discard(users[-1])
    promised, nodes = keeper.tree.evictable, len(keeper.held)
    while keeper.tree.evict({(0, 0)}):
        keeper.check_integrity()
    assert not keeper.tree.evictable
    assert sum(len(tokens) for tokens in keeper.closed) >= sum(promised.values())
    for user in users:
        whole = user.computed - user.computed % 4
        assert keeper.tree.match((*user.tokens[:whole], -1)).length == whole
        keeper.finish(user)
    while keeper.tree.evict({(0, 0)}):
        pass
    assert not keeper.held
    assert len(keeper.closed) >= nodes - len(users)


def test_eviction_takes_the_least_recently_used_leaf() -> None:
    keeper = Keeper()
    trunk = (0,) * 4
    branches = [trunk + (branch,) * 4 for branch in (1, 2, 3)]
    for branch in branches:
        keeper.keep(branch)
    touch = (*branches[0], 9)
    keeper.finish(keeper.start(touch, keeper.tree.match(touch)))
    while keeper.tree.evict({(0, 0)}):
        pass
    assert keeper.closed == [branches[1], branches[2], branches[0], trunk]


def test_node_in_use_is_not_evicted_but_can_be_given_up() -> None:
    keeper = Keeper()
    keeper.keep((1,) * 8)
    tokens = (1,) * 8 + (2,)
    user = keeper.start(tokens, keeper.tree.match(tokens))
    assert not keeper.tree.evictable
    assert not keeper.tree.evict({(0, 0)})
    assert keeper.tree.evict_used({(0, 0)})
    assert not keeper.tree.evict_used({(0, 0)})
    keeper.finish(user)
    assert keeper.closed == [(1,) * 8]


def test_fork_inside_a_page_happens_only_when_it_saves_half_of_the_page() -> None:
    keeper = Keeper(page_size=4)
    keeper.keep(tuple(range(1, 9)))
    lengths = [keeper.tree.match((*range(1, 1 + n), 0, 0)).length for n in range(9)]
    assert lengths == [0, 0, 2, 3, 4, 4, 6, 7, 8]


def test_fork_never_starts_below_the_floor() -> None:
    keeper = Keeper(page_size=4)
    sequence = keeper.start((1,) * 12)
    sequence.floor = 7
    keeper.compute(sequence, 12)
    keeper.finish(sequence)
    assert keeper.tree.match((1,) * 6 + (0,)).length == 0
    assert keeper.tree.match((1,) * 7 + (0,)).length == 7
    other = keeper.start((1,) * 4 + (0,) * 4)  # it would be split off at 4
    assert other not in keeper.tree._pending


def test_waiting_request_is_woken_when_its_prefix_is_computed() -> None:
    keeper = Keeper()
    writer = keeper.start((1,) * 16)
    waiter = ScheduledSequence(Request("1", (1,) * 9, 1), 0, 1, [1] * 9)
    match = keeper.tree.match((1,) * 9)
    assert (match.length, match.promised) == (0, 8)
    keeper.tree.wait(waiter, match)
    keeper.compute(writer, 7)
    assert keeper.awake == []
    keeper.compute(writer, 8)
    assert keeper.awake == [waiter]
    assert keeper.tree.match((1,) * 9).length == 8
    assert keeper.tree.match((1,) * 17).promised == 16


def test_waiting_requests_are_woken_when_the_writer_is_discarded() -> None:
    keeper = Keeper()
    writer = keeper.start((1,) * 16)
    waiters = [ScheduledSequence(Request(str(n), (1,) * n, 1), 0, n, [1] * n) for n in (9, 17)]
    for waiter in waiters:
        keeper.tree.wait(waiter, keeper.tree.match(tuple(waiter.tokens)))
    keeper.tree.discard(writer)
    assert keeper.awake == waiters
    assert keeper.tree.match((1,) * 17) == Match()
    keeper.check_integrity()


def test_pending_node_is_given_up_when_a_window_left_its_keys() -> None:
    keeper = Keeper()
    writer = keeper.start((1,) * 16)
    keeper.compute(writer, 9)
    waiter = ScheduledSequence(Request("1", (1,) * 9, 1), 0, 1, [1] * 9)
    keeper.tree.wait(waiter, keeper.tree.match((1,) * 9))
    writer.floor = 9  # its next row began at 9, and a window dropped the keys below
    keeper.compute(writer, 16)
    assert keeper.awake == [waiter]
    assert keeper.tree.match((1,) * 17) == Match()


def test_faster_writer_keeps_nothing_below_its_floor() -> None:
    keeper = Keeper()
    keeper.start((1,) * 12)
    fast = keeper.start((1,) * 8 + (2,) * 8)
    keeper.compute(fast, 16)
    fast.floor = 9
    keeper.finish(fast)
    assert keeper.tree.match((1,) * 8 + (2,) * 9).length == 0


def test_faster_writer_fills_the_node_that_another_writer_promised() -> None:
    keeper = Keeper()
    slow = keeper.start((1,) * 12)
    fast = keeper.start((1,) * 8 + (2,) * 8)
    assert fast not in keeper.tree._pending  # below another's pending node nothing is promised
    keeper.compute(fast, 16)
    keeper.finish(fast)
    assert keeper.tree.match((1,) * 8 + (2,) * 9).length == 16
    keeper.compute(slow, 12)
    keeper.finish(slow)
    assert keeper.tree.match((1,) * 13).length == 12


def test_empty_cache_keeps_no_root() -> None:
    keeper = Keeper()
    for salt in ("a", "b"):
        sequence = keeper.start((1,) * 8, salt=salt)
        keeper.tree.discard(sequence)
        keeper.finish(sequence)
        keeper.finish(keeper.start((1, 2), salt=salt))
    assert keeper.tree._roots == {}


class Router:
    """What a subscriber knows of a cache, from events alone: the tokens of each prefix, by the hash of its last
    block."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.blocks: dict[int, tuple[int, ...]] = {}

    def take(self, event: PrefixEvent) -> bool:
        if isinstance(event, BlocksCleared):
            self.blocks.clear()
        elif isinstance(event, BlocksRemoved):
            for each in event.hashes:
                del self.blocks[each]
        else:
            hashes, parent, tokens, size, _ = event
            assert size == self.page_size
            assert len(tokens) == size * len(hashes)
            before = () if parent is None else self.blocks[parent]
            for number, each in enumerate(hashes):
                before = (*before, *tokens[number * size : (number + 1) * size])
                assert each not in self.blocks
                self.blocks[each] = before
        return True

    def prefixes(self) -> list[tuple[int, ...]]:
        return sorted(self.blocks.values())


@given(prompts(), prompts(), st.integers(0, 6), st.sampled_from([1, 2, 5]))
@settings(max_examples=100, deadline=None)
def test_events_tell_a_router_every_block_that_is_kept(
    early: list[tuple[int, ...]], late: list[tuple[int, ...]], evictions: int, page_size: int
) -> None:
    keeper, first, second = Keeper(page_size), Router(page_size), Router(page_size)
    keeper.tree.events.listen(first.take, keeper.tree)
    for tokens in early:
        keeper.keep(tokens)
    for _ in range(evictions):
        keeper.tree.evict({(0, 0)})
    assert first.prefixes() == blocks(keeper)
    keeper.tree.events.listen(second.take, keeper.tree)  # which came later, and gets what is there
    for tokens in late:
        keeper.keep(tokens)
    assert second.prefixes() == blocks(keeper)
    keeper.tree.clear()
    assert second.prefixes() == []


def blocks(keeper: Keeper) -> list[tuple[int, ...]]:
    """Every prefix of whole pages that a node's KV has, once."""
    found = set()
    for handle in keeper.tree.check_integrity([]):
        tokens = keeper.held[handle]
        found.update(tokens[:end] for end in range(keeper.page_size, len(tokens) + 1, keeper.page_size))
    return sorted(found)


def test_blocks_of_other_salts_have_other_hashes_and_say_so() -> None:
    keeper = Keeper(2)
    events: list[PrefixEvent] = []
    keeper.tree.events.listen(lambda event: events.append(event) is None, keeper.tree)
    for salt in (None, "a"):
        sequence = keeper.start((1, 2, 3, 4), salt=salt)
        keeper.compute(sequence, 4)
        keeper.finish(sequence)
    shared, salted = (event for event in events if isinstance(event, BlocksStored))
    assert not set(shared.hashes) & set(salted.hashes)
    assert (shared.key, len(salted.key)) == ("", 16)


def test_a_listener_that_wants_no_more_gets_nothing_more() -> None:
    keeper = Keeper(2)
    events: list[PrefixEvent] = []
    keeper.tree.events.listen(lambda event: bool(events.append(event)), keeper.tree)
    keeper.keep((1, 2))
    assert events == [BlocksCleared()]
