"""How pages are counted: once where sequences and prefixes share them (`PageRuns`), and only where the layers and heads
of a pool keep them (`PageGroup`). Pure.

An owner is a sequence or a prefix. What it has of a share is a path of runs, from a root to a leaf of its own. All
owners below a run have its pages, and no others. So a leaf's pages are free once its owner is closed.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

from lamina.kv.kv_shares import NO_PAGES, Handover, Layout, Pages, Share


@dataclass(eq=False, slots=True)
class PageRun:
    """The pages of a share at positions [lo, hi); `hi` of a sequence's leaf is not kept, since it grows.

    `users` counts the leaves below that are in use. `floor`, of a leaf, is its owner's as of the last row that came to
    the share: a range that is full lets nothing go any more. Of other runs without users it is the lowest of the leaves
    below.
    """

    share: Share
    lo: int
    hi: int
    parent: PageRun | None = None
    floor: int = 0
    users: int = 1
    children: set[PageRun] = field(default_factory=set)

    def path(self) -> Iterator[PageRun]:
        """This run and those above it."""
        run: PageRun | None = self
        while run is not None:
            yield run
            run = run.parent


Runs = dict[Share, PageRun]
"""The leaves of one owner, by share."""


class PageRuns:
    """The runs of one engine. `unused` has the pages that are in no sequence, nor in a prefix that is in use.

    `weigh(layout, lo, hi, floor)` counts the pages of positions [lo, hi) that an owner with that floor keeps.
    """

    def __init__(self, page_size: int, weigh: Callable[[Layout, int, int, int], Pages]) -> None:
        self.unused = NO_PAGES
        self._size = page_size
        self._weigh = weigh

    def open(self, layout: Layout, known: int = 0, floor: int = 0) -> Runs:
        """The leaves of a new sequence. Which others have the pages of its first `known` tokens too is unknown."""
        return {share: PageRun(share, max(share.lo, self._end(known)), 0, floor=floor) for share in layout}

    def fork(self, source: Runs, length: int, prefix: bool = False, users: int = 1, policy: str | None = None) -> Runs:
        """The leaves of an owner that shares the first `length` tokens of another, of that policy; None: of the
        other's. Those of a prefix are whole pages, and may be without users."""
        forks, cut = {}, self._end(length)
        for of_source, leaf in source.items():
            parent, floor = self._ends(leaf, cut), leaf.floor
            share = of_source if policy in (None, of_source.policy) else replace(of_source, policy=policy)
            forks[share] = fork = PageRun(share, max(share.lo, cut), length if prefix else 0, parent, floor, 0)
            if parent is not None:
                parent.children.add(fork)
                for run in parent.path():
                    if not run.users:
                        self.unused -= self._pages(run)
                    run.floor = min(run.floor, floor)
                    if not run.users:
                        self.unused += self._pages(run)
            self._use(fork, users)
        return forks

    def use(self, runs: Runs, users: int) -> None:
        """A prefix is in use (1), or not any more (-1)."""
        for leaf in runs.values():
            self._use(leaf, users)

    def close(self, runs: Runs) -> None:
        for leaf in runs.values():
            self._use(leaf, -leaf.users)
            self._cut_off(leaf)
            self.unused -= self._pages(leaf)

    def relocate(self, runs: Runs, kept: Container[Share] = (), new: Layout = ()) -> None:
        """A sequence has lost all shares but these, and has new ones, which it shares with none."""
        lost_leaves = {share: leaf for share, leaf in runs.items() if share not in kept}
        self.close(lost_leaves)
        for share in lost_leaves:
            del runs[share]
        runs.update(self.open(new))

    def grow(self, runs: Runs, handovers: Iterable[Handover]) -> None:
        """Shares of a sequence grow elsewhere: they end above all that it has of them."""
        for share, ended, taker in handovers:
            leaf = runs.pop(share)
            if ended is None:
                self.close({share: leaf})
            else:
                leaf.share = ended
                runs[ended] = leaf
            runs[taker] = PageRun(taker, taker.lo, 0)

    def rewrite(self, runs: Runs, start: int) -> None:
        """A sequence writes its tokens from `start` on into pages of its own."""
        for leaf in runs.values():
            cut = max(leaf.share.lo, start - start % self._size)
            if leaf.lo > cut:
                parent = self._ends(leaf, cut)
                self._use(leaf, -1)
                self._cut_off(leaf)
                leaf.lo, leaf.parent = cut, parent
                if parent is not None:
                    parent.children.add(leaf)
                self._use(leaf, 1)

    def extend(self, leaf: PageRun, hi: int) -> None:
        """The leaf of a prefix or spare has pages up to `hi` now."""
        before = self._pages(leaf)
        leaf.hi = hi
        if not leaf.users:
            self.unused += self._pages(leaf) - before

    def own(self, runs: Iterable[PageRun]) -> Pages:
        """The pages of these leaves of prefixes, which no other owner has."""
        pages = NO_PAGES
        for run in runs:
            pages += self._pages(run)
        return pages

    @staticmethod
    def common(a: PageRun, b: PageRun) -> int:
        """Up to which position two leaves have the same pages; 0 where they have none."""
        above = set(a.path())
        return next((run.hi for run in b.path() if run in above), 0)

    def _end(self, length: int) -> int:
        return length + -length % self._size

    def _pages(self, run: PageRun) -> Pages:
        return self._weigh((run.share,), run.lo, run.hi, run.floor)

    def _use(self, leaf: PageRun, users: int) -> None:
        if not users:
            return
        for run in leaf.path():
            before, run.users = run.users, run.users + users
            if not before:
                self.unused -= self._pages(run)
            elif not run.users:
                run.floor = min((child.floor for child in run.children), default=run.floor)
                self.unused += self._pages(run)

    def _ends(self, leaf: PageRun, cut: int) -> PageRun | None:
        """The run on a leaf's path that ends at `cut`, where whole pages end. None where the path begins there."""
        run = leaf
        while run.lo >= cut:
            if run.parent is None or run.parent.hi <= cut:
                return run.parent
            run = run.parent
        upper = PageRun(run.share, run.lo, cut, run.parent, run.floor, run.users, {run})
        if run.parent is not None:
            run.parent.children.remove(run)
            run.parent.children.add(upper)
        run.parent, run.lo = upper, cut
        return upper

    def _cut_off(self, leaf: PageRun) -> None:
        """Take a leaf without users off its path. Where a single run is left beside it, its parent is one with that."""
        parent, leaf.parent = leaf.parent, None
        if parent is None:
            return
        above = [run for run in parent.path() if not run.users]
        for run in above:
            self.unused -= self._pages(run)
        parent.children.remove(leaf)
        if len(parent.children) == 1:
            (only,) = parent.children
            if not only.users:
                self.unused -= self._pages(only)
                above.insert(0, only)
            only.lo, only.parent = parent.lo, parent.parent
            if parent.parent is not None:
                parent.parent.children.remove(parent)
                parent.parent.children.add(only)
            if parent in above:
                above.remove(parent)
        for run in above:
            run.floor = min((child.floor for child in run.children), default=run.floor)
            self.unused += self._pages(run)


