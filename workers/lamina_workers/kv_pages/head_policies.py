"""The policies of KV heads: a holder's own, by the texts of its `HolderConfig`, or one that a part has for all heads.
They are parsed once for reading and for keeping. A stored layer keeps all that any layer which reads it can see.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch

from lamina_protocols.messages.layers import HolderConfig, LayerSpec
from lamina_workers.errors import PolicyError
from lamina_workers.policies.catalogue import parse
from lamina_workers.policies.compared.blocks import BlockPolicy
from lamina_workers.policies.policy import LONGEST, Policy, within

LayerPolicies = tuple[Policy, ...]  # one a KV head


@dataclass(frozen=True, eq=False)
class HeadPolicies:
    """reads: by layer, how each KV head is read, its sliding window included.

    keepers: by stored layer, what all layers that read a KV head keep of it together.

    counted: whether what was read and kept is counted, since a policy or an index chooses it."""

    reads: tuple[LayerPolicies, ...]
    keepers: tuple[LayerPolicies, ...]
    indexed: bool  # whether a layer has an index of its own
    counted: bool
    sketches: bool  # whether sketches of pages are kept although no policy here reads them

    @staticmethod
    @lru_cache(maxsize=256)
    def of(config: HolderConfig, policy: str = "") -> HeadPolicies:
        """The policies of such holders, or where a part has a `policy` of its own, which all its heads have, that
        part's. Mostly the same object at every call. Raises PolicyError, also where such holders cannot serve the
        part's policy."""
        if policy:
            return _asked(config, policy)
        reads = tuple(_parsed(spec, config.page_size) for spec in config.layers)
        readers: list[list[LayerPolicies]] = [[] for _ in range(1 + max(spec.kv_layer for spec in config.layers))]
        for spec, policies in zip(config.layers, reads, strict=True):
            readers[spec.kv_layer].append(policies)
        every = [[(parse("full"),) * spec.kv_heads] for spec in config.layers]  # of a layer that is not read
        keepers = (
            tuple(map(_together, zip(*of_layer or unread, strict=True)))
            for of_layer, unread in zip(readers, every, strict=False)
        )
        indexed = any(spec.index for spec in config.layers)
        counted = indexed or any(spec.policies for spec in config.layers)
        return HeadPolicies(reads, tuple(keepers), indexed, counted, config.sketches and not indexed)

    @cached_property
    def alike(self) -> tuple[int, ...]:
        """By layer, the first layer that is read as this one."""
        first: dict[LayerPolicies, int] = {}
        return tuple(first.setdefault(policies, layer) for layer, policies in enumerate(self.reads))

    @cached_property
    def retention(self) -> Retention:
        """What is kept, by the heads of a part."""
        return Retention(self)

    @cached_property
    def distinct(self) -> tuple[Policy, ...]:
        """Each policy that a head is read by, once."""
        return tuple(dict.fromkeys(policy for layer in self.reads for policy in layer))

    @cached_property
    def sketched(self) -> bool:
        """Whether sketches of pages are kept."""
        return self.sketches or any(policy.adaptive for policy in self.distinct)

    def stride(self, start: int, prompt: int) -> int:
        """One in so many queries is kept of a row that begins at `start`, of a prompt of `prompt` tokens; 0: none."""
        strides = [policy.sampled(start, prompt) for policy in self.distinct]
        return min((stride for stride in strides if stride), default=0)

    @cached_property
    def releasing(self) -> tuple[Policy, ...]:
        """Of the keepers, the policies by which pages are freed while their part lives."""
        every = dict.fromkeys(policy for layer in self.keepers for policy in layer)
        return tuple(policy for policy in every if policy.seen_from(LONGEST) > 0)

    def check(self, device: torch.device) -> None:
        """Raise PolicyError for a policy that a holder on that device cannot serve."""
        if self.indexed and device.type != "cpu":
            raise PolicyError(f"layers with an index choose what they read, which attention on {device} cannot do")
        hosted = [policy for policy in self.distinct if policy.builds]
        if hosted and device.type != "cpu":
            raise PolicyError(
                f"the policy {hosted[0]} keeps an index, which attention on {device} cannot search; allowed there are "
                "policies without one, and any policy with attention on cpu"
            )


@dataclass(frozen=True)
class _Together(Policy):
    """What several layers that read the same KV keep of it."""

    name: ClassVar[str] = "together"
    policies: tuple[Policy, ...]

    @property
    def sinks(self) -> int:
        return max(policy.sinks for policy in self.policies)

    def seen_from(self, start: int) -> int:
        return min(policy.seen_from(start) for policy in self.policies)


