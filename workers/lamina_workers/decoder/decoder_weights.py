"""A decoder's weights, and the part of each that a rank keeps.

Maps whose outputs are split among ranks (q, k, v; gate and up; the head) are cut by rows, maps whose inputs are
(attention's output, down) by columns, and the ranks' products are summed. The bias of such a sum belongs to rank 0
alone: a share of it on each rank would be rounded once a rank. Norms and routers are whole on every rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F

from lamina_kernels.dense.dense import HeadLinears, Linear, repacks
from lamina_kernels.packed.layout import ROWS
from lamina_kernels.packed.matrix import PackedMatrix
from lamina_workers.decoder.checkpoint import Renamed, TensorSource, check_tensors
from lamina_workers.decoder.config import ModelConfig
from lamina_workers.decoder.index import HeadIndex, LatentIndex, load_index
from lamina_workers.decoder.latent import LatentAttention, query_rows, rotated_last
from lamina_workers.decoder.latent_config import LatentConfig
from lamina_workers.decoder.mlp_weights import MlpWeights, load_mlp
from lamina_workers.decoder.packing import ALIGNMENT, UNPACKED, Packing
from lamina_workers.decoder.rope import head_order
from lamina_workers.decoder.shard import WHOLE, RankShape, Shard, kv_rows, local, rank_shape
from lamina_workers.decoder.stacked_experts import SeparateExperts, found_stacked, published_shapes
from lamina_workers.decoder.state_layers import OutputGate, StateWeights
from lamina_workers.decoder.state_weights import load_state
from lamina_workers.decoder.weight_loader import ALL, Loader, part_of
from lamina_workers.decoder.weight_names import (
    EMBEDDING,
    HEAD,
    NORM,
    norm_names,
    projection_names,
    tensor_shapes,
)


@dataclass(frozen=True, slots=True)
class MixerWeights:
    """One mixer, attention or a state layer, and what follows it up to the next one.

    qkv maps to `(heads + kv_heads) * d_k + kv_heads * d_v` of attention, or to the inputs of a state layer, in the
    order q, k, v. Norms: `[hidden]`, of q and k `[d_k]` or as wide as all heads; None where the family has none there.
    sinks: float32 `[heads]`. `state`: None where the mixer is attention. `gate`: of the mixer's output. `residual`: its
    factors in `Residuals`. `mlps`: one, except where layers are an MLP alone, or none where it `joins` the next mixer,
    which reads the same stream: what both give is added at once. latent: where attention is over latents; then qkv maps
    to queries, or to what they are made of, and to latents. index: of a layer that has one.
    """

    qkv: Linear
    output: Linear
    residual: tuple[float, float]
    input_norm: torch.Tensor | None = None
    attended_norm: torch.Tensor | None = None
    qk_norms: tuple[torch.Tensor, torch.Tensor] | None = None
    sinks: torch.Tensor | None = None
    gate: OutputGate | None = None
    state: StateWeights | None = None
    latent: LatentAttention | None = None
    index: HeadIndex | LatentIndex | None = None
    mlps: tuple[MlpWeights, ...] = ()
    joins: bool = False


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """All mixers as `layers`, the embedding, the last norm and the head, of one rank or of the whole model.

    embedding: `[vocab, hidden]`, perhaps in another dtype than the rest, or packed; or only the rank's part of the
    vocabulary.
    """

    embedding: torch.Tensor | PackedMatrix
    layers: tuple[MixerWeights, ...]
    norm: torch.Tensor
    head: Linear

    def embedded(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of the embedding by their numbers `[T]`: `[T, hidden]` in the dtype of the rest."""
        if isinstance(self.embedding, PackedMatrix):
            return self.embedding.rows(rows, self.norm.dtype)
        return F.embedding(rows, self.embedding).to(self.norm.dtype)


