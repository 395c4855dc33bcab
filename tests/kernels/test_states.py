"""States of layers: the compiled kernels against the recurrences, over rows, heads and pages of every kind."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import state_reference as reference
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lamina_kernels.paged import memory
from lamina_kernels.states import advance as states
from lamina_kernels.states.layout import KINDS, StateLayout
from lamina_kernels.states.operands import StateConstants, StateRows

every_kind = pytest.mark.parametrize("kind", KINDS)


@dataclass(frozen=True)
class World:
    """Pages of random states, and the constants of a layer of `heads` heads."""

    layout: StateLayout
    arena: torch.Tensor
    constants: StateConstants

    def inputs(self, rows: StateRows, strength: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        """x and gates; `strength` multiplies log decays."""
        x = torch.randn(sum(int(count) * rows.width(self.layout, row) for row, count in enumerate(rows.count)))
        gates = torch.rand(rows.vectors, self.layout.gates)
        if self.layout.gates:
            decays = gates[:, :1] if self.layout.kind == "mamba2" else gates[:, :-1]
            decays.mul_(-strength)
        return x, gates.flatten()

    def advance(self, rows: StateRows, source: Any, target: Any, x: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        tables = (np.array(pages, np.int64)[None] for pages in (source, target))
        plan = states.plan(self.layout, self.arena, rows, *tables, threads=2)
        return states.advance(plan, 0, x, gates, self.constants)


def allocate(layout: StateLayout, pages: int) -> torch.Tensor:
    return memory.allocate(pages * layout.page_bytes).view(torch.float32).view(pages, layout.record)


def make(kind: str, d_k: int, d_v: int, heads: int = 4, group: int = 1, conv: int = 4, bias: bool = True) -> World:
    layout = StateLayout(kind, d_k, d_v, conv)
    arena = allocate(layout, 64)
    arena.normal_()
    channels = 2 * heads // group * d_k + heads * d_v
    constants = StateConstants(
        heads,
        heads // group,
        d_k**-0.5,
        torch.randn(channels, conv) if conv else None,
        torch.randn(channels) if conv and bias else None,
        torch.randn(heads) if kind == "mamba2" else None,
        -torch.rand(heads) if kind == "lightning" else None,
    )
    return World(layout, arena, constants)


def same(given: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Within the tolerance of the largest number."""
    assert bool(given.isfinite().all())
    assert float((given - expected).abs().max()) <= tolerance * max(float(expected.abs().max()), 1e-3)


# Kind, d_k, d_v and the inputs that a convolution reads: a kernel is compiled for each, so they are few.
DRAWN = [(kind, 64, 64, 4) for kind in KINDS] + list(
    zip(KINDS, (48, 16, 64, 128), (80, 16, 192, 64), (2, 0, 4, 2), strict=True)
)


@st.composite
def batches(draw: st.DrawFn) -> tuple[World, StateRows, list[int], list[int]]:
    torch.manual_seed(draw(st.integers(0, 1000)))
    group = draw(st.sampled_from([1, 2, 4]))
    kind, d_k, d_v, conv = draw(st.sampled_from(DRAWN))
    world = make(kind, d_k, d_v, 4, group, conv, draw(st.booleans()))
    count = draw(st.lists(st.one_of(st.just(1), st.integers(1, 130)), min_size=1, max_size=3))
    heads = [np.array(sorted(draw(st.sets(st.integers(0, 3), min_size=1)))) for _ in count]
    rows = StateRows(np.array(count), heads, group)
    pages = draw(st.permutations(range(64)))
    target = pages[: rows.items]
    source = [draw(st.sampled_from([-1, own, other])) for own, other in zip(target, pages[32:], strict=False)]
    return world, rows, source, target


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(batches(), st.sampled_from([0.0, 0.1, 3.0, 60.0]))
def test_every_batch_is_that_of_the_recurrence(batch: Any, strength: float) -> None:
    world, rows, source, target = batch
    x, gates = world.inputs(rows, strength)
    expected = allocate(world.layout, 64).copy_(world.arena)
    before = world.arena.clone()
    out = reference.advance(
        world.layout, expected, rows, np.array(source), np.array(target), x, gates, world.constants
    )  # fmt: skip
    given_out = world.advance(rows, source, target, x, gates)
    same(given_out, out)
    for page in target:
        same(world.arena[page], expected[page])
    others = [page for page in range(64) if page not in target]
    assert torch.equal(world.arena[others], before[others])


