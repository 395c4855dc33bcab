"""A driver for the decoder: all keys and values of one sequence in plain tensors, attention by its definition.

It computes on the decoder's device; what goes in and comes out is on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lamina_workers.decoder.model import Batch, Decoder, KeyValueReady


class DenseAttention:
    """One sequence. `run` gives the logits of tokens that follow those of earlier calls."""

    def __init__(self, decoder: Decoder, prompt_length: int) -> None:
        self._decoder = decoder
        self._specs = decoder.config.layer_specs()
        self._prompt_length = prompt_length
        self._past: list[tuple[torch.Tensor, torch.Tensor]] = [
            (self._nothing(s.kv_heads, s.d_k), self._nothing(s.kv_heads, s.d_v)) for s in self._specs
        ]
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
                else:
                    query, event = event.q, next(forward)
            except StopIteration as end:
                self.length += len(token_ids)
                logits: torch.Tensor = end.value
                return logits.cpu()

    def _attend(self, event: KeyValueReady, q: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        spec = self._specs[event.layer]
        k, v = (
            torch.cat((past, new.float()))
            for past, new in zip(self._past[event.layer], (event.k, event.v), strict=True)
        )
        self._past[event.layer] = k, v
        k, v = k.repeat_interleave(spec.group, 1), v.repeat_interleave(spec.group, 1)
        distance = positions.unsqueeze(-1) - torch.arange(len(k), device=k.device)
        hidden = (distance < 0) | (distance >= (spec.window or len(k)))
        scores = torch.einsum("qhd,khd->hqk", q.float(), k) * spec.scale
        out = torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)
        return out.to(q.dtype)