def load_weights(
    config: ModelConfig,
    source: TensorSource,
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
    shard: Shard = WHOLE,
    split_embedding: bool | None = None,
    packing: Packing = UNPACKED,
) -> DecoderWeights:
    """Check all of `source` against `config`, then convert and pack what belongs to `shard`, releasing each tensor.

    On a CPU an embedding that is nothing else stays the source's view in the source's dtype, so that only rows that
    occur take memory; therefore every rank has all of it. Elsewhere, and with `split_embedding`, a rank has its part of
    the vocabulary. Nothing outside the rank's part of a tensor is read. `packing`: what stays packed, on a CPU.
    `progress(done, total)` counts tensors, those without a part for this rank too. Raises ModelFileError naming tensors
    that are missing, unexpected, or of another shape.
    """
    if config.family.renamed:
        source = Renamed(source, config.family.renamed)
    config = found_stacked(config, source.names())
    wanted = tensor_shapes(config)
    ignored = {name for name in source.names() if re.fullmatch(config.family.unread, name)}
    if config.tie_word_embeddings:
        ignored.add(f"{HEAD}.weight")
    if config.latent is not None:  # layers behind the last one predict further tokens, and are not used here
        behind = f"model.layers.{config.num_hidden_layers}."
        ignored |= {name for name in source.names() if name.startswith(behind)}
    check_tensors(source, published_shapes(config, wanted), ignored)
    if config.moe is not None and config.moe.stacked:
        source = SeparateExperts(source, config, wanted)
    shape = rank_shape(config, shard)
    room = sum(math.prod(of) * dtype.itemsize + ALIGNMENT for of in _kept_shapes(config, shard, shape))
    load = Loader(source, dtype, device, progress or (lambda done, total: None), len(wanted), room, packing)
    own = (part_of(shape.vocabulary),)
    if split_embedding is None:
        split_embedding = device.type != "cpu"
    looked_up = own if split_embedding else ALL
    # The largest tensor first, while the copy that is made of it stands beside little else.
    if config.tie_word_embeddings:
        embedding, head = _load_tied(load, own, looked_up, shard)
    else:
        head = load.head(HEAD, own)
        name = f"{EMBEDDING}.weight"
        packed = load.matrix(name, looked_up)
        embedding = load.lookup(name, looked_up) if packed is None else packed
    layers = tuple(_load_mixers(config, load, shard, shape))
    return DecoderWeights(embedding, layers, load.norm(NORM, config.family.norm_offset), head)


def _load_tied(
    load: Loader, own: Sequence[slice], looked_up: Sequence[slice], shard: Shard
) -> tuple[torch.Tensor | PackedMatrix, Linear]:
    """The embedding and the head of the same numbers: rows to look up, and the rank's `own`, in one memory where they
    can be."""
    name = f"{EMBEDDING}.weight"
    packed = load.matrix(name, looked_up)
    if packed is not None:
        whole = looked_up == own or own[0] == slice(0, packed.shape[0])
        aligned = not own[0].start % ROWS and (not own[0].stop % ROWS or own[0].stop == packed.shape[0])
        part = packed if whole else packed.part(own[0]) if aligned else load.matrix(name, own)
        if part is None:
            raise ValueError(f"a part of {name} is not packed, all of it is")
        return packed, Linear([part])
    weight = load.copy(name, own)
    if not repacks(weight) and (looked_up == own or shard.ranks == 1):
        return weight, Linear(weight)
    return load.lookup(name, looked_up, counts=False), Linear(weight)


def _kept_shapes(config: ModelConfig, shard: Shard, shape: RankShape) -> list[Sequence[int]]:
    """The shapes of the rank's parts of all tensors: those of a model that is as small."""
    moe = config.moe
    if moe is not None:
        moe = replace(moe, experts=len(shape.experts), shared=len(shape.shared))
    small = replace(
        local(config, shard),
        intermediate_size=len(shape.columns),
        vocab_size=len(shape.vocabulary),
        moe=moe,
        kv_copies=1,
    )
    routers = [(config.moe.experts, config.hidden_size + 1)] * sum(config.sparse) if config.moe is not None else []
    pieces = [(0,)] * 8 * len(config.mixer_layers())  # a tensor may be cut into maps, each of which is aligned
    return [*tensor_shapes(small).values(), *routers, *pieces]


def _load_mixers(config: ModelConfig, load: Loader, shard: Shard, shape: RankShape) -> list[MixerWeights]:
    found: list[MixerWeights] = []
    for layer, kinds in enumerate(config.mixers):
        before, behind = (
            load.norm(f"model.layers.{layer}.{name}", config.family.norm_offset) if name and kinds else None
            for name in norm_names(config.family)[:2]
        )
        for i, kind in enumerate(kinds):
            load_mixer = _load_state if kind == "state" else _load_attention
            mixer = load_mixer(config, load, layer, shard, shape)
            found.append(replace(mixer, input_norm=before, attended_norm=behind, joins=i < len(kinds) - 1))
        if config.has_mlp(layer):
            mlp = load_mlp(config, load, layer, shard, shape)
            found[-1] = replace(found[-1], mlps=(*found[-1].mlps, mlp))
    return found


def _load_state(config: ModelConfig, load: Loader, layer: int, shard: Shard, shape: RankShape) -> MixerWeights:
    qkv, state, gate, output = load_state(config, load, layer, shard, shape)
    return MixerWeights(qkv, output, config.residuals.state, gate=gate, state=state)