@every_kind
def test_a_batch_runs_again_from_its_source(kind: str) -> None:
    torch.manual_seed(0)
    world = make(kind, 64, 64)
    rows = StateRows(np.array([1, 70]), [np.arange(4), np.array([1, 3])])
    source, target = list(range(6)), list(range(10, 16))
    x, gates = world.inputs(rows)
    first = world.advance(rows, source, target, x, gates)
    written = world.arena[target].clone()
    world.arena[target] = torch.nan
    assert torch.equal(world.advance(rows, source, target, x, gates), first)
    assert torch.equal(world.arena[target], written)


@every_kind
@settings(max_examples=8, deadline=None)
@given(cuts=st.sets(st.integers(1, 129), max_size=4), seed=st.integers(0, 99))
def test_a_prompt_may_be_cut_anywhere(kind: str, cuts: set[int], seed: int) -> None:
    torch.manual_seed(seed)
    world, n = make(kind, 32, 48, group=2), 130
    whole = StateRows(np.array([n]), [np.arange(4)], 2)
    x, gates = world.inputs(whole)
    expected = world.advance(whole, [-1] * 4, range(4), x, gates)
    state = world.arena[:4].clone()
    x, gates, outs = x.view(n, -1), gates.view(n, -1), []
    edges = [0, *sorted(cuts), n]
    for lo, hi in pairwise(edges):
        part = StateRows(np.array([hi - lo]), [np.arange(4)], 2)
        source = range(10, 14) if lo else [-1] * 4
        outs.append(world.advance(part, source, range(10, 14), x[lo:hi].flatten(), gates[lo:hi].flatten()))
    same(torch.cat(outs), expected, 2e-5)
    same(world.arena[10:14], state, 2e-5)


@every_kind
def test_what_a_row_gives_does_not_depend_on_the_others_or_on_threads(kind: str) -> None:
    torch.manual_seed(0)
    world = make(kind, 64, 32)
    rows = StateRows(np.array([1, 20, 1]), [np.arange(4)] * 3)
    x, gates = world.inputs(rows)
    source, target = np.arange(12)[None], np.arange(20, 32)[None]
    outs = []
    for threads in (1, 3):
        plan = states.plan(world.layout, world.arena, rows, source, target, threads)
        outs.append(states.advance(plan, 0, x, gates, world.constants))
    assert torch.equal(*outs)
    width = rows.width(world.layout, 0)
    n = 4 * world.layout.gates
    alone = world.advance(StateRows(np.array([1]), [np.arange(4)]), range(4), range(20, 24), x[:width], gates[:n])
    assert torch.equal(alone, outs[0][:4])


