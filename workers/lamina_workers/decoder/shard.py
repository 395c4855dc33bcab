"""How a model is cut among ranks, each of which is a model worker: the heads, columns, experts and tokens of each.

A rank owns KV heads with the query heads that read them, columns of the MLP's intermediate dimension or whole experts,
and rows of the vocabulary. All are contiguous, and uneven where they do not divide. For whatever holds or attends KV a
rank is a model with fewer heads, numbered from 0. What ranks compute together goes through a `Collective`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from lamina_workers.errors import RanksError
from lamina_workers.model_config.config import ModelConfig
from lamina_workers.model_config.mixers import StateConfig


class Collective(Protocol):
    """One rank's end of a group. All ranks call the same in the same order, with the same shapes.

    `seconds`: time spent here since the beginning. Raises RankLost where another rank is gone or silent; then the group
    is closed, which the others notice in turn.
    """

    rank: int
    ranks: int
    seconds: float

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks of x, any contiguous shape, in place of x: the same bits on each rank."""
        ...

    def gather_columns(self, x: torch.Tensor, widths: Sequence[int]) -> torch.Tensor | None:
        """All parts side by side, `[n, sum(widths)]`, on rank 0; None elsewhere. x: `[n, widths[rank]]`."""
        ...

    def close(self) -> None: ...


class Alone:
    """The group of one rank: nothing to do."""

    rank, ranks, seconds = 0, 1, 0.0

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def gather_columns(self, x: torch.Tensor, widths: Sequence[int]) -> torch.Tensor | None:
        return x

    def close(self) -> None:
        pass


