"""A recorded forward pass as the slices between its attentions, with the weights of a loaded model.

A slice is a list of calls over a list of values, some of which are constants. No Python of the model's own runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from typing import Any

import torch

from lamina_kernels.dense.dense import Linear
from lamina_workers.converted.cuts import Cuts, Live
from lamina_workers.converted.fusion import Joined
from lamina_workers.converted.recording import (
    Device,
    Input,
    Operation,
    Part,
    Recording,
    Ref,
    Size,
    Weight,
    leaves,
    mapped,
)

Key = Ref | Input
Call = Callable[..., Any]


class Slice:
    """What is computed from some values, `inputs`, to others, `outputs`, both by their keys."""

    def __init__(
        self, binding: Binding, inputs: Sequence[Key], outputs: Sequence[Key], after: Sequence[Key] = ()
    ) -> None:
        """`after`: what must have run too."""
        self._values: list[Any] = [None]  # the number of tokens
        self._places: dict[Key, int] = {}
        self._sizes: list[tuple[int, Size]] = []
        self._inputs = [self._place(key) for key in inputs]
        # Each a function, what takes its arguments out of the values, and the place of its result.
        self._steps: list[tuple[Call, Callable[[list[Any]], tuple[Any, ...]], int]] = []
        for number in binding.between(inputs, [*outputs, *after]):
            result = self._place(Ref(number))
            self._steps.append((*self._call(binding, binding.operations[number]), result))
        self._outputs = [self._found(binding, key) for key in outputs]

    def __call__(self, tokens: int, inputs: Sequence[Any]) -> list[Any]:
        values = self._values.copy()
        values[0] = tokens
        for place, size in self._sizes:
            values[place] = size.slope * tokens + size.constant
        for place, value in zip(self._inputs, inputs, strict=True):
            values[place] = value
        for function, args, result in self._steps:
            values[result] = function(*args(values))
        return [values[place] if item is None else values[place][item] for place, item in self._outputs]

    def _place(self, key: Key, value: Any = None) -> int:
        self._values.append(value)
        self._places[key] = len(self._values) - 1
        return self._places[key]

    def _found(self, binding: Binding, key: Key) -> tuple[int, int | None]:
        """Where a value is, and which item of it."""
        if key in self._places:
            return self._places[key], None
        if isinstance(key, Ref):
            return self._places[Ref(key.number)], key.item
        raise KeyError(f"{key} is not there")

    def _constant(self, value: Any) -> int:
        self._values.append(value)
        return len(self._values) - 1

    def _call(self, binding: Binding, operation: Operation) -> tuple[Call, Callable[[list[Any]], tuple[Any, ...]]]:
        function = operation.function
        if function is None:
            raise ValueError("an attention is inside a slice")
        kwargs = mapped(operation.kwargs, binding.constant)
        if any(isinstance(leaf, (Ref, Input, Size)) for leaf in leaves(kwargs)):
            function = partial(_with_keywords, function, list(kwargs), len(operation.args))
            args = [*mapped(list(operation.args), binding.constant), *kwargs.values()]
            return function, self._arguments(binding, args)
        if kwargs:
            function = partial(function, **kwargs)
        return function, self._arguments(binding, mapped(list(operation.args), binding.constant))

    def _arguments(self, binding: Binding, args: list[Any]) -> Callable[[list[Any]], tuple[Any, ...]]:
        places = [self._argument(binding, arg) for arg in args]
        plain = [place for place in places if isinstance(place, int)]
        if len(plain) == len(places):
            if not places:
                return lambda values: ()
            return _one(plain[0]) if len(plain) == 1 else itemgetter(*plain)
        builders = [itemgetter(place) if isinstance(place, int) else place for place in places]
        return lambda values: tuple([builder(values) for builder in builders])

    def _argument(self, binding: Binding, arg: Any) -> int | Callable[[list[Any]], Any]:
        if isinstance(arg, (Ref, Input)):
            place, item = self._found(binding, arg)
            return place if item is None else lambda values: values[place][item]
        if isinstance(arg, Size):
            place = self._constant(None)
            self._sizes.append((place, arg))
            return place
        if not any(isinstance(leaf, (Ref, Input, Size)) for leaf in leaves(arg)):
            return self._constant(arg)
        inside = {leaf: self._argument(binding, leaf) for leaf in leaves(arg) if isinstance(leaf, (Ref, Input, Size))}

        def build(values: list[Any]) -> Any:
            def value(leaf: Any) -> Any:
                place = inside.get(leaf) if isinstance(leaf, (Ref, Input, Size)) else None
                return leaf if place is None else values[place] if isinstance(place, int) else place(values)

            return mapped(arg, value)

        return build


@dataclass(frozen=True, slots=True)
class Binding:
    """Operations with the model that their weights and modules are of."""

    operations: Sequence[Operation]
    model: torch.nn.Module
    device: torch.device
    linears: dict[Joined, Linear] = field(default_factory=dict)

    def constant(self, leaf: Any) -> Any:
        if isinstance(leaf, Weight):
            return _tensor(self.model, leaf.name)
        if isinstance(leaf, Joined):
            if leaf not in self.linears:
                self.linears[leaf] = self._linear(leaf)
            return self.linears[leaf]
        if isinstance(leaf, Part):
            return self.model.get_submodule(leaf.name)
        return self.device if isinstance(leaf, Device) else leaf

    def _linear(self, names: Joined) -> Linear:
        """One map of several, whose weights stand side by side where they can."""
        weights = [_tensor(self.model, name) for name in names.weights]
        ends = [weight.data_ptr() + weight.nbytes for weight in weights]
        if all(end == after.data_ptr() for end, after in zip(ends, weights[1:], strict=False)):
            first = weights[0]
            joined = first.as_strided((sum(map(len, weights)), first.shape[1]), (first.shape[1], 1))
        else:
            joined = torch.cat(weights)
        biases = [_tensor(self.model, name) for name in names.biases]
        return Linear(joined, torch.cat(biases) if biases else None)

    def needs(self, number: int) -> Iterable[Key]:
        operation = self.operations[number]
        yield from (leaf for leaf in leaves((operation.args, operation.kwargs)) if isinstance(leaf, (Ref, Input)))
        yield from map(Ref, operation.after)

    def between(self, inputs: Sequence[Key], outputs: Sequence[Key]) -> list[int]:
        """The operations that make `outputs` of `inputs`, in order."""
        have = set(inputs)
        numbers: set[int] = set()
        stack = list(outputs)
        while stack:
            key = stack.pop()
            if not isinstance(key, Ref) or key in have or Ref(key.number) in have or key.number in numbers:
                continue
            numbers.add(key.number)
            stack.extend(self.needs(key.number))
        return sorted(numbers)


INPUTS: tuple[Key, Key] = (Input("token_ids"), Input("positions"))


class Slices:
    """All slices of a recording. Slice i begins behind attention i - 1, and ends before attention i or with the
    logits."""

    def __init__(self, recording: Recording, cuts: Cuts, model: torch.nn.Module, device: torch.device) -> None:
        self.binding = Binding(recording.operations, model, device)
        self._cuts = cuts
        self._attentions = [n for n, operation in enumerate(recording.operations) if operation.attention is not None]
        self._logits = recording.logits
        self._shared = [self._tables(index) for index in range(len(self._attentions) + 1)]
        self._table_slices: dict[int, Slice] = {}
        args = [recording.operations[number].args[3] for number in self._attentions]
        self.sinks = [_tensor(model, arg.name) if isinstance(arg, Weight) else None for arg in args]
        """Of each attention, `[heads]`, where they are weights as they are."""
        self._slices = [self._slice(index) for index in range(1, len(self._attentions) + 1)]
        first = [*self.wanted(0), *self._shared[0]]
        self._first = Slice(self.binding, INPUTS, first, self._before(0))

    @property
    def count(self) -> int:
        """How many slices there are."""
        return len(self._attentions) + 1

    @property
    def shared(self) -> list[Key]:
        """What `first` and `tables` give."""
        return self._shared[0]

    def attention(self, index: int) -> Ref:
        """Attention `index`."""
        return Ref(self._attentions[index])

    def wanted(self, index: int) -> list[Key]:
        """What slice `index` gives: to its attention, then what lives across that; or the logits."""
        if index == len(self._attentions):
            return [self._logits]
        args = self.binding.operations[self._attentions[index]].args
        return [*(arg for arg in args if isinstance(arg, Ref)), *(live.ref for live in self._cuts.live[index])]

    def live(self, index: int) -> tuple[Live, ...]:
        """What lives across attention `index`."""
        return self._cuts.live[index]

    def first(self, token_ids: torch.Tensor, positions: torch.Tensor) -> tuple[list[Any], list[Any]]:
        """Up to the first attention: q, k, v and sinks, and what later slices share."""
        values = self._first(token_ids.shape[-1], (token_ids, positions))
        count = len(values) - len(self._shared[0])
        return values[:count], values[count:]

    def tables(self, index: int, token_ids: torch.Tensor, positions: torch.Tensor) -> list[Any]:
        """What slices from `index` on share, which `run` takes; for all tokens of a batch, or for some."""
        if index not in self._table_slices:
            self._table_slices[index] = Slice(self.binding, INPUTS, self._shared[index])
        values = self._table_slices[index](token_ids.shape[-1], (token_ids, positions))
        tables = dict(zip(self._shared[index], values, strict=True))
        return [tables.get(key) for key in self._shared[0]]

    def run(self, index: int, tables: list[Any], live: Sequence[Any], attended: torch.Tensor) -> list[Any]:
        """Slice `index` > 0. attended: `[1, T, heads, d_v]`. Returns q, k, v and sinks and what lives on, or the
        logits `[1, T, vocab]`."""
        return self._slices[index - 1](attended.shape[1], (*tables, *live, attended))

    def _before(self, index: int) -> list[Key]:
        """What writes to the memory of what a slice gives to its attention."""
        if index == len(self._attentions):
            return []
        return [Ref(number) for number in self.binding.operations[self._attentions[index]].after]

    def _slice(self, index: int) -> Slice:
        inputs = [
            *self._shared[0],
            *(live.ref for live in self._cuts.live[index - 1]),
            Ref(self._attentions[index - 1]),
        ]
        return Slice(self.binding, inputs, self.wanted(index), self._before(index))

    def _tables(self, index: int) -> list[Key]:
        """What depends on no attention, and is taken by slices from `index` on, behind the first attention."""
        tables: dict[Key, None] = {}
        levels = self._cuts.levels
        for later in range(max(1, index), len(self._attentions) + 1):
            inputs = [*(live.ref for live in self._cuts.live[later - 1]), Ref(self._attentions[later - 1])]
            outputs = self.wanted(later)
            for number in self.binding.between(inputs, [*outputs, *self._before(later)]):
                if levels[number] >= 0:
                    for key in self.binding.needs(number):
                        if isinstance(key, Input) or (levels[key.number] < 0 and key not in inputs):
                            tables[key] = None
            for key in outputs:
                if isinstance(key, Ref) and levels[key.number] < 0:
                    tables[key] = None
        return list(tables)


def _tensor(model: torch.nn.Module, name: str) -> torch.Tensor:
    owner, _, attribute = name.rpartition(".")
    tensor: torch.Tensor = getattr(model.get_submodule(owner), attribute)
    return tensor.detach()


def _one(place: int) -> Callable[[list[Any]], tuple[Any, ...]]:
    return lambda values: (values[place],)


def _with_keywords(function: Call, names: list[str], count: int, *args: Any) -> Any:
    return function(*args[:count], **dict(zip(names, args[count:], strict=True)))
