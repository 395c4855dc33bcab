"""Multi-head latent attention, absorbed (DeepSeek-V2, arXiv 2405.04434, section 2.1).

k and v of all heads are linear in one latent a token. So q.k is a product of the latent with a query that has gone
through the map to k, and a sum of values is that map's of a sum of latents. Attention then is over latents alone: one
KV head, whose v is the front of its k, and nothing else is stored or sent.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lamina_kernels.dense.dense import HeadLinears, Linear, rms_norm, rotate
from lamina_workers.decoder.latent_config import LatentConfig
from lamina_workers.decoder.rope import head_order
from lamina_workers.decoder.rope_keys import RopeConfig

Rotation = tuple[torch.Tensor, torch.Tensor] | None
"""cos and sin of the batch's positions, float32 `[T, d / 2]`; None in a layer without RoPE."""

EPS = 1e-6  # of the norms of both vectors, whatever the model's other norms have


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """One layer's maps between the projections of the residual stream and the attention over latents.

    query_norm: `[query_rank]` and query_up, to `heads * (plain + rotary)`: None where the projection has the queries
    themselves. latent_norm: `[rank]`. key_up: of each head, from its q, `plain`, to the latent's `rank`; value_up: from
    a latent to its v, `value`.
    """

    config: LatentConfig
    query_norm: torch.Tensor | None
    query_up: Linear | None
    latent_norm: torch.Tensor
    key_up: HeadLinears
    value_up: HeadLinears

    def queries(self, projected: torch.Tensor, rotation: Rotation) -> torch.Tensor:
        """What attends latents, `[n, heads, rank + rotary]`. projected: `[n, query_rank]`, or all heads of q."""
        at = self.config
        if self.query_up is not None and self.query_norm is not None:
            projected = self.query_up(rms_norm(projected.contiguous(), self.query_norm, EPS))
        q = projected.view(len(projected), self.key_up.heads, at.plain + at.rotary)
        found = q.new_empty(len(q), q.shape[1], at.rank + at.rotary)
        found[..., : at.rank] = self.key_up(q[..., : at.plain])
        still = q[..., at.plain :]
        found[..., at.rank :] = still if rotation is None else rotate(still, *rotation)
        return found

    def keys(self, projected: torch.Tensor, rotation: Rotation) -> torch.Tensor:
        """The latents, with what is rotated behind them: `[n, 1, rank + rotary]`. projected: `[n, rank + rotary]`."""
        latent, rotated = projected.split((self.config.rank, self.config.rotary), -1)
        normed = rms_norm(latent.contiguous(), self.latent_norm, EPS)
        rotated = rotated.unsqueeze(1)
        return torch.cat((normed.unsqueeze(1), rotated if rotation is None else rotate(rotated, *rotation)), -1)

    def values(self, attended: torch.Tensor) -> torch.Tensor:
        """The attention output `[n, heads * value]` from sums of latents, `[n, heads, rank]` or flat."""
        sums = attended.view(len(attended), self.value_up.heads, self.config.rank)
        return self.value_up(sums).flatten(1)


def query_rows(config: LatentConfig, heads: int) -> int:
    """How many outputs the projection to queries has, which stands before that to latents."""
    return config.query_rank or heads * (config.plain + config.rotary)


def rotated_last(width: int, heads: int, rope: RopeConfig, rotary: int) -> torch.Tensor | None:
    """The order of the outputs of `heads` vectors of `width` numbers whose last `rotary` are rotated, so that halves
    turn against each other: int64 `[heads * width]`, None where they stand so already."""
    order = head_order(rope, rotary)
    if order is None:
        return None
    one = torch.cat((torch.arange(width - rotary), width - rotary + order))
    return (torch.arange(heads).unsqueeze(1) * width + one).flatten()
