"""A decoder's weights: their names in a checkpoint, their shapes, and the part of each that a rank keeps.

Maps whose outputs are split among ranks (q, k, v; gate and up; the head) are cut by rows, maps whose inputs are
(attention's output, down) by columns, and the ranks' products are summed. The bias of such a sum belongs to rank 0
alone: a share of it on each rank would be rounded once a rank. Norms and routers are whole on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from lamina_kernels.dense import Linear, repacks
from lamina_kernels.paged import memory
from lamina_workers.decoder.config import ModelConfig
from lamina_workers.decoder.moe import Experts, Mlp
from lamina_workers.decoder.shard import WHOLE, RankShape, Shard, local, rank_shape
from lamina_workers.errors import ModelFileError

_ALIGNMENT = 64  # bytes, one cache line
_EVERY = slice(None)
_ALL = (_EVERY,)
_EMBEDDING, _HEAD, _NORM = "model.embed_tokens", "lm_head", "model.norm"


class TensorSource(Protocol):
    """Named tensors of a checkpoint. A tensor may be a view of a file; `release` says that its pages may leave
    memory. A view stays valid after that, and reads them again where it must."""

    def names(self) -> Iterable[str]: ...

    def shape(self, name: str) -> Sequence[int]: ...

    def tensor(self, name: str) -> torch.Tensor: ...

    def release(self, name: str) -> None: ...


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer. qkv maps to `(heads + 2 * kv_heads) * d`, in the order q, k, v. Norms: `[hidden]`, `[d]`."""

    input_norm: torch.Tensor
    qkv: Linear
    qk_norms: tuple[torch.Tensor, torch.Tensor] | None
    output: Linear
    post_norm: torch.Tensor
    mlp: Mlp | Experts


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """All layers, the embedding, the last norm and the head, of one rank or of the whole model.

    embedding: `[vocab, hidden]`, perhaps in another dtype than the rest; or only the rank's part of the vocabulary.
    """

    embedding: torch.Tensor
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor
    head: Linear


