"""What a holder may let go: for every layer and KV head that it keeps, the policies of those who read it.

Pure: read off a `HolderConfig`. Knows no page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from lamina_protocols.messages import HolderConfig, LayerSpec
from lamina_workers.errors import PolicyError
from lamina_workers.policies.catalogue import parse
from lamina_workers.policies.policy import LONGEST, Policy, within

Cells = npt.NDArray[np.bool_]


def layer_policies(spec: LayerSpec) -> tuple[Policy, ...]:
    """How each KV head of the layer is read, its sliding window included. Raises PolicyError."""
    if spec.policies and len(spec.policies) != spec.kv_heads:
        raise PolicyError(f"{len(spec.policies)} policies for a layer of {spec.kv_heads} KV heads")
    return tuple(within(parse(text), spec.window) for text in spec.policies or ("full",) * spec.kv_heads)


@dataclass(frozen=True)
class _Readers(Policy):
    """What several layers that read the same KV keep of it."""

    name: ClassVar[str] = "readers"
    policies: tuple[Policy, ...]

    @property
    def sinks(self) -> int:
        return max(policy.sinks for policy in self.policies)

    def seen_from(self, start: int) -> int:
        return min(policy.seen_from(start) for policy in self.policies)


@dataclass(frozen=True, slots=True)
class Group:
    """The cells, bool `[layers, heads]`, whose readers have this policy together."""

    policy: Policy
    cells: Cells


def keepers(config: HolderConfig) -> tuple[tuple[Policy, ...], ...]:
    """By stored layer, for each KV head: the policy of all who read it. Raises PolicyError."""
    readers: list[list[tuple[Policy, ...]]] = [[] for _ in range(1 + max(spec.kv_layer for spec in config.layers))]
    for spec in config.layers:
        readers[spec.kv_layer].append(layer_policies(spec))
    unread = ((parse("full"),) * config.layers[0].kv_heads,)  # of layers whose KV nobody reads
    return tuple(tuple(_all_of(policies) for policies in zip(*of_layer or unread, strict=True)) for of_layer in readers)


def _all_of(policies: Sequence[Policy]) -> Policy:
    different = tuple(dict.fromkeys(policies))
    return different[0] if len(different) == 1 else _Readers(different)


class Retention:
    """The groups of a holder whose policies let anything go at all."""

    def __init__(self, config: HolderConfig) -> None:
        self._keepers = keepers(config)
        self._by_heads: dict[tuple[int, ...], tuple[Group, ...]] = {}

    def groups(self, heads: tuple[int, ...]) -> tuple[Group, ...]:
        """For a part of those heads, in their order."""
        found = self._by_heads.get(heads)
        if found is None:
            every = {policy for layer in self._keepers for policy in layer}
            # What one of several readers would have a mean stand for, the others still read.
            shared = {policy for readers in every if isinstance(readers, _Readers) for policy in readers.policies}
            policies = {
                policy
                for policy in every
                if policy.kept_from(LONGEST) > 0 and not (policy.compensated and policy in shared)
            }
            groups = [
                Group(policy, np.array([[layer[head] == policy for head in heads] for layer in self._keepers]))
                for policy in policies
            ]
            found = self._by_heads[heads] = tuple(group for group in groups if group.cells.any())
        return found


@lru_cache(maxsize=1 << 14)
def returns_to(policy: Policy, position: int) -> int:
    """`policy.returns_to(position)`, which is asked for again in each batch."""
    return policy.returns_to(position)