def _load_attention(config: ModelConfig, load: Loader, layer: int, shard: Shard, shape: RankShape) -> MixerWeights:
    family, order = config.family, head_order(config.rope, config.rotary_dim)
    attention = f"model.layers.{layer}.self_attn"
    latent, value, gates = None, config.v_head_dim, []
    if config.latent is not None:
        qkv, latent = _load_latent(config, config.latent, load, layer, shape)
        value = config.latent.value
    else:
        turned = (len(shape.heads) + len(shape.kv_heads)) * config.head_dim  # rows of q and k
        parts = list(zip(projection_names(config, layer), _qkv_rows(config, shape), strict=True))
        gate = [[(parts[0][0], _head_rows(config, shape, gate=True))]] if family.gated else []
        qkv, *gates = load.apart([parts, *gate], config.qkv_bias, order, turned)
    qk_norms = None
    if family.qk_norm:
        q_norm, k_norm = (f"{attention}.{name}" for name in family.qk_norm_names)
        qk_norms = load.norm(q_norm, family.norm_offset, order), load.norm(k_norm, family.norm_offset, order)
    attended = part_of(shape.heads, value)
    return MixerWeights(
        qkv=qkv,
        qk_norms=qk_norms,
        sinks=load.copy(f"{attention}.sinks", [part_of(shape.heads)]).float() if config.sinks else None,
        output=load.summed(f"{attention}.o_proj", config.o_bias, attended, shard.rank == 0),
        residual=config.residuals.attention,
        gate=OutputGate(gates[0], torch.sigmoid) if gates else None,
        latent=latent,
        index=load_index(config, load, layer, shape, order),
    )


def _load_latent(
    config: ModelConfig, latent: LatentConfig, load: Loader, layer: int, shape: RankShape
) -> tuple[Linear, LatentAttention]:
    """The map to queries, or to what they are made of, and to latents; and what follows it."""
    at, heads = f"model.layers.{layer}.self_attn", len(shape.heads)
    of_query, of_latent = latent.plain + latent.rotary, latent.rank + latent.rotary
    own = [part_of(shape.heads, of_query)]
    order_of = partial(rotated_last, rope=config.rope, rotary=latent.rotary)
    query_order, latent_order = order_of(of_query, heads), order_of(of_latent, 1)
    first = query_rows(latent, heads)
    order = None
    if latent_order is not None:
        before = torch.arange(first) if latent.query_rank or query_order is None else query_order
        order = torch.cat((before, first + latent_order))
    rows = [ALL if latent.query_rank else own, ALL]
    projection = load.linear(projection_names(config, layer), rows=rows, order=order, turned=first + of_latent)
    query_norm = query_up = None
    if latent.query_rank:
        query_norm = load.norm(f"{at}.q_a_layernorm", 0.0)
        query_up = load.linear([f"{at}.q_b_proj"], rows=[own], order=query_order, turned=heads * of_query)
    norm = load.norm(f"{at}.kv_a_layernorm", 0.0)
    up = load.rows(f"{at}.kv_b_proj.weight", part_of(shape.heads, latent.plain + latent.value))
    of_heads = up.view(heads, -1, latent.rank)
    key_up, value_up = of_heads[:, : latent.plain].transpose(1, 2), of_heads[:, latent.plain :]
    ups = (HeadLinears(load.keep(x)) for x in (key_up, value_up))
    return projection, LatentAttention(latent, query_norm, query_up, norm, *ups)


def _qkv_rows(config: ModelConfig, shape: RankShape) -> list[list[slice]]:
    """The rank's rows of the maps to q, k and v, or of the map that has all."""
    d, d_v = config.head_dim, config.v_head_dim
    rows = [_head_rows(config, shape), kv_rows(config, shape, d), kv_rows(config, shape, d_v)]
    if not config.family.qkv:
        return rows
    k_first = config.num_attention_heads * d
    firsts = (0, k_first, k_first + config.num_key_value_heads // config.kv_copies * d)
    return [[slice(each.start + at, each.stop + at) for at, of in zip(firsts, rows, strict=True) for each in of]]


def _head_rows(config: ModelConfig, shape: RankShape, gate: bool = False) -> list[slice]:
    """The rank's rows of the map to q; with `gate` those of its other half, head by head, that attention's output is
    gated by."""
    d = config.head_dim
    if not config.family.gated:
        return [part_of(shape.heads, d)]
    return [slice(first, first + d) for first in ((2 * head + gate) * d for head in shape.heads)]
