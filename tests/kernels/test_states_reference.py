"""The recurrences of state layers against the code of transformers, with its mixers run as models run them."""

from __future__ import annotations

import math

import pytest
import state_reference as reference
import torch
from torch.nn.functional import silu, softplus
from transformers.models.kimi_linear import modeling_kimi_linear as kimi
from transformers.models.minimax import modeling_minimax as minimax
from transformers.models.nemotron_h import modeling_nemotron_h as nemotron
from transformers.models.qwen3_next import modeling_qwen3_next as qwen

T, H, D_K, D_V = 70, 4, 32, 16


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float32)


def close(given: tuple[torch.Tensor, torch.Tensor], out: torch.Tensor, state: torch.Tensor) -> None:
    torch.testing.assert_close(given[0], out[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(given[1], state[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("function", [qwen.torch_recurrent_gated_delta_rule, qwen.torch_chunk_gated_delta_rule])
def test_gated_delta_is_that_of_qwen3_next(function) -> None:
    torch.manual_seed(0)
    q, k, v, beta = drawn(T, H, D_K), drawn(T, H, D_K), drawn(T, H, D_V), torch.rand(T, H)
    decay, state = -softplus(drawn(T, H)), drawn(H, D_K, D_V)
    batch = [x[None] for x in (q, k, v, decay, beta, state)]
    expected = function(*batch[:5], initial_state=batch[5], output_final_state=True, use_qk_l2norm_in_kernel=True)
    scaled = reference.l2norm(q) * D_K**-0.5
    close(reference.gated_delta(scaled, reference.l2norm(k), v, decay, beta, state), *expected)


@pytest.mark.parametrize("function", [kimi.recurrent_kimi_delta_attention, kimi.chunk_kimi_delta_attention])
def test_kda_is_that_of_kimi_linear(function) -> None:
    torch.manual_seed(0)
    q, k, v, beta = drawn(T, H, D_K), drawn(T, H, D_K), drawn(T, H, D_V), torch.rand(T, H)
    decay, state = -softplus(drawn(T, H, D_K)), drawn(H, D_K, D_V)
    batch = [x[None] for x in (q, k, v, decay, beta, state)]
    expected = function(*batch[:5], initial_state=batch[5], output_final_state=True, use_qk_l2norm_in_kernel=True)
    scaled = reference.l2norm(q) * D_K**-0.5
    close(reference.kda(scaled, reference.l2norm(k), v, decay, beta, state), *expected)


def test_mamba2_is_that_of_nemotron_h() -> None:
    torch.manual_seed(0)
    c, b, x, dt = drawn(T, 2, D_K), drawn(T, 2, D_K), drawn(T, H, D_V), torch.rand(T, H)
    a, state, skip = -torch.rand(H) * 4, drawn(H, D_K, D_V), drawn(H)
    out, after = nemotron.mamba2_chunk_scan(
        x[None], dt[None], a, b[None], c[None], 64, D=skip,
        initial_states=state.transpose(1, 2)[None], return_final_states=True,
    )  # fmt: skip
    every_c, every_b = (y.repeat_interleave(H // 2, 1) for y in (c, b))
    given = reference.mamba2(every_c, every_b, x, dt * a, dt, state)
    close((given[0] + skip[:, None] * x, given[1]), out, after.transpose(2, 3))
    kept = state.transpose(1, 2)[None].clone()
    wide = [y.unsqueeze(-1).expand(-1, -1, D_V) for y in (dt[:1], skip[None])]
    step = nemotron.mamba2_selective_state_update(
        kept, x[:1], wide[0], a[:, None, None].expand(-1, D_V, D_K), b[:1], c[:1], D=wide[1][0]
    )
    one = reference.mamba2(every_c[:1], every_b[:1], x[:1], dt[:1] * a, dt[:1], state)
    close((one[0] + skip[:, None] * x[:1], one[1]), step[None], kept.transpose(2, 3))


def test_lightning_is_that_of_minimax() -> None:
    torch.manual_seed(0)
    config = minimax.MiniMaxConfig(hidden_size=64, num_attention_heads=H, head_dim=D_K, block_size=16)
    mixer = minimax.MiniMaxLightningAttention(config, 1).eval()
    seen = {}
    mixer.norm = torch.nn.Identity()
    mixer.out_proj.register_forward_pre_hook(lambda module, args: seen.update(out=args[0]))
    hidden = drawn(1, T, 64)
    with torch.no_grad():
        _, state = mixer(hidden, (hidden, hidden), None)
        qkv = silu(mixer.qkv_proj(hidden))[0].view(T, H, 3, D_K)
        gate = torch.sigmoid(mixer.output_gate(hidden))[0]
        decay = -mixer.slope_rate.view(H)
        out, after = reference.lightning(*qkv.unbind(2), decay, torch.zeros(H, D_K, D_K))
    torch.testing.assert_close(gate * out.reshape(T, -1), seen["out"][0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after, state[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
def test_the_convolution_is_that_of_the_models(bias: bool) -> None:
    torch.manual_seed(0)
    x, weight, given_bias = drawn(T, 8), drawn(8, 4), drawn(8) if bias else None
    expected = qwen.causal_conv1d_fn(x.T[None], weight, given_bias, activation="silu")[0].T
    first, history = reference.convolve(x[:3], torch.zeros(3, 8), weight, given_bias)
    rest, history = reference.convolve(x[3:], history, weight, given_bias)
    torch.testing.assert_close(torch.cat([first, rest]), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(history, x[-3:])


def test_a_norm_of_zeros_is_finite() -> None:
    assert reference.l2norm(torch.zeros(3)).tolist() == [0.0] * 3
    assert math.isclose(float(reference.l2norm(torch.ones(4)).norm()), 1.0, rel_tol=1e-5)