def load_weights(
    config: ModelConfig,
    source: TensorSource,
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
    shard: Shard = WHOLE,
    split_embedding: bool | None = None,
) -> DecoderWeights:
    """Check all of `source` against `config`, then convert and pack what belongs to `shard`, releasing each tensor.

    On a CPU an embedding that is nothing else stays the source's view in the source's dtype, so that only rows that
    occur take memory; therefore every rank has all of it. Elsewhere, and with `split_embedding`, a rank has its part of
    the vocabulary. Nothing outside the rank's part of a tensor is read.
    `progress(done, total)` counts tensors, those without a part for this rank too. Raises ModelFileError naming tensors
    that are missing, unexpected, or of another shape.
    """
    wanted = tensor_shapes(config)
    check_tensors(source, wanted, ignored={f"{_HEAD}.weight"} if config.tie_word_embeddings else set())
    shape = rank_shape(config, shard)
    room = sum(math.prod(of) * dtype.itemsize + _ALIGNMENT for of in _kept_shapes(config, shard, shape))
    load = _Loader(source, dtype, device, progress or (lambda done, total: None), len(wanted), room)
    own = (_slice(shape.vocabulary),)
    if split_embedding is None:
        split_embedding = device.type != "cpu"
    looked_up = own if split_embedding else _ALL
    # The largest tensor first, while the copy that is made of it stands beside little else.
    if config.tie_word_embeddings:
        weight = load.copy(f"{_EMBEDDING}.weight", own)
        shared = not repacks(weight) and (split_embedding or shard.ranks == 1)
        embedding = weight if shared else source.tensor(f"{_EMBEDDING}.weight")[looked_up[0]]
        head = Linear(weight)
        del weight
    else:
        head = load.linear([_HEAD], rows=[own])
        keep = load.view if device.type == "cpu" else load.copy
        embedding = keep(f"{_EMBEDDING}.weight", looked_up)
    layers = tuple(_load_layer(config, load, layer, shard, shape) for layer in range(config.num_hidden_layers))
    return DecoderWeights(embedding, layers, load.copy(f"{_NORM}.weight"), head)


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint of `config`, by the name under which Hugging Face models are published."""
    hidden, d = config.hidden_size, config.head_dim
    q, kv = config.num_attention_heads * d, config.num_key_value_heads // config.kv_copies * d
    shapes: dict[str, tuple[int, ...]] = {f"{_NORM}.weight": (hidden,)}

    def linear(name: str, n_out: int, n_in: int, bias: bool = False) -> None:
        shapes[f"{name}.weight"] = (n_out, n_in)
        if bias:
            shapes[f"{name}.bias"] = (n_out,)

    for name in (_EMBEDDING,) if config.tie_word_embeddings else (_EMBEDDING, _HEAD):
        linear(name, config.vocab_size, hidden)
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}"
        shapes[f"{at}.input_layernorm.weight"] = shapes[f"{at}.post_attention_layernorm.weight"] = (hidden,)
        for name, width in (("q_proj", q), ("k_proj", kv), ("v_proj", kv)):
            linear(f"{at}.self_attn.{name}", width, hidden, config.qkv_bias)
        linear(f"{at}.self_attn.o_proj", hidden, q, config.o_bias)
        if config.qk_norm:
            shapes[f"{at}.self_attn.q_norm.weight"] = shapes[f"{at}.self_attn.k_norm.weight"] = (d,)
        router, mlps = _mlp_names(config, layer)
        size, bias = config.intermediate_size, config.mlp_bias
        if router is not None and config.moe is not None:
            size, bias = config.moe.intermediate_size, False
            linear(router, config.moe.experts, hidden)
        for gate, up, down in mlps:
            linear(gate, size, hidden, bias)
            linear(up, size, hidden, bias)
            linear(down, hidden, size, bias)
    return shapes


def check_tensors(source: TensorSource, wanted: dict[str, tuple[int, ...]], ignored: set[str]) -> None:
    """Raise ModelFileError unless `source` has exactly the tensors `wanted`. Takes no memory for any."""
    found = set(source.names())
    unexpected = found - wanted.keys() - ignored
    unexpected = {name for name in unexpected if not name.endswith("rotary_emb.inv_freq")}  # older files, computed here
    for problem, names in (("lacks", wanted.keys() - found), ("has unexpected", unexpected)):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise ModelFileError(f"the checkpoint {problem} {', '.join(sorted(names)[:5])}{more}")
    for name, shape in wanted.items():
        if (given := tuple(source.shape(name))) != shape:
            raise ModelFileError(f"tensor {name} has shape {list(given)}, the config wants {list(shape)}")


def _mlp_names(config: ModelConfig, layer: int) -> tuple[str | None, list[tuple[str, str, str]]]:
    """The router's name, if any, and (gate, up, down) of the layer's MLP or of each of its experts."""
    at = f"model.layers.{layer}.mlp"
    block, names = at, ("gate_proj", "up_proj", "down_proj")
    if config.architecture == "MixtralForCausalLM":
        block, names = f"model.layers.{layer}.block_sparse_moe", ("w1", "w3", "w2")
    if config.moe is None or not config.sparse[layer]:
        return None, [(f"{at}.gate_proj", f"{at}.up_proj", f"{at}.down_proj")]
    gate, up, down = names
    experts = [f"{block}.experts.{expert}" for expert in range(config.moe.experts)]
    return f"{block}.gate", [(f"{expert}.{gate}", f"{expert}.{up}", f"{expert}.{down}") for expert in experts]


def _kept_shapes(config: ModelConfig, shard: Shard, shape: RankShape) -> list[Sequence[int]]:
    """The shapes of the rank's parts of all tensors: those of a model that is as small."""
    moe = config.moe if config.moe is None else replace(config.moe, experts=len(shape.experts))
    small = replace(
        local(config, shard),
        intermediate_size=len(shape.columns),
        vocab_size=len(shape.vocabulary),
        moe=moe,
        kv_copies=1,
    )
    routers = [(config.moe.experts, config.hidden_size)] * sum(config.sparse) if config.moe is not None else []
    return [*tensor_shapes(small).values(), *routers]


