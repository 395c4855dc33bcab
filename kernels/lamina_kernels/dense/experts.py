"""The experts of a layer as steps of a program: the choice, the chosen experts of all rows, and each row's sum.

Rows are grouped by expert, and an expert's weights are read once for all of them. Python comes between none of it.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lamina_kernels.compile import groups, programs
from lamina_kernels.compile.programs import Program, Step
from lamina_kernels.dense import dense_loops, expert_loops, few_rows
from lamina_kernels.dense.expert_loops import CHOOSE, GATE, GROUP, RELU2, SUM
from lamina_kernels.dense.steps import MAX_ROWS, Builder, Map, Room, address_of
from lamina_kernels.packed import multiply as few
from lamina_kernels.packed.layout import Format
from lamina_kernels.packed.matrix import multiplies_unpacked

_ROWS = 512  # that are computed at once outside of spans
_FEW = 8  # rows an expert up to which bfloat16, or a CPU that multiplies unpacked, is faster here than in a library
_SHARES = 8  # of the matrices of a group, for each thread: an expert with many rows is cut, too
_PARALLEL = 1 << 12  # logits from which more than one thread pays
_DTYPES = {2: torch.bfloat16, 4: torch.float32}


@dataclass(frozen=True, slots=True)
class Stack:
    """The matrices `[n_out, n_in]` of experts, all of one layout: parts of their rows, each with its format (None:
    bfloat16), its rows, and its address in each expert; biases `[experts, n_out]`. maps: what is at the addresses."""

    n_out: int
    n_in: int
    parts: tuple[tuple[Format | None, int, torch.Tensor], ...]
    bias: torch.Tensor | None
    maps: Sequence[Map]

    @property
    def packed(self) -> bool:
        return self.parts[0][0] is not None


def stack(maps: Sequence[Map | None]) -> Stack | None:
    """The maps of the experts as one; None where there are none, or their layouts differ."""
    linears = [linear for linear in maps if linear is not None]
    layouts = {_layout(linear) for linear in linears}
    if len(layouts) != 1 or len(linears) != len(maps):
        return None
    ((layout, has_bias),) = layouts
    data = [(weight,) if isinstance(weight, torch.Tensor) else [part.data for part in weight] for weight, _ in linears]
    addresses = [torch.tensor([tensor.data_ptr() for tensor in part]) for part in zip(*data, strict=True)]
    parts = tuple((format, n_out, part) for (format, n_out, _), part in zip(layout, addresses, strict=True))
    bias = torch.stack([biases for _, biases in linears if biases is not None]) if has_bias else None
    return Stack(sum(n_out for _, n_out, _ in layout), layout[0][2], parts, bias, linears)


def _layout(linear: Map) -> tuple[tuple[tuple[Format | None, int, int], ...], bool]:
    weight, bias = linear
    if isinstance(weight, torch.Tensor):
        return ((None, weight.shape[0], weight.shape[1]),), bias is not None
    return tuple((part.format, *part.shape) for part in weight), bias is not None


@dataclass(frozen=True, slots=True)
class Routing:
    """How a row's `top_k` of `experts` are chosen, as the fields of `expert_loops` say, and what the sum of the chosen
    ones' weights is. bias: float32 `[experts]`, added to choose."""

    experts: int
    top_k: int
    normalize: bool = False
    groups: int = 1
    top_groups: int = 1
    sigmoid: bool = False
    scale: float = 1.0
    bias: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Gating:
    """kind: of `expert_loops`; limit, alpha: of CLAMPED."""

    kind: int
    limit: float = 0.0
    alpha: float = 0.0


class _ThreadMemory(threading.local):
    def __init__(self) -> None:
        self.programs: dict[tuple[int, int, int, bool], tuple[Program, list[Any]]] = {}


class _ThreadRoom(threading.local):
    def __init__(self) -> None:
        self.room: Room = {}


_thread = _ThreadRoom()


