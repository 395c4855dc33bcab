"""A driver for the decoder: all keys and values of one sequence in plain tensors, attention by its definition, and the
states of the layers that keep one, by the reference of their recurrences.

It computes on the decoder's device; what goes in and comes out is on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import state_reference as reference
import torch

from lamina_kernels.states.layout import StateLayout
from lamina_kernels.states.operands import StateRows
from lamina_protocols.messages.layers import LayerSpec
from lamina_workers.decoder.model import Batch, Decoder, KeyValueReady, StateReady


class DenseAttention:
    """One sequence. `run` gives the logits of tokens that follow those of earlier calls."""

    def __init__(self, decoder: Decoder, prompt_length: int) -> None:
        self._decoder = decoder
        self._specs = decoder.config.layer_specs()
        self._prompt_length = prompt_length
        self._past: list[tuple[torch.Tensor, torch.Tensor]] = [
            (self._nothing(s.kv_heads, s.key_width), self._nothing(s.kv_heads, s.own_v)) for s in self._specs
        ]
        layouts = {i: StateLayout(s.kind, s.d_k, s.d_v, s.conv) for i, s in enumerate(self._specs) if s.key_heads}
        self._states = {i: (layout, torch.zeros(self._specs[i].heads, layout.record)) for i, layout in layouts.items()}
        self.length = 0

    def _nothing(self, heads: int, d: int) -> torch.Tensor:
        return torch.empty(0, heads, d, device=self._decoder.device)

    def run(self, token_ids: Sequence[int], hidden: torch.Tensor | None = None, first_layer: int = 0) -> torch.Tensor:
        """Logits, float32 `[tokens, vocab]`, of all `token_ids`."""
        device = self._decoder.device
        positions = torch.arange(self.length, self.length + len(token_ids), device=device)
        batch = Batch(
            token_ids=torch.tensor(token_ids, device=device),
            positions=positions,
            sampled=torch.arange(len(token_ids), device=device),
            rope_lengths=(positions + 1).clamp(min=self._prompt_length),
        )
        hidden = hidden if hidden is None else hidden.to(device)
        forward = self._decoder.forward(batch, hidden, first_layer)
        event = next(forward)
        query = torch.empty(0)
        while True:
            try:
                if isinstance(event, KeyValueReady):
                    event = forward.send(self._attend(event, query, positions))
                elif isinstance(event, StateReady):
                    event = forward.send(self._advance(event))
                else:
                    query, event = event.q, next(forward)
            except StopIteration as end:
                self.length += len(token_ids)
                logits: torch.Tensor = end.value
                return logits.cpu()

    def _advance(self, event: StateReady) -> torch.Tensor:
        heads, (layout, records) = self._specs[event.layer].heads, self._states[event.layer]
        rows = StateRows(np.array([len(event.x)]), [np.arange(heads)], heads // self._specs[event.layer].key_heads)
        pages = np.arange(heads, dtype=np.int32)
        constants = self._decoder.state_constants()[event.layer]
        x, gates = event.x.flatten().cpu(), event.gates.flatten().cpu()
        out = reference.advance(layout, records, rows, pages, pages, x, gates, constants)
        return out.view(len(event.x), -1).to(event.x.device)

    def _attend(self, event: KeyValueReady, q: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        spec = self._specs[event.layer]
        k, v = (
            torch.cat((past, new.float()))
            for past, new in zip(self._past[event.layer], (event.k, event.v), strict=True)
        )
        self._past[event.layer] = k, v
        v = v if spec.own_v else k[..., : spec.d_v]
        distance = positions.unsqueeze(-1) - torch.arange(len(k), device=k.device)
        hidden = (distance < 0) | (distance >= (spec.window or len(k)))
        if spec.index is not None:
            hidden = hidden | ~chosen(spec, q[..., spec.d_k :].float(), k[:, 0, spec.d_k :], positions)
            q, k = q[..., : spec.d_k], k[..., : spec.d_k]
        k, v = k.repeat_interleave(spec.group, 1), v.repeat_interleave(spec.group, 1)
        scores = torch.einsum("qhd,khd->hqk", q.float(), k) * spec.scale
        if spec.soft_cap is not None:
            scores = spec.soft_cap * torch.tanh(scores / spec.soft_cap)
        scores = scores.masked_fill(hidden, -torch.inf)
        if event.sinks is not None:
            scores = torch.cat((scores, event.sinks[:, None, None].expand(-1, len(q), 1)), -1)
        out = torch.einsum("hqk,khd->qhd", scores.softmax(-1)[:, :, : len(k)], v)
        return out.to(q.dtype)


def chosen(spec: LayerSpec, pieces: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Bool `[heads, T, keys]`: the keys in blocks that a layer's index lets each token read, each as `Index` says.

    pieces: `[T, heads, n]`, what stands behind the queries; keys: `[keys, width]`."""
    index = spec.index
    assert index is not None
    reads = torch.zeros(spec.heads, len(positions), len(keys), dtype=torch.bool)
    numbers = pieces.reshape(len(positions), spec.kv_heads, -1)
    for t, position in enumerate(positions.tolist()):
        for head in range(spec.kv_heads):
            mine = numbers[t, head]
            queries = mine[: index.heads * index.width].view(index.heads, index.width)
            products = queries @ keys[: position + 1].T
            if index.weighted:
                weights = mine[index.heads * index.width : index.numbers]
                of_keys = (products.clamp(min=0) * weights[:, None]).sum(0)
            else:
                of_keys = products.amax(0)
            scores = [float(block.max()) for block in of_keys.split(index.block)]
            last = len(scores) - 1
            order = sorted(range(len(scores)), key=lambda b: (b > last - index.local, scores[b]), reverse=True)
            for block in order[: index.top]:
                end = min((block + 1) * index.block, position + 1)
                reads[head * spec.group : (head + 1) * spec.group, t, block * index.block : end] = True
    return reads
