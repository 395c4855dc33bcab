"""A layer's work at a holder, store and attend, for compiled callers: no Python between the layers of a batch.

`layer_work` gathers the plans of a batch in a block, once, `state_layer_work` those of layers with states; `store` and
`attend` are called for each layer by the loops of `serve_loop` and `exchange_loop`. Plans are those of `decode` and of
`states.advance`, and are checked when they are made: nothing is here.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import carray, njit

from lamina_kernels.attention.decode import CompiledAppend, Plan
from lamina_kernels.attention.loops import ARGUMENTS
from lamina_kernels.attention.moves import APPEND, append_kernel
from lamina_kernels.compile.calls import PARALLEL, address_of, call
from lamina_kernels.compile.intrinsics import pointer
from lamina_kernels.compile.launch import block_type
from lamina_kernels.paged.pages import FLOATS, Pages
from lamina_kernels.states.advance import Arguments as StateArguments
from lamina_kernels.states.advance import StateWork
from lamina_kernels.states.loops import ARGUMENTS as STATE_ARGUMENTS
from lamina_kernels.states.loops import advance_kernel

# Addresses of functions that compiled code calls, in this order.
NAMES = (PARALLEL, "poll", "recv", "send", "__errno_location", "clock_gettime", "memcpy", "usleep")
_PARALLEL, POLL, RECEIVE, SEND, ERRNO, CLOCK, COPY, _SLEEP = range(len(NAMES))

WORK = np.dtype(
    [
        ("functions", "i8"),
        ("layers", "i8"),  # as many as the largest number of a layer, plus one
        ("stores", "i8"),
        ("attends", "i8"),
        ("fused", "i8"),  # stored before it is attended
        ("kv_layers", "i8"),  # address of int64 [layers]: the layer whose KV each reads and stores
        ("append", "i8"),  # address of the store's block, of its kernel, and of the slots of KV layer 0
        ("append_kernel", "i8"),
        ("slots", "i8"),
        ("slot_stride", "i8"),  # bytes from one KV layer's slots to the next
        ("plans", "i8"),  # address of int64 [layers]: the attention's blocks, or those of states
        ("states", "i8"),  # states are advanced: q is x, k is gates, and nothing is stored
        ("kernel", "i8"),
        ("scales", "i8"),  # addresses of float64 [layers]
        ("soft_caps", "i8"),
        ("out_dtype", "i8"),
        ("delay", "i8"),  # microseconds of sleep after each attention
    ]
)
_Work = block_type(WORK)


class LayerReading(NamedTuple):
    """How the layer number `layer` of a batch is attended. `plan` is that of `decode.plan`, None in a batch that only
    stores."""

    layer: int
    plan: Any
    kv_layer: int
    scale: float
    soft_cap: float | None


@dataclass(frozen=True, slots=True)
class LayerWork:
    """The work of a batch's `layers` of one shape at one holder, by their numbers, ascending. Query vectors come in
    `query`, K and V in `loaded`; outputs are in `query` too. `queries` and `fresh` count the vectors of q and of k.
    Its plans belong to it while it is used."""

    block: Any
    query: torch.dtype
    loaded: torch.dtype
    queries: int
    fresh: int
    layers: tuple[int, ...]
    keep: tuple[Any, ...]  # the memory that addresses in the block point to

    @property
    def address(self) -> int:
        """Of the block."""
        return ctypes.addressof(self.block)


@cache
def functions() -> Any:
    """int64 addresses of NAMES; None where this system lacks one: then layers are computed from Python."""
    addresses = [address_of(name) for name in NAMES]
    return None if None in addresses else np.array(addresses, np.int64)


def layer_work(layers: Sequence[LayerReading], places: Any, fused: bool) -> LayerWork | None:
    """The work of a batch; None where it cannot be done without Python, as with other kernels' plans. places: where K
    and V go, of `decode.plan_append`, None: nothing is stored; fused: they are stored before the layer is attended."""
    addresses = functions()
    first = layers[0].plan
    if addresses is None or not (places is None or isinstance(places, CompiledAppend)):
        return None
    for reading in layers:
        if reading.plan is not None and (
            not isinstance(reading.plan, Plan) or reading.kv_layer in reading.plan.missing
        ):
            return None
    if first is None and places is None:
        return None
    layer_numbers = tuple(reading.layer for reading in layers)
    numbers, floats = np.zeros((2, layer_numbers[-1] + 1), np.int64), np.zeros((2, layer_numbers[-1] + 1))
    numbers[:, layer_numbers] = [
        [r.kv_layer for r in layers],
        [0 if r.plan is None else ctypes.addressof(r.plan.arguments) for r in layers],
    ]
    floats[:, layer_numbers] = [[r.scale for r in layers], [r.soft_cap or 0.0 for r in layers]]
    pages: Pages = (first or places).pages  # type: ignore[union-attr]  # one of them is there
    block = _Work(
        functions=addresses.ctypes.data,
        layers=layer_numbers[-1] + 1,
        fused=int(fused),
        kv_layers=numbers[0].ctypes.data,
        plans=numbers[1].ctypes.data,
        scales=floats[0].ctypes.data,
        soft_caps=floats[1].ctypes.data,
    )
    query = pages.layout.loaded
    if first is not None:
        query = first.query
        block.attends, block.kernel, block.out_dtype = 1, first.kernel, FLOATS.index(query)
    if places is not None:
        block.stores, block.append, block.append_kernel = 1, ctypes.addressof(places.arguments), append_kernel()
        block.slots, block.slot_stride = places.slots.data_ptr(), places.slots.shape[1] * 8
    queries = 0 if first is None else first.n
    fresh = 0 if places is None else places.slots.shape[1]
    keep, layout = (numbers, floats, layers, places, addresses), pages.layout
    return LayerWork(block, query, layout.loaded, queries, fresh, layer_numbers, keep)


def state_layer_work(
    work: StateWork, layers: tuple[int, ...], dtype: torch.dtype, vectors: tuple[int, int]
) -> LayerWork | None:
    """The same of layers with states, whose x and outputs are of `dtype`. vectors: of x and of gates. None where this
    system lacks a function."""
    addresses = functions()
    if addresses is None:
        return None
    steps = (StateArguments * len(layers))()
    plans = np.zeros(layers[-1] + 1, np.int64)
    for layer, step in zip(layers, steps, strict=True):
        work.fill(step, layer, dtype)
        plans[layer] = ctypes.addressof(step)
    block = _Work(
        functions=addresses.ctypes.data,
        layers=len(plans),
        attends=1,
        fused=1,
        plans=plans.ctypes.data,
        states=1,
        kernel=advance_kernel(),
    )
    return LayerWork(block, dtype, dtype, *vectors, layers, (steps, plans, work, addresses))


@njit  # type: ignore[untyped-decorator]
def function(addresses: int, number: int) -> Any:
    """The address of function number `number` of NAMES."""
    return carray(pointer(addresses), (number + 1,), np.int64)[number]


@njit  # type: ignore[untyped-decorator]
def run_shares(functions: int, kernel: int, block: int, shares: int) -> None:
    """Run a kernel's shares, on a team where there are several."""
    if shares > 1:
        call(function(functions, _PARALLEL), kernel, block, shares, 0, 0, 0)
    else:
        call(kernel, block, 0, 0, 0, 0, 0)


