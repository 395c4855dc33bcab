"""Few rows times W^T: right to bfloat16's rounding, and each row by itself."""

from __future__ import annotations

import pytest
import torch

from lamina_kernels.dense import few_rows

pytestmark = pytest.mark.skipif(
    not few_rows.can_multiply(torch.zeros(4, 32, dtype=torch.bfloat16)), reason="this CPU has no AVX512_BF16"
)


@pytest.mark.parametrize(("dtype", "precision"), [(torch.bfloat16, 2**-8), (torch.float32, 2**-16)])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 9, 16, 31])
@pytest.mark.parametrize(("n_out", "n_in"), [(4, 32), (52, 96), (260, 576)])
def test_equals_float64_to_rounding(n, n_out, n_in, dtype, precision):
    torch.manual_seed(n)
    x, weight = (torch.randn(rows, n_in).bfloat16() for rows in (n, n_out))
    exact = x.double() @ weight.double().T
    y = few_rows.multiply(x, weight, dtype)
    assert y.dtype == dtype
    assert ((y.double() - exact).abs() <= exact.abs() * precision + 1e-4).all()


def test_a_row_does_not_depend_on_the_others():
    x, weight = torch.randn(13, 64).bfloat16(), torch.randn(20, 64).bfloat16()
    whole = few_rows.multiply(x, weight)
    for i in range(13):
        assert torch.equal(few_rows.multiply(x[i : i + 1], weight)[0], whole[i])
    assert torch.equal(few_rows.multiply(x[3:9], weight), whole[3:9])


def test_what_is_not_finite_stays_in_its_row():
    x = torch.ones(3, 32).bfloat16()
    x[1, 5] = float("nan")
    x[2, 7] = float("inf")
    y = few_rows.multiply(x, torch.ones(4, 32).bfloat16())
    assert (y[0] == 32).all()
    assert y[1].isnan().all()
    assert (y[2] == float("inf")).all()


@pytest.mark.parametrize("shape", [(3, 32), (4, 33), (4, 0)])
def test_weights_that_do_not_fit_are_left_to_others(shape):
    assert not few_rows.can_multiply(torch.zeros(shape, dtype=torch.bfloat16))
    assert not few_rows.can_multiply(torch.zeros(4, 32))


def test_another_x_is_refused():
    with pytest.raises(ValueError, match=r"bfloat16 \[n, 32\]"):
        few_rows.multiply(torch.zeros(1, 31).bfloat16(), torch.zeros(4, 32).bfloat16())
