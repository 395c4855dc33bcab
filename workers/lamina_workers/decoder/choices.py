"""The two variants of attention that a model may describe: attention over latents, and an index that chooses keys.

Multi-head latent attention (`LatentAttention`; DeepSeek-V2, arXiv 2405.04434, section 2.1) is computed absorbed. k and
v of all heads are linear in one latent a token. So q.k is a product of the latent with a query that has gone through
the map to k, and a sum of values is the map to v of a sum of latents. Attention then is over latents alone: one KV
head, whose v is the front of its k, and nothing else is stored or sent.

An index (`HeadIndex`, `LatentIndex`) computes queries and keys of its own from the residual stream. They travel behind
q and k (`beside`), and holders choose by them which keys are attended: see `lamina_protocols.messages.layers.Index`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from lamina_kernels.dense.dense import HeadLinears, Linear, rms_norm, rotate, split_heads
from lamina_workers.checkpoints.weight_loader import ALL, Loader
from lamina_workers.decoder.rope import head_order
from lamina_workers.decoder.shard import RankShape, kv_rows
from lamina_workers.decoder.weight_names import index_names
from lamina_workers.model_config.config import ModelConfig
from lamina_workers.model_config.mixers import LatentConfig
from lamina_workers.model_config.rope_config import RopeConfig

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
        sizes = self.config
        if self.query_up is not None and self.query_norm is not None:
            projected = self.query_up(rms_norm(projected.contiguous(), self.query_norm, EPS))
        q = projected.view(len(projected), self.key_up.heads, sizes.plain + sizes.rotary)
        queries = q.new_empty(len(q), q.shape[1], sizes.rank + sizes.rotary)
        queries[..., : sizes.rank] = self.key_up(q[..., : sizes.plain])
        still = q[..., sizes.plain :]
        queries[..., sizes.rank :] = still if rotation is None else rotate(still, *rotation)
        return queries

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


@dataclass(frozen=True, slots=True)
class HeadIndex:
    """MiniMax-M3's: one index query for each KV head, normed and rotated as the queries are.

    projection: to `(kv_heads + 1) * width`, index queries and then the index key. norms: `[width]`, of both."""

    projection: Linear
    norms: tuple[torch.Tensor, torch.Tensor]
    kv_heads: int
    eps: float

    def __call__(
        self, normed: torch.Tensor, projected: torch.Tensor, rotation: Rotation
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Index queries `[n, kv_heads, width]` and index keys `[n, 1, width]`, of the normed residual stream alone."""
        q, k, _ = split_heads(self.projection(normed), self.kv_heads, 1, rotation, self.norms, self.eps, 0)
        return q, k


@dataclass(frozen=True, slots=True)
class LatentIndex:
    """DeepSeek V3.2's (arXiv 2512.02556): `heads` index queries of what q is made of, whose first `rotary` numbers are
    rotated, and a weight of each. Positive factors of all weights, which change no choice, are left out.

    query_norm: `[query_rank]`; query_up: to `heads * width`; projection: of the residual stream to the index key and
    the weights, `width + heads`; key_norm: weight and bias, `[width]`."""

    query_norm: torch.Tensor
    query_up: Linear
    projection: Linear
    key_norm: tuple[torch.Tensor, torch.Tensor]
    heads: int
    rotary: int

    def __call__(
        self, normed: torch.Tensor, projected: torch.Tensor, rotation: Rotation
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Index queries with their weights behind them, `[n, 1, heads * width + heads]`, and index keys
        `[n, 1, width]`, of the normed residual stream and what q is made of, which `projected` begins with."""
        rank = len(self.query_norm)
        q = self.query_up(rms_norm(projected[:, :rank].contiguous(), self.query_norm, EPS))
        width = self.query_up.n_out // self.heads
        k, weights = self.projection(normed).split((width, self.heads), -1)
        k = F.layer_norm(k, (width,), *self.key_norm, EPS)
        q, k = (self._rotated(x.unflatten(-1, (-1, width)), rotation) for x in (q, k))
        return torch.cat((q.flatten(1), weights), -1).unsqueeze(1), k

    def _rotated(self, x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
        if rotation is None:
            return x
        return torch.cat((rotate(x[..., : self.rotary], *rotation), x[..., self.rotary :]), -1)


def beside(
    q: torch.Tensor, k: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k with an index's queries `[n, kv_heads, numbers]` and keys `[n, 1, width]` behind them, as `LayerSpec`
    says."""
    (n, heads, _), kv_heads = q.shape, k.shape[1]
    pieces = F.pad(queries, (0, -queries.shape[-1] % (heads // kv_heads)))
    pieces = pieces.view(n, heads, pieces.shape[-1] * kv_heads // heads)
    return torch.cat((q, pieces), -1), torch.cat((k, keys.expand(-1, kv_heads, -1)), -1)


def load_index(
    config: ModelConfig, load: Loader, layer: int, shape: RankShape, order: torch.Tensor | None
) -> HeadIndex | LatentIndex | None:
    """A rank's part of a layer's index, if it has one. `order`: of the numbers of the layer's heads."""
    index = config.index
    if index is None or not config.indexed[layer]:
        return None
    names = index_names(config, layer)
    if config.latent is None:
        of_q, of_k, *norms = names
        rows, turned = [kv_rows(config, shape, index.width), ALL], (len(shape.kv_heads) + 1) * index.width
        projection = load.linear([of_q, of_k], rows=rows, order=order, turned=turned, plain=True)
        q_norm, k_norm = (load.norm(name, config.family.norm_offset, order) for name in norms)
        return HeadIndex(projection, (q_norm, k_norm), len(shape.kv_heads), config.rms_norm_eps)
    up, of_k, weights, norm = names
    rotary = config.latent.rotary
    rotary_order = head_order(replace(config.rope, interleaved=config.family.index_interleaved), rotary)
    order = None if rotary_order is None else torch.cat((rotary_order, torch.arange(rotary, index.width)))
    bias = load.copy(f"{norm}.bias")
    return LatentIndex(
        query_norm=load.norm(f"model.layers.{layer}.self_attn.q_a_layernorm", 0.0),
        query_up=load.linear([up], order=order, turned=index.heads * index.width, plain=True),
        projection=load.linear([of_k, weights], order=order, turned=index.width, plain=True),
        key_norm=(load.norm(norm, 0.0, order), bias if order is None else bias[order.to(bias.device)]),
        heads=index.heads,
        rotary=rotary,
    )
