"""The nodes of the prefix cache, a radix tree over token ids, and what changes in it (`PrefixEvents`). Pure.

Changes are told block by block, for routers that send requests where their prefix is. A block is `page_size` tokens of
a prefix. Its hash is that of its parent's hash and its tokens, so it stands for the whole prefix that it ends; prefixes
of other salts and policies have other hashes.
"""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_left
from collections.abc import Callable, Container, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import NamedTuple, TypeAlias

from lamina.kv.kv_shares import Layout, Place, Share
from lamina.kv.pages import Runs
from lamina.kv.request import ScheduledSequence

Tree = tuple[Hashable, str | None]
"""Of which sequences a tree is: their salt, and their policy; None: KV that is the same without a policy."""


@dataclass(eq=False, slots=True)
class Node:
    """The first `length` tokens of a path; `tokens` are those beyond its parent. Both are whole pages.

    A node is pending while it has a `writer`; then it has a `handle` in the holders, until it is evicted. The first
    pages of children differ, so an edge is found by the order of tokens.
    """

    tokens: tuple[int, ...]
    length: int
    parent: Node | None
    writer: ScheduledSequence | None = None
    handle: int | None = None
    floor: int = 0  # the lowest length at which it can be forked
    layout: Layout = ()  # the shares of its KV
    runs: Runs = field(default_factory=dict)  # by share, the pages that it shares with none
    read: Layout = ()  # the shares that are read back: until then it cannot be forked
    users: int = 0  # running sequences that share pages with it or with a node below
    tick: int = 0  # when it was last used
    queued: bool = False  # whether the heap of unused leaves has it
    tree: Tree = (None, None)  # of a root
    children: list[Node] = field(default_factory=list)
    waiters: list[ScheduledSequence] = field(default_factory=list)


class Match(NamedTuple):
    """What the tree has of some tokens: the first `length` by a fork of `node`, and the first `promised` in pages that
    the writer of `pending` is about to compute. None and 0 where there is nothing."""

    node: Node | None = None
    length: int = 0
    pending: Node | None = None
    promised: int = 0


def longest_match(root: Node, tokens: tuple[int, ...], page_size: int) -> Match:
    """The longest prefix of `tokens`, without the last one, that the tree below `root` has; nodes are multiples of
    `page_size` tokens. A fork inside a page costs a copy of it, so it is used only where it saves half a page or more.
    """
    node, position = root, 0
    source, length, pending, promised = None, 0, None, 0
    while position < len(tokens) - 1:
        child, common = closest_child(node, tokens[position:-1])
        if child is None:
            break
        reach = position + common
        page_end = reach - reach % page_size
        if child.writer is None:
            usable = reach if 2 * (reach - page_end) >= page_size else page_end
            if usable > position and usable >= child.floor and not child.read:
                source, length = child, usable
        elif page_end > position:
            pending, promised = child, page_end
        if common < len(child.tokens):
            break
        node, position = child, child.length
    return Match(source, length, pending, promised)


def place_of(parent: Node, tokens: tuple[int, ...]) -> int:
    """The index among the children of the edge `tokens`, or where it would be inserted."""
    return bisect_left(parent.children, tokens, key=lambda child: child.tokens)


