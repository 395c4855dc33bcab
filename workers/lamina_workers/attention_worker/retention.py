"""What a holder may let go: which layers and KV heads of a part keep by the same policy."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from lamina_workers.attention_worker.head_policies import HeadPolicies
from lamina_workers.policies.policy import Policy


@dataclass(frozen=True, slots=True)
class Group:
    """The cells, bool `[layers, heads]`, that are kept by this policy."""

    policy: Policy
    cells: npt.NDArray[np.bool_]


class Retention:
    """The groups of a holder whose policies let anything go at all."""

    def __init__(self, policies: HeadPolicies) -> None:
        self._keepers = policies.keepers
        self._releasing = policies.releasing
        self._by_heads: dict[tuple[int, ...], tuple[Group, ...]] = {}

    def groups(self, heads: tuple[int, ...]) -> tuple[Group, ...]:
        """For a part of those heads, in their order."""
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
    """`policy.returns_to(position)`, which is asked for again in each batch."""
    return policy.returns_to(position)