def _together(policies: Sequence[Policy]) -> Policy:
    different = tuple(dict.fromkeys(policies))
    return different[0] if len(different) == 1 else _Together(different)


def _asked(config: HolderConfig, policy: str) -> HeadPolicies:
    """The policies of a part that has its own."""
    present = HeadPolicies.of(config)
    if present.indexed:
        raise PolicyError(f"the policy is {policy!r:.80}; allowed is none: the model's own index chooses what is read")
    layers = tuple(replace(spec, policies=(policy,) * spec.kv_heads) for spec in config.layers)
    requested = HeadPolicies.of(replace(config, layers=layers))
    if requested.sketched and not present.sketched:
        raise PolicyError(
            f"the policy {policy:.80} chooses by sketches of pages, which this engine does not keep; allowed here are "
            "static policies, and any where the engine has sketches=True or a policy that chooses"
        )
    if any(rule.builds for rule in requested.distinct) and not any(rule.builds for rule in present.distinct):
        raise PolicyError(
            f"the policy {policy:.80} builds an index of keys, which this engine does not; allowed here is the same "
            "without an index, or an engine whose own policy builds one"
        )
    return requested


def _parsed(spec: LayerSpec, page_size: int) -> LayerPolicies:
    if spec.policies and len(spec.policies) != spec.kv_heads:
        raise PolicyError(f"{len(spec.policies)} policies for a layer of {spec.kv_heads} KV heads")
    if spec.index and (others := [text for text in spec.policies if text != "full"]):
        raise PolicyError(f"the model's own index chooses what a layer reads; its policy is {others[0]}, allowed: full")
    texts = spec.policies or ("full",) * spec.kv_heads
    return tuple(policy_of(text, head, spec.window, page_size) for head, text in enumerate(texts))


def policy_of(text: str, head: int, window: int | None, page_size: int) -> Policy:
    """How KV head `head` of a layer with that sliding window is read under a text. Raises PolicyError."""
    policy = parse(text).of_head(head)
    if isinstance(policy, BlockPolicy) and policy.block % page_size:
        raise PolicyError(
            f"{policy.name}: block is {policy.block}; allowed are multiples of the page size, {page_size}"
        )
    return within(policy, window)


@dataclass(frozen=True, slots=True)
class Group:
    """The cells, bool `[layers, heads]`, of a part that are kept by this policy."""

    policy: Policy
    cells: npt.NDArray[np.bool_]


@lru_cache(maxsize=256)
def read_alike(policies: tuple[HeadPolicies, ...]) -> tuple[int, ...]:
    """By layer, a number that the layers have in common which are read alike under each of these; from 0 on."""
    numbers: dict[tuple[int, ...], int] = {}
    of_layers = zip(*(policy.alike for policy in policies), strict=True)
    return tuple(numbers.setdefault(alike, len(numbers)) for alike in of_layers)


class Retention:
    """Which cells of a holder's parts are kept by which policy, for policies by which anything is freed at all."""

    def __init__(self, policies: HeadPolicies) -> None:
        self._keepers = policies.keepers
        self._releasing = policies.releasing
        self._by_heads: dict[tuple[int, ...], tuple[Group, ...]] = {}

    def groups(self, heads: tuple[int, ...]) -> tuple[Group, ...]:
        """The groups of a part of those heads, in their order."""
        groups_of_heads = self._by_heads.get(heads)
        if groups_of_heads is None:
            groups = [
                Group(policy, np.array([[layer[head] == policy for head in heads] for layer in self._keepers]))
                for policy in self._releasing
            ]
            groups_of_heads = self._by_heads[heads] = tuple(group for group in groups if group.cells.any())
        return groups_of_heads


@lru_cache(maxsize=1 << 14)
def returns_to(policy: Policy, position: int) -> int:
    """`policy.returns_to(position)`, cached, since each batch asks for it again."""
    return policy.returns_to(position)


@lru_cache(maxsize=1 << 14)  # each batch asks for it again
def lowest_length(policy: Policy, lo: int, freed: int, size: int) -> int:
    """The lowest length to which a part of that policy, of pages from position `lo` on, can return: the first `freed`
    of them are gone, but for what stays."""
    dropped_slots = np.flatnonzero(~policy.stays(lo + np.arange(freed) * size))
    return policy.returns_to(lo + (int(dropped_slots[-1]) + 1) * size) if len(dropped_slots) else 0
