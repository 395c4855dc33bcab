"""The compiled gates of layers that keep a state against torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lamina_kernels.dense.gate_loops import gate_output, recurrence_gates

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def random(*shape: int, dtype: torch.dtype, seed: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def check(found: torch.Tensor, expected: torch.Tensor) -> None:
    """expected: as float32."""
    rounding = 2**-8 if found.dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(found.float(), expected, atol=1e-6, rtol=rounding)


@dtypes
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("rows", "width", "group"), [(0, 32, 16), (1, 48, 16), (3, 30, 10), (40, 1024, 128)])
def test_gate_output(rows: int, width: int, group: int, normed: bool, silu: bool, dtype: torch.dtype) -> None:
    x, gate = random(rows, width, dtype=dtype, seed=1), random(rows, width, dtype=dtype, seed=2, scale=4)
    norm = random(width, dtype=torch.float32, seed=3) if normed else None
    expected = x.float()
    if norm is not None:
        expected = F.rms_norm(expected.unflatten(1, (-1, group)), (group,), None, 1e-6).flatten(1) * norm
    expected = expected * (F.silu(gate.float()) if silu else torch.sigmoid(gate.float()))
    found = gate_output(x, gate, norm, group, 1e-6, silu)
    assert found.dtype == dtype
    check(found, expected)


@pytest.mark.parametrize("silu", [False, True])
def test_gates_of_extremes(silu: bool) -> None:
    gate = torch.tensor([[-torch.inf, -1e30, -200.0, 0.0, 200.0, 1e30, torch.nan]])
    found = gate_output(torch.ones(1, 7), gate, None, 1, 0.0, silu)
    assert torch.equal(found[0, 3:6], gate[0, 3:6] if silu else torch.tensor([0.5, 1.0, 1.0]))
    assert found[0, 1:3].abs().max() < (1e-3 if silu else 1e-30)
    assert found[0, 6].isnan()


@dtypes
@pytest.mark.parametrize(("rows", "heads"), [(0, 4), (1, 1), (5, 7), (8, 32)])
def test_recurrence_gates(rows: int, heads: int, dtype: torch.dtype) -> None:
    x = random(rows, 2 * heads, dtype=dtype, seed=1, scale=10)
    rate, offset = (random(heads, dtype=torch.float32, seed=seed) for seed in (2, 3))
    time, beta = F.softplus(x[:, :heads].float() + offset), x[:, heads:].float().sigmoid()
    torch.testing.assert_close(recurrence_gates(x, rate, offset), torch.stack((time * rate, beta), -1))


def test_refuses_what_does_not_fit() -> None:
    x = torch.zeros(2, 6)
    for gate in (torch.zeros(2, 5), torch.zeros(2, 6).bfloat16()):
        with pytest.raises(ValueError, match=r"the gate of torch.float32 \[2, 6\] by 3 is"):
            gate_output(x, gate, torch.ones(6), 3, 0.0, False)
    with pytest.raises(ValueError, match="by 4"):
        gate_output(x, x, torch.ones(6), 4, 0.0, False)
    with pytest.raises(ValueError, match=r"norm is .* expected torch.float32 \[6\]"):
        gate_output(x, x, torch.ones(5), 3, 0.0, False)
    with pytest.raises(ValueError, match=r"offset is .* expected torch.float32 \[3\]"):
        recurrence_gates(x, torch.ones(3), torch.ones(2))