@dataclass(slots=True, eq=False)
class Routed:
    """Experts from number `first` of the router's on. gate_up: gate first, or where the gating has none up alone.
    router: the map to logits, where spans can have it. shared_gate: `[width]`, whose product with a row is, by its
    sigmoid, the weight of the shared expert; None: it is 1."""

    routing: Routing
    gate_up: Stack
    down: Stack
    gating: Gating
    first: int = 0
    router: Map | None = None
    shared_gate: torch.Tensor | None = None
    counts: torch.Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.int64))
    """Experts that had rows, pairs of a row and an expert, and calls, since the beginning."""
    _memory: _ThreadMemory = field(default_factory=_ThreadMemory)

    def __post_init__(self) -> None:
        maps = 1 if self.gating.kind == RELU2 else 2
        count, k = len(self.gate_up.maps), self.routing.top_k
        if self.gate_up.n_out != maps * self.down.n_in or len(self.down.maps) != count or self.gate_up.n_in < 1:
            raise ValueError(
                f"{count} experts to {self.gate_up.n_out} and {len(self.down.maps)} from {self.down.n_in} do not fit"
            )
        if not 0 <= self.first <= self.routing.experts - count or not 0 < k <= self.routing.experts:
            raise ValueError(
                f"{count} experts from {self.first}, {k} of which are chosen, are not of {self.routing.experts}"
            )
        for half in (True, False):
            if half or self.gate_up.packed:
                expert_loops.load_kernel(half)

    def takes(self, rows: int, dtype: torch.dtype) -> bool:
        """Whether `run` takes so many rows, and is the fastest way."""
        packed = self.gate_up.packed and self.down.packed
        if not programs.can_run() or not (dtype == torch.bfloat16 or (dtype == torch.float32 and packed)):
            return False
        few = rows * self.routing.top_k <= _FEW * self.routing.experts
        return rows > 0 and (few or (packed and not multiplies_unpacked()))

    def run(self, x: torch.Tensor, logits: torch.Tensor, shared: torch.Tensor | None = None) -> torch.Tensor:
        """The weighted sum, float32 `[n, width]`. x: `[n, width]`; logits: `[n, experts]`; shared: `[n, width]`, what
        the shared expert gives, which is added; all of one dtype."""
        out = torch.empty(len(x), self.down.n_out, dtype=torch.float32)
        for first in range(0, len(x), _ROWS):
            part = slice(first, first + _ROWS)
            of_shared = None if shared is None else shared[part].contiguous()
            self._run(x[part].contiguous(), logits[part].contiguous(), of_shared, out[part])
        return out

    def _run(self, x: torch.Tensor, logits: torch.Tensor, shared: torch.Tensor | None, out: torch.Tensor) -> None:
        rows, size, threads, dtype = len(x), x.element_size(), torch.get_num_threads(), x.dtype
        key = rows, size, threads, shared is not None
        program = self._memory.programs.get(key)
        if program is None:
            builder = Builder(_thread.room, rows, threads, size=size)
            builder.most = MAX_ROWS if rows <= MAX_ROWS else _ROWS
            blocks = add_experts(builder, self, 0, 0, sums=1, shared=int(shared is not None))
            program = Program(builder.steps), blocks
            if rows <= MAX_ROWS or rows == _ROWS:
                self._memory.programs[key] = program
        steps, (choose, reader, total) = program
        choose.x = address_of("logits", logits, dtype, rows * self.routing.experts)
        choose.shared = reader.x = address_of("x", x, dtype, rows * self.gate_up.n_in)
        total.shared = 0 if shared is None else address_of("shared", shared, dtype, rows * self.down.n_out)
        total.scores = address_of("out", out, torch.float32, rows * self.down.n_out)
        steps.run(threads)


