"""Which pages of a sequence the layers and heads of a pool keep."""

from __future__ import annotations

from typing import NamedTuple, Protocol


class Retention(Protocol):
    """Which tokens of a sequence are kept; `lamina_workers.policies.policy.Policy` implements it."""

    @property
    def evicts(self) -> bool:
        """Whether decode frees pages by the attention that they got."""

    @property
    def unit(self) -> int:
        """By how many tokens at once `seen_from` moves on, at most."""

    def seen_from(self, start: int) -> int:
        """The lowest position, but for pages that stay, that queries at `start` or later see. What lies below is freed
        with a row at `start`."""

    def kept_from(self, start: int) -> int:
        """The lowest position, but for pages that stay, that a sequence of floor `start` keeps: means may stand for
        what is seen."""

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
        window = max(first, self.policy.kept_from(floor) // size, self.policy.seen_from(start) // size)
        return self.policy.staying(first, min(end, window), size) + max(0, end - window)

    def most(self, first: int, needed: int, length: int, size: int) -> int:
        """The most of `needed` pages from `first` on that a head has at a time, while its sequence grows page by page
        to `length` tokens."""
        if self.policy is None:
            return needed
        window = length - self.policy.seen_from(length) + self.policy.unit
        return min(needed, self.policy.staying(first, first + needed, size) + -(-window // size) + 2)


class PolicyKv(NamedTuple):
    """What becomes of the KV of sequences under a policy, whose `name` is as the engine writes it. `groups`: what is
    kept, by pool. `whole_prompts`: a prompt reads everything, so its KV is as without a policy. `chooses`: a decoded
    token reads otherwise than the same token of a prompt, and a row of decode can have no drafts."""

    name: str
    groups: tuple[tuple[PageGroup, ...], ...]
    whole_prompts: bool = True
    chooses: bool = False