_SUPER = 256  # columns of a block of ggml's K kinds
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
    dimension, experts (perhaps none), columns of the expert that all tokens share, rows of the vocabulary, and heads of
    state layers with those of their q and k (perhaps none)."""

    heads: range
    kv_heads: range
    columns: range
    experts: range
    shared: range
    vocabulary: range
    states: range = range(0)
    state_keys: range = range(0)


def with_ranks(config: ModelConfig, ranks: int) -> ModelConfig:
    """The model as `ranks` ranks can share it: `config` itself, or with KV heads repeated so that each rank has one.

    Each head stands as often as the smallest number that divides the query heads of a group and gives at least `ranks`
    heads; `kv_copies` keeps it, for the code that loads the checkpoint. It computes the same, and keeps more KV.
    Raises RanksError where there are more ranks than query heads, or than another dimension that is cut.
    """
    limits = {"query heads": config.num_attention_heads, "tokens in its vocabulary": config.vocab_size}
    if config.family.qk_norm == "whole" and ranks > 1:
        raise RanksError(f"{ranks} ranks cannot share a model whose q and k are normed over all heads; allowed: 1")
    if not all(config.sparse):
        limits["columns in its MLPs"] = config.intermediate_size
    if config.moe is not None and config.moe.shared:
        limits["columns in its shared experts"] = config.moe.shared
    for name, limit in limits.items():
        if not 1 <= ranks <= limit:
            raise RanksError(f"the model cannot be cut among {ranks} ranks: it has {limit} {name}, so 1 to {limit}")
    if config.states is not None:
        config = replace(config, states=_states_with_ranks(config.states, ranks))
    kv_heads = config.num_key_value_heads
    group = config.num_attention_heads // kv_heads
    if config.latent is not None and group % ranks:
        raise RanksError(
            f"{ranks} ranks cannot share a latent, which each keeps whole for its query heads: {ranks} must divide "
            f"the {group} query heads"
        )
    copies = _copies(kv_heads, config.num_attention_heads, ranks)
    if copies == 1:
        return config
    return replace(config, num_key_value_heads=kv_heads * copies, kv_copies=config.kv_copies * copies)


def _states_with_ranks(states: StateConfig, ranks: int) -> StateConfig:
    if not 1 <= ranks <= states.heads:
        raise RanksError(
            f"the model cannot be cut among {ranks} ranks: a state layer has {states.heads} heads, so 1 to "
            f"{states.heads}"
        )
    copies = _copies(states.key_heads, states.heads, ranks)
    width = states.heads * states.d_v
    if copies > 1 and states.d_v < states.norm < width:
        raise RanksError(f"{ranks} ranks cannot share a norm over {states.norm} of {width} numbers of a state layer")
    return replace(states, key_heads=states.key_heads * copies, key_copies=states.key_copies * copies)


def _copies(shared: int, heads: int, ranks: int) -> int:
    """How often each of the `shared` heads, which `heads` heads read, must stand so that each rank has one."""
    group = heads // shared
    return next(n for n in range(1, group + 1) if group % n == 0 and shared * n >= ranks)


def rank_shape(config: ModelConfig, shard: Shard) -> RankShape:
    """What `shard` owns of `config`. Raises ValueError where a rank would have no KV head; see `with_ranks`."""
    kv_heads = config.num_key_value_heads
    if shard.ranks > kv_heads:
        raise ValueError(f"{shard.ranks} ranks cannot share {kv_heads} KV heads; with_ranks makes them enough")
    kv_range = heads_of(kv_heads, shard)
    group, states = config.num_attention_heads // kv_heads, config.states
    state_keys = _apportion(0 if states is None else states.key_heads, shard)
    state_group = 0 if states is None else states.heads // states.key_heads
    return RankShape(
        heads=range(kv_range.start * group, kv_range.stop * group),
        kv_heads=kv_range,
        columns=_apportion(config.intermediate_size, shard, _columns_block(config.intermediate_size, shard)),
        experts=_apportion(config.moe.experts if config.moe is not None else 0, shard),
        shared=_apportion(config.moe.shared if config.moe is not None else 0, shard, _BLOCK),
        vocabulary=_apportion(config.vocab_size, shard, _BLOCK),
        states=range(state_keys.start * state_group, state_keys.stop * state_group),
        state_keys=state_keys,
    )


def local(config: ModelConfig, shard: Shard) -> ModelConfig:
    """The model as a rank and its holders see it: only its own heads, numbered from 0; all else as in `config`."""
    if shard.ranks == 1:
        return config
    shape = rank_shape(config, shard)
    heads, kv_heads = len(shape.heads), len(shape.kv_heads)
    states = config.states
    if states is not None:
        states = replace(
            states,
            heads=len(shape.states),
            key_heads=len(shape.state_keys),
            slopes=states.slopes[shape.states.start : shape.states.stop],
            key_copies=1,
        )
    return replace(config, num_attention_heads=heads, num_key_value_heads=kv_heads, states=states, kv_copies=1)


def heads_of(count: int, shard: Shard) -> range:
    """Which of `count` KV heads of a layer a rank owns."""
    return _apportion(count, shard)


def kv_rows(config: ModelConfig, shape: RankShape, width: int) -> list[slice]:
    """A rank's rows of a map to what each KV head of the checkpoint has, `width` numbers each."""
    heads, copies = shape.kv_heads, config.kv_copies
    if copies == 1:
        return [slice(heads.start * width, heads.stop * width)]
    return [slice(head // copies * width, (head // copies + 1) * width) for head in heads]


def _columns_block(columns: int, shard: Shard) -> int:
    """What columns are cut at multiples of: those of the largest blocks of packed weights, where ranks then still get
    much the same, so that these stay packed."""
    return _SUPER if columns % _SUPER == 0 and columns >= 8 * _SUPER * shard.ranks else _BLOCK


def _apportion(total: int, shard: Shard, block: int = 1) -> range:
    """The share of `total` things: blocks of `block` where each rank gets one, the first ranks one more if uneven."""
    if total < block * shard.ranks:
        block = 1
    share, more = divmod(total // block, shard.ranks)
    first = (share * shard.rank + min(shard.rank, more)) * block
    last = shard.rank == shard.ranks - 1  # takes what fills no block
    return range(first, total if last else first + (share + (shard.rank < more)) * block)
