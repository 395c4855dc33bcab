"""From a config and a machine to sizes: dtype, devices and threads, what holders of KV are built from, and the limits
that the scheduler plans within."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lamina.config import EngineConfig
from lamina.errors import InvalidRequest
from lamina.launch.model_files import ModelFiles
from lamina.policy_file import head_policies
from lamina.scheduling.request import PageGroup, SchedulerConfig
from lamina.system.machine import Machine, kv_share, native_dtype
from lamina_protocols.messages import HolderConfig
from lamina_workers.attention_worker.head_policies import HeadPolicies
from lamina_workers.attention_worker.page_layout import page_cost
from lamina_workers.decoder.checkpoint import fingerprint
from lamina_workers.decoder.config import ModelConfig
from lamina_workers.decoder.shard import RankShape, Shard, rank_shape
from lamina_workers.devices.available import find_each, memory_available
from lamina_workers.policies.policy import Policy

DEFAULT_BATCH_TOKENS = 1024
MAX_SEQUENCES = 256  # in one batch


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a model takes of the machine.

    `devices` has one for each model worker. `threads` are the CPU threads of one step on this machine, `own_threads`
    those of each model worker. `holder` is what holders of the whole model's KV are built from, `ranks` the part of
    each rank.
    """

    dtype: torch.dtype
    devices: tuple[torch.device, ...]
    attention_device: torch.device
    threads: int
    own_threads: int
    holder: HolderConfig
    ranks: tuple[HolderConfig, ...]
    limits: SchedulerConfig

    @property
    def device(self) -> torch.device:
        """Where model worker 0 computes."""
        return self.devices[0]

    @property
    def dtype_name(self) -> str:
        """The dtype of computing as workers know it, such as "bfloat16"."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def heads(self) -> list[int]:
        """How many KV heads each rank has."""
        return [holder.layers[0].kv_heads for holder in self.ranks]


def size_kv(files: ModelFiles, config: EngineConfig, machine: Machine) -> Sizes:
    """Sizes of a model on a machine. Raises InvalidRequest, DeviceError, PolicyError, RanksError, or
    UnsupportedModelError where no kernels can keep such KV."""
    threads = own_threads = config.threads or machine.cores
    if config.cluster is None:
        own_threads = max(1, threads // config.model_workers)
    devices, attention = _model_devices(config), attention_devices(config)
    dtype = _dtype(config.dtype, devices[0], machine)
    holder = holder_config(files.path, files.model, config, dtype, machine)
    for device in attention:
        HeadPolicies.of(holder).check(device)
    limits = limits_of(config, files.model, holder, machine)
    ranks = _rank_holders(holder, files.model, config.ranks)
    return Sizes(dtype, devices, attention[0], threads, own_threads, holder, ranks, limits)


def _model_devices(config: EngineConfig) -> tuple[torch.device, ...]:
    if config.cluster is not None and isinstance(config.device, str):  # each worker has that device of its own node
        return find_each("device", config.device, 1) * config.model_workers
    return find_each("device", config.device, config.model_workers)


def _dtype(name: str, device: torch.device, machine: Machine) -> torch.dtype:
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else native_dtype(machine)[0]
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def holder_config(
    path: Path, model: ModelConfig, config: EngineConfig, dtype: torch.dtype, machine: Machine
) -> HolderConfig:
    """What holders of a model's KV are built from. `path` is the model's folder, `dtype` that of computing.

    Raises PolicyError for a policy that is unknown or does not fit the model.
    """
    layers = model.layer_specs()
    copies = model.kv_copies
    plain = replace(model, num_key_value_heads=model.num_key_value_heads // copies, kv_copies=1)
    if (policies := head_policies(config.policy, plain, fingerprint(path))) is not None:
        layers = tuple(
            replace(spec, policies=tuple(text for text in texts for _ in range(copies)))
            for spec, texts in zip(layers, policies, strict=True)
        )
    return HolderConfig(
        layers=layers,
        page_size=config.page_size,
        dtype=str(dtype).removeprefix("torch.") if config.kv_dtype == "auto" else config.kv_dtype,
        kv_memory=config.kv_memory if isinstance(config.kv_memory, int) else _kv_share(config, machine),
    )


def _kv_share(config: EngineConfig, machine: Machine) -> int:
    """Bytes that the device with the least memory can give each holder. All holders are alike."""
    devices = attention_devices(config)
    shares = [kv_share(machine, config.holders_here)] if any(device.type == "cpu" for device in devices) else []
    for device in devices:
        if device.type == "cuda":  # the engine's own holder is on the device of the first worker
            gpu = replace(machine, memory_available=memory_available(device) or 0)
            shares.append(kv_share(gpu, min(2, config.holders_here)))
    return min(shares)


def _rank_holders(holder: HolderConfig, model: ModelConfig, ranks: int) -> tuple[HolderConfig, ...]:
    """What the holders of each rank are built from: its own heads of every layer, and its part of the memory. `model`
    is from `with_ranks`."""
    if ranks == 1:
        return (holder,)
    return tuple(_rank_holder(holder, model, rank_shape(model, Shard(rank, ranks))) for rank in range(ranks))


def _rank_holder(holder: HolderConfig, model: ModelConfig, shape: RankShape) -> HolderConfig:
    own = shape.kv_heads
    layers = tuple(
        replace(spec, heads=len(shape.heads), kv_heads=len(own), policies=spec.policies[own.start : own.stop])
        for spec in holder.layers
    )
    return replace(holder, layers=layers, kv_memory=holder.kv_memory * len(own) // model.num_key_value_heads)


def divided(config: EngineConfig, holder: HolderConfig) -> tuple[HolderConfig, HolderConfig | None]:
    """The memory of the engine's process in two: for prompts that are being computed, and for whole sequences, None
    where none are kept here.

    Whole sequences get three quarters because they stay until they end. A prompt that finds no room is read from the
    holders that keep it.
    """
    prompts = holder.kv_memory // 4
    heads = tuple(range(holder.layers[0].kv_heads))
    least = sum(group.cells(heads) for group in page_groups(holder)) * page_cost(holder)
    if config.local_share == 0 or config.model_workers > 1 or prompts < least:
        return holder, None
    return replace(holder, kv_memory=prompts), replace(holder, kv_memory=holder.kv_memory - prompts)


def limits_of(config: EngineConfig, model: ModelConfig, holder: HolderConfig, machine: Machine) -> SchedulerConfig:
    """The limits that the scheduler plans within. Raises InvalidRequest where settings contradict the model or the
    machine."""
    context = model.max_position_embeddings
    asked = config.max_model_len
    if asked is not None and asked > context:
        raise InvalidRequest(f"max_model_len is {asked}; the model's context is {context} (see rope_scaling)")
    page_bytes = page_cost(holder)
    groups = page_groups(holder)
    least = sum(group.cells(tuple(range(model.num_key_value_heads))) for group in groups) * page_bytes
    on_cpu = any(device.type == "cpu" for device in attention_devices(config))
    most = machine.memory if machine.memory and on_cpu else 1 << 50
    if not least <= holder.kv_memory <= most:
        raise InvalidRequest(
            f"kv_memory is {holder.kv_memory} bytes; allowed are {least} (a page for each layer and KV head) to {most}"
        )
    return SchedulerConfig(
        max_batch_tokens=config.max_batch_tokens or DEFAULT_BATCH_TOKENS,
        max_sequences=min(MAX_SEQUENCES, config.max_batch_tokens or MAX_SEQUENCES),
        max_model_len=asked or context,
        page_size=config.page_size,
        page_groups=groups,
        prefix_cache=config.prefix_cache and not _keys_depend_on_length(model, asked or context),
    )


def check_room(config: EngineConfig, holder: HolderConfig, possible: int) -> None:
    """Raise InvalidRequest where sequences cannot be as long as the config asks: `possible` tokens of one can have
    KV."""
    asked = config.max_model_len
    if possible < 1:
        raise InvalidRequest(f"kv_memory of {holder.kv_memory} bytes holds not one token")
    if asked is not None and asked > possible:
        where = "kv_memory of" if not config.attention_workers else "the attention workers, with kv_memory of"
        raise InvalidRequest(f"max_model_len is {asked}; {where} {holder.kv_memory} bytes holds {possible} tokens")


def page_groups(holder: HolderConfig) -> tuple[PageGroup, ...]:
    """The pages that one sequence needs, as groups of layers and heads under the same policy. Layers that share the KV
    of another are not counted."""
    groups: Counter[tuple[Policy | None, frozenset[int]]] = Counter()
    policies = HeadPolicies.of(holder)
    for layer in policies.keepers:
        heads: dict[Policy | None, set[int]] = {}
        for head, policy in enumerate(layer):
            heads.setdefault(policy if policy in policies.releasing else None, set()).add(head)
        groups.update((policy, frozenset(those)) for policy, those in heads.items())
    return tuple(PageGroup(layers, policy, heads) for (policy, heads), layers in groups.items())


def _keys_depend_on_length(model: ModelConfig, length: int) -> bool:
    """Dynamic RoPE rotates keys by the prompt's length, so prompts of different lengths cannot share them."""
    return model.rope.kind == "dynamic" and length > model.rope.positions


def attention_devices(config: EngineConfig) -> tuple[torch.device, ...]:
    """The devices on which KV is kept: one for each attention worker that is started here. The engine's own holder uses
    the first. Raises DeviceError."""
    workers = config.attention_workers if isinstance(config.attention_workers, int) and not config.cluster else 0
    return find_each("attention_device", config.attention_device, max(1, workers), prefer_gpu=False)