def closest_child(node: Node, tokens: tuple[int, ...]) -> tuple[Node | None, int]:
    """The child that shares the most tokens, and how many. It is next to the place of `tokens` in the order."""
    best, longest = None, 0
    index = place_of(node, tokens)
    for child in node.children[max(index - 1, 0) : index + 1]:
        common = common_length(child.tokens, tokens)
        if common > longest:
            best, longest = child, common
    return best, longest


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens a and b have in common at their beginning. Compares slices: a loop takes 1 ms for 12,000."""
    shorter = min(len(a), len(b))
    low, high = 0, 64
    while high < shorter and a[low:high] == b[low:high]:
        low, high = high, 2 * high
    high = min(high, shorter) + 1
    while high - low > 1:  # the first `low` are equal, the first `high` are not
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low


def tree_of(node: Node) -> Tree:
    while node.parent is not None:
        node = node.parent
    return node.tree


def path_up(node: Node) -> Iterator[Node]:
    """The node and its ancestors, without the root."""
    ancestor: Node | None = node
    while ancestor is not None and ancestor.parent is not None:
        yield ancestor
        ancestor = ancestor.parent


def pending_down_to(node: Node | None) -> Iterator[Node]:
    """The pending nodes of the path to `node`, from the top. They have one writer."""
    pending = []
    while node is not None and node.writer is not None:
        pending.append(node)
        node = node.parent
    return reversed(pending)


def contradiction(node: Node, page_size: int, users: int) -> str | None:
    """What is wrong with a node that `users` sequences hold; None where nothing is. Nodes are multiples of `page_size`
    tokens."""
    parent = node.parent
    if parent is None or node.length != parent.length + len(node.tokens):
        return "its length is not its parent's and its own tokens"
    if not node.tokens or node.length % page_size or len(node.tokens) % page_size:
        return "it is no whole number of pages"
    if (node.handle is None) != (node.writer is not None):
        return "it must have a handle or a writer, and not both"
    if node.writer is None and parent.writer is not None:
        return "its parent is pending"
    if node.users != (users if node.handle is not None else 0):
        return f"it counts {node.users} users, {users} hold it"
    if node.waiters and node.writer is None:
        return "sequences wait for it"
    if any(a.tokens[:page_size] >= b.tokens[:page_size] for a, b in pairwise(node.children)):
        return "its children are out of order or begin alike"
    if node.handle is not None and not node.users and not node.children and not node.queued:
        return "it would never be evicted"
    return None


def kept_by(leaf: Node) -> frozenset[Place]:
    """The pools that keep a leaf, or what is above it."""
    return frozenset(share.at for node, share in shares_of(leaf) if share.lo < node.length)


def is_at(node: Node, holders: Container[int] | None) -> bool:
    """Whether a node or one above it has a share at one of these holders; None: at any."""
    return holders is None or any(share.holder in holders for _, share in shares_of(node))


def shares_of(node: Node) -> Iterator[tuple[Node, Share]]:
    """The shares of a node and of those above it: a pending node is kept where its writer is."""
    for ancestor in path_up(node):
        yield from (
            (ancestor, share) for share in (ancestor.layout if ancestor.writer is None else ancestor.writer.layout)
        )


class BlocksStored(NamedTuple):
    """Consecutive blocks of `block` tokens are in the cache, behind the block `parent`; None: at the begin of a prompt.

    Hashes are unsigned integers of 64 bits. `key` is the same for all blocks that the same requests may share, "" for
    those that any request may."""

    hashes: tuple[int, ...]
    parent: int | None
    tokens: tuple[int, ...]
    block: int
    key: str


class BlocksRemoved(NamedTuple):
    """The cache has these blocks no more."""

    hashes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BlocksCleared:
    """The cache is empty."""


PrefixEvent: TypeAlias = BlocksStored | BlocksRemoved | BlocksCleared

PrefixSink: TypeAlias = Callable[[PrefixEvent], bool]
"""Takes an event, and returns at once: False where it wants no more."""


class PrefixEvents:
    """Counts the prefixes that were entered, and sends a sink, if there is one, what is stored and what is removed."""

    def __init__(self, block: int) -> None:
        self.entered = 0
        self._block = block
        self._sink: PrefixSink | None = None
        self._hashes: dict[Node, tuple[int, ...]] = {}  # of the blocks that a node has beyond its parent

    def listen(self, sink: PrefixSink, nodes: Iterable[Node]) -> None:
        """Send `sink` that the cache is cleared, then these nodes, parents first, and from now on what changes. The
        previous sink gets nothing more."""
        self._sink = sink
        self._hashes.clear()
        self._send(BlocksCleared())
        for node in nodes:
            self._store(node)

    def stored(self, node: Node) -> None:
        self.entered += 1
        self._store(node)

    def split(self, upper: Node, lower: Node) -> None:
        """The first tokens of `lower` are `upper`'s from now on: the same blocks."""
        if (hashes := self._hashes.get(lower)) is not None:
            count = len(upper.tokens) // self._block
            self._hashes[upper], self._hashes[lower] = hashes[:count], hashes[count:]

    def removed(self, node: Node) -> None:
        """A node's KV is not kept for others any more."""
        if (hashes := self._hashes.pop(node, None)) is not None:
            self._send(BlocksRemoved(hashes))

    def _store(self, node: Node) -> None:
        if self._sink is None or node.parent is None:
            return
        tree = tree_of(node)
        above = self._hashes.get(node.parent)
        parent = above[-1] if above else None
        hashes, last = [], _of_tree(tree) if parent is None else parent
        for start in range(0, len(node.tokens), self._block):
            last = _hash(last, node.tokens[start : start + self._block])
            hashes.append(last)
        self._hashes[node] = tuple(hashes)
        self._send(BlocksStored(self._hashes[node], parent, node.tokens, self._block, _key(tree)))

    def _send(self, event: PrefixEvent) -> None:
        if self._sink is not None and not self._sink(event):
            self._sink = None
            self._hashes.clear()


def _hash(parent: int, tokens: tuple[int, ...]) -> int:
    data = array("Q", chain((parent,), tokens)).tobytes()
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "little")


def _of_tree(tree: Tree) -> int:
    return int.from_bytes(hashlib.sha256(repr(tree).encode()).digest()[:8], "little")


def _key(tree: Tree) -> str:
    salt, policy = tree
    parts = salt if isinstance(salt, tuple) else (salt,)
    return "" if not policy and not any(parts) else f"{_of_tree(tree):016x}"
