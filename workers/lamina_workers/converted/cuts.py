"""Where a recorded forward pass is cut: at each attention, at the fewest bytes that must live across it.

What depends on no attention is made again from token ids and positions, and costs nothing. Of the rest, the smallest
set of results behind which everything lies that is still to do: a minimum cut, weighted by bytes a token.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch

from lamina_workers.converted.recording import NotRecorded, Operation, Recording, Ref, Size, leaves

_ENDLESS = 1 << 60


@dataclass(frozen=True, slots=True)
class Live:
    """A result that lives across a cut: `width` numbers a token, along dimension `axis` of `shape`."""

    ref: Ref
    dtype: torch.dtype
    shape: tuple[int | Size, ...]
    axis: int
    width: int

    @property
    def bytes(self) -> int:
        """Bytes a token."""
        return self.width * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Cuts:
    """`live[i]`: what lives across attention i, beside what is made of token ids and positions. levels: of each
    operation the last attention that it depends on, -1: none."""

    live: tuple[tuple[Live, ...], ...]
    levels: tuple[int, ...]


def cut(recording: Recording) -> Cuts:
    """Cut at every attention. Raises NotRecorded where something lives across that is not of one token."""
    operations = recording.operations
    needs = [_needs(operation) for operation in operations]
    levels: list[int] = []
    for operation, needed in zip(operations, needs, strict=True):
        level = max((levels[operand] for operand in needed), default=-1)
        levels.append(level if operation.attention is None else operation.attention)
    numbers = _wanted(recording, needs)
    uses: dict[int, list[int]] = {}
    for number in numbers:
        for operand in needs[number]:
            uses.setdefault(operand, []).append(number)
    items: dict[int, set[int | None]] = {}
    for number in numbers:
        for leaf in leaves((operations[number].args, operations[number].kwargs)):
            if isinstance(leaf, Ref):
                items.setdefault(leaf.number, set()).add(leaf.item)
    attentions = [number for number, operation in enumerate(operations) if operation.attention is not None]
    live: list[tuple[Live, ...]] = [()]
    for index in range(1, len(attentions)):
        sources = {operand.ref.number for operand in live[-1]} | {attentions[index - 1]}
        live_numbers = _smallest(operations, uses, levels, items, sources, index)
        live.append(
            tuple(
                part for number in live_numbers for part in _parts(operations[number], number, items.get(number, set()))
            )
        )
    _check_writes(operations, live)
    return Cuts(tuple(live), tuple(levels))


def _needs(operation: Operation) -> set[int]:
    refs = {leaf.number for leaf in leaves((operation.args, operation.kwargs)) if isinstance(leaf, Ref)}
    return refs | set(operation.after)


def _wanted(recording: Recording, needs: list[set[int]]) -> list[int]:
    """The operations that the logits come from."""
    reached, stack = set(), [recording.logits.number]
    while stack:
        number = stack.pop()
        if number not in reached:
            reached.add(number)
            stack.extend(needs[number])
    return sorted(reached)


def _parts(operation: Operation, number: int, items: set[int | None]) -> list[Live]:
    """Its results that are used, as what can live across a cut. Raises NotRecorded where one is not of one token."""
    parts = []
    for item in sorted(items, key=lambda each: each or 0):
        shape, dtype = operation.shapes[item or 0], operation.dtypes[item or 0]
        axes = [axis for axis, size in enumerate(shape) if isinstance(size, Size)]
        if len(axes) != 1 or shape[axes[0]] != Size(1, 0):
            raise NotRecorded(f"{operation.function} gives {shape}, which is not one thing a token")
        width = 1
        for axis, size in enumerate(shape):
            width *= 1 if axis == axes[0] else size
        parts.append(Live(Ref(number, item), dtype, shape, axes[0], width))
    return parts


def _cost(operation: Operation, number: int, items: set[int | None]) -> int:
    try:
        return sum(part.bytes for part in _parts(operation, number, items))
    except NotRecorded:
        return _ENDLESS


def _smallest(
    operations: list[Operation],
    uses: dict[int, list[int]],
    levels: list[int],
    items: dict[int, set[int | None]],
    sources: set[int],
    index: int,
) -> list[int]:
    """The operations whose results live across attention `index`. Each operation is an edge, as wide as its results are
    large; what comes from it is behind that edge. `sources` are what there was behind the attention before."""
    inside, stack = set(sources), list(sources)
    while stack:
        for user in uses.get(stack.pop(), ()):
            if levels[user] < index and user not in inside:
                inside.add(user)
                stack.append(user)
    start, end = -1, -2
    room: dict[tuple[int, int], dict[tuple[int, int], int]] = {}

    def edge(a: tuple[int, int], b: tuple[int, int], wide: int) -> None:
        room.setdefault(a, {})[b] = wide
        room.setdefault(b, {}).setdefault(a, 0)

    for number in inside:
        edge((number, 0), (number, 1), _cost(operations[number], number, items.get(number, set())))
        if number in sources:
            edge((start, 0), (number, 0), _ENDLESS)
        for user in uses.get(number, ()):
            edge((number, 1), (user, 0) if levels[user] < index else (end, 0), _ENDLESS)
    while path := _path(room, (start, 0), (end, 0)):
        wide = min(room[a][b] for a, b in path)
        if wide >= _ENDLESS:
            raise NotRecorded(f"no cut at attention {index}: what lives across it is not of one token")
        for a, b in path:
            room[a][b] -= wide
            room[b][a] += wide
    back: Room = {}  # of cuts of equal size the last one: least is computed on both sides
    for a, ways in room.items():
        for b, wide in ways.items():
            back.setdefault(b, {})[a] = wide
    far = _reached(back, (end, 0))
    return sorted(number for number in inside if (number, 0) not in far and (number, 1) in far)


Room = dict[tuple[int, int], dict[tuple[int, int], int]]


def _path(room: Room, start: tuple[int, int], end: tuple[int, int]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """A shortest way with room left; empty where there is none."""
    came = _reached(room, start)
    path = []
    node = end
    while node in came and node != start:
        path.append((came[node], node))
        node = came[node]
    return path


def _reached(room: Room, start: tuple[int, int]) -> dict[tuple[int, int], tuple[int, int]]:
    came = {start: start}
    queue = deque([start])
    while queue:
        node = queue.popleft()
        for neighbour, wide in room.get(node, {}).items():
            if wide > 0 and neighbour not in came:
                came[neighbour] = node
                queue.append(neighbour)
    return came


def _check_writes(operations: list[Operation], live: list[tuple[Live, ...]]) -> None:
    """What lives across a cut must not be written to."""
    written = {memory for operation in operations if operation.writes for memory in operation.memory}
    for parts in live:
        for part in parts:
            if written & set(operations[part.ref.number].memory):
                raise NotRecorded("what lives across an attention is written to in place")
