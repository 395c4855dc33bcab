"""The attention workers of one process of vLLM (`VllmTier`), and their losses as all processes count them (`Losses`).

The client is imported when vLLM sizes its KV, not before: it loads numba, and vLLM looks, when a worker of its own
starts, into all modules there are for kernels, which llvmlite's do not stand.
"""

from __future__ import annotations

import atexit
import dataclasses
import logging
import os
import secrets
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import get_tp_group, get_world_group
from vllm.model_executor.models.utils import extract_layer_index

from lamina.behind import SWITCH
from lamina.errors import InvalidRequest
from lamina_protocols.frames.tensors import FLOAT_NAMES
from lamina_protocols.messages.layers import BlockConfig, LayerSpec
from lamina_workers.errors import HolderFault, HolderLost

if TYPE_CHECKING:
    from lamina.behind.block_tier import BlockTier

logger = logging.getLogger("vllm.lamina")  # shown as vLLM's own

_POLICY = "LAMINA_BEHIND_POLICY"
_RECOVERY_TIMEOUT = "LAMINA_BEHIND_RECOVERY_TIMEOUT"  # seconds for a lost worker to come back
_CORES = os.sched_getaffinity(0)  # as vLLM's process was given them, before it binds its threads
_LINES = 60.0  # seconds between two lines about policies

LOST, GONE = b"l", b"g"
"""Kinds of losses: a worker is waited for, or has not come back."""


@dataclasses.dataclass(frozen=True)
class TierLayer:
    """One of vLLM's layers. `target`: the name of the layer whose KV it shares, None where it has its own."""

    spec: LayerSpec
    target: str | None


class Losses:
    """The losses of workers so far, as all processes of a model know them: a file in memory with the kind of each.
    `place` says where it is; without it, there is a new one. Raises InvalidRequest where it is not on this host."""

    def __init__(self, place: str = "") -> None:
        if not place:
            name = f"lamina-{secrets.token_hex(16)}"
            place = f"/proc/{os.getpid()}/fd/{os.memfd_create(name)} {name}"
        self.place = place
        path, name = place.split()
        try:
            self._file = os.open(path, os.O_RDWR | os.O_APPEND)
            on_host = name in os.readlink(path)
        except OSError:
            on_host = False
        if not on_host:
            raise InvalidRequest(f"processes of one model on several hosts, with {SWITCH}; allowed: all on one host")

    def add(self, kind: bytes) -> None:
        os.write(self._file, kind)

    def after(self, count: int) -> bytes:
        """The kinds of those after the first `count`."""
        return os.pread(self._file, 4096, count)


