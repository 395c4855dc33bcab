"""A decoder's weights (`DecoderWeights`), and the part of each that a rank keeps (`load_weights`).

Maps whose outputs are split among ranks (q, k, v; gate and up; the head) are cut by rows, maps whose inputs are
(attention's output, down) by columns, and the ranks' products are summed. The bias of such a sum belongs to rank 0
alone: a share of it on each rank would be rounded once a rank. Norms and routers are whole on every rank.

A checkpoint may keep all experts of a layer in one tensor; `SeparateExperts` shows it as tensors of each expert. In
most such checkpoints the rows of gate stand before those of up. gpt-oss has them alternating, in MXFP4 or as floats.
Each read takes one part of one expert out of the file, so no layer's experts are dequantised at once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F

from lamina_kernels.dense.dense import HeadLinears, Linear, repacks
from lamina_kernels.packed.layout import ROWS
from lamina_kernels.packed.matrix import PackedMatrix
from lamina_workers.checkpoints.checkpoint import Renamed, TensorSource, check_tensors
from lamina_workers.checkpoints.packed_tensors import PackedTensor
from lamina_workers.checkpoints.weight_loader import ALIGNMENT, ALL, UNPACKED, Loader, Packing, part_of
from lamina_workers.decoder.choices import HeadIndex, LatentAttention, LatentIndex, load_index, query_rows, rotated_last
from lamina_workers.decoder.moe import GATINGS, ClampedGate, Experts, Mlp, Router, ScaledGate
from lamina_workers.decoder.rope import head_order
from lamina_workers.decoder.shard import WHOLE, RankShape, Shard, kv_rows, local, rank_shape
from lamina_workers.decoder.state_layers import OutputGate, StateWeights
from lamina_workers.decoder.weight_names import (
    CHOICE_BIAS,
    EMBEDDING,
    HEAD,
    NORM,
    latent_names,
    load_state,
    mlp_names,
    norm_names,
    projection_names,
    shared_names,
    tensor_shapes,
)
from lamina_workers.model_config.config import ModelConfig
from lamina_workers.model_config.mixers import LatentConfig, MoeConfig


def published_shapes(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The tensors of a checkpoint whose parts are `shapes`: the same but for experts that are stacked."""
    moe = config.moe
    if moe is None or not moe.stacked:
        return dict(shapes)
    part, named = _part(config), config.family.experts
    published = {name: shape for name, shape in shapes.items() if not part.fullmatch(name)}
    hidden, size = config.hidden_size, moe.intermediate_size
    for layer in (layer for layer, sparse in enumerate(config.sparse) if sparse):
        for name, n_out, n_in in zip(named.stacked, (2 * size, hidden), (hidden, size), strict=True):
            stacked_name = f"model.layers.{layer}.{named.block}.{name}"
            if moe.stacked == "rows":
                published[stacked_name] = moe.experts, n_out, n_in
                continue
            published[f"{stacked_name}_bias"] = moe.experts, n_out
            order = (n_out, n_in) if moe.stacked == "mxfp4" else (n_in, n_out)
            published[stacked_name] = moe.experts, *order
    return published


def _part(config: ModelConfig) -> re.Pattern[str]:
    """Of the name of an expert's tensor: the block, the expert, the map, and what it is."""
    named = config.family.experts
    return re.compile(
        rf"(model\.layers\.\d+\.{named.block})\.experts\.(\d+)\.({'|'.join(filter(None, named.maps))})\.(weight|bias)"
    )


def found_stacked(config: ModelConfig, names: Iterable[str]) -> ModelConfig:
    """The model as it is published: with experts stacked or apart, as the checkpoint, of those `names`, has them."""
    if config.moe is None:
        return config
    if config.moe.stacked:
        apart = any(_part(config).fullmatch(name) for name in names)
        return replace(config, moe=replace(config.moe, stacked="")) if apart else config
    tensor = f".{config.family.experts.block}.{config.family.experts.stacked[0]}"
    rows = any(name.endswith(tensor) for name in names)
    return replace(config, moe=replace(config.moe, stacked="rows")) if rows else config


