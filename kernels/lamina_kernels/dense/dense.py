"""The operations of dense layers: linear maps, norms, rotation, gating. One function each, so that one can be replaced.

The torch code here serves every device and dtype, and torch.compile; on CPUs `dense_loops` does the same in one pass
over memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F

from lamina_kernels.compile import programs
from lamina_kernels.compile.emitter import Kind, kind_of
from lamina_kernels.compile.launch import load_each
from lamina_kernels.dense import dense_loops, few_rows, gate_loops, tiles
from lamina_kernels.packed import matrix as packed
from lamina_kernels.packed.matrix import PackedMatrix

Weight = torch.Tensor | tuple[PackedMatrix, ...]
"""W `[n_out, n_in]`, or the matrices whose rows are those of W, one behind the other."""


class Linear:
    """y = x W^T + b, in the layout that the machine at hand multiplies fastest. Takes W over.

    weight: `[n_out, n_in]`, or packed matrices whose rows are those of W, one matrix behind the other; bias: `[n_out]`
    or None; what is not packed has the dtype that x will have. In bfloat16 on a CPU W stays as it is where `few_rows`
    can multiply with it, since that reads W faster than oneDNN. More rows of x are for `tiles`, where the CPU has them,
    and many for oneDNN elsewhere, which repacks W in a small part of its time. A W for neither is prepacked for oneDNN.
    """

    def __init__(
        self, weight: torch.Tensor | PackedMatrix | Sequence[PackedMatrix], bias: torch.Tensor | None = None
    ) -> None:
        self.halves: tuple[Linear, Linear] | None = None
        """What `split` has made."""
        self._bias = bias
        self._parts = () if isinstance(weight, torch.Tensor) else _parts(weight)
        if not isinstance(weight, torch.Tensor):
            self.n_out, self.n_in = sum(part.shape[0] for part in self._parts), self._parts[0].shape[1]
            self._packed = self._few = self._tiles = False
            packed.load_kernels(self._parts)
            return
        self.n_out, self.n_in = weight.shape
        self._item = weight.itemsize
        self._packed = repacks(weight)
        self._few = not self._packed and few_rows.can_multiply(weight)
        self._tiles = not self._packed and tiles.can_multiply(weight)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, None) if self._packed else weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: `[n, n_in]` -> `[n, n_out]`. n may be 0."""
        if self._parts:
            product = packed.multiply(self._parts, x)
            return product if self._bias is None else product.add_(self._bias)
        if torch.compiler.is_compiling() and not self._packed:  # torch.compile can follow this way alone
            return F.linear(x, self._weight, self._bias)
        if not len(x):  # the compiled ways refuse
            return x.new_empty(0, self.n_out)
        if (kernel := self._kernel(len(x))) is not None:
            product = kernel(x, self._weight)
            return product if self._bias is None else product.add_(self._bias)
        if self._packed:
            if self.halves is not None:
                return torch.cat([half(x) for half in self.halves], -1)
            y: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(x, self._weight, self._bias, "none", [], "")
            return y
        return F.linear(x, self._weight, self._bias)

    @property
    def few_rows(self) -> tuple[Weight, torch.Tensor | None] | None:
        """W and the bias, where W is packed or our kernels multiply up to `few_rows.MAX_ROWS` rows; else None."""
        if self._parts:
            return self._parts, self._bias
        return (self._weight, self._bias) if self._few else None

    @property
    def nbytes(self) -> int:
        """Of W and the bias."""
        weights = sum(part.nbytes for part in self._parts) if self._parts else self.n_out * self.n_in * self._item
        return weights + (0 if self._bias is None else self._bias.nbytes)

    def split(self, rows: int) -> tuple[Linear, Linear]:
        """The first `rows` outputs and the others as maps of their own; from then on they are the `halves`.

        They share W. Where W was repacked they take its place, since there is no part of it to share: then a call of
        the whole map is one of each half. Packed matrices are cut at multiples of 16 rows, and nowhere else.
        """
        if self.halves is None and self._parts:
            biases = (None, None) if self._bias is None else (self._bias[:rows], self._bias[rows:])
            first, second = _cut(self._parts, rows)
            self.halves = Linear(first, biases[0]), Linear(second, biases[1])
        if self.halves is None:
            weight = self._weight.to_dense() if self._packed else self._weight
            biases = (None, None) if self._bias is None else (self._bias[:rows], self._bias[rows:])
            self.halves = Linear(weight[:rows], biases[0]), Linear(weight[rows:], biases[1])
            if self._packed:
                self._weight = weight.new_empty(0)
        return self.halves

    def float32(self, x: torch.Tensor) -> torch.Tensor:
        """Like a call, but the result is float32, and not rounded to x's dtype first where that costs nothing."""
        if self._parts:
            product = packed.multiply(self._parts, x, torch.float32)
            return product if self._bias is None else product.add_(self._bias)
        if not self._few or self._bias is not None:
            return self(x).float()
        if self._tiles and len(x) >= tiles.MIN_ROWS:
            return tiles.multiply(x, self._weight, torch.float32)
        slices = [few_rows.multiply(part, self._weight, torch.float32) for part in x.split(few_rows.MAX_ROWS)]
        return torch.cat(slices) if len(slices) > 1 else slices[0]

    def _kernel(self, rows: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None:
        """Our own kernel for so many rows of x."""
        if self._tiles and rows >= tiles.MIN_ROWS:
            return tiles.multiply
        return few_rows.multiply if self._few and rows <= few_rows.MAX_ROWS else None


class HeadLinears:
    """y = x W^T for each head, with a W of its own. weight: `[heads, n_out, n_in]`, contiguous."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.heads = len(weight)
        self._weight = weight
        self._few = few_rows.can_multiply(weight[0])

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: `[n, heads, n_in]` -> `[n, heads, n_out]`. n may be 0."""
        by_head = x.transpose(0, 1)
        if self._few and 0 < len(x) <= few_rows.MAX_ROWS and not torch.compiler.is_compiling():
            products = [few_rows.multiply(head_x, weight) for head_x, weight in zip(by_head, self._weight, strict=True)]
            return torch.stack(products, 1)
        return torch.bmm(by_head, self._weight.transpose(1, 2)).transpose(0, 1)


def prepare(dtype: torch.dtype, device: torch.device) -> Iterator[tuple[int, int]]:
    """Load the kernels of dense layers, and compile what numba's cache on disk lacks: how many of how many."""
    loads: list[Callable[[], object]] = []
    if device.type == "cpu" and dtype in dense_loops.DTYPES:
        loads.append(lambda: dense_loops.load_kernel(dtype is torch.bfloat16))
        loads.append(lambda: gate_loops.load_kernel(dtype is torch.bfloat16))
        if kind_of(dtype) is Kind.BFLOAT16_DOT:
            loads.append(few_rows.load_kernel)
            if tiles.available():
                loads.append(tiles.load_kernels)
            if programs.can_run():
                loads.append(programs.load_kernel)
    return load_each(loads)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension. x: `[n, d]`, weight: `[d]`."""
    if compiled(x):
        return dense_loops.rms_norm(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(x + residual), x + residual). x, residual: `[n, d]`, neither is changed; weight: `[d]`."""
    if compiled(x):
        return dense_loops.add_rms_norm(x, residual, weight, eps)
    total = x + residual
    return F.rms_norm(total, weight.shape, weight, eps), total


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (x[i], x[i + d/2]) by each token's angle i: RoPE in the halves layout of GPT-NeoX.

    x: `[n, heads, d]`; cos, sin: float32 `[n, d / 2]`.
    """
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


def split_heads(
    qkv: torch.Tensor,
    heads: int,
    kv_heads: int,
    rotation: tuple[torch.Tensor, torch.Tensor] | None = None,
    norms: tuple[torch.Tensor, torch.Tensor] | None = None,
    eps: float = 0.0,
    d_v: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q `[n, heads, d]`, k `[n, kv_heads, d]`, v `[n, kv_heads, d_v]`, contiguous, from qkv
    `[n, (heads + kv_heads) * d + kv_heads * d_v]`. `d_v` is d unless given.

    With `norms`, the weights `[d]` for q and for k, each head of q and k is `rms_norm`ed; then, with `rotation`,
    (cos, sin), it is `rotate`d.
    """
    n, width = qkv.shape
    d_v = width // (heads + 2 * kv_heads) if d_v is None else d_v
    d = (width - kv_heads * d_v) // (heads + kv_heads)
    if d == d_v and compiled(qkv):
        return dense_loops.split_heads(qkv, heads, kv_heads, rotation, norms, eps)
    q, k, v = qkv.split_with_sizes((heads * d, kv_heads * d, kv_heads * d_v), 1)
    q, k, v = q.view(n, heads, d), k.view(n, kv_heads, d), v.view(n, kv_heads, d_v)
    if norms is not None:
        q, k = (F.rms_norm(x, weight.shape, weight, eps) for x, weight in zip((q, k), norms, strict=True))
    if rotation is not None:
        q, k = rotate(q, *rotation), rotate(k, *rotation)
    return q.contiguous(), k.contiguous(), v.contiguous()


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up. gate_up: `[n, 2f]`, gate first -> `[n, f]`."""
    if compiled(gate_up):
        return dense_loops.silu_mul(gate_up)
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def gelu_tanh_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """gelu(gate) * up, gelu by its approximation with tanh. gate_up: `[n, 2f]`, gate first -> `[n, f]`."""
    if compiled(gate_up):
        return dense_loops.gelu_tanh_mul(gate_up)
    gate, up = gate_up.chunk(2, -1)
    return F.gelu(gate, approximate="tanh") * up


def layer_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """(x - mean(x)) / sqrt(var(x) + eps) * weight over the last dimension. x: `[n, d]`, weight: `[d]`."""
    return F.layer_norm(x, weight.shape, weight, None, eps)


def soft_cap(x: torch.Tensor, cap: float) -> torch.Tensor:
    """cap * tanh(x / cap). Changes x."""
    return x.div_(cap).tanh_() * cap  # tanh is not changed in place: its gradient is made of it


def compiled(x: torch.Tensor) -> bool:
    """Whether `dense_loops` computes it: those know no gradients."""
    return x.is_cpu and x.dtype in dense_loops.DTYPES and not (x.requires_grad or torch.compiler.is_compiling())


def _parts(weight: PackedMatrix | Sequence[PackedMatrix]) -> tuple[PackedMatrix, ...]:
    parts = (weight,) if isinstance(weight, PackedMatrix) else tuple(weight)
    widths = sorted({part.shape[1] for part in parts})
    if len(widths) != 1:
        raise ValueError(f"packed matrices must be at least one and have one n_in, got {len(parts)} with {widths}")
    return parts


def _cut(parts: Sequence[PackedMatrix], rows: int) -> tuple[list[PackedMatrix], list[PackedMatrix]]:
    """The first `rows` rows of the parts, and the others."""
    first: list[PackedMatrix] = []
    second: list[PackedMatrix] = []
    for part in parts:
        n_out = part.shape[0]
        split = min(max(rows, 0), n_out)
        if split:
            first.append(part.part(slice(0, split)))
        if split < n_out:
            second.append(part.part(slice(split, n_out)))
        rows -= n_out
    return first, second


def repacks(weight: torch.Tensor) -> bool:
    """Whether `Linear` makes a copy of W `[n_out, n_in]` in oneDNN's own layout instead of keeping it."""
    # Private operators: a torch without them multiplies the plain way.
    has_mkldnn = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    half = weight.is_cpu and weight.dtype == torch.bfloat16
    return bool(has_mkldnn and half and not few_rows.can_multiply(weight))
