"""A model's forward pass as a list of operations, recorded on the meta device for several numbers of tokens.

Python runs as it does always, so what a model does between operations costs nothing later. An integer that differs
between two runs is a linear function of the number of tokens; where operations differ otherwise there is no recording.

A mixture's experts, as transformers' models call them, are one operation (`experts`): only at run time is it known
which experts have work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from lamina_protocols.errors import LaminaError
from lamina_workers.converted.attention_calls import AttentionCall, attention_by, having
from lamina_workers.errors import UnsupportedModelError

_handler: ContextVar[Callable[..., torch.Tensor] | None] = ContextVar("lamina_experts", default=None)


def experts_by(handler: Callable[..., torch.Tensor]) -> AbstractContextManager[None]:
    """Models that run in here give their experts' calls to `handler`: what computes them, module, args and kwargs."""
    return having(_handler, handler)


def experts(module: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
    """What transformers calls. Gives a tensor like the first of `args`."""
    if (handler := _handler.get()) is not None:
        return handler(each_expert, module, args, kwargs)
    return torch.empty_like(args[0]) if args[0].is_meta else each_expert(module, *args, **kwargs)


def each_expert(module: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The forward that the class has of its own: experts one by one, each for the tokens that chose it."""
    plain = type(module).forward.__wrapped__  # type: ignore[attr-defined]
    result: torch.Tensor = plain(module, *args, **kwargs)
    return result


SIZES = (5, 1009, 1)
"""Tokens of the runs. The first two give the functions, the last one checks them."""

_SAME = {"to", "type_as", "float", "half", "bfloat16", "type", "cpu"}  # dropped where they give their argument
_WRITES = {"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__"}


class NotRecorded(LaminaError):
    """The forward pass is not the same operations for every number of tokens."""


@dataclass(frozen=True, slots=True)
class Ref:
    """Result `item` of operation `number`; None: its only one."""

    number: int
    item: int | None = None


@dataclass(frozen=True, slots=True)
class Input:
    """`token_ids` or `positions`, `[1, T]`."""

    name: str


@dataclass(frozen=True, slots=True)
class Weight:
    """A parameter or buffer of the model."""

    name: str


@dataclass(frozen=True, slots=True)
class Part:
    """A module of the model."""

    name: str


@dataclass(frozen=True, slots=True)
class Size:
    """An integer: `slope` times the number of tokens, and `constant`."""

    slope: int
    constant: int


@dataclass(frozen=True, slots=True)
class Device:
    """The device that the model is on."""


@dataclass(slots=True)
class Operation:
    """One call. `args` and `kwargs` hold what this file defines in place of tensors.

    shapes, dtypes: of its results, with `Size` for what grows with the tokens. `after`: operations on the same memory
    that must have run; `memory`: where its results are, in numbers that mean nothing else. `attention`: the number of
    the attention that it is; `function` is then None, and the args are q, k, v and the sinks.
    """

    function: Callable[..., Any] | None
    args: Any
    kwargs: Any
    shapes: Any
    dtypes: list[torch.dtype]
    after: tuple[int, ...] = ()
    writes: bool = False
    memory: tuple[int, ...] = ()
    attention: int | None = None


@dataclass(slots=True)
class Recording:
    """`operations` in their order; `logits` is their result, `[1, T, vocab]`."""

    operations: list[Operation]
    logits: Ref


Rope = tuple[Any, Callable[..., Any]] | None
"""A module of code and its function `apply_rotary_pos_emb`, which is noted as one operation."""


def record(model: torch.nn.Module, norms: Mapping[str, Callable[..., Any]], rope: Rope = None) -> Recording:
    """Record a model on the meta device. `norms`: what is called in place of a module, with its weight and its input.

    Raises NotRecorded."""
    first, second, third = (_Recorder(model, tokens, norms, rope).run() for tokens in SIZES)
    if not len(first.operations) == len(second.operations) == len(third.operations):
        raise NotRecorded(f"{[len(recorder.operations) for recorder in (first, second, third)]} operations")
    if not first.logits == second.logits == third.logits:
        raise NotRecorded("the logits come from different operations")
    merged = []
    for number, (a, b, c) in enumerate(zip(first.operations, second.operations, third.operations, strict=True)):
        if a.function != b.function or a.function != c.function or a.after != b.after or a.after != c.after:
            raise NotRecorded(f"operation {number}: {a.function}, {b.function}, {c.function}")
        args, kwargs, shapes = (_merge(getattr(a, n), getattr(b, n)) for n in ("args", "kwargs", "shapes"))
        for mine, theirs in ((args, c.args), (kwargs, c.kwargs), (shapes, c.shapes)):
            if at(mine, SIZES[2]) != theirs:
                raise NotRecorded(f"operation {number}, {a.function}: {mine} is not {theirs} for one token")
        merged.append(Operation(a.function, args, kwargs, shapes, a.dtypes, a.after, a.writes, a.memory, a.attention))
    return Recording(merged, first.logits)


def at(tree: Any, tokens: int) -> Any:
    """`tree` with the sizes that it has for a number of tokens."""
    return mapped(tree, lambda leaf: leaf.slope * tokens + leaf.constant if isinstance(leaf, Size) else leaf)


def mapped(tree: Any, of: Callable[[Any], Any]) -> Any:
    """`tree`, a nest of tuples, lists, dicts and slices, with `of` each leaf."""
    if isinstance(tree, (tuple, list)):
        return (
            type(tree)([mapped(item, of) for item in tree])
            if type(tree) in (tuple, list)
            else tuple(mapped(item, of) for item in tree)
        )
    if isinstance(tree, dict):
        return {key: mapped(item, of) for key, item in tree.items()}
    if isinstance(tree, slice):
        return slice(mapped(tree.start, of), mapped(tree.stop, of), mapped(tree.step, of))
    return of(tree)


def leaves(tree: Any) -> list[Any]:
    items: list[Any] = []
    mapped(tree, items.append)
    return items


def set_item(x: torch.Tensor, *args: Any) -> torch.Tensor:
    """`x[i] = y`, as a function."""
    x[args[0]] = args[1]
    return x


def _merge(a: Any, b: Any) -> Any:
    if type(a) is not type(b):
        raise NotRecorded(f"{a!r:.80} and {b!r:.80}")
    if isinstance(a, (tuple, list)) and len(a) == len(b):
        return type(a)([_merge(x, y) for x, y in zip(a, b, strict=True)])
    if isinstance(a, dict) and a.keys() == b.keys():
        return {key: _merge(a[key], b[key]) for key in a}
    if isinstance(a, slice):
        return slice(_merge(a.start, b.start), _merge(a.stop, b.stop), _merge(a.step, b.step))
    if type(a) is int and a != b:
        slope, remainder = divmod(b - a, SIZES[1] - SIZES[0])
        if remainder:
            raise NotRecorded(f"{a} and {b} of {SIZES[0]} and {SIZES[1]} tokens")
        return Size(slope, a - slope * SIZES[0])
    if isinstance(a, torch.Tensor):
        if a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)):
            return a
        raise NotRecorded("a table that depends on the number of tokens")
    if a != b:
        raise NotRecorded(f"{a!r:.80} and {b!r:.80}")
    return a


class _Recorder(TorchFunctionMode):
    """One run of `tokens` tokens."""

    def __init__(
        self, model: torch.nn.Module, tokens: int, norms: Mapping[str, Callable[..., Any]], rope: Rope
    ) -> None:
        super().__init__()
        self._model, self._tokens, self._norms, self._rope = model, tokens, norms, rope
        self.operations: list[Operation] = []
        self._refs: dict[int, Any] = {}  # by id of a tensor
        self._results: list[Any] = []  # so that no id is used again
        self._written: dict[int, int] = {}  # the last operation that wrote to a memory
        self._read: dict[int, list[int]] = {}
        self._attentions = 0
        for kind in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
            for name, tensor in kind:
                self._refs.setdefault(id(tensor), Weight(name))
        self._parts = {id(module): Part(name) for name, module in model.named_modules()}

    def run(self) -> Recording:
        ids, positions = (torch.zeros(1, self._tokens, dtype=torch.int64, device="meta") for _ in range(2))
        self._refs[id(ids)], self._refs[id(positions)] = Input("token_ids"), Input("positions")
        self._results += [ids, positions]
        patched = [(self._model.get_submodule(name), function) for name, function in self._norms.items()]
        for module, function in patched:
            module.forward = lambda x, module=module, function=function: self.leaf(function, (module.weight, x), x)
        if self._rope is not None:
            code, plain = self._rope
            code.apply_rotary_pos_emb = self._rotated
        try:
            with torch.inference_mode(), attention_by(self._attend), experts_by(self._experts), self:
                logits = self._model(input_ids=ids, position_ids=positions, use_cache=False).logits
        except UnsupportedModelError:
            raise
        except Exception as error:
            raise NotRecorded(f"{type(error).__name__}: {error}") from error
        finally:
            for module, _ in patched:
                del module.forward
            if self._rope is not None:
                code.apply_rotary_pos_emb = plain
        ref = self._refs.get(id(logits))
        if not isinstance(ref, Ref):
            raise NotRecorded("the logits come from nowhere")
        return Recording(self.operations, ref)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "__setitem__":
            self._note(set_item, args, kwargs, args[0], writes=True)
            return result
        if name in _SAME and args and result is args[0]:
            return result
        if not any(isinstance(leaf, torch.Tensor) for leaf in leaves(result)):
            return result
        if "out" in kwargs:
            raise NotRecorded(f"{name} writes to another tensor")
        writes = name in _WRITES or (name.endswith("_") and not name.endswith("__"))
        self._note(func, args, kwargs, result, writes)
        return result

    def leaf(self, function: Callable[..., Any], args: tuple[Any, ...], like: torch.Tensor) -> torch.Tensor:
        """Note a call whose result is as `like`, without doing it."""
        with torch._C.DisableTorchFunction():
            result = torch.empty_like(like)
        self._note(function, args, {}, result)
        return result

    def _rotated(self, q: torch.Tensor, k: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():
            result = torch.empty_like(q), torch.empty_like(k)
        self._note(self._rope[1] if self._rope else None, (q, k, *args), kwargs, result)
        return result

    def _experts(self, function: Callable[..., Any], module: torch.nn.Module, args: Any, kwargs: Any) -> torch.Tensor:
        with torch._C.DisableTorchFunction():
            result = torch.empty_like(args[0])
        self._note(function, (module, *args), kwargs, result)
        return result

    def _attend(self, call: AttentionCall) -> torch.Tensor:
        with torch._C.DisableTorchFunction():
            result = call.q.new_empty(1, call.q.shape[2], call.q.shape[1], call.v.shape[-1])
        self._note(None, (call.q, call.k, call.v, call.sinks), {}, result)
        self.operations[-1].attention = self._attentions
        self._attentions += 1
        return result

    def _note(
        self, function: Callable[..., Any] | None, args: Any, kwargs: Any, result: Any, writes: bool = False
    ) -> None:
        number, after = len(self.operations), set()
        tensors = [value for value in leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        for tensor in tensors:
            memory = tensor.untyped_storage()._cdata
            if (last := self._written.get(memory)) is not None:
                after.add(last)
            self._read.setdefault(memory, []).append(number)
        encoded = [mapped(tree, self._encoded) for tree in (args, kwargs)]
        if writes:
            memory = args[0].untyped_storage()._cdata
            if isinstance(self._refs.get(id(args[0])), (Weight, Input)):
                raise NotRecorded(f"{function} writes to what the model does not own")
            after.update(reader for reader in self._read[memory] if reader != number)
            self._written[memory] = number
        results = list(result) if isinstance(result, (tuple, list)) else [result]
        for item, tensor in enumerate(results):
            if isinstance(tensor, torch.Tensor):
                self._refs[id(tensor)] = Ref(number, item if isinstance(result, (tuple, list)) else None)
        self._results.append((args, kwargs, result))
        shapes = [tuple(value.shape) if isinstance(value, torch.Tensor) else None for value in results]
        tensors = [value for value in results if isinstance(value, torch.Tensor)]
        dtypes, memory = [value.dtype for value in tensors], tuple(value.untyped_storage()._cdata for value in tensors)
        args, kwargs = encoded
        self.operations.append(Operation(function, args, kwargs, shapes, dtypes, tuple(sorted(after)), writes, memory))

    def _encoded(self, leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            if id(leaf) in self._refs:
                return self._refs[id(leaf)]
            if leaf.is_meta:
                raise NotRecorded("a tensor that no operation has made")
            return leaf
        if isinstance(leaf, torch.nn.Module):
            return self._parts[id(leaf)]
        if leaf == "meta" or (isinstance(leaf, torch.device) and leaf.type == "meta"):
            return Device()
        return leaf
