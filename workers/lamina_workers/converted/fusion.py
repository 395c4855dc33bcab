"""A recording with Lamina's operations in place of several of the model's: linear maps of one input side by side,
norms, gating, and the heads of q, k and v with RoPE."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from lamina_kernels.dense import dense
from lamina_workers.converted.recording import Operation, Recording, Ref, Size, Weight, leaves, mapped


@dataclass(frozen=True, slots=True)
class Joined:
    """Linear maps of one input as one: the names of their weights, and of their biases, perhaps none."""

    weights: tuple[str, ...]
    biases: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RmsNorm:
    """In place of a module that computes just this."""

    eps: float

    def __call__(self, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return dense.rms_norm(x.reshape(-1, x.shape[-1]), weight, self.eps).view(x.shape)


@dataclass(frozen=True, slots=True)
class SplitHeads:
    """q, k and v by token, `[T, heads, d]`, of the joined projections `[T, (heads + 2 * kv_heads) * d]`."""

    heads: int
    kv_heads: int
    eps: float

    def __call__(self, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *norms: torch.Tensor) -> Any:
        pair = (norms[0], norms[1]) if norms else None
        return dense.split_heads(qkv, self.heads, self.kv_heads, (cos, sin), pair, self.eps)


def apply_linear(x: torch.Tensor, linear: dense.Linear) -> torch.Tensor:
    """x: `[..., n_in]` -> `[n, n_out]`."""
    return linear(x.reshape(-1, x.shape[-1]))


def part(y: torch.Tensor, first: int, end: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Of `apply_linear`'s result what one map gives, in the shape that the model's code has."""
    return y[:, first:end].view(shape) if first or end < y.shape[1] else y.view(shape)


