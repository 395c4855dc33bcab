"""State layers in plain torch, token by token, as the papers print them: what the kernels are tested against.

T is tokens, H heads. A function of a kind takes q and k `[T, H, d_k]`, v `[T, H, d_v]`, gates by token and head and the
state `[H, d_k, d_v]` before them; it gives `[T, H, d_v]` and the state after. All are float32 or float64.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.functional import silu

from lamina_kernels.states.layout import EPSILON, StateLayout
from lamina_kernels.states.operands import Pages, StateConstants, StateRows, check_inputs, check_tables, input_sizes

Result = tuple[torch.Tensor, torch.Tensor]


def lightning(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor, state: torch.Tensor) -> Result:
    """S <- e^decay S + k v^T; o = S^T q, decay `[H]` (Lightning Attention-2, arXiv 2401.04658)."""
    outs = []
    for q_t, k_t, v_t in zip(q, k, v, strict=True):
        state = decay.exp()[:, None, None] * state + k_t.unsqueeze(-1) * v_t.unsqueeze(-2)
        outs.append(_read(state, q_t))
    return torch.stack(outs), state


def mamba2(
    c: torch.Tensor, b: torch.Tensor, x: torch.Tensor, decay: torch.Tensor, dt: torch.Tensor, state: torch.Tensor
) -> Result:
    """S <- e^decay S + dt B x^T; y = S^T C, decay = dt A and dt `[T, H]` (Mamba-2, arXiv 2405.21060)."""
    outs = []
    for c_t, b_t, x_t, decay_t, dt_t in zip(c, b, x, decay, dt, strict=True):
        written = (dt_t.unsqueeze(-1) * b_t).unsqueeze(-1) * x_t.unsqueeze(-2)
        state = decay_t.exp()[:, None, None] * state + written
        outs.append(_read(state, c_t))
    return torch.stack(outs), state


def gated_delta(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor, beta: torch.Tensor, state: torch.Tensor
) -> Result:
    """S <- e^decay S; S <- S + beta k (v - S^T k)^T; o = S^T q, decay `[T, H]` (Gated DeltaNet, arXiv 2412.06464)."""
    return kda(q, k, v, decay.unsqueeze(-1).expand_as(k), beta, state)


def kda(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor, beta: torch.Tensor, state: torch.Tensor
) -> Result:
    """S <- Diag(e^decay) S; S <- S + beta k (v - S^T k)^T; o = S^T q, decay `[T, H, d_k]` (Kimi Linear, arXiv
    2510.26692)."""
    outs = []
    for q_t, k_t, v_t, decay_t, beta_t in zip(q, k, v, decay, beta, strict=True):
        state = decay_t.exp().unsqueeze(-1) * state
        change = beta_t.unsqueeze(-1) * (v_t - _read(state, k_t))
        state = state + k_t.unsqueeze(-1) * change.unsqueeze(-2)
        outs.append(_read(state, q_t))
    return torch.stack(outs), state


def _read(state: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (state * q.unsqueeze(-1)).sum(-2)


def l2norm(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + EPSILON)


def convolve(x: torch.Tensor, history: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Result:
    """SiLU of the causal convolution of x `[T, channels]` behind history `[conv - 1, channels]`; and the new history.

    weight: `[channels, conv]`, its last column that of the token itself.
    """
    whole = torch.cat([history, x])
    out = torch.stack([whole[i : i + len(x)] * weight[:, i] for i in range(weight.shape[1])]).sum(0)
    return silu(out if bias is None else out + bias), whole[len(x) :]


def advance(
    layout: StateLayout,
    arena: torch.Tensor,
    rows: StateRows,
    source: Pages,
    target: Pages,
    x: torch.Tensor,
    gates: torch.Tensor,
    constants: StateConstants,
) -> torch.Tensor:
    """What `states.advance.advance` does, in float64: source and target `[items]` are those of one layer."""
    check_tables(layout, rows.items, arena, source[None], target[None])
    check_inputs(input_sizes(layout, rows), x, gates)
    constants.check(layout, rows.group, rows.end)
    first, outs, read = 0, [], arena.clone()
    at_x = at_gates = 0
    for row, (count, heads) in enumerate(zip(rows.count, rows.heads, strict=True)):
        n, width, n_gates = int(count), rows.width(layout, row), int(count) * len(heads) * layout.gates
        row_x = x[at_x : at_x + n * width].view(n, width).double()
        row_gates = gates[at_gates : at_gates + n_gates].view(n, len(heads), layout.gates).double()
        at_x, at_gates = at_x + n * width, at_gates + n_gates
        every = []
        for i, head in enumerate(heads):
            page = int(source[first + i])
            record = torch.zeros(layout.record) if page < 0 else read[page]
            own = torch.cat([row_x[:, columns] for columns in head_columns(layout, rows, row, i)], -1)
            out, record = _advance_head(layout, record.double(), own, row_gates[:, i], constants, int(head))
            arena[int(target[first + i])] = record.float()
            every.append(out)
        outs.append(torch.stack(every, 1).reshape(-1, layout.d_v))
        first += len(heads)
    return torch.cat(outs).to(x.dtype) if outs else x.new_empty(0, layout.d_v)


def head_columns(layout: StateLayout, rows: StateRows, row: int, i: int) -> tuple[slice, slice, slice]:
    """Where q, k and v of a row's i-th head stand among the numbers of a token of the row's x."""
    keys = rows.key_heads(row)
    key = list(keys).index(rows.heads[row][i] // rows.group)
    q, k, v = key * layout.d_k, (len(keys) + key) * layout.d_k, 2 * len(keys) * layout.d_k + i * layout.d_v
    return slice(q, q + layout.d_k), slice(k, k + layout.d_k), slice(v, v + layout.d_v)


def _advance_head(
    layout: StateLayout,
    record: torch.Tensor,
    x: torch.Tensor,
    gates: torch.Tensor,
    constants: StateConstants,
    head: int,
) -> Result:
    """x `[T, channels]` and gates `[T, g]` of one head: gives `[T, d_v]` and the new record."""
    size = layout.d_k * layout.d_v
    state, history = record[:size].view(1, layout.d_k, layout.d_v), record[size:].view(-1, layout.channels)
    if constants.conv is not None:
        every = StateRows(np.ones(1, np.int64), [np.arange(constants.heads)], constants.group)
        columns = head_columns(layout, every, 0, head)
        weight = torch.cat([constants.conv[c] for c in columns]).double()
        bias = None if constants.bias is None else torch.cat([constants.bias[c] for c in columns]).double()
        x, history = convolve(x, history, weight, bias)
    q, k, v = x.unsqueeze(1).split([layout.d_k, layout.d_k, layout.d_v], -1)
    if layout.delta:
        q, k = l2norm(q), l2norm(k)
    q, gates = q * constants.scale, gates.unsqueeze(1)
    if constants.decays is not None:
        out, state = lightning(q, k, v, constants.decays[head].double().view(1), state)
    elif layout.kind == "mamba2":
        out, state = mamba2(q, k, v, gates[..., 0], gates[..., 1], state)
    elif layout.kind == "gated_delta":
        out, state = gated_delta(q, k, v, gates[..., 0], gates[..., 1], state)
    else:
        out, state = kda(q, k, v, gates[..., :-1], gates[..., -1], state)
    if constants.skip is not None:
        out = out + constants.skip[head] * v
    return out.squeeze(1), torch.cat([state.flatten(), history.flatten()])