@every_kind
@pytest.mark.parametrize("count", [1, 130])
@pytest.mark.parametrize("gate", [0.0, -1e-6, -50.0, -1e4, -1e30, -torch.inf])
def test_extreme_decays_give_numbers(kind: str, count: int, gate: float) -> None:
    """Every other token has the extreme decay, so that what is small stands beside what is large."""
    torch.manual_seed(0)
    world = make(kind, 32, 32)
    rows = StateRows(np.array([count]), [np.arange(4)])
    x, gates = world.inputs(rows)
    if kind == "lightning":
        world.constants.decays[::2] = max(gate, -1e30)
    else:
        decays = gates.view(count, 4, -1)[::2]
        (decays[..., :1] if kind == "mamba2" else decays[..., :-1])[:] = gate
    expected = allocate(world.layout, 64).copy_(world.arena)
    source, target = np.arange(4), np.arange(8, 12)
    out = reference.advance(world.layout, expected, rows, source, target, x, gates, world.constants)
    same(world.advance(rows, source, target, x, gates), out)
    same(world.arena[8:12], expected[8:12])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_only_that_of_x_and_out(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    world = make("gated_delta", 32, 32)
    rows = StateRows(np.array([1, 9]), [np.arange(4)] * 2)
    x, gates = world.inputs(rows)
    x = x.to(dtype)
    expected = world.advance(rows, range(8), range(10, 18), x.float(), gates)
    written = world.arena[10:18].clone()
    out = world.advance(rows, range(8), range(10, 18), x, gates)
    assert torch.equal(out, expected.to(dtype))
    assert torch.equal(world.arena[10:18], written)


def test_constants_may_be_views() -> None:
    torch.manual_seed(0)
    world = make("mamba2", 32, 32)
    rows = StateRows(np.array([1, 20]), [np.arange(4)] * 2)
    x, gates = world.inputs(rows)
    expected = world.advance(rows, range(8), range(8, 16), x, gates)
    c = world.constants
    every_other = [torch.stack([y, y * 0], -1)[..., 0] for y in (c.conv, c.bias, c.skip) if y is not None]
    views = StateConstants(c.heads, c.key_heads, c.scale, *every_other)
    assert torch.equal(
        World(world.layout, world.arena, views).advance(rows, range(8), range(8, 16), x, gates), expected
    )


def test_a_plan_goes_on_with_other_pages() -> None:
    torch.manual_seed(0)
    world = make("kda", 32, 32)
    rows = StateRows(np.array([1, 1]), [np.arange(4)] * 2)
    pages = np.arange(32).reshape(2, 2, 8)  # two halves, two layers
    first = states.plan(world.layout, world.arena, rows, pages[0], pages[1])
    again = states.with_pages(first, pages[1], pages[0])
    x, gates = world.inputs(rows)
    expected = allocate(world.layout, 64).copy_(world.arena)
    for plan, source, target in ((first, pages[0], pages[1]), (again, pages[1], pages[0])):
        for layer in range(2):
            out = states.advance(plan, layer, x, gates, world.constants)
            given = (source[layer], target[layer], x, gates, world.constants)
            same(out, reference.advance(world.layout, expected, rows, *given))
    same(world.arena[:32], expected[:32])
    with pytest.raises(ValueError, match="target names a page twice"):
        states.with_pages(first, pages[0], pages[1] * 0)


def test_a_batch_of_no_rows_is_nothing() -> None:
    world = make("kda", 16, 16)
    rows = StateRows(np.zeros(0, np.int64), [])
    assert world.advance(rows, [], [], torch.zeros(0), torch.zeros(0)).shape == (0, 16)


def test_wrong_shapes_are_named() -> None:
    world = make("gated_delta", 16, 16)
    rows = StateRows(np.array([2]), [np.arange(4)])
    x, gates = world.inputs(rows)
    with pytest.raises(ValueError, match=r"x must be \[384\] in one of .*, got torch.float32 \[383\]"):
        world.advance(rows, range(4), range(4), x[1:], gates)
    with pytest.raises(ValueError, match=r"x must be \[384\] in one of .*, got torch.float64"):
        world.advance(rows, range(4), range(4), x.double(), gates)
    with pytest.raises(ValueError, match=r"gates must be float32 \[16\], got torch.float32 \[15\]"):
        world.advance(rows, range(4), range(4), x, gates[1:])
    with pytest.raises(ValueError, match="source must name pages from -1 to 63, got 0 to 64"):
        world.advance(rows, [0, 1, 2, 64], range(4), x, gates)
    with pytest.raises(ValueError, match="target must name pages from 0 to 63, got -1 to 2"):
        world.advance(rows, range(4), [-1, 0, 1, 2], x, gates)
    with pytest.raises(ValueError, match=r"source must be \[layers, 4\] as target is"):
        world.advance(rows, range(3), range(3), x, gates)
    with pytest.raises(ValueError, match="target names a page twice"):
        world.advance(rows, range(4), [5, 6, 7, 7], x, gates)
    with pytest.raises(ValueError, match="a page that is written for one item is the source of another"):
        world.advance(rows, range(4), [1, 5, 6, 7], x, gates)
    with pytest.raises(ValueError, match="rows must have heads below 4, 1 a key head; got heads below 5, 1 a key head"):
        world.advance(StateRows(np.array([2]), [np.arange(1, 5)]), range(4), range(4), x, gates)
    with pytest.raises(ValueError, match="arena must be float32"):
        states.plan(world.layout, world.arena[:, 1:], rows, np.arange(4)[None], np.arange(4)[None])
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        states.plan(world.layout, world.arena, rows, np.arange(4)[None], np.arange(4)[None], 0)


def test_wrong_constants_are_named() -> None:
    with pytest.raises(ValueError, match="heads must be a multiple of key_heads, got 3 and 2"):
        StateConstants(3, 2, 1.0)
    layout = StateLayout("mamba2", 16, 16, 4)
    with pytest.raises(ValueError, match=r"conv of a mamba2 layer with conv 4 must be float32 \[192, 4\]"):
        StateConstants(4, 4, 1.0).check(layout, 1, 4)
    with pytest.raises(ValueError, match=r"conv must be float32 \[192, 4\], got torch.float32 \[191, 4\]"):
        StateConstants(4, 4, 1.0, torch.zeros(191, 4)).check(layout, 1, 4)
    with pytest.raises(ValueError, match=r"conv must be float32 \[192, 4\], got torch.float32 \[768\]"):
        StateConstants(4, 4, 1.0, torch.zeros(768)).check(layout, 1, 4)
    with pytest.raises(ValueError, match="decays of a mamba2 layer with conv 4 must be no tensor"):
        StateConstants(4, 4, 1.0, torch.zeros(192, 4), decays=torch.zeros(4)).check(layout, 1, 4)
    with pytest.raises(ValueError, match="skip of a kda layer with conv 0 must be no tensor"):
        StateConstants(4, 4, 1.0, skip=torch.zeros(4)).check(StateLayout("kda", 16, 16), 1, 4)


def test_layouts_say_what_they_allow() -> None:
    with pytest.raises(ValueError, match="kind must be one of lightning, gated_delta, mamba2, kda, got 'retention'"):
        StateLayout("retention", 16, 16)
    with pytest.raises(ValueError, match="d_v must be a multiple of 16 from 16 to 256, got 20"):
        StateLayout("kda", 16, 20)
    with pytest.raises(ValueError, match="conv must be 0 or from 2 to 8, got 1"):
        StateLayout("kda", 16, 16, 1)
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        StateRows(np.array([0]), [np.arange(1)])
    with pytest.raises(ValueError, match="heads of row 0 must be ascending"):
        StateRows(np.array([1]), [np.array([1, 1])])
    with pytest.raises(ValueError, match="group must be at least 1, got 0"):
        StateRows(np.array([1]), [np.arange(1)], 0)
    assert StateLayout("kda", 128, 128, 4).record == 128 * 128 + 3 * 384
    assert [StateLayout(kind, 32, 16).gates for kind in KINDS] == [0, 2, 2, 33]


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drafts_give_bit_by_bit_what_single_tokens_do(kind: str, dtype: torch.dtype) -> None:
    """Rows with as many drafts as there may be, of which the last ones are wrong, and rows without; each runs twice."""
    torch.manual_seed(1)
    draw, world, tokens, heads = random.Random(2), make(kind, 64, 64, 4, 2), 40, [np.arange(4)]
    first, second, inputs = np.arange(4), np.arange(4, 8), np.arange(8, 12)
    x, gates = world.inputs(StateRows(np.array([tokens]), heads, 2))
    x, gates = x.to(dtype).view(tokens, -1), gates.view(tokens, -1)
    start = world.arena.clone()
    outs, records, source, target = [], [world.arena[first].clone()], first, second
    for token in range(tokens):
        rows = StateRows(np.array([1]), heads, 2)
        outs.append(world.advance(rows, source, target, x[token].flatten(), gates[token].flatten()).view(4, -1))
        source, target = target, source
        records.append(world.arena[source].clone())
    world.arena.copy_(start)
    base, at, source, target = 0, 0, first, second
    while at < tokens:
        drafts = min(draw.choice((0, 1, 3, world.layout.drafts)) if at else world.layout.drafts, tokens - at - 1)
        right, replay = draw.randint(0, drafts), at - base
        rows = StateRows(np.array([1 + drafts]), heads, 2, np.array([replay]), np.array([drafts > 0]), np.array([at]))
        written = target if replay or not drafts else np.full(4, -1)
        row_x, row_gates = x[at : at + 1 + drafts].clone(), gates[at : at + 1 + drafts]
        row_x[1 + right :] *= -1
        tables = (pages[None] for pages in (source, written))
        plan = states.plan(world.layout, world.arena, rows, *tables, threads=2, kept=inputs[None])
        for _ in range(2):
            out = states.advance(plan, 0, row_x.flatten(), row_gates.flatten(), world.constants).view(1 + drafts, 4, -1)
            assert torch.equal(out[: 1 + right], torch.stack(outs[at : at + 1 + right]))
        if written is target:
            source, target, base = target, source, at if drafts else at + 1
        assert torch.equal(world.arena[source], records[base])
        at += 1 + right


def test_inputs_without_a_page_or_room_are_refused() -> None:
    world = make("gated_delta", 16, 16)
    page, other, heads = np.array([[1]]), np.array([[2]]), [np.array([0])]
    few, many = np.array([2]), np.array([9])
    for rows, target, kept, says in (
        (StateRows(few, heads, 1, None, np.array([True]), few), other, None, "no pages of them"),
        (StateRows(few, heads, 1, None, np.array([True]), few), other, -page, "no page for them"),
        (StateRows(many, heads, 1, None, np.array([True]), few), other, page + 2, "inputs of 9 tokens, a page keeps"),
        (StateRows(few, heads, 1, few, np.array([True]), few), -other // 2, page + 2, "target names no page"),
        (StateRows(few, heads, 1, few, np.array([True]), few), other, other, "names a page twice"),
    ):
        with pytest.raises(ValueError, match=says):
            states.plan(world.layout, world.arena, rows, page, target, kept=kept)
