"""What a model worker beyond 0 computes with: its decoder, and pools of KV in its process."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch

from lamina_workers.attention_worker.device_worker import attention_worker
from lamina_workers.checkpoints.model_checkpoint import fingerprint, open_checkpoint
from lamina_workers.checkpoints.weight_loader import Packing
from lamina_workers.converted.models import decoder_of, for_ranks, load_model, model_config
from lamina_workers.decoder.model import Decoder
from lamina_workers.decoder.shard import WHOLE, Collective, Shard
from lamina_workers.devices import available as devices
from lamina_workers.errors import ModelFileError
from lamina_workers.model_worker.model_worker import ModelWorker
from lamina_workers.model_worker.warmup import prepare_kernels
from lamina_workers.parallel import peer_messages
from lamina_workers.ports.port import AttentionPort, LocalAttention


class PeerParts(Protocol):
    """What a model worker computes with, once it is loaded."""

    @property
    def device(self) -> torch.device: ...

    def pool(self, join: peer_messages.Join) -> LocalAttention:
        """A port to a new pool in this process."""

    def worker(self, group: Collective | None, ports: Mapping[int, AttentionPort], epoch: int) -> ModelWorker:
        """The worker, one of `group` where it is one of several ranks."""

    def enter_group(self, group: Collective) -> None: ...

    def leave_group(self) -> None:
        """It wakes the ranks that wait for this one."""


Load = Callable[[peer_messages.Begin, str | Path, Callable[[str, int, int], None]], PeerParts]
"""Loads what `Begin` says from a folder, and reports how far it is. Raises LaminaError."""


class LoadedParts:
    """The decoder and its holders, loaded from `folder` as `begin` says: a `Load`."""

    def __init__(
        self, begin: peer_messages.Begin, folder: str | Path, progress: Callable[[str, int, int], None]
    ) -> None:
        path = Path(folder)
        if (found := fingerprint(path)) != begin.model:
            raise ModelFileError(f"the model in {path} has fingerprint {found:.16}, model worker 0's {begin.model:.16}")
        model = model_config(path)
        if begin.rope_scaling:
            model = model.with_rope_scaling(json.loads(begin.rope_scaling))
        self._begin = begin
        self._config = for_ranks(model, begin.ranks)
        self._shard = Shard(begin.rank, begin.ranks) if begin.ranks > 1 else WHOLE
        self._decoder: Decoder | None = None
        self.device = devices.find("device", begin.device)
        dtype: torch.dtype = getattr(torch, begin.dtype)
        torch.set_num_threads(begin.threads)
        self._attention_device = devices.find("attention_device", begin.attention_device, prefer_gpu=False)
        prepare_kernels(begin.holder, dtype, (self.device, self._attention_device), progress)
        with open_checkpoint(path) as checkpoint, torch.inference_mode():
            self._weights = load_model(
                self._config,
                checkpoint,
                dtype,
                self.device,
                lambda *done: progress("loading", *done),
                self._shard,
                Packing(begin.packed, begin.quantize),
            )

    def pool(self, join: peer_messages.Join) -> LocalAttention:
        holder = self._begin.holder
        holder = replace(holder, kv_memory=holder.kv_memory * join.part // max(1, join.of))
        return LocalAttention(attention_worker(holder, self._begin.threads, self._attention_device))

    def worker(self, group: Collective | None, ports: Mapping[int, AttentionPort], epoch: int) -> ModelWorker:
        begin = self._begin
        with torch.inference_mode():
            self._decoder = decoder_of(self._config, self._weights, self._shard, group, begin.compile)
        return ModelWorker(self._decoder, begin.holder, ports, begin.threads, begin.patience, epoch=epoch)

    def enter_group(self, group: Collective) -> None:
        if self._decoder is not None:
            self._decoder.collective = group

    def leave_group(self) -> None:
        if self._decoder is not None and self._decoder.collective is not None:
            self._decoder.collective.close()
