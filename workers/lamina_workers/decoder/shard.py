"""How a model is cut among ranks, each of which is a model worker: the heads, columns, experts and tokens of each.

A rank owns KV heads with the query heads that read them,
columns of the MLP's intermediate dimension or whole experts, and rows of the vocabulary; all contiguous, and uneven
where they do not divide. For whatever holds or attends KV a rank is a model with fewer heads, numbered from 0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lamina_workers.decoder.config import ModelConfig
from lamina_workers.errors import RanksError

_BLOCK = 64  # columns and rows are cut at multiples of it where there are enough: kernels take whole registers


@dataclass(frozen=True, slots=True)
class Shard:
    """The part of a model that belongs to `rank` of `ranks`. Raises ValueError where there is no such rank."""

    rank: int
    ranks: int

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.ranks:
            raise ValueError(f"rank is {self.rank}, allowed is 0 to {self.ranks - 1} of {self.ranks} ranks")


WHOLE = Shard(0, 1)


@dataclass(frozen=True, slots=True)
class RankShape:
    """What a rank owns, in numbers of the whole model: query heads, KV heads, columns of the MLP's intermediate
    dimension, experts (perhaps none), and rows of the vocabulary."""

    heads: range
    kv_heads: range
    columns: range
    experts: range
    vocabulary: range


def with_ranks(config: ModelConfig, ranks: int) -> ModelConfig:
    """The model as `ranks` ranks can share it: `config` itself, or with KV heads repeated so that each rank has one.

    Each head stands as often as the smallest number that divides the query heads of a group and gives at least `ranks`
    heads; `kv_copies` keeps it, for the code that loads the checkpoint. It computes the same, and keeps more KV.
    Raises RanksError where there are more ranks than query heads, or than another dimension that is cut.
    """
    limits = {"query heads": config.num_attention_heads, "tokens in its vocabulary": config.vocab_size}
    if not all(config.sparse):
        limits["columns in its MLPs"] = config.intermediate_size
    for name, limit in limits.items():
        if not 1 <= ranks <= limit:
            raise RanksError(f"the model cannot be cut among {ranks} ranks: it has {limit} {name}, so 1 to {limit}")
    kv_heads = config.num_key_value_heads
    group = config.num_attention_heads // kv_heads
    copies = next(n for n in range(1, group + 1) if group % n == 0 and kv_heads * n >= ranks)
    if copies == 1:
        return config
    return replace(config, num_key_value_heads=kv_heads * copies, kv_copies=config.kv_copies * copies)


def rank_shape(config: ModelConfig, shard: Shard) -> RankShape:
    """What `shard` owns of `config`. Raises ValueError where a rank would have no KV head; see `with_ranks`."""
    kv_heads = config.num_key_value_heads
    if shard.ranks > kv_heads:
        raise ValueError(f"{shard.ranks} ranks cannot share {kv_heads} KV heads; with_ranks makes them enough")
    own = _apportion(kv_heads, shard)
    group = config.num_attention_heads // kv_heads
    return RankShape(
        heads=range(own.start * group, own.stop * group),
        kv_heads=own,
        columns=_apportion(config.intermediate_size, shard, _BLOCK),
        experts=_apportion(config.moe.experts if config.moe is not None else 0, shard),
        vocabulary=_apportion(config.vocab_size, shard, _BLOCK),
    )


def local(config: ModelConfig, shard: Shard) -> ModelConfig:
    """The model as a rank and its holders see it: only its own heads, numbered from 0; all else as in `config`."""
    if shard.ranks == 1:
        return config
    shape = rank_shape(config, shard)
    return replace(config, num_attention_heads=len(shape.heads), num_key_value_heads=len(shape.kv_heads), kv_copies=1)


def _apportion(total: int, shard: Shard, block: int = 1) -> range:
    """The share of `total` things: blocks of `block` where each rank gets one, the first ranks one more if uneven."""
    if total < block * shard.ranks:
        block = 1
    each, more = divmod(total // block, shard.ranks)
    first = (each * shard.rank + min(shard.rank, more)) * block
    last = shard.rank == shard.ranks - 1  # takes what fills no block
    return range(first, total if last else first + (each + (shard.rank < more)) * block)