def add_experts(
    builder: Builder, experts: Routed, x: int, logits: int, sums: int = 0, out: int = 0, shared: int = 0
) -> list[Any]:
    """The steps from logits, and rows at x, to their sums: float32 at `sums`, or numbers at `out`. shared: what the
    shared expert gives. The blocks of the choice, of what reads x, and of the sum."""
    rows, size, routing = builder.rows, builder.size, experts.routing
    count, k, width, inner = len(experts.gate_up.maps), routing.top_k, experts.down.n_out, experts.down.n_in
    numbers, gate, gating = groups.HEAD + (groups.GROUP + 1) * count, experts.shared_gate, experts.gating
    weighted = bool(shared) and gate is not None
    common = {name: builder.buffer(name, k, 8 * k) for name in ("order", "owners", "places", "chosen")}
    common |= {"size": size, "rows": rows, "experts": routing.experts, "top_k": k}
    common |= {"first": experts.first, "own": count, "counts": experts.counts.data_ptr()}
    common["plan"] = builder.buffer("plan", numbers, 8 * numbers)
    common["weight"] = builder.buffer("weight", k, 4 * k)
    common["gate"] = builder.buffer("shared gate", 1, 4) if weighted else 0

    def step(operation: int, parallel: bool, most: int, **fields: int | float) -> Any:
        parallel = parallel or not builder.steps
        shares = min(builder.threads, most) if parallel else 1
        block = expert_loops.Arguments(operation=operation, shares=shares, **common, **fields)
        builder.steps.append(Step(expert_loops.load_kernel(size == 2), block, parallel))
        return block

    names = "groups", "top_groups", "sigmoid", "normalize", "scale"
    fields = {name: getattr(routing, name) for name in names} | {"x": logits, "shared": x, "width": width}
    fields["scores"] = builder.buffer("scores", routing.experts, 12 * routing.experts)
    if routing.bias is not None:
        fields["bias"] = address_of("bias", routing.bias, torch.float32, routing.experts)
    if weighted and gate is not None:
        fields["gate_weight"] = address_of("gate", gate, _DTYPES[size], width)
    choose = step(CHOOSE, rows * routing.experts >= _PARALLEL, rows, **fields)
    step(GROUP, False, 1)
    gate_up, gated, results = (
        builder.buffer(f"experts' {name}", n, n * size, k)
        for name, n in (("gate_up", experts.gate_up.n_out), ("gated", inner), ("results", width))
    )
    reader = _multiply(builder, experts.gate_up, x, gate_up, common["plan"], common["order"])
    fields = {"gating": gating.kind, "limit": gating.limit, "alpha": gating.alpha, "width": inner}
    many, bias = rows * k * inner >= dense_loops.PARALLEL, _bias(experts.gate_up, size)
    step(GATE, many, rows * k, x=gate_up, out=gated, bias=bias, **fields)
    _multiply(builder, experts.down, gated, results, common["plan"], 0, k)
    fields = {"scores": sums or builder.buffer("experts' sums", width, 4 * width), "shared": shared, "out": out}
    many, bias = rows * k * width >= dense_loops.PARALLEL, _bias(experts.down, size)
    return [choose, reader, step(SUM, many, rows, x=results, bias=bias, width=width, **fields)]


def _bias(of: Stack, size: int) -> int:
    return 0 if of.bias is None else address_of("bias", of.bias, _DTYPES[size], len(of.maps) * of.n_out)


def _multiply(builder: Builder, by: Stack, x: int, y: int, plan: int, order: int, each: int = 1) -> Any:
    """The steps of one map of each group's expert: x `[rows * each, n_in]` to y, a row for each pair. The block of what
    reads x."""
    shares = builder.threads * _SHARES
    where = {"plan": plan, "order": order, "identity": groups.IDENTITY}
    if not by.packed:
        (_, n_out, addresses), *_ = by.parts
        where |= {"x": x, "y": y, "n_in": by.n_in, "n_out": n_out, "size": builder.size}
        reader = few_rows.Arguments(shares=shares, weights=addresses.data_ptr(), **where)
        builder.steps.append(Step(few_rows.load_kernel(), reader, True))
        return reader
    reader, lines, blocks = builder.rounded([format for format, *_ in by.parts if format is not None], by.n_in, each)
    reader.x = x
    for format, n_out, addresses in by.parts:
        if format is not None:
            block = few.arguments(format, 0, by.n_in, n_out, builder.size, shares)
            block.x, block.blocks, block.y, block.stride = lines, blocks, y, by.n_out * builder.size
            block.plan, block.order, block.weights = plan, order, addresses.data_ptr()
            builder.steps.append(Step(few.load_kernel(format), block, True))
            y += n_out * builder.size
    return reader
