"""Which spares the KV of a sequence should have, so that a lost holder's part need not be computed again. Pure.

A spare is a copy of pages at another attention worker that no row reads. A *replica* has the pages of one share.
*Parity* has the XOR of the pages of several shares, which lie at as many holders and cover the same positions: any one
of them is the XOR of the others and the parity (RAID 4; Patterson, Gibson and Katz, 1988).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Literal

from lamina.errors import InvalidRequest
from lamina.kv.kv_shares import Layout, Share

MOST = 64  # replicas of a share, or shares behind one parity
_GRAMMAR = re.compile(r"(none|replica|parity)(?:\(([0-9]{1,4})\))?")
_ALLOWED = '"none", "replica", "replica(N)", "parity" or "parity(K)"'


@dataclass(frozen=True, slots=True)
class Redundancy:
    """How lost KV is read back: `count` replicas of each share, or parity over at most `count` shares.

    N replicas survive the loss of N holders at once; parity survives one of each group, and takes 1/K of the memory.
    """

    kind: Literal["none", "replica", "parity"] = "none"
    count: int = 0

    def __bool__(self) -> bool:
        return self.kind != "none"

    def __str__(self) -> str:
        return f"{self.kind}({self.count})" if self else self.kind

    @property
    def holders(self) -> int:
        """The fewest attention workers that it takes."""
        return self.count + 1 if self else 0

    @property
    def copies(self) -> int:
        """How many spares each group has."""
        return self.count if self.kind == "replica" else 1


NONE = Redundancy()


def parse(text: object) -> Redundancy:
    """The redundancy that a text names: "replica" is one replica, "parity" is over two shares. Raises InvalidRequest
    for anything else."""
    match = _GRAMMAR.fullmatch(text) if isinstance(text, str) else None
    if match is None or (match[1] == "none" and match[2]):
        raise InvalidRequest(f"redundancy is {text!r:.80}; allowed is {_ALLOWED}")
    kind, least = match[1], {"none": 0, "replica": 1, "parity": 2}[match[1]]
    count = int(match[2] or least)
    if count < least or count > MOST:
        raise InvalidRequest(f"redundancy is {text!r:.80}; allowed is {kind}({least}) to {kind}({MOST})")
    return Redundancy(kind, count)  # type: ignore[arg-type]  # the grammar has these kinds alone


def check_workers(redundancy: Redundancy, workers: int) -> None:
    """Raise InvalidRequest where so many attention workers can never keep the spares."""
    if workers < redundancy.holders:
        if workers < 2:
            instead = 'redundancy="none", or more attention workers'
        else:
            instead = f'redundancy="replica({workers - 1})", or more attention workers'
        raise InvalidRequest(
            f'redundancy is "{redundancy}" with {workers} attention_workers; it takes {redundancy.holders} or more, '
            f"since a copy lies apart from what it protects; use {instead}"
        )


def groups(layout: Layout, redundancy: Redundancy, holders: Callable[[Share], tuple[int, ...]]) -> list[Layout]:
    """The shares that are protected together: each alone by replicas, or up to K by one parity.

    `holders`: those that could keep a share's parity. Parity is over shares of which the same holders can, of the same
    pool and positions, at different holders, and leaves one holder for itself. A group of one has a replica.
    """
    if redundancy.kind == "replica":
        return [(share,) for share in layout]
    complete: list[Layout] = []
    unfinished: dict[Hashable, list[Share]] = {}
    for share in layout:
        hosts = holders(share)
        key = hosts, share.pool, share.policy, share.lo, share.hi
        group = unfinished.setdefault(key, [])
        if any(share.holder == other.holder for other in group):
            complete.append((share,))
            continue
        group.append(share)
        if len(group) >= min(redundancy.count, len(hosts) - 1):
            complete.append(tuple(unfinished.pop(key)))
    return complete + [tuple(group) for group in unfinished.values()]
