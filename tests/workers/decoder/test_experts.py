"""Experts as kernels compute them against one expert after the other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lamina.simulator.costs.shapes import LayerGroup
from lamina_kernels.compile import programs
from lamina_kernels.dense import few_rows
from lamina_kernels.dense.dense import Linear, gelu_tanh_mul, silu_mul
from lamina_kernels.dense.experts import Routed
from lamina_kernels.packed.layout import Format
from lamina_kernels.packed.matrix import PackedMatrix
from lamina_workers.decoder.moe import ClampedGate, Experts, Mlp, Router, relu2
from lamina_workers.model_config.mixers import Choice, MoeConfig
from tests.support.packed_weights import random_packed

HIDDEN, INNER, EXPERTS, TOP_K = 256, 512, 12, 3
ROUTERS = {
    "softmax": (MoeConfig(EXPERTS, TOP_K, INNER, normalize=False), False),
    "normalized": (MoeConfig(EXPERTS, TOP_K, INNER, normalize=True, choice=Choice(scale=2.5)), False),
    "groups": (MoeConfig(EXPERTS, TOP_K, INNER, normalize=False, choice=Choice(groups=4, top_groups=2)), False),
    "sigmoid": (MoeConfig(EXPERTS, TOP_K, INNER, normalize=True, choice=Choice(3, 1, sigmoid=True, scale=1.5)), True),
}
GATINGS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": silu_mul,
    "gelu": gelu_tanh_mul,
    "relu2": relu2,
    "clamped": ClampedGate(1.5, 1.702),
}
PACKED = list(Format)

needs_programs = pytest.mark.skipif(not programs.can_run(), reason="torch has another OpenMP")
needs_few_rows = pytest.mark.skipif(
    not few_rows.can_multiply(torch.zeros(4, 32, dtype=torch.bfloat16)), reason="this CPU has no AVX512_BF16"
)


@pytest.fixture(autouse=True)
def _weights_are_not_repacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lamina_kernels.dense.dense.repacks", lambda _: False)


@pytest.fixture(params=[1, 3], autouse=True)
def threads(request: pytest.FixtureRequest):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def random(*shape: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def linear(
    format: tuple[Format, ...] | None, n_out: int, n_in: int, seed: int, bias: bool, dtype: torch.dtype
) -> Linear:
    """formats: of parts of the rows; None: floats."""
    biases = random(n_out, seed=seed, dtype=dtype) / 4 if bias else None
    if format is None:
        return Linear(random(n_out, n_in, seed=seed) * n_in**-0.5, biases)
    drawn = [random_packed(one, n_out // len(format), n_in, seed=seed + i) for i, one in enumerate(format)]
    return Linear([PackedMatrix(tuple(of.values.shape), of.format, of.data) for of in drawn], biases)


def make(
    format: tuple[Format, ...] | None,
    gating: str = "silu",
    router: str = "softmax",
    bias: bool = False,
    first: int = 0,
    own: int = EXPERTS,
    dtype: torch.dtype = torch.bfloat16,
) -> Experts:
    moe, has_bias = ROUTERS[router]
    width = INNER if gating == "relu2" else 2 * INNER
    experts = [
        Mlp(
            linear(format, width, HIDDEN, 100 + number, bias, dtype),
            linear(None if format is None else format[-1:], HIDDEN, INNER, 200 + number, bias, dtype),
            GATINGS[gating],
        )
        for number in range(first, first + own)
    ]
    scores = Linear(random(EXPERTS, HIDDEN, seed=1, dtype=dtype) * HIDDEN**-0.5)
    return Experts(
        Router(scores, moe, random(EXPERTS, seed=2, dtype=torch.float32) if has_bias else None), experts, first
    )


def unlike_logits(rows: int) -> torch.Tensor:
    """In each row no two are equal: which of equal ones is chosen is open."""
    places = torch.rand(rows, EXPERTS, generator=torch.Generator().manual_seed(rows)).argsort(-1)
    return places / 4 - 1.5


def check(experts: Experts, rows: int, dtype: torch.dtype = torch.bfloat16) -> None:
    x = random(rows, HIDDEN, seed=rows, dtype=dtype)
    logits = unlike_logits(rows).to(dtype)
    assert isinstance(experts.routed, Routed)
    got, expected = experts.routed.run(x, logits), experts._one_by_one(x, logits.float())
    chosen = experts._router.choose(logits.float())[1]
    own = (chosen >= experts._first) & (chosen < experts._first + len(experts._experts))
    bytes_read, pairs = experts.touched()  # by both ways
    assert pairs == 2 * int(own.sum())
    parts = [slice(None), *(slice(first, first + 512) for first in range(0, rows, 512))]  # one by one, and by kernels
    assert bytes_read == sum(len(chosen[part][own[part]].unique()) for part in parts) * experts.expert_bytes
    assert (got - expected).abs().max() <= (2e-5 if dtype == torch.float32 else 0.02) * expected.abs().max()
    for row in range(0, rows, max(rows // 3, 1)):
        part = slice(row, row + 1)
        assert torch.equal(experts.routed.run(x[part], logits[part]), got[part])


@needs_programs
@pytest.mark.parametrize("rows", [1, 7, 32, 90])
@pytest.mark.parametrize("router", ROUTERS)
def test_every_choice(router: str, rows: int) -> None:
    check(make((Format.K4,), router=router), rows)


@needs_programs
@pytest.mark.parametrize("rows", [1, 19])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gating", GATINGS)
def test_every_gating(gating: str, bias: bool, rows: int) -> None:
    check(make((Format.U5,), gating=gating, bias=bias), rows)


@needs_programs
@pytest.mark.parametrize("format", PACKED)
def test_every_packed_kind(format: Format) -> None:
    check(make((format,)), 9)


@needs_programs
def test_parts_of_two_kinds() -> None:
    check(make((Format.K4, Format.K6)), 9)


@needs_programs
@needs_few_rows
@pytest.mark.parametrize("rows", [1, 8, 40])
@pytest.mark.parametrize("bias", [False, True])
def test_bfloat16(bias: bool, rows: int) -> None:
    check(make(None, bias=bias, router="normalized"), rows)


@needs_programs
@pytest.mark.parametrize("gating", GATINGS)
def test_float32(gating: str) -> None:
    check(make((Format.K4,), gating=gating, bias=True, dtype=torch.float32), 9, torch.float32)


@needs_programs
@pytest.mark.parametrize("rows", [1, 33])
@pytest.mark.parametrize(("first", "own"), [(0, 5), (5, 4), (11, 1)])
def test_ranks_have_some(first: int, own: int, rows: int) -> None:
    check(make((Format.K5,), first=first, own=own, router="normalized"), rows)


@needs_programs
def test_many_rows_are_computed_in_parts() -> None:
    check(make((Format.K4,)), 1100)


@needs_programs
def test_logits_that_are_no_numbers_stay_such() -> None:
    experts = make((Format.K4,))
    assert experts.routed is not None
    logits = torch.full((2, EXPERTS), torch.nan, dtype=torch.bfloat16)
    logits[1] = random(EXPERTS, seed=4)
    out = experts.routed.run(random(2, HIDDEN, seed=3), logits)
    assert out[0].isnan().all()
    assert out[1].isfinite().all()


def test_experts_of_unlike_layouts_go_one_by_one() -> None:
    experts = make((Format.K4,))
    expert = experts._experts[3]
    expert.down = linear((Format.K6,), HIDDEN, INNER, 7, False, torch.bfloat16)
    assert Experts(experts._router, experts._experts).routed is None


@needs_programs
@needs_few_rows
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("rows", [1, 9])
def test_the_shared_expert_is_added(gated: bool, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = make((Format.K4,))
    shared = Mlp(*(linear(None, *shape, 5, False, torch.bfloat16) for shape in ((64, HIDDEN), (HIDDEN, 32))), silu_mul)
    gate = random(1, HIDDEN, seed=6) * HIDDEN**-0.5 if gated else None
    experts = Experts(plain._router, plain._experts, shared=(shared, gate))
    monkeypatch.setattr(experts._router, "scores", lambda x: unlike_logits(len(x)).to(x.dtype))
    x = random(rows, HIDDEN, seed=rows)
    by_kernels = experts(x)
    monkeypatch.setattr(Routed, "takes", lambda *_: False)
    expected = experts(x)
    assert (by_kernels - expected).abs().max() <= 0.02 * expected.abs().max()


@needs_programs
@pytest.mark.parametrize("rows", [1, 2, 5, 16, 64])
def test_the_simulators_model_of_experts_is_what_is_counted(rows: int) -> None:
    """Over tokens that take any experts alike, as many experts a batch as it says, and their bytes."""
    experts = make((Format.U4,))
    assert experts.routed is not None
    draw, batches = torch.Generator().manual_seed(rows), 200
    for _ in range(batches):
        logits = torch.rand(rows, EXPERTS, generator=draw).argsort(-1).bfloat16()
        experts.routed.run(torch.zeros(rows, HIDDEN, dtype=torch.bfloat16), logits)
    bytes_read, pairs = experts.touched()
    group = LayerGroup(1, *[0] * 8, experts=EXPERTS, top_k=TOP_K)
    assert pairs == batches * rows * TOP_K
    assert bytes_read / batches / experts.expert_bytes == pytest.approx(group.experts_read(rows), rel=0.03)
