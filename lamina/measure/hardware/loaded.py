"""A model as the engine loads it, for measuring its parts: files, weights, decoder, what its holders are built from.

They come from where an engine gets them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from lamina.config import EngineConfig
from lamina.launch.kv_sizing import holder_config
from lamina.models.resolve import resolve
from lamina.system.machine import native_dtype, this_machine
from lamina_kernels.dense import dense
from lamina_protocols.messages.layers import HolderConfig
from lamina_workers.attention_worker.page_layout import attention_kernels, page_cost, page_layout
from lamina_workers.checkpoints.model_checkpoint import fingerprint, open_checkpoint
from lamina_workers.decoder.decoder_weights import DecoderWeights, load_weights
from lamina_workers.decoder.model import Batch, Decoder
from lamina_workers.model_config.config import ModelConfig

STEPS = 256
"""Decode steps that a cell has room for."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """`threads`: of a step; `dtype`: of weights, queries and KV."""

    config: ModelConfig
    weights: DecoderWeights
    decoder: Decoder
    holder: HolderConfig
    fingerprint: str
    dtype: torch.dtype
    threads: int


def load(model: str, cells: Sequence[Sequence[int]], device: str = "cpu") -> Loaded:
    """The model by its name, in the dtype and with the threads that an engine would choose, and a holder with room for
    the largest of `cells`, each (batch, context). Raises what `LLM` raises for a model."""
    path = resolve(model)
    machine = this_machine()
    config = ModelConfig.from_folder(path)
    dtype: torch.dtype = getattr(torch, "bfloat16" if device == "cuda" else native_dtype(machine)[0])
    torch.set_num_threads(machine.cores)
    holder = holder_config(path, config, EngineConfig(), dtype, machine)
    tokens = max(batch * (context + STEPS + holder.page_size) for batch, context in cells)
    pages = -(-tokens // holder.page_size) * config.num_key_value_heads * len(holder.layers)
    holder = replace(holder, kv_memory=pages * page_cost(holder))
    for steps in (attention_kernels().prepare(page_layout(holder)), dense.prepare(dtype, torch.device(device))):
        for _ in steps:
            pass
    with open_checkpoint(path) as checkpoint, torch.inference_mode():
        weights = load_weights(config, checkpoint, dtype, torch.device(device))
    return Loaded(config, weights, Decoder(config, weights), holder, fingerprint(path), dtype, machine.cores)


def decode_batch(rows: int, position: int, device: torch.device) -> Batch:
    """One token each of `rows` sequences, all at the same position."""
    positions = torch.full((rows,), position, device=device)
    lengths = positions + 1  # read by dynamic RoPE alone
    return Batch(torch.zeros_like(positions), positions, torch.arange(rows, device=device), lengths)
