"""Few rows times packed weights: right to the rounding of x, each row by itself, whatever the format."""

from __future__ import annotations

import pytest
import torch

from lamina_kernels.packed.activations import LINE, round_rows
from lamina_kernels.packed.layout import Format
from lamina_kernels.packed.multiply import MAX_ROWS, multiply, multiply_rounded
from tests.support.packed_weights import Packed, random_packed

FORMATS = list(Format)


def rounded(x: torch.Tensor) -> torch.Tensor:
    """What x is after rounding by blocks of 32, in float64."""
    blocks = x.float().unflatten(1, (-1, 32))
    most = blocks.abs().amax(-1, keepdim=True)
    codes = torch.where(most > 0, blocks * (127 / most), 0).round()
    return (codes.double() * (most * torch.tensor(1 / 127)).double()).flatten(1)


def product(x: torch.Tensor, of: Packed, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    y = torch.full((len(x), len(of.values)), 7.0, dtype=dtype)
    multiply(x, of.data, of.format, len(of.values), y)
    return y


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("n", [1, 2, 5, 8, 9, MAX_ROWS])
@pytest.mark.parametrize(("n_out", "blocks"), [(16, 1), (1, 3), (50, 8), (130, 17)])
def test_equals_float64_to_rounding(format, n, n_out, blocks):
    n_in = blocks * (256 if format >= Format.K4 else 32)
    of, x = random_packed(format, n_out, n_in), torch.randn(n, n_in, generator=torch.Generator().manual_seed(n))
    exact = rounded(x) @ of.values.T
    room = rounded(x).abs() @ of.values.abs().T + 1e-6
    assert ((product(x, of).double() - exact).abs() <= room * 2**-20).all()
    half = product(x, of, torch.bfloat16).double()
    assert ((half - exact).abs() <= exact.abs() * 2**-8 + room * 2**-20).all()
    assert torch.nn.functional.cosine_similarity(exact, x.double() @ of.values.T, dim=-1).min() > 0.999 or n_out == 1


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("threads", [1, 3])
def test_a_row_depends_neither_on_the_others_nor_on_threads(format, threads):
    of, x = random_packed(format, 52, 512), torch.randn(19, 512).bfloat16()
    whole, before = product(x, of), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for part in (slice(0, 1), slice(3, 14), slice(18, 19)):
            assert torch.equal(product(x[part], of), whole[part])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("format", FORMATS)
def test_what_is_not_finite_makes_its_row_nan(format, bad):
    of, x = random_packed(format, 20, 256), torch.ones(3, 256)
    x[1, 130] = bad
    y = product(x, of)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-31, 1e30])
def test_x_of_any_size_is_multiplied(size):
    of, x = random_packed(Format.U8, 16, 64), torch.full((1, 64), size)
    exact = x.double() @ of.values.T
    assert ((product(x, of) - exact).abs() <= exact.abs() * 1e-3 + 1e-28).all()


def test_columns_of_y_that_stand_apart_are_left_alone():
    of = random_packed(Format.U4, 21, 96)
    y = torch.full((3, 40), 5.0)
    multiply(torch.randn(3, 96), of.data, of.format, 21, y[:, 8:29])
    assert (y[:, :8] == 5).all()
    assert (y[:, 29:] == 5).all()
    assert (y[:, 8:29] != 5).all()


def test_lines_hold_the_codes_their_scale_and_sums():
    x = torch.linspace(-2, 1, 96).view(1, 96)
    (lines,) = round_rows(x, 4)
    numbers, words = lines.view(torch.int8)[:3, :32].int(), lines.view(torch.int32)[:3, 8:]
    scales = words[:, 0].contiguous().view(torch.float32)
    assert (numbers.abs().amax(1) == 127).all()
    assert ((numbers * scales[:, None]).flatten() - x[0]).abs().max() <= 2 / 127 / 2 + 1e-6
    sums = numbers.sum(1)
    assert torch.equal(words[:, 2:5], -sums[:, None] * torch.tensor([8, 16, 128], dtype=torch.int32))
    assert torch.equal(words[:, 5], -32 * numbers[:, :16].sum(1))
    assert not lines[3].any()
    assert lines.shape == (4, LINE)


@pytest.mark.parametrize(
    ("shape", "n_out", "message"),
    [((2, 33), 16, "blocks of 32"), ((2, 96), 16, "data must be uint8"), ((2, 64), 17, "data must be uint8")],
)
def test_what_does_not_fit_is_refused(shape, n_out, message):
    of = random_packed(Format.U4, 16, 64)
    with pytest.raises(ValueError, match=message):
        multiply(torch.zeros(shape), of.data, of.format, n_out, torch.zeros(2, n_out))
    with pytest.raises(ValueError, match="y must be"):
        multiply(torch.zeros(2, 64), of.data, of.format, 16, torch.zeros(2, 15))
    with pytest.raises(ValueError, match="needs 8 blocks"):
        multiply_rounded(round_rows(torch.zeros(1, 64), 2), 64, of.data, Format.K4, 16, torch.zeros(1, 16))
