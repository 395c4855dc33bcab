"""The pieces of dense layers: the compiled ones against torch in float64, which takes the plain path."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina_kernels.dense import dense
from lamina_kernels.dense.dense import Linear, add_rms_norm, gelu_tanh_mul, rms_norm, rotate, silu_mul, split_heads

# bfloat16 keeps 8 bits: a result may be half a unit of the last place off, and norms of q and k round twice.
TOLERANCE = {torch.float32: {"rtol": 2e-6, "atol": 2e-6}, torch.bfloat16: {"rtol": 2**-7, "atol": 1e-6}}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE)
shapes = pytest.mark.parametrize(("rows", "width"), [(0, 8), (1, 1), (1, 576), (3, 100), (7, 33), (130, 576)])


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.dtype is torch.float64
    assert found.is_contiguous()
    torch.testing.assert_close(found.double(), expected, **TOLERANCE[found.dtype])


@dtypes
@shapes
def test_rms_norm(rows: int, width: int, dtype: torch.dtype) -> None:
    x, weight = random(rows, width, dtype=dtype), random(width, dtype=dtype, seed=1)
    check(rms_norm(x, weight, 1e-5), rms_norm(x.double(), weight.double(), 1e-5))


@dtypes
@shapes
def test_add_rms_norm(rows: int, width: int, dtype: torch.dtype) -> None:
    x, residual, weight = (random(*s, dtype=dtype, seed=i) for i, s in enumerate([(rows, width)] * 2 + [(width,)]))
    before = x.clone(), residual.clone()
    normed, total = add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, x + residual)
    check(normed, rms_norm(total.double(), weight.double(), 1e-5))
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])


@dtypes
@shapes
def test_silu_mul(rows: int, width: int, dtype: torch.dtype) -> None:
    gate_up = random(rows, 2 * width, dtype=dtype) * 8
    check(silu_mul(gate_up), silu_mul(gate_up.double()))


@dtypes
@shapes
def test_gelu_tanh_mul(rows: int, width: int, dtype: torch.dtype) -> None:
    gate_up = random(rows, 2 * width, dtype=dtype) * 8
    check(gelu_tanh_mul(gate_up), gelu_tanh_mul(gate_up.double()))


@dtypes
@pytest.mark.parametrize("width", [12, 16])  # the second fills a register
def test_gelu_tanh_mul_of_extremes(dtype: torch.dtype, width: int) -> None:
    few = [-1e38, -1e4, -90.0, -20.0, -3.0, 0.0, 3.0, 20.0, 90.0, 1e4, 1e38, torch.nan]
    gate = torch.tensor([[*few, *few[:4]][:width]], dtype=dtype)
    found = gelu_tanh_mul(torch.cat((gate, torch.ones_like(gate)), 1))
    expected = torch.nn.functional.gelu(gate.double(), approximate="tanh")
    torch.testing.assert_close(found.double(), expected, equal_nan=True, **TOLERANCE[dtype])


@dtypes
def test_silu_mul_of_extremes(dtype: torch.dtype) -> None:
    gate = torch.tensor([[-1e38, -1e4, -90.0, -88.0, -20.0, 0.0, 20.0, 88.0, 90.0, 1e4, 1e38, torch.nan]], dtype=dtype)
    found, expected = silu_mul(torch.cat((gate, torch.ones_like(gate)), 1)), gate.double() * gate.double().sigmoid()
    torch.testing.assert_close(found.double(), expected, equal_nan=True, **TOLERANCE[dtype])


@dtypes
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize(
    ("rows", "heads", "kv_heads", "d"), [(0, 2, 1, 8), (1, 9, 3, 64), (5, 4, 4, 6), (70, 7, 1, 80)]
)
def test_split_heads(
    rows: int, heads: int, kv_heads: int, d: int, rotated: bool, normed: bool, dtype: torch.dtype
) -> None:
    qkv = random(rows, (heads + 2 * kv_heads) * d, dtype=dtype)
    angles = random(rows, d // 2, dtype=torch.float32, seed=1)
    rotation = (angles.cos(), angles.sin()) if rotated else None
    norms = (random(d, dtype=dtype, seed=2), random(d, dtype=dtype, seed=3)) if normed else None
    wide = (norms[0].double(), norms[1].double()) if norms else None
    found = split_heads(qkv, heads, kv_heads, rotation, norms, 1e-6)
    expected = split_heads(qkv.double(), heads, kv_heads, rotation, wide, 1e-6)
    assert [tuple(x.shape) for x in found] == [(rows, heads, d), (rows, kv_heads, d), (rows, kv_heads, d)]
    for x, y in zip(found, expected, strict=True):
        # Rotating mixes two numbers, each rounded by the norm: the error is relative to the larger.
        scale = y.abs().amax(-1, keepdim=True) if rows else y
        assert bool(((x.double() - y).abs() <= (2**-7 if dtype is torch.bfloat16 else 2e-6) * scale).all())


@dtypes
def test_a_rotation_rounds_as_torch_does(dtype: torch.dtype) -> None:
    """The compiler joined one of the two products with the sum, and not the same one in each process: freshly compiled
    kernels gave another greedy text than those of the cache."""
    heads, kv_heads, d, rows = 9, 3, 64, 200
    qkv, angles = random(rows, (heads + 2 * kv_heads) * d, dtype=dtype), random(rows, d // 2, dtype=torch.float32)
    q, k, _ = split_heads(qkv, heads, kv_heads, (angles.cos(), angles.sin()))
    vectors = qkv.view(rows, heads + 2 * kv_heads, d)
    assert torch.equal(torch.cat((q, k), 1), rotate(vectors[:, : heads + kv_heads], angles.cos(), angles.sin()))


def test_rotate_keeps_lengths_and_turns_by_the_angle() -> None:
    x = torch.tensor([[[1.0, 0.0, 0.0, 2.0]]])  # pairs (1, 0) and (0, 2)
    angle = torch.tensor([[0.3, 0.7]])
    expected = torch.stack((angle.cos()[0, 0], -2 * angle.sin()[0, 1], angle.sin()[0, 0], 2 * angle.cos()[0, 1]))
    torch.testing.assert_close(rotate(x, angle.cos(), angle.sin())[0, 0], expected)


@dtypes
def test_a_row_does_not_depend_on_the_others(dtype: torch.dtype) -> None:
    x, weight = random(300, 192, dtype=dtype), random(192, dtype=dtype, seed=1)
    angles = random(300, 32, dtype=torch.float32, seed=2)
    for row in (0, 149, 299):
        one = slice(row, row + 1)
        assert torch.equal(rms_norm(x, weight, 1e-6)[one], rms_norm(x[one], weight, 1e-6))
        assert torch.equal(silu_mul(x)[one], silu_mul(x[one]))
        q, _, _ = split_heads(x, 1, 1, (angles.cos(), angles.sin()))
        assert torch.equal(q[one], split_heads(x[one], 1, 1, (angles[one].cos(), angles[one].sin()))[0])


@settings(max_examples=30)
@given(bits=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40))
def test_rounds_to_bfloat16_as_torch_does(bits: list[int]) -> None:
    patterns = torch.tensor([b - 2**32 if b >= 2**31 else b for b in bits], dtype=torch.int32).view(torch.float32)
    halves = patterns.bfloat16()
    zeros = torch.zeros_like(halves)
    found = add_rms_norm(halves.unsqueeze(0), zeros.unsqueeze(0), zeros, 1e-6)[1][0]
    assert torch.equal(found.isnan(), halves.isnan())
    assert torch.equal(found.nan_to_num(0), (halves + zeros).nan_to_num(0))


def test_refuses_what_does_not_fit() -> None:
    x = random(3, 8, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"weight is torch.float32 \[7\].*expected torch.float32 \[8\]"):
        rms_norm(x, torch.ones(7), 1e-6)
    with pytest.raises(ValueError, match=r"residual is torch\.bfloat16"):
        add_rms_norm(x, x.bfloat16(), torch.ones(8), 1e-6)
    with pytest.raises(ValueError, match="rotation is"):
        split_heads(x, 2, 1, (torch.ones(2, 1), torch.ones(3, 1)))
    with pytest.raises(ValueError, match=r"qkv is torch.float32 \[3, 8\]"):
        split_heads(x, 3, 1)


@dtypes
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "n_in", "n_out"), [(0, 64, 32), (1, 64, 33), (8, 48, 160), (70, 100, 7)])
def test_linear(rows: int, n_in: int, n_out: int, bias: bool, dtype: torch.dtype) -> None:
    x, weight = random(rows, n_in, dtype=dtype), random(n_out, n_in, dtype=dtype, seed=1)
    offset = random(n_out, dtype=dtype, seed=2) if bias else None
    found = Linear(weight.clone(), offset)(x)
    expected = torch.nn.functional.linear(x.double(), weight.double(), None if offset is None else offset.double())
    assert (found.dtype, found.shape) == (dtype, (rows, n_out))
    torch.testing.assert_close(found.double(), expected, rtol=2**-7, atol=2**-6 if dtype is torch.bfloat16 else 1e-5)


@dtypes
@pytest.mark.parametrize("repacked", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 9, 70])
def test_the_halves_of_a_linear_map_are_its_outputs(
    rows: int, bias: bool, repacked: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if repacked and dtype is not torch.bfloat16:
        pytest.skip("only bfloat16 is repacked")
    if repacked:
        monkeypatch.setattr(dense, "repacks", lambda weight: True)  # as on a machine with AMX
    x, weight = random(rows, 96, dtype=dtype), random(160, 96, dtype=dtype, seed=1)
    offset = random(160, dtype=dtype, seed=2) if bias else None
    linear = Linear(weight.clone(), offset)
    whole = linear(x)
    halves = linear.split(96)
    assert linear.split(96) is halves
    assert [half.n_out for half in halves] == [96, 64]
    both = torch.cat([half(x) for half in halves], -1)
    tolerance = {"rtol": 2**-7, "atol": 2**-6} if dtype is torch.bfloat16 else TOLERANCE[dtype] | {"atol": 1e-5}
    torch.testing.assert_close(both, whole, **tolerance)
    torch.testing.assert_close(linear(x), whole, **tolerance)  # it works as before
    torch.testing.assert_close(linear.float32(x), whole.float(), **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 32, 33])
def test_each_head_has_its_own_map(rows: int, dtype: torch.dtype) -> None:
    x, weight = torch.randn(rows, 3, 64).to(dtype), torch.randn(3, 20, 64).to(dtype)
    y = dense.HeadLinears(weight)(x)
    assert (y.shape, y.dtype) == ((rows, 3, 20), dtype)
    wanted = torch.einsum("nhi,hoi->nho", x.double(), weight.double())
    torch.testing.assert_close(y.double(), wanted, rtol=2**-7 if dtype is torch.bfloat16 else 1e-5, atol=1e-2)
