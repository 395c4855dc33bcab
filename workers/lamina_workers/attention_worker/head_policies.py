"""The policies of a holder's KV heads: the texts of a `HolderConfig`, parsed once for reading and for keeping.

Promises that a stored layer keeps all that any layer which reads it can see.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch

from lamina_protocols.layers import HolderConfig, LayerSpec
from lamina_workers.errors import PolicyError
from lamina_workers.policies.catalogue import parse
from lamina_workers.policies.policy import LONGEST, Policy, within

LayerPolicies = tuple[Policy, ...]  # one a KV head


@dataclass(frozen=True, slots=True)
class HeadPolicies:
    """reads: by layer, how each KV head is read, its sliding window included.

    keepers: by stored layer, what all layers that read a KV head keep of it together."""

    reads: tuple[LayerPolicies, ...]
    keepers: tuple[LayerPolicies, ...]
    indexed: bool = False  # whether a layer has an index of its own

    @staticmethod
    @lru_cache(maxsize=64)
    def of(config: HolderConfig) -> HeadPolicies:
        """The policies of such holders, the same object at every call. Raises PolicyError."""
        reads = tuple(_parsed(spec) for spec in config.layers)
        readers: list[list[LayerPolicies]] = [[] for _ in range(1 + max(spec.kv_layer for spec in config.layers))]
        for spec, policies in zip(config.layers, reads, strict=True):
            readers[spec.kv_layer].append(policies)
        every = [[(parse("full"),) * spec.kv_heads] for spec in config.layers]  # of a layer that nobody reads
        keepers = (
            tuple(map(_together, zip(*of_layer or unread, strict=True)))
            for of_layer, unread in zip(readers, every, strict=False)
        )
        return HeadPolicies(reads, tuple(keepers), any(spec.index for spec in config.layers))

    @property
    def distinct(self) -> tuple[Policy, ...]:
        """Each policy that a head is read by, once."""
        return tuple(dict.fromkeys(policy for layer in self.reads for policy in layer))

    @property
    def sketched(self) -> bool:
        """Whether a policy reads sketches of pages."""
        return any(policy.sketched for policy in self.distinct)

    @property
    def releasing(self) -> tuple[Policy, ...]:
        """Of the keepers, the policies by which pages are freed while their part lives.

        A compensated one is left out where a layer with another policy reads the same KV: that layer still reads what a
        mean would stand for."""
        every = tuple(dict.fromkeys(policy for layer in self.keepers for policy in layer))
        shared = {policy for keeper in every if isinstance(keeper, _Together) for policy in keeper.policies}
        return tuple(p for p in every if p.kept_from(LONGEST) > 0 and not (p.compensated and p in shared))

    def check(self, device: torch.device) -> None:
        """Raise PolicyError for a policy that a holder on that device cannot serve: choosers run on CPUs alone."""
        if self.indexed and device.type != "cpu":
            raise PolicyError(f"layers with an index choose what they read, which attention on {device} cannot do")
        choosing = [policy for policy in self.distinct if policy.adaptive or policy.sketched]
        if choosing and device.type != "cpu":
            raise PolicyError(
                f"the policy {choosing[0]} chooses what it reads, which attention on {device} cannot do; allowed there "
                "are static policies, and any policy with attention on cpu"
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


def _parsed(spec: LayerSpec) -> LayerPolicies:
    if spec.policies and len(spec.policies) != spec.kv_heads:
        raise PolicyError(f"{len(spec.policies)} policies for a layer of {spec.kv_heads} KV heads")
    if spec.index and (others := [text for text in spec.policies if text != "full"]):
        raise PolicyError(f"the model's own index chooses what a layer reads; its policy is {others[0]}, allowed: full")
    return tuple(within(parse(text), spec.window) for text in spec.policies or ("full",) * spec.kv_heads)


@dataclass(frozen=True, slots=True)
class Group:
    """The cells, bool `[layers, heads]`, of a part that are kept by this policy."""

    policy: Policy
    cells: npt.NDArray[np.bool_]


class Retention:
    """Which cells of a holder's parts are kept by which policy, for policies by which anything is freed at all."""

    def __init__(self, policies: HeadPolicies) -> None:
        self._keepers = policies.keepers
        self._releasing = policies.releasing
        self._by_heads: dict[tuple[int, ...], tuple[Group, ...]] = {}

    def groups(self, heads: tuple[int, ...]) -> tuple[Group, ...]:
        """The groups of a part of those heads, in their order."""
        found = self._by_heads.get(heads)
        if found is None:
            groups = [
                Group(policy, np.array([[layer[head] == policy for head in heads] for layer in self._keepers]))
                for policy in self._releasing
            ]
            found = self._by_heads[heads] = tuple(group for group in groups if group.cells.any())
        return found


@lru_cache(maxsize=1 << 14)
def returns_to(policy: Policy, position: int) -> int:
    """`policy.returns_to(position)`, cached, since each batch asks for it again."""
    return policy.returns_to(position)