def _load_layer(config: ModelConfig, load: _Loader, layer: int, shard: Shard, shape: RankShape) -> LayerWeights:
    at = f"model.layers.{layer}"
    attention = f"{at}.self_attn"
    router, names = _mlp_names(config, layer)
    mlp: Mlp | Experts
    if router is not None and config.moe is not None:
        own = names[_slice(shape.experts)]
        for name in (name for names_of_one in names if names_of_one not in own for name in names_of_one):
            load.skip(f"{name}.weight")
        experts = [Mlp(load.linear([gate, up]), load.linear([down])) for gate, up, down in own]
        mlp = Experts(load.linear([router]), experts, config.moe.top_k, config.moe.normalize, shape.experts.start)
    else:
        ((gate, up, down),) = names
        columns = _slice(shape.columns)
        gate_up = load.linear([gate, up], config.mlp_bias, [[columns], [columns]])
        mlp = Mlp(gate_up, load.summed(down, config.mlp_bias, columns, shard.rank == 0))
    d, copies = config.head_dim, config.kv_copies
    heads = _slice(shape.heads, d)
    kv = [slice(head // copies * d, (head // copies + 1) * d) for head in shape.kv_heads] if copies > 1 else None
    kv = kv or [_slice(shape.kv_heads, d)]
    qk_norms = None
    if config.qk_norm:
        qk_norms = load.copy(f"{attention}.q_norm.weight"), load.copy(f"{attention}.k_norm.weight")
    return LayerWeights(
        input_norm=load.copy(f"{at}.input_layernorm.weight"),
        qkv=load.linear([f"{attention}.{part}_proj" for part in "qkv"], config.qkv_bias, [[heads], kv, kv]),
        qk_norms=qk_norms,
        output=load.summed(f"{attention}.o_proj", config.o_bias, heads, shard.rank == 0),
        post_norm=load.copy(f"{at}.post_attention_layernorm.weight"),
        mlp=mlp,
    )


def _slice(part: range, size: int = 1) -> slice:
    """Where the things `part` lie, each `size` long."""
    return slice(part.start * size, part.stop * size)


def _length(part: slice, of: int) -> int:
    return len(range(*part.indices(of)))


class _Loader:
    """Takes tensors, or parts of them, out of a source one by one; holds no more than one of them twice.

    `rows` of a tensor are slices of its first dimension, side by side in the copy; `columns` is one of its second.
    """

    def __init__(
        self,
        source: TensorSource,
        dtype: torch.dtype,
        device: torch.device,
        progress: Callable[[int, int], None],
        total: int,
        room: int,
    ) -> None:
        self._source = source
        self._dtype = dtype
        self._device = device
        self._progress = progress
        self._done, self._total = 0, total
        # Weights are streamed in every step, so on a CPU they lie in one block of huge pages.
        self._arena = memory.allocate(room) if device.type == "cpu" else None
        self._used = 0

    def linear(self, names: Sequence[str], bias: bool = False, rows: Sequence[Sequence[slice]] | None = None) -> Linear:
        """One map out of those called `names`, their outputs side by side; `rows`: those of each that are kept."""
        rows = rows or [_ALL] * len(names)
        weight = self._join([f"{name}.weight" for name in names], rows)
        return Linear(weight, self._join([f"{name}.bias" for name in names], rows) if bias else None)

    def summed(self, name: str, bias: bool, columns: slice, keeps_bias: bool) -> Linear:
        """A map of which each rank has some inputs, `columns`, and one rank the bias."""
        weight = self._join([f"{name}.weight"], [_ALL], columns)
        if bias and not keeps_bias:
            self.skip(f"{name}.bias")
        return Linear(weight, self.copy(f"{name}.bias") if bias and keeps_bias else None)

    def copy(self, name: str, rows: Sequence[slice] = _ALL) -> torch.Tensor:
        return self._join([name], [rows])

    def view(self, name: str, rows: Sequence[slice] = _ALL) -> torch.Tensor:
        """The source's own tensor, in its dtype; `rows`: one slice."""
        tensor = self._tensor(name)[rows[0]]
        self._count(name)
        return tensor

    def skip(self, name: str) -> None:
        """Nothing of this tensor is kept."""
        self._count(name)

    def _join(self, names: Sequence[str], rows: Sequence[Sequence[slice]], columns: slice = _EVERY) -> torch.Tensor:
        """The tensors `names`, concatenated along their first dimension in a copy of the loader's dtype."""
        shapes = [self._source.shape(name) for name in names]
        n_rows = sum(_length(part, shape[0]) for of, shape in zip(rows, shapes, strict=True) for part in of)
        width = [_length(columns, n) for n in shapes[0][1:]]
        joined = self._empty((n_rows, *width))
        first = 0
        for name, of in zip(names, rows, strict=True):
            tensor = self._tensor(name)
            for part in of:
                piece = tensor[part, columns] if width else tensor[part]
                joined[first : first + len(piece)].copy_(piece)
                first += len(piece)
            self._count(name)
        return joined

    def _empty(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Room for a tensor: for good where it will be kept, for the moment where `Linear` makes its own copy."""
        if self._arena is not None:
            end = self._used + math.prod(shape) * self._dtype.itemsize
            kept = self._arena[self._used : end].view(self._dtype).view(shape)
            if kept.ndim != 2 or not repacks(kept):
                self._used = end + -end % _ALIGNMENT
                return kept
        return torch.empty(shape, dtype=self._dtype, device=self._device)

    def _tensor(self, name: str) -> torch.Tensor:
        tensor = self._source.tensor(name)
        if not tensor.is_floating_point():
            raise ModelFileError(f"tensor {name} holds {tensor.dtype}, expected floating point")
        return tensor

    def _count(self, name: str) -> None:
        self._source.release(name)
        self._done += 1
        self._progress(self._done, self._total)
