"""What changes in the prefix cache, block by block, for routers that send requests where their prefix is. Pure.

A block is `page_size` tokens of a prefix. Its hash is that of its parent's hash and its tokens, so it stands for the
whole prefix that it ends; prefixes of other salts and policies have other hashes.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any, TypeAlias

from lamina.scheduling.prefix_nodes import Node, Tree, tree_of

PrefixEvent: TypeAlias = tuple[Any, ...]
"""("stored", hashes, parent's hash or None, tokens, block size, key) | ("removed", hashes) | ("cleared",).

Hashes are unsigned integers of 64 bits. `key` is the same for all blocks that the same requests may share, "" for those
that any request may."""

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
        """Send `sink` that nothing is there, then these nodes, parents first, and from now on what changes. The sink
        before gets nothing more."""
        self._sink = sink
        self._hashes.clear()
        self._send(("cleared",))
        for node in nodes:
            self._store(node)

    def stored(self, node: Node) -> None:
        """A node's KV is there."""
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
            self._send(("removed", hashes))

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
        self._send(("stored", self._hashes[node], parent, node.tokens, self._block, _key(tree)))

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