class Retention(Protocol):
    """Which tokens of a sequence are kept; `lamina_workers.policies.policy.Policy` implements it."""

    def seen_from(self, start: int) -> int:
        """The lowest position, but for pages that stay, that queries at `start` or later see. What lies below is freed
        with a row at `start`."""

    def staying(self, first: int, end: int, size: int) -> int:
        """How many of the pages [first, end), of `size` tokens each, are kept as long as the sequence is."""


class PageGroup(NamedTuple):
    """Layers whose KV heads `heads` (None: all) keep what `policy` says (None: everything)."""

    layers: int
    policy: Retention | None = None
    heads: frozenset[int] | None = None

    def cells(self, heads: tuple[int, ...]) -> int:
        """How many of these heads, over all layers, belong to the group."""
        return self.layers * (len(heads) if self.heads is None else len(self.heads.intersection(heads)))

    def kept(self, first: int, end: int, floor: int, start: int, size: int) -> int:
        """How many of the pages [first, end) of a head a sequence of that floor keeps, once a row at `start` has
        come."""
        if self.policy is None:
            return max(0, end - first)
        window = max(first, self.policy.seen_from(max(floor, start)) // size)
        return self.policy.staying(first, min(end, window), size) + max(0, end - window)

    def most(self, first: int, needed: int, length: int, size: int) -> int:
        """The most of `needed` pages from `first` on that a head has at a time, while its sequence grows page by page
        to `length` tokens."""
        if self.policy is None:
            return needed
        window = length - self.policy.seen_from(length) + 1
        return min(needed, self.policy.staying(first, first + needed, size) + -(-window // size) + 2)


class PolicyKv(NamedTuple):
    """What becomes of the KV of sequences under a policy, whose `name` is as the engine writes it. `groups`: what is
    kept, by pool. `whole_prompts`: a prompt reads everything, so its KV is as without a policy. `chooses`: a decoded
    token reads otherwise than the same token of a prompt, and a row of decode can have no drafts."""

    name: str
    groups: tuple[tuple[PageGroup, ...], ...]
    whole_prompts: bool = True
    chooses: bool = False
