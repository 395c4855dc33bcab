"""Rows times W^T by tiles: right to bfloat16's rounding, each row by itself, and no neighbour loses its tiles."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lamina_kernels.dense import tiles

pytestmark = pytest.mark.skipif(not tiles.available(), reason="this CPU has no AMX")


@pytest.mark.parametrize(("dtype", "precision"), [(torch.bfloat16, 2**-8), (torch.float32, 2**-16)])
@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 32, 33, 100])
@pytest.mark.parametrize(("n_out", "n_in"), [(16, 32), (48, 96), (272, 576), (32, 4096)])
def test_equals_float64_to_rounding(n, n_out, n_in, dtype, precision):
    torch.manual_seed(n)
    x, weight = (torch.randn(rows, n_in).bfloat16() for rows in (n, n_out))
    exact = x.double() @ weight.double().T
    y = tiles.multiply(x, weight, dtype)
    assert y.dtype == dtype
    assert ((y.double() - exact).abs() <= exact.abs() * precision + 1e-3).all()


def test_a_row_does_not_depend_on_the_others():
    x, weight = torch.randn(70, 64).bfloat16(), torch.randn(80, 64).bfloat16()
    product = tiles.multiply(x, weight)
    for first, last in ((0, 1), (3, 9), (16, 49), (69, 70)):
        assert torch.equal(tiles.multiply(x[first:last], weight), product[first:last])


def test_what_is_not_finite_stays_in_its_row():
    x = torch.ones(3, 32).bfloat16()
    x[1, 5] = float("nan")
    x[2, 7] = float("inf")
    y = tiles.multiply(x, torch.ones(16, 32).bfloat16())
    assert (y[0] == 32).all()
    assert y[1].isnan().all()
    assert (y[2] == float("inf")).all()


def test_onednn_and_tiles_take_turns():
    """Both set the tiles' shape in each thread."""
    x, weight = torch.randn(64, 128).bfloat16(), torch.randn(64, 128).bfloat16()
    by_tiles, by_onednn = tiles.multiply(x, weight), F.linear(x, weight)
    for _ in range(5):
        assert torch.equal(tiles.multiply(x, weight), by_tiles)
        assert torch.equal(F.linear(x, weight), by_onednn)


@pytest.mark.parametrize("shape", [(8, 32), (16, 48), (16, 0)])
def test_weights_that_do_not_fit_are_left_to_others(shape):
    assert not tiles.can_multiply(torch.zeros(shape, dtype=torch.bfloat16))
    assert not tiles.can_multiply(torch.zeros(16, 32))


def test_another_x_is_refused():
    weight = torch.zeros(16, 32).bfloat16()
    with pytest.raises(ValueError, match=r"bfloat16 \[n, 32\]"):
        tiles.multiply(torch.zeros(1, 31).bfloat16(), weight)
    with pytest.raises(ValueError, match="must be"):
        tiles.multiply(torch.zeros(1, 32).bfloat16(), weight, torch.float16)