@njit  # type: ignore[untyped-decorator]
def store(w: Any, layer: int, k: int, v: int) -> None:
    """Store K and V, at these addresses, of a layer."""
    a = carray(pointer(w.append), (1,), APPEND)[0]
    a.taken = 0
    a.finished = 0
    a.slots = w.slots + carray(pointer(w.kv_layers), (w.layers,), np.int64)[layer] * w.slot_stride
    a.k, a.v = k, v
    run_shares(w.functions, w.append_kernel, w.append, a.shares)


@njit  # type: ignore[untyped-decorator]
def attend(w: Any, layer: int, q: int, k: int, out: int, lse: int) -> None:
    """Attention of q, at this address, in a layer, to out and lse; or states take x and gates, and what is read of them
    goes to out."""
    plan = carray(pointer(w.plans), (w.layers,), np.int64)[layer]
    if w.states:
        s = carray(pointer(plan), (1,), STATE_ARGUMENTS)[0]
        s.taken = 0
        s.finished = 0
        s.x, s.gates, s.out = q, k, out
        run_shares(w.functions, w.kernel, plan, min(s.shares, s.threads))
    else:
        a = carray(pointer(plan), (1,), ARGUMENTS)[0]
        a.taken = 0
        a.finished = 0
        a.layer = carray(pointer(w.kv_layers), (w.layers,), np.int64)[layer]
        a.q, a.out, a.lse, a.out_dtype = q, out, lse, w.out_dtype
        a.scale = carray(pointer(w.scales), (w.layers,), np.float64)[layer]
        a.soft_cap = carray(pointer(w.soft_caps), (w.layers,), np.float64)[layer]
        run_shares(w.functions, w.kernel, plan, a.shares)
    if w.delay:
        call(function(w.functions, _SLEEP), w.delay, 0, 0, 0, 0, 0)