class VllmTier:
    """The workers of this process, for all layers that it has. They are connected to with the first step, when vLLM has
    said which layers have which block table, and how many blocks there are."""

    _only: VllmTier | None = None

    def __init__(self, config: VllmConfig, layers: Mapping[str, TierLayer]) -> None:
        from lamina.behind.tier_workers import workers_of_rank

        self._config = config
        self._numbers = {name: number for number, name in enumerate(layers)}
        self._specs = _with_policies(config, layers, self._numbers)
        self._targets = {spec.kv_layer for number, spec in enumerate(self._specs) if spec.kv_layer != number}
        self._shared: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # k and v of targets in this step
        self._tables: list[list[str]] = []
        self._tier: BlockTier | None = None
        self._broken = False  # a worker is lost; the next step waits for it
        self._recovery_timeout = self._patience = _seconds(_RECOVERY_TIMEOUT, 60.0)
        self._line_at = time.monotonic()  # the last one about policies
        self._ranks = get_world_group()
        self._workers = workers_of_rank(self._ranks.rank_in_group, self._ranks.world_size, _CORES)
        self._agreed: tuple[int, str] | None = None

    @classmethod
    def of(cls, config: VllmConfig, layers: Mapping[str, TierLayer]) -> VllmTier:
        """That of a model with these layers, by their names."""
        if cls._only is None or cls._only._config is not config:
            cls._only = VllmTier(config, layers)
        return cls._only

    @classmethod
    def present(cls) -> VllmTier:
        if cls._only is None:
            raise RuntimeError("a layer's attention before its step was announced")
        return cls._only

    def agreed(self) -> tuple[int, str]:
        """What all ranks know: for how many blocks the workers of each have room, and where losses are counted."""
        if self._agreed is None:
            from lamina.behind.block_tier import room

            self._losses = Losses()
            answers: list[Any] = [None] * self._ranks.world_size
            answer = room(self._workers, self._holder(0)), self._losses.place
            torch.distributed.all_gather_object(answers, answer, group=self._ranks.cpu_group)
            self._agreed = min(blocks for blocks, _ in answers), answers[0][1]
            self._losses = Losses(self._agreed[1])
        return self._agreed

    def add_table(self, layer_names: list[str]) -> int:
        """The number of these layers' block table. vLLM may ask twice, where it measures its graphs first."""
        names = [name for name in layer_names if name in self._numbers]
        if names not in self._tables:
            self._tables.append(names)
        return self._tables.index(names)

    def announce(self, table: int, starts: torch.Tensor, lengths: torch.Tensor, blocks: torch.Tensor) -> None:
        tier = self._connected()
        if self._broken:
            try:
                tier.restore(self._patience)
            except HolderLost as error:  # this step computes nothing of use, and its requests end
                logger.warning("%s", error)
                self._patience = 0.0
                self._losses.add(GONE)
                return
            self._broken, self._patience = False, self._recovery_timeout
        try:
            tier.announce(table, starts, lengths, blocks)
        except HolderFault as error:
            self._lose(error)
        if time.monotonic() > self._line_at + _LINES and (savings := tier.savings()):
            self._line_at = time.monotonic()
            logger.info("policies, of the sequences in this step: %s", savings)

    def attend(
        self,
        name: str,
        q: torch.Tensor,
        kv: tuple[torch.Tensor, torch.Tensor] | None,
        sinks: torch.Tensor | None,
        target: torch.Tensor,
    ) -> torch.Tensor | None:
        """The output of a layer, in `target`; None after a loss, until the next step. `kv` None: that of the layer
        whose KV this one shares, which is sent once more, for the worker writes the same to the same place."""
        if self._broken:
            return None
        number = self._numbers[name]
        if kv is None:
            kv = self._shared[self._specs[number].kv_layer]
        elif number in self._targets:
            self._shared[number] = kv[0].clone(), kv[1].clone()  # vLLM may use their memory again
        try:
            return self._connected().attend(number, q, *kv, sinks, target)
        except HolderFault as error:
            self._lose(error)
            return None

    def _lose(self, error: HolderFault) -> None:
        logger.warning("%s", error)
        self._broken = True
        self._losses.add(LOST)

    def _connected(self) -> BlockTier:
        if self._tier is None:
            from lamina.behind.block_tier import BlockTier

            blocks = self._config.cache_config.num_gpu_blocks
            if not blocks:
                raise RuntimeError("a step was announced before vLLM had said how many blocks there are")
            dtype = FLOAT_NAMES[self._config.model_config.dtype]
            self._tier = BlockTier(self._workers, self._holder(blocks), dtype, str(self._config.model_config.model))
            atexit.register(self._tier.close)
        return self._tier

    def _holder(self, blocks: int) -> BlockConfig:
        tables = {name: number for number, names in enumerate(self._tables) for name in names}
        dtype = FLOAT_NAMES[self._config.model_config.dtype]
        return BlockConfig(
            tuple(self._specs),
            self._config.cache_config.block_size,
            dtype,
            0,
            blocks=blocks,
            tables=tuple(tables.get(name, 0) for name in self._numbers),
        )


def _seconds(name: str, default: float) -> float:
    text = os.environ.get(name, "")
    try:
        seconds = float(text) if text else default
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= 86400:
        raise InvalidRequest(f"{name} is {text!r:.80}; allowed are 0 to 86400 seconds")
    return seconds


def _with_policies(config: VllmConfig, layers: Mapping[str, TierLayer], numbers: Mapping[str, int]) -> list[LayerSpec]:
    """The specs of these layers, with the policies of this rank's KV heads. Raises PolicyError."""
    from lamina.policy_file import head_policies

    specs = [
        dataclasses.replace(layer.spec, kv_layer=numbers[name if layer.target is None else layer.target])
        for name, layer in layers.items()
    ]
    count, heads = config.model_config.get_total_num_hidden_layers(), config.model_config.get_total_num_kv_heads()
    policies = head_policies(os.environ.get(_POLICY) or "full", count, heads, None)
    if policies is None:
        return specs
    group = get_tp_group()
    first = heads * group.rank_in_group // group.world_size
    of_rank = []
    for name, spec in zip(layers, specs, strict=True):
        texts = policies[extract_layer_index(name)]
        heads_here = texts[:1] * spec.kv_heads if len(set(texts)) == 1 else texts[first : first + spec.kv_heads]
        of_rank.append(dataclasses.replace(spec, policies=heads_here))
    return of_rank
