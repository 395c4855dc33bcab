"""Which prefixes the holders keep, as a radix tree over token ids, so that each is computed once.

A node is a whole number of pages, and a sequence of its own in the holders, forked off the sequence that computed it.
Before that the node is *pending*, and its writer is computing it.

Requests of several policies share what is the same under all of them: the KV of prompts that read everything. Under
other policies, and where a policy chooses what decoded tokens read, KV differs, and has a tree for each policy.

A node of a model with states has their records after its last token, a snapshot, and can be forked there alone. So each
snapshot is a node. No sequence needs a snapshot to go on: it gives way even where the pages of its node are in use.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Set
from heapq import heappop, heappush

from lamina.errors import EngineError
from lamina.kv.kv_shares import NO_PAGES, Pages, Place
from lamina.kv.pages import PageRun, PageRuns
from lamina.kv.prefix_nodes import (
    Match,
    Node,
    PrefixEvents,
    Tree,
    closest_child,
    contradiction,
    is_at,
    kept_by,
    longest_match,
    path_up,
    pending_down_to,
    place_of,
)
from lamina.kv.request import ScheduledSequence, SchedulerConfig


class PrefixCache:
    """All trees, by salt and policy. `events` gets every change, `snapshots` are the pages of all nodes' states.

    `fork(parent, length)` and `close(handle, pages)` change the holders, and `wake` gets each sequence that need not
    wait any more.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        runs: PageRuns,
        fork: Callable[[int, int], int],
        close: Callable[[int, Pages], None],
        wake: Callable[[ScheduledSequence], None],
    ) -> None:
        self.snapshots = NO_PAGES
        self._config = config
        self._page_size = config.snapshot_tokens or config.page_size  # nodes are multiples of it
        self.events = PrefixEvents(self._page_size)
        self._runs, self._fork, self._close, self._wake = runs, fork, close, wake
        self._roots: dict[Tree, Node] = {}
        self._tick = 0
        self._deepest: dict[ScheduledSequence, Node] = {}  # the deepest node whose pages a running sequence shares
        self._pending: dict[ScheduledSequence, Node] = {}  # the deepest node that a running sequence is about to write
        # Heaps of (tick, handle, leaf), by the pools that keep a leaf or what is above it; ticks may be out of date.
        self._unused: dict[frozenset[Place], list[tuple[int, int, Node]]] = {}

    def __iter__(self) -> Iterator[Node]:
        """The nodes that are not pending."""
        return (node for node in self._nodes() if node.handle is not None)

    @property
    def evictable(self) -> Pages:
        """The pages that eviction could free, those of spares included."""
        return self._runs.unused + self.snapshots if self.snapshots else self._runs.unused

    def match(self, tokens: tuple[int, ...], salt: Hashable = None, policy: str = "") -> Match:
        """The longest prefix of `tokens` in the trees for that salt and policy. The last token is left out, since its
        logits are wanted."""
        roots = [self._roots[tree] for tree in dict.fromkeys(self._trees(salt, policy)) if tree in self._roots]
        matches = [longest_match(root, tokens, self._page_size) for root in roots]
        return max(matches, key=lambda match: (match.length, match.promised), default=Match())

    def _trees(self, salt: Hashable, policy: str) -> tuple[Tree, Tree]:
        """The tree of prompts under a policy, and that of all that is computed under it, decoded tokens too."""
        policy_kv = self._config.policy(policy)
        prompts = salt, None if policy_kv.whole_prompts else policy
        return prompts, (salt, policy) if policy_kv.chooses else prompts

    def _written(self, writer: ScheduledSequence) -> tuple[Tree, int, Tree]:
        """The tree of a sequence's first tokens, how many these are, and the tree of all its tokens."""
        prompts, every = self._trees(writer.request.salt, writer.request.policy)
        if prompts == every or not writer.exact:
            return every, len(writer.tokens), every
        return prompts, writer.exact, every

    def wait(self, sequence: ScheduledSequence, match: Match) -> None:
        """Let `sequence` wait until the promised pages are computed, or never will be."""
        node = match.pending
        if node is None or node.parent is None:
            raise EngineError(f"request {sequence.request.id} would wait for a prefix that is not pending")
        if match.promised < node.length:
            node = self._split(node, match.promised) or node
        node.waiters.append(sequence)

    def enter(self, writer: ScheduledSequence) -> None:
        """Enter the whole pages of the writer's tokens as pending nodes, where the tree lacks them."""
        tree, length, _ = self._written(writer)
        tokens = self._whole_pages(writer, length)
        node = self._branch(tokens, tree)
        # Not below another writer's pending node, which may be discarded before this one is computed.
        if node is not None and node.writer is None and node.length < len(tokens):
            ends = range(node.length + self._page_size, len(tokens), self._page_size) if self._config.states else ()
            for end in (*ends, len(tokens)):
                node = self._add(node, tokens, end)
                node.writer = writer
            self._pending[writer] = node

    def advance(self, writer: ScheduledSequence) -> None:
        """Fork the writer's pending nodes that are computed off it. It must not be in flight."""
        deepest, last = None, self._pending.get(writer)
        for node in pending_down_to(last):
            if node.length > writer.computed:
                break
            if not self._config.forks_at(writer, node.length):  # a sliding window has moved past: split off too late
                self.discard(writer)
                break
            self._make_ready(node, writer)
            deepest = node
        if self._config.snapshot_tokens and deepest is None and writer not in self._pending and writer.sound:
            deepest = self._keep(writer)  # what was generated
        if deepest is not None:
            self.release(writer)
            self.hold(writer, deepest, deepest.length)
            if deepest is last:
                self._pending.pop(writer, None)

    def discard(self, writer: ScheduledSequence) -> None:
        """Forget the writer's pending nodes, and wake the sequences that wait for them."""
        nodes = list(pending_down_to(self._pending.pop(writer, None)))
        for node in nodes:
            node.writer = None
            self._wake_waiters(node)
        if nodes:
            self._detach(nodes[0])  # below it are the others alone

    def keep(self, sequence: ScheduledSequence) -> None:
        """Enter the whole pages that an ended sequence has computed, forked off it. It must not be in flight."""
        self.discard(sequence)
        self._keep(sequence)

    def _keep(self, sequence: ScheduledSequence) -> Node | None:
        """The deepest new node with whole pages that a sequence has computed; None where there is none."""
        first, first_length, every = self._written(sequence)
        of_first = self._kept(sequence, first, min(first_length, sequence.computed))
        longer = first != every and len(self._whole_pages(sequence, sequence.computed)) > first_length
        return (self._kept(sequence, every, sequence.computed) if longer else None) or of_first

    def _kept(self, sequence: ScheduledSequence, tree: Tree, length: int) -> Node | None:
        """The new node of a tree with the whole pages of a sequence's first `length` tokens; None where there is
        none."""
        tokens, forks_at = self._whole_pages(sequence, length), self._config.forks_at
        node = self._branch(tokens, tree) if forks_at(sequence, len(tokens)) else None
        pending = list(pending_down_to(node))
        if node is None or not all(forks_at(sequence, promised.length) for promised in pending):
            return None
        for promised in pending:  # this sequence was faster than their writer
            self._make_ready(promised, sequence)
        if node.length < len(tokens):
            node = self._add(node, tokens, len(tokens))
            self._make_ready(node, sequence)
            return node
        return node if pending else None

    def hold(self, sequence: ScheduledSequence, node: Node, length: int) -> None:
        """Keep the nodes whose pages `sequence` shares: it was forked off `node` at `length`, or `node` off it."""
        shared = length - length % self._page_size
        while node.parent is not None and node.parent.length >= shared:
            node = node.parent
        self._deepest[sequence] = node
        self._tick += 1
        for ancestor in path_up(node):
            if ancestor.users == 0:
                self._runs.use(ancestor.runs, 1)
            ancestor.users += 1
            ancestor.tick = self._tick

    def release(self, sequence: ScheduledSequence) -> None:
        """Undo `hold`. Nodes without users may be evicted."""
        deepest = self._deepest.pop(sequence, None)
        if deepest is None:
            return
        for node in path_up(deepest):
            node.users -= 1
            if node.users == 0 and node.handle is not None:
                self._runs.use(node.runs, -1)
                self._queue(node)

    def held_by(self, sequence: ScheduledSequence) -> Node | None:
        """The deepest node whose pages a sequence shares."""
        return self._deepest.get(sequence)

    def knows(self, sequence: ScheduledSequence) -> bool:
        """Whether a sequence shares pages with a node, or is the writer of one."""
        return sequence in self._deepest or sequence in self._pending

    def unused_pages(self, node: Node) -> Pages:
        """The pages that would not be evictable any more if `node` were held."""
        leaves = (leaf for ancestor in path_up(node) if ancestor.users == 0 for leaf in ancestor.runs.values())
        return self._runs.own({run for leaf in leaves for run in leaf.path() if not run.users})

    def evict(self, at: Set[Place]) -> bool:
        """Close the least recently used leaf without users that is in one of these pools, or whose ancestors are; in a
        pool of states, then the oldest one with users. False where there is none."""
        while heaps := [heap for places, heap in self._unused.items() if heap and not places.isdisjoint(at)]:
            tick, _, node = heappop(min(heaps, key=lambda heap: heap[0][:2]))
            node.queued = False
            if node.tick > tick:
                self._queue(node)
            elif node.handle is not None and node.users == 0 and not node.children:
                self._evict(node)
                return True
        return bool(self.snapshots) and self._evict_snapshot(at)

    def _evict_snapshot(self, at: Set[Place]) -> bool:
        """Close the oldest node in use with a snapshot in one of these pools, below which all is pending; what is
        pending is forgotten."""
        candidates = [
            node
            for node in self
            if any(share.at in at and share.pool in self._config.states for share in node.layout)
            and all(child.writer is not None for child in node.children)
        ]
        if candidates:
            oldest = min(candidates, key=lambda node: node.tick)
            for writer in [child.writer for child in oldest.children if child.writer is not None]:
                self.discard(writer)
            self._evict(oldest)
        return bool(candidates)

    def clear(self, holders: Set[int] | None = None) -> None:
        """Drop every node, or those that have a share at one of these holders with all below them, pending ones too.
        Sequences keep the pages that they share."""
        nodes = [node for node in self._nodes() if is_at(node, holders)]
        for node in nodes:
            if node.writer is not None:
                self.discard(node.writer)
        for node in reversed(nodes):  # children first
            if node.handle is not None:
                self._evict(node)
        self._unused.clear()  # where they are kept may have changed
        for node in self:
            node.queued = False
            self._queue(node)

    def evict_used(self, at: Set[Place]) -> bool:
        """Drop the oldest leaf that is in one of these pools, pending or in use; its users keep the pages. False where
        there is none."""
        leaves = [node for node in self._nodes() if not node.children and not kept_by(node).isdisjoint(at)]
        if not leaves:
            return False
        oldest = min(leaves, key=lambda node: node.tick)
        if oldest.writer is not None:
            self.discard(oldest.writer)
        else:
            self._evict(oldest)
        return True

    def _whole_pages(self, sequence: ScheduledSequence, length: int) -> tuple[int, ...]:
        return tuple(sequence.tokens[: length - length % self._page_size])

    def _branch(self, tokens: tuple[int, ...], tree: Tree) -> Node | None:
        """The node at whose end `tokens` leave the tree, split off where there is none. None where they end inside an
        edge, or the edge cannot be split."""
        if not tokens:
            return None
        node = self._roots.setdefault(tree, Node(tokens=(), length=0, parent=None, tree=tree))
        while node.length < len(tokens):
            child, common = closest_child(node, tokens[node.length :])
            common -= common % self._page_size
            if child is None or common == 0:
                break
            if common < len(child.tokens):
                end = node.length + common
                return self._split(child, end) if end < len(tokens) else None
            node = child
        return node

    def _add(self, parent: Node, tokens: tuple[int, ...], end: int) -> Node:
        node = Node(tokens[parent.length : end], end, parent)
        parent.children.insert(place_of(parent, node.tokens), node)
        return node

    def _split(self, node: Node, length: int) -> Node | None:
        """Put a node of `length` tokens between `node` and its parent. None for a length below the floor of `node`."""
        parent = node.parent
        if parent is None or node.read or (node.handle is not None and length < node.floor):
            return None
        index = place_of(parent, node.tokens)
        common = length - parent.length
        upper = Node(
            node.tokens[:common], length, parent, node.writer, floor=node.floor, users=node.users, tick=node.tick
        )
        upper.children.append(node)
        parent.children[index] = upper
        node.parent, node.tokens = upper, node.tokens[common:]
        if node.handle is not None:
            upper.handle, upper.layout = self._fork(node.handle, length), node.layout
            upper.runs = self._runs.fork(node.runs, length, True, min(node.users, 1))
            self.events.split(upper, node)
        return upper

    def _make_ready(self, node: Node, source: ScheduledSequence) -> None:
        if node.parent is None or source.handle is None:
            raise EngineError(f"request {source.request.id} has no KV to fork a prefix from")
        if node.writer is not None and self._pending.get(node.writer) is node:
            del self._pending[node.writer]
        node.writer = None
        node.handle = self._fork(source.handle, node.length)
        node.floor, node.layout = source.floor, source.layout
        if self._config.states:
            node.floor = node.length
            source.forked.add(node.length)
            self.snapshots += self._config.records(node.layout)
        node.runs = self._runs.fork(source.runs, node.length, True, 0)
        node.tick = self._tick
        self.events.stored(node)
        self._queue(node)
        self._wake_waiters(node)

    def _wake_waiters(self, node: Node) -> None:
        for sequence in node.waiters:
            self._wake(sequence)
        node.waiters.clear()

    def _queue(self, node: Node) -> None:
        if node.handle is not None and node.users == 0 and not node.children and not node.queued:
            node.queued = True
            heappush(self._unused.setdefault(kept_by(node), []), (node.tick, node.handle, node))

    def _evict(self, node: Node) -> None:
        if node.handle is None:
            raise EngineError("a prefix node was evicted twice")
        self._close(node.handle, self._runs.own(node.runs.values()) + self._drop_snapshot(node))
        self._runs.close(node.runs)
        self.events.removed(node)
        node.handle, node.runs = None, {}
        self._detach(node)

    def _drop_snapshot(self, node: Node) -> Pages:
        """The pages of a node's states, which it gives up: none where sequences stand there; a single one has them
        alone from now on."""
        if not self._config.states:
            return NO_PAGES
        records = self._config.records(node.layout)
        self.snapshots -= records
        users = [sequence for sequence, deepest in self._deepest.items() if node.users and node in path_up(deepest)]
        standing = [user for user in users if node.length in user.forked & set(user.records)]
        if len(standing) == 1:
            standing[0].forked.discard(node.length)
        return NO_PAGES if standing else records

    def _detach(self, node: Node) -> None:
        """Cut a node off its parent. It keeps its own link to the parent, which `release` follows."""
        parent = node.parent
        if parent is None:
            return
        del parent.children[place_of(parent, node.tokens)]
        self._queue(parent)
        if parent.parent is None and not parent.children:
            del self._roots[parent.tree]

    def _nodes(self) -> Iterator[Node]:
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            stack.extend(node.children)
            if node.parent is not None:
                yield node

    def check_integrity(self, running: Iterable[ScheduledSequence], spares: Iterable[PageRun] = ()) -> list[int]:
        """Raise EngineError if nodes, users and counts contradict each other. Returns the handles of all nodes."""
        alive = set(running)
        if strangers := (self._deepest.keys() | self._pending.keys()) - alive:
            names = sorted(sequence.request.id for sequence in strangers)
            raise EngineError(f"the prefix tree knows requests that are not running: {names}")
        users = Counter(node for deepest in self._deepest.values() for node in path_up(deepest))
        handles = []
        unused = {run for leaf in spares for run in leaf.path() if not run.users}
        for node in self._nodes():
            wrong = contradiction(node, self._page_size, users[node])
            if node.writer is not None and node not in pending_down_to(self._pending.get(node.writer)):
                wrong = "its writer does not write it"
            if wrong:
                raise EngineError(f"the prefix node of {node.length} tokens, handle {node.handle}: {wrong}")
            if node.handle is not None:
                handles.append(node.handle)
                unused.update(run for leaf in node.runs.values() for run in leaf.path() if not run.users)
        snapshots = sum((self._config.records(node.layout) for node in self), NO_PAGES)
        if (evictable := self._runs.own(unused) + snapshots) != self.evictable:
            raise EngineError(f"the prefix tree counts {self.evictable} evictable pages, its nodes have {evictable}")
        return handles