def half_angles(x: torch.Tensor) -> torch.Tensor:
    """cos or sin `[1, T, d]`, whose halves are equal, as float32 `[T, d / 2]`."""
    return x[0, :, : x.shape[2] // 2].float().contiguous()


def plain_norms(model: torch.nn.Module) -> dict[str, RmsNorm]:
    """The modules, by name, that compute what `dense.rms_norm` computes, found by trying one of each class and eps."""
    norms: dict[str, RmsNorm] = {}
    tried: dict[Any, bool] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        parameters = list(module.parameters())
        if (
            "RMSNorm" not in type(module).__name__
            or len(parameters) != 1
            or weight is None
            or not isinstance(eps, float)
        ):
            continue
        key = type(module), eps, tuple(weight.shape)
        if key not in tried:
            tried[key] = _is_plain_norm(module, eps, tuple(weight.shape))
        if tried[key]:
            norms[name] = RmsNorm(eps)
    return norms


def _is_plain_norm(module: torch.nn.Module, eps: float, shape: tuple[int, ...]) -> bool:
    if len(shape) != 1 or len(inspect.signature(type(module).forward).parameters) != 2:
        return False
    generator = torch.Generator().manual_seed(1)
    weight, x = torch.randn(shape, generator=generator), torch.randn(3, *shape, generator=generator)
    try:
        trial = torch.func.functional_call(module, {"weight": weight}, (x,))
    except (RuntimeError, TypeError):
        return False
    return torch.allclose(trial, F.rms_norm(x, shape, weight, eps), atol=1e-5)


def plain_rope(model: torch.nn.Module) -> tuple[Any, Callable[..., Any]] | None:
    """The code that `model` comes from, and its function that rotates q and k, where that is RoPE in halves."""
    code = sys.modules[type(model).__module__]
    function = getattr(code, "apply_rotary_pos_emb", None)
    if function is None:
        return None
    generator = torch.Generator().manual_seed(1)
    q, k = torch.randn(1, 4, 3, 8, generator=generator), torch.randn(1, 2, 3, 8, generator=generator)
    angles = torch.randn(3, 4, generator=generator)
    cos, sin = (torch.cat((x, x), -1)[None] for x in (angles.cos(), angles.sin()))
    try:
        results = function(q, k, cos, sin)
        for x, rotated in zip((q, k), results, strict=True):
            expected = dense.rotate(x[0].transpose(0, 1), angles.cos(), angles.sin()).transpose(0, 1)[None]
            if not torch.allclose(rotated, expected, atol=1e-5):
                return None
    except (RuntimeError, TypeError, ValueError):
        return None
    return code, function


def fused(recording: Recording, rope: Callable[..., Any] | None) -> Recording:
    """The recording with fewer operations; `rope`: the function that `plain_rope` found. Numbers change."""
    operations = recording.operations
    new: list[Operation] = []
    renamed: dict[Ref, Any] = {}
    groups = _groups(operations)
    joined: dict[int, int] = {}  # of the first map of a group: its operation in `new`

    def translated(tree: Any) -> Any:
        return mapped(tree, lambda leaf: renamed[leaf] if isinstance(leaf, Ref) else leaf)

    for number, operation in enumerate(operations):
        if number in groups:
            first, names = groups[number]
            if first not in joined:
                joined[first] = len(new)
                new.append(_joined(translated(operation.args[0]), operation, names, operations))
            widths = [operations[member].shapes[0][-1] for member in names]
            place = names.index(number)
            begin = sum(widths[:place])
            args = (Ref(joined[first]), begin, begin + widths[place], operation.shapes[0])
            new.append(Operation(part, args, {}, operation.shapes, operation.dtypes))
        else:
            after = tuple(renamed[Ref(earlier)].number for earlier in operation.after)
            args, kwargs = translated(operation.args), translated(operation.kwargs)
            new.append(replace(operation, args=args, kwargs=kwargs, after=after))
        last = len(new) - 1
        renamed[Ref(number)] = Ref(last)
        for item in range(len(operation.shapes)):
            renamed[Ref(number, item)] = Ref(last, item)
    result = Recording(new, renamed[recording.logits])
    _gate(result)
    return result if rope is None else _with_heads(result, rope)


def joined_weights(recording: Recording) -> list[Joined]:
    return [leaf for operation in recording.operations for leaf in leaves(operation.args) if isinstance(leaf, Joined)]


def _groups(operations: list[Operation]) -> dict[int, tuple[int, list[int]]]:
    """Of each linear map by weights alone: the first that has the same input, and all that have."""
    by_input: dict[tuple[Any, bool], list[int]] = {}
    for number, operation in enumerate(operations):
        if getattr(operation.function, "__name__", "") != "linear" or operation.kwargs:
            continue
        x, weight, *bias = operation.args
        has_bias = bool(bias) and bias[0] is not None
        if isinstance(x, Ref) and isinstance(weight, Weight) and (not has_bias or isinstance(bias[0], Weight)):
            by_input.setdefault((x, has_bias), []).append(number)
    return {number: (group[0], group) for group in by_input.values() for number in group}


def _joined(x: Any, like: Operation, group: list[int], operations: list[Operation]) -> Operation:
    members = [operations[number] for number in group]
    biases = tuple(member.args[2].name for member in members if len(member.args) > 2 and member.args[2] is not None)
    names = Joined(tuple(member.args[1].name for member in members), biases)
    rows = like.shapes[0][:-1]
    tokens = next((size for size in rows if isinstance(size, Size)), 1)
    width = sum(member.shapes[0][-1] for member in members)
    return Operation(apply_linear, (x, names), {}, [(tokens, width)], like.dtypes)


def _gate(recording: Recording) -> None:
    """silu(gate) * up of joined maps in one pass."""
    operations = recording.operations
    for operation in operations:
        if getattr(operation.function, "__name__", "") != "mul" or len(operation.args) != 2:
            continue
        gate, up = (_at(operations, arg) for arg in operation.args)
        if gate is None or up is None or getattr(gate.function, "__name__", "") != "silu" or up.function is not part:
            continue
        gate = _at(operations, gate.args[0])
        if gate is None or gate.function is not part or gate.args[0] != up.args[0]:
            continue
        product, (_, width) = gate.args[0], operations[gate.args[0].number].shapes[0]
        if gate.args[1:3] == (0, width // 2) and up.args[1:3] == (width // 2, width):
            operation.function, operation.args = silu_mul, (product, operation.shapes[0])


def silu_mul(gate_up: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    return dense.silu_mul(gate_up).view(shape)


def _at(operations: list[Operation], ref: Any) -> Operation | None:
    return operations[ref.number] if isinstance(ref, Ref) else None


def _with_heads(recording: Recording, rope: Callable[..., Any]) -> Recording:
    """q, k and v of an attention in one pass, where they are joined maps, perhaps normed, and rotated."""
    old = recording.operations
    new: list[Operation] = []
    moved: dict[int, int] = {}
    angles: dict[Any, Ref] = {}
    for number, operation in enumerate(old):
        match = _heads(old, operation, rope) if operation.attention is not None else None
        if match is not None:
            projected, function, tables, norms, shapes = match
            for table in tables:
                if table not in angles:
                    tokens, width = old[table.number].shapes[table.item or 0][1:]
                    new.append(
                        Operation(
                            half_angles,
                            (Ref(moved[table.number], table.item),),
                            {},
                            [(tokens, width // 2)],
                            [torch.float32],
                        )
                    )
                    angles[table] = Ref(len(new) - 1)
            args = (Ref(moved[projected.number]), *(angles[table] for table in tables), *norms)
            new.append(Operation(function, args, {}, shapes, old[projected.number].dtypes * 3))
            last = len(new) - 1
            heads = [Ref(last, item) for item in range(3)]
            new.append(replace(operation, args=(*heads, _moved(operation.args[3], moved)), after=()))
        else:
            args, kwargs = _moved(operation.args, moved), _moved(operation.kwargs, moved)
            new.append(replace(operation, args=args, kwargs=kwargs, after=tuple(moved[n] for n in operation.after)))
        moved[number] = len(new) - 1
    return Recording(new, _moved(recording.logits, moved))


def _moved(tree: Any, moved: dict[int, int]) -> Any:
    return mapped(tree, lambda leaf: Ref(moved[leaf.number], leaf.item) if isinstance(leaf, Ref) else leaf)


def _heads(old: list[Operation], attention: Operation, rope: Callable[..., Any]) -> Any:
    """Of an attention: the joined maps, what splits them, cos and sin, weights of norms, shapes. None where it is made
    in another way."""
    q, k, v = attention.args[:3]
    rotated = _at(old, q)
    if rotated is None or rotated.function is not rope or (q.item, k.item) != (0, 1) or k.number != q.number:
        return None
    if len(rotated.args) != 4 or rotated.kwargs or attention.after:
        return None
    sides = [_side(old, arg) for arg in (rotated.args[0], rotated.args[1], v)]
    if any(side is None for side in sides):
        return None
    (of_q, q_norm), (of_k, k_norm), (of_v, v_norm) = sides
    q_shape, k_shape = rotated.shapes
    heads, kv_heads, d = q_shape[1], k_shape[1], q_shape[3]
    ends = [heads * d, (heads + kv_heads) * d, (heads + 2 * kv_heads) * d]
    places = [part.args[1:3] for part in (of_q, of_k, of_v)]
    if places != list(zip([0, *ends], ends, strict=False)) or old[of_q.args[0].number].shapes[0][-1] != ends[-1]:
        return None
    if len({part.args[0] for part in (of_q, of_k, of_v)}) != 1 or v_norm is not None:
        return None
    if (q_norm is None) != (k_norm is None) or (q_norm is not None and q_norm[0] != k_norm[0]):
        return None
    tokens = q_shape[2]
    if old[rotated.args[2].number].shapes[rotated.args[2].item or 0] != (1, tokens, d):
        return None
    shapes = [(tokens, heads, d), (tokens, kv_heads, d), (tokens, kv_heads, d)]
    eps, norms = (q_norm[0], (q_norm[1], k_norm[1])) if q_norm is not None else (0.0, ())
    return of_q.args[0], SplitHeads(heads, kv_heads, eps), rotated.args[2:4], norms, shapes


def _side(old: list[Operation], ref: Any) -> Any:
    """What `ref` is a transposed view of: the part of joined maps, and eps and weight of the norm between, if any."""
    turned = _at(old, ref)
    if turned is None or getattr(turned.function, "__name__", "") != "transpose" or turned.args[1:] != (1, 2):
        return None
    inner = _at(old, turned.args[0])
    norm = None
    if inner is not None and isinstance(inner.function, RmsNorm):
        norm = inner.function.eps, inner.args[0]
        inner = _at(old, inner.args[1])
    if inner is None or getattr(inner.function, "__name__", "") not in ("view", "reshape"):
        return None
    source = _at(old, inner.args[0])
    return (source, norm) if source is not None and source.function is part else None