class SeparateExperts:
    """The checkpoint `source`, whose tensors are `published_shapes`, with one tensor for each part of each expert."""

    def __init__(self, source: TensorSource, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
        moe, self._named = config.moe, config.family.experts
        self._source = source
        self._shapes = shapes
        self._kind = "" if moe is None else moe.stacked
        self._part = _part(config)
        gate, up, down = self._named.maps
        size = 0 if moe is None else moe.intermediate_size
        apart = (slice(size), slice(size, None)) if self._kind == "rows" else (slice(0, None, 2), slice(1, None, 2))
        self._rows = {gate: apart[0], up: apart[1], down: slice(None)}

    def names(self) -> Iterable[str]:
        return self._shapes

    def shape(self, name: str) -> Sequence[int]:
        return self._shapes[name]

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor of the checkpoint, or a part of one expert: a view, or floats of what was packed."""
        if (part := self._part.fullmatch(name)) is None:
            return self._source.tensor(name)
        if (packed := self.packed(name)) is not None:
            return packed.floats()
        expert, rows = self._source.tensor(self._stacked(part))[int(part[2])], self._rows[part[3]]
        return expert.T[rows] if self._kind == "floats" and part[4] == "weight" else expert[rows]

    def packed(self, name: str) -> PackedTensor | None:
        if (part := self._part.fullmatch(name)) is None:
            return self._source.packed(name)
        stacked_name = self._stacked(part)
        if (stacked := self._source.packed(stacked_name)) is None:
            return None
        rows = torch.arange(self._source.shape(stacked_name)[1])[self._rows[part[3]]]
        return stacked.cut(int(part[2]) * self._source.shape(stacked_name)[1] + rows)

    def release(self, name: str) -> None:
        part = self._part.fullmatch(name)
        self._source.release(name if part is None else self._stacked(part))

    def _stacked(self, part: re.Match[str]) -> str:
        """The tensor that a part of an expert is in."""
        prefix = f"{part[1]}.{self._named.stacked[part[3] == self._named.maps[2]]}"
        return f"{prefix}_bias" if part[4] == "bias" else prefix


@dataclass(frozen=True, slots=True)
class MlpWeights:
    """An MLP or experts, the norms before and behind it, `[hidden]`, or None where there is none there, and its factors
    in `Residuals`."""

    norm: torch.Tensor | None
    mlp: Mlp | Experts
    norm_behind: torch.Tensor | None
    residual: tuple[float, float]


def load_mlp(config: ModelConfig, load: Loader, layer: int, shard: Shard, shape: RankShape) -> MlpWeights:
    """The rank's part of the MLP or experts of `layer`."""
    router, names = mlp_names(config, layer)
    mlp: Mlp | Experts
    if router is not None and config.moe is not None:
        mlp = _experts(config, config.moe, load, layer, shard, shape)
    else:
        bias = config.mlp_bias, shard.rank == 0
        mlp = _mlp(load, names[0], shape.columns, config.intermediate_size, bias, _gating(config))
    before, behind = (
        load.norm(f"model.layers.{layer}.{name}", config.family.norm_offset) if name else None
        for name in norm_names(config.family)[2:]
    )
    return MlpWeights(before, mlp, behind, config.residuals.mlp)


def _mlp(
    load: Loader,
    names: tuple[str, str, str],
    columns: range,
    whole: int,
    bias: tuple[bool, bool],
    gating: Callable[[torch.Tensor], torch.Tensor],
) -> Mlp:
    """`columns` of an MLP that is `whole` wide. bias: whether there are any, and whether that of the sum is kept."""
    gate, up, down = names
    rank_part = part_of(columns)
    if gate == up:
        gate_up = load.linear([gate], bias[0], [[rank_part, part_of(columns, 1, whole)]])
    else:
        maps = [name for name in (gate, up) if name]
        gate_up = load.linear(maps, bias[0], [[rank_part]] * len(maps))
    return Mlp(gate_up, load.summed(down, bias[0], rank_part, bias[1]), gating)


def _gating(config: ModelConfig) -> Callable[[torch.Tensor], torch.Tensor]:
    if config.moe is not None and config.moe.clamp is not None:
        return ClampedGate(config.moe.clamp, config.moe.alpha)
    plain = GATINGS[config.activation]
    return plain if config.gate_scale == 1.0 else ScaledGate(plain, config.gate_scale)


def _experts(config: ModelConfig, moe: MoeConfig, load: Loader, layer: int, shard: Shard, shape: RankShape) -> Experts:
    router, names = mlp_names(config, layer)
    rank_names = names[part_of(shape.experts)]
    for name in (name for names_of_one in names if names_of_one not in rank_names for name in names_of_one if name):
        load.skip(f"{name}.weight")
        if moe.bias:
            load.skip(f"{name}.bias")
    gating, size = _gating(config), moe.intermediate_size
    experts = [_mlp(load, maps, range(size), size, (moe.bias, True), gating) for maps in rank_names]
    shared = None
    if moe.shared:
        gate, of_shared = shared_names(config, layer)
        mlp = _mlp(load, of_shared, shape.shared, moe.shared, (False, False), gating)
        shared = mlp, None if gate is None else load.copy(f"{gate}.weight")
    latent = None
    if moe.latent:
        into, out = latent_names(config, layer)
        columns = slice(0, moe.latent)
        latent = load.linear([into], config.mlp_bias), load.summed(out, config.mlp_bias, columns, shard.rank == 0)
    bias = load.float32(f"{router}.{CHOICE_BIAS}") if moe.choice.sigmoid else None
    chooses = Router(load.linear([str(router)], moe.bias, plain=True), moe, bias)
    return Experts(chooses, experts, shape.experts.start, shared, latent)


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
    shapes = tensor_shapes(config)
    ignored = {name for name in source.names() if re.fullmatch(config.family.unread, name)}
    if config.tie_word_embeddings:
        ignored.add(f"{HEAD}.weight")
    behind = f"model.layers.{config.num_hidden_layers}."  # a layer there predicts further tokens: see `mtp`
    if config.family.groups or f"{behind}eh_proj.weight" in source.names():
        ignored |= {name for name in source.names() if name.startswith(behind)}
    check_tensors(source, published_shapes(config, shapes), ignored)
    if config.moe is not None and config.moe.stacked:
        source = SeparateExperts(source, config, shapes)
    shape = rank_shape(config, shard)
    room = sum(
        math.prod(tensor_shape) * dtype.itemsize + ALIGNMENT for tensor_shape in _kept_shapes(config, shard, shape)
    )
    load = Loader(source, dtype, device, progress or (lambda done, total: None), len(shapes), room, packing)
    rank_rows = (part_of(shape.vocabulary),)
    if split_embedding is None:
        split_embedding = device.type != "cpu"
    looked_up = rank_rows if split_embedding else ALL
    # The largest tensor first, while the copy that is made of it stands beside little else.
    if config.tie_word_embeddings:
        embedding, head = _load_tied(load, rank_rows, looked_up, shard)
    else:
        head = load.head(HEAD, rank_rows)
        name = f"{EMBEDDING}.weight"
        packed = load.matrix(name, looked_up)
        embedding = load.lookup(name, looked_up) if packed is None else packed
    layers = tuple(load_mixers(config, load, shard, shape))
    load.report()
    return DecoderWeights(embedding, layers, load.norm(NORM, config.family.norm_offset), head)


def _load_tied(
    load: Loader, own: Sequence[slice], looked_up: Sequence[slice], shard: Shard
) -> tuple[torch.Tensor | PackedMatrix, Linear]:
    """The embedding and the head of the same numbers: rows to look up, and the rank's `own`, in one memory where they
    can be."""
    name = f"{EMBEDDING}.weight"
    packed = load.matrix(name, looked_up)
    if packed is not None:
        covers_table = looked_up == own or own[0] == slice(0, packed.shape[0])
        aligned = not own[0].start % ROWS and (not own[0].stop % ROWS or own[0].stop == packed.shape[0])
        part = packed if covers_table else packed.part(own[0]) if aligned else load.matrix(name, own)
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


def load_mixers(config: ModelConfig, load: Loader, shard: Shard, shape: RankShape) -> list[MixerWeights]:
    """The rank's part of all layers."""
    mixers: list[MixerWeights] = []
    for layer, kinds in enumerate(config.mixers):
        before, behind = (
            load.norm(f"model.layers.{layer}.{name}", config.family.norm_offset) if name and kinds else None
            for name in norm_names(config.family)[:2]
        )
        for i, kind in enumerate(kinds):
            load_mixer = _load_state if kind == "state" else _load_attention
            mixer = load_mixer(config, load, layer, shard, shape)
            mixers.append(replace(mixer, input_norm=before, attended_norm=behind, joins=i < len(kinds) - 1))
        if config.has_mlp(layer):
            mlp = load_mlp(config, load, layer, shard, shape)
            mixers[-1] = replace(mixers[-1], mlps=(*mixers[-1].mlps, mlp))
    return mixers


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
    prefix, heads = f"model.layers.{layer}.self_attn", len(shape.heads)
    of_query, of_latent = latent.plain + latent.rotary, latent.rank + latent.rotary
    rank_queries = [part_of(shape.heads, of_query)]
    order_of = partial(rotated_last, rope=config.rope, rotary=latent.rotary)
    query_order, latent_order = order_of(of_query, heads), order_of(of_latent, 1)
    first = query_rows(latent, heads)
    order = None
    if latent_order is not None:
        before = torch.arange(first) if latent.query_rank or query_order is None else query_order
        order = torch.cat((before, first + latent_order))
    rows = [ALL if latent.query_rank else rank_queries, ALL]
    projection = load.linear(projection_names(config, layer), rows=rows, order=order, turned=first + of_latent)
    query_norm = query_up = None
    if latent.query_rank:
        query_norm = load.norm(f"{prefix}.q_a_layernorm", 0.0)
        query_up = load.linear([f"{prefix}.q_b_proj"], rows=[rank_queries], order=query_order, turned=heads * of_query)
    norm = load.norm(f"{prefix}.kv_a_layernorm", 0.0)
    up = load.rows(f"{prefix}.kv_b_proj.weight", part_of(shape.heads, latent.plain + latent.value))
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
    return [
        [
            slice(part.start + first, part.stop + first)
            for first, parts in zip(firsts, rows, strict=True)
            for part in parts
        ]
    ]


def _head_rows(config: ModelConfig, shape: RankShape, gate: bool = False) -> list[slice]:
    """The rank's rows of the map to q; with `gate` those of its other half, head by head, that attention's output is
    gated by."""
    d = config.head_dim
    if not config.family.gated:
        return [part_of(shape.heads, d)]
    return [slice(first, first + d) for first in ((2 * head + gate) * d for head in shape.heads)]
