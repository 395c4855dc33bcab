"""A span gives what the operations of dense layers give one by one, bit for bit."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from lamina_kernels.compile import programs
from lamina_kernels.dense import few_rows
from lamina_kernels.dense.dense import Linear, add_rms_norm, gelu_tanh_mul, rms_norm, silu_mul, split_heads
from lamina_kernels.dense.expert_loops import CLAMPED
from lamina_kernels.dense.experts import Gating, Routed, Routing, Stack, stack
from lamina_kernels.dense.gate_loops import gate_output, recurrence_gates
from lamina_kernels.dense.steps import MAX_ROWS, Map
from lamina_kernels.dense_spans import Behind, Gate, Heads, Span, Spans, States
from lamina_kernels.packed.layout import Format
from lamina_kernels.packed.matrix import PackedMatrix
from lamina_kernels.paged import memory
from lamina_kernels.states.advance import StateWork, plan
from lamina_kernels.states.layout import StateLayout
from lamina_kernels.states.operands import StateConstants, StateRows
from tests.support.packed_weights import random_packed

HIDDEN, INNER, HEADS, KV_HEADS, D, VOCAB, EPS = 64, 1056, 6, 2, 32, 36, 1e-5

pytestmark = pytest.mark.skipif(
    not (programs.can_run() and few_rows.can_multiply(torch.zeros(4, 32, dtype=torch.bfloat16))),
    reason="this CPU has no AVX512_BF16, or torch has another OpenMP",
)


@pytest.fixture(autouse=True)
def _weights_are_not_repacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """With AMX `Linear` would multiply by oneDNN, which rounds sums in another order, and no span would be used."""
    monkeypatch.setattr("lamina_kernels.dense.dense.repacks", lambda _: False)


def random(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).bfloat16()


def linear(n_out: int, n_in: int, seed: int, bias: bool) -> Map:
    return random(n_out, n_in, seed=seed, scale=n_in**-0.5), random(n_out, seed=seed + 1) if bias else None


def pack(by: Map) -> Map:
    """Other weights of the shape: packed, in two parts of two formats, the second of an odd size."""
    n_out, n_in = by[0].shape
    sizes = n_out // 2 + 3, n_out - n_out // 2 - 3
    drawn = [random_packed(f, n, n_in, seed=n) for f, n in zip((Format.U5M, Format.U4), sizes, strict=True)]
    return tuple(PackedMatrix((len(of.values), n_in), of.format, of.data) for of in drawn), by[1]


def pack_span(span: Span) -> Span:
    behind, then = span.behind, span.then
    if behind is not None:
        gate = behind.gate and replace(behind.gate, map=pack(behind.gate.map))
        maps = {name: pack(getattr(behind, name)) for name in ("output", "gate_up", "down")}
        behind = replace(behind, gate=gate, **maps)
    if isinstance(then, States):
        then = replace(then, qkv=pack(then.qkv), gates=pack(then.gates))
    elif isinstance(then, Heads):
        then = replace(then, qkv=pack(then.qkv))
    elif then is not None:
        then = pack((then, None))[0]
    return Span(behind, span.norm, then)


def make(bias: bool, qk_norms: bool, gemma: bool = False) -> list[Span]:
    """Four spans: to q, k and v, and from behind an attention to those, to the normed stream, and to logits."""
    norms = (random(D, seed=20), random(D, seed=21)) if qk_norms else None
    heads = Heads(linear((HEADS + 2 * KV_HEADS) * D, HIDDEN, 1, bias), HEADS, KV_HEADS, norms)
    behind = Behind(
        linear(HIDDEN, HEADS * D, 3, bias),
        random(HIDDEN, seed=5),
        linear(2 * INNER, HIDDEN, 6, bias),
        linear(HIDDEN, INNER, 8, bias),
        *((True, random(HIDDEN, seed=12), random(HIDDEN, seed=13)) if gemma else ()),
    )
    norm, head = random(HIDDEN, seed=10), random(VOCAB, HIDDEN, seed=11)
    return [Span(None, norm, heads), Span(behind, norm, heads), Span(behind, norm, None), Span(behind, norm, head)]


def make_hybrid(silu: bool, normed: bool) -> list[Span]:
    """Between two states, and between gated attention and a state."""
    before = make(bias=False, qk_norms=True)
    rate, offset = -random(HEADS, seed=40).float().exp(), random(HEADS, seed=41).float()
    states = States(linear(3 * HEADS * D, HIDDEN, 42, False), linear(2 * HEADS, HIDDEN, 43, False), rate, offset)
    weights = random(HEADS * D, seed=44).float() if normed else None
    gate = Gate(linear(HEADS * D, HIDDEN, 45, False), random(HIDDEN, seed=46), silu, weights, D, 1e-6)
    behind, norm = replace(before[1].behind, gate=gate), random(HIDDEN, seed=10)
    return [Span(None, norm, states), Span(behind, norm, states), Span(behind, norm, before[1].then)]


def make_experts(shared: bool, gated: bool, packed: bool) -> list[Span]:
    """Two layers, each with experts, and perhaps an expert that all rows share."""
    before, number, inner = make(bias=False, qk_norms=True), 12, 96

    def stacked(n_out: int, n_in: int, seed: int) -> Stack:
        maps = [linear(n_out, n_in, seed + i, True) for i in range(number)]
        result = stack([pack(by) for by in maps] if packed else maps)
        assert result is not None
        return result

    experts = Routed(
        Routing(number, 3, normalize=True),
        stacked(2 * inner, HIDDEN, 100),
        stacked(HIDDEN, inner, 200),
        Gating(CLAMPED, 2.0, 1.7),
        router=linear(number, HIDDEN, 50, True),
        shared_gate=random(HIDDEN, seed=51) if gated else None,
    )
    behind = replace(before[1].behind, experts=experts, **({} if shared else {"gate_up": None, "down": None}))
    return [before[0], *(Span(behind, random(HIDDEN, seed=10), before[i].then) for i in (1, 2))]


def one_by_one(
    span: Span, hidden: torch.Tensor, attended: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor] | None
) -> tuple[torch.Tensor, ...]:
    if span.behind is not None:
        layer, given = span.behind, attended.flatten(1)
        if (gate := layer.gate) is not None:
            by = Linear(*gate.map)(rms_norm(hidden, gate.entering, EPS))
            given = gate_output(given, by, gate.norm, gate.group, gate.eps, gate.silu)
        delta = Linear(*layer.output)(given)
        if layer.attended_norm is not None:
            delta = rms_norm(delta, layer.attended_norm, EPS)
        normed, hidden = add_rms_norm(delta, hidden, layer.norm, EPS)
        if layer.gate_up is not None:
            delta = Linear(*layer.down)((gelu_tanh_mul if layer.gelu else silu_mul)(Linear(*layer.gate_up)(normed)))
        if (experts := layer.experts) is not None:
            shared = None if layer.gate_up is None else delta
            delta = experts.run(normed, Linear(*experts.router)(normed), shared).bfloat16()
        if layer.mlp_norm is not None:
            delta = rms_norm(delta, layer.mlp_norm, EPS)
        hidden = hidden + delta
    normed = rms_norm(hidden, span.norm, EPS)
    if span.then is None:
        return hidden, normed
    to = span.then
    if not isinstance(to, Heads | States):
        return hidden, Linear(to).float32(normed)
    if isinstance(to, States):
        return hidden, Linear(*to.qkv)(normed), recurrence_gates(Linear(*to.gates)(normed), to.rate, to.offset)
    return hidden, *split_heads(Linear(*to.qkv)(normed), to.heads, to.kv_heads, rotation, to.norms, EPS)


def inputs(rows: int) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    angles = torch.rand(rows, D // 2, generator=torch.Generator().manual_seed(rows))
    return random(rows, HIDDEN, seed=30), random(rows, HEADS, D, seed=31), (angles.cos(), angles.sin())


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("rotates", [True, False])
@pytest.mark.parametrize(
    ("bias", "qk_norms", "gemma"), [(False, False, False), (True, True, False), (False, True, True)]
)
@pytest.mark.parametrize("rows", [1, 2, 9, 31, MAX_ROWS])
def test_equals_the_operations_one_by_one(rows, bias, qk_norms, gemma, rotates, threads):
    check(make(bias, qk_norms, gemma), rows, rotates)


@pytest.mark.parametrize(("silu", "normed"), [(True, True), (False, False)])
@pytest.mark.parametrize("rows", [1, 9, MAX_ROWS])
def test_equals_the_operations_of_states(rows, silu, normed, threads):
    check(make_hybrid(silu, normed), rows, rotates=True)


@pytest.mark.parametrize(
    ("shared", "gated", "packed"), [(False, False, False), (True, True, False), (True, False, True)]
)
@pytest.mark.parametrize("rows", [1, 9, MAX_ROWS])
def test_equals_the_operations_of_experts(rows, shared, gated, packed, threads):
    check(make_experts(shared, gated, packed), rows, rotates=True)


@pytest.mark.parametrize("rows", [1, 5, 8, 17, MAX_ROWS])
def test_equals_the_operations_on_packed_weights(rows, threads):
    packed = [pack_span(span) for span in (*make(True, True), *make_hybrid(silu=True, normed=True))]
    check(packed, rows, rotates=True)


def check(made, rows, rotates):
    hidden, attended, angles = inputs(rows)
    spans, before, rotation = Spans(made, EPS), hidden.clone(), angles if rotates else None
    for index, span in enumerate(made):
        for _ in range(3):  # a program leaves its blocks as it found them
            found = spans.run(index, hidden, None if span.behind is None else attended, rotation)
            expected = one_by_one(span, hidden, attended, rotation)
            for a, b in zip(found, expected, strict=True):
                assert (a.dtype, a.shape) == (b.dtype, b.shape)
                assert torch.equal(a, b)
    assert torch.equal(hidden, before)


def test_results_are_not_written_again():
    spans, (hidden, attended, angles) = Spans(make(True, True), EPS), inputs(4)
    first = spans.run(1, hidden, attended, angles)
    kept = [x.clone() for x in first]
    second = spans.run(1, *(x.flip(0) for x in (hidden, attended)), tuple(x.flip(0) for x in angles))
    for a, b, c in zip(first, kept, second, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(c, b.flip(0))  # and a row does not depend on where it stands


def test_a_row_does_not_depend_on_the_others():
    spans, (hidden, attended, angles) = Spans(make(False, True), EPS), inputs(MAX_ROWS)
    whole = spans.run(1, hidden, attended, angles)
    for part in (slice(0, 1), slice(3, 14)):
        alone = spans.run(1, hidden[part], attended[part], tuple(x[part] for x in angles))
        for a, b in zip(alone, whole, strict=True):
            assert torch.equal(a, b[part])


def test_what_is_not_contiguous_is_read_as_it_is():
    spans, (hidden, attended, angles) = Spans(make(False, False), EPS), inputs(3)
    apart = torch.stack((attended, attended), -1)[..., 0]
    assert not apart.is_contiguous()
    for a, b in zip(spans.run(1, hidden, apart, angles), spans.run(1, hidden, attended, angles), strict=True):
        assert torch.equal(a, b)


def test_several_threads_may_run_them():
    spans, made = Spans(make(False, True), EPS), make(False, True)
    cases = [inputs(rows) for rows in (1, 2, 5)]
    expected = [one_by_one(made[1], *case) for case in cases]

    def many(number):
        for _ in range(50):
            found = spans.run(1, *cases[number])
            if not all(torch.equal(a, b) for a, b in zip(found, expected[number], strict=True)):
                return False
        return True

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(many, range(3)))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("packed", [False, True])
def test_states_between_spans(rows: int, packed: bool):
    """Three layers with states, of which rows keep their inputs too, as one program: the same bits, and records."""
    spans = make_hybrid(silu=True, normed=True)
    spans = [*spans[:2], spans[1], spans[2]]
    chained = Spans([pack_span(span) for span in spans] if packed else spans, EPS)
    layout, layers, heads = StateLayout("gated_delta", D, D, 4), 3, HEADS
    constants = {n: StateConstants(heads, heads, D**-0.5, random(3 * heads * D, 4, seed=n).float()) for n in range(3)}
    keeps = np.arange(rows) == 1
    counted = StateRows(
        np.where(keeps, 2, 1), [np.arange(heads)] * rows, 1, np.zeros(rows, np.int64), keeps, np.full(rows, 5)
    )
    pages = np.arange(3 * layers * rows * heads).reshape(3, layers, -1)
    target, kept = pages[1].copy(), np.full_like(pages[2], -1)
    for row in np.flatnonzero(keeps):
        part = slice(row * heads, (row + 1) * heads)
        target[:, part], kept[:, part] = -1, pages[2][:, part]
    tokens, found = int(counted.count.sum()), []
    hidden, _, angles = inputs(tokens)
    first, x, gates = chained.run(0, hidden)
    for together in (False, True):
        arena = memory.allocate(pages.size * layout.page_bytes).view(torch.float32).view(-1, layout.record)
        arena.copy_(torch.randn(arena.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
        done: list[int] = []
        batch = plan(layout, arena, counted, pages[0], target, torch.get_num_threads(), kept)
        work = StateWork(batch, {n: n for n in range(layers)}, constants, done.extend)
        assert work.takes(x, gates, torch.get_num_threads())
        if together:
            results = chained.advance(range(layers), first, (x, gates), work, angles)
        else:
            results = first, x, gates
            for layer in range(layers):
                rotation = angles if layer == 2 else None
                results = chained.run(layer + 1, results[0], work.advance(layer, *results[1:]), rotation)
            assert done == [0, 1, 2]
        found.append((*results, arena))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_refuses_what_does_not_fit():
    spans, (hidden, attended, angles) = Spans(make(False, False), EPS), inputs(2)
    with pytest.raises(ValueError, match="1 to 32 rows, got 33"):
        spans.run(1, torch.zeros(33, HIDDEN).bfloat16(), torch.zeros(33, HEADS * D).bfloat16())
    with pytest.raises(ValueError, match="1 to 32 rows, got 0"):
        spans.run(1, hidden[:0], attended[:0])
    with pytest.raises(ValueError, match=r"attended is torch.float32 \[2, 6, 32\]"):
        spans.run(1, hidden, attended.float(), angles)
    with pytest.raises(ValueError, match=r"hidden is .* expected 128 numbers"):
        spans.run(1, hidden[:, :32], attended, angles)
    with pytest.raises(ValueError, match=r"rotation is .* expected 32 numbers of torch.float32"):
        spans.run(1, hidden, attended, tuple(x[:1] for x in angles))
    with pytest.raises(ValueError, match="got None"):
        spans.run(1, hidden)
