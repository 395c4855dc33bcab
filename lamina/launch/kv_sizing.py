"""What of a model's KV is kept, and how much of it there is room for: settings and a machine become what holders are
built from, and the limits that the scheduler plans within.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch

from lamina.config import EngineConfig
from lamina.errors import InvalidRequest
from lamina.policy_file import head_policies
from lamina.scheduling.request import PageGroup, SchedulerConfig
from lamina.system.machine import Machine, kv_share
from lamina_protocols.messages import HolderConfig
from lamina_workers.attention_worker.head_policies import HeadPolicies
from lamina_workers.attention_worker.page_layout import page_cost
from lamina_workers.decoder.checkpoint import fingerprint
from lamina_workers.decoder.config import ModelConfig
from lamina_workers.devices.available import find_each, memory_available
from lamina_workers.policies.policy import LONGEST, Policy

DEFAULT_BATCH_TOKENS = 1024
MAX_SEQUENCES = 256  # in one batch


def holder_config(
    path: Path, model: ModelConfig, config: EngineConfig, dtype: torch.dtype, machine: Machine
) -> HolderConfig:
    """What holders of the KV of that model, whose files are at `path`, are built from. `dtype` is that of computing.

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
    """What the device that has least can give each holder: they are all alike."""
    devices = attention_devices(config)
    shares = [kv_share(machine, config.holders_here)] if any(device.type == "cpu" for device in devices) else []
    for device in devices:
        if device.type == "cuda":  # the engine's own holder is with the first worker
            gpu = replace(machine, memory_available=memory_available(device) or 0)
            shares.append(kv_share(gpu, min(2, config.holders_here)))
    return min(shares)


def divided(config: EngineConfig, holder: HolderConfig) -> tuple[HolderConfig, HolderConfig | None]:
    """The memory of this process: for prompts that are being computed, and for whole sequences where there are any.

    Those stay for their lives, so they get three quarters: a prompt that finds no room is read from where it is kept.
    """
    prompts = holder.kv_memory // 4
    heads = tuple(range(holder.layers[0].kv_heads))
    least = sum(group.cells(heads) for group in page_groups(holder)) * page_cost(holder)
    if config.local_share == 0 or config.model_workers > 1 or prompts < least:
        return holder, None
    return replace(holder, kv_memory=prompts), replace(holder, kv_memory=holder.kv_memory - prompts)


def limits_of(config: EngineConfig, model: ModelConfig, holder: HolderConfig, machine: Machine) -> SchedulerConfig:
    """What the scheduler may plan with. Raises InvalidRequest where settings contradict the model or the machine."""
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
    """Raise InvalidRequest where sequences cannot be as long as was asked for: `possible` tokens of one can have KV."""
    asked = config.max_model_len
    if possible < 1:
        raise InvalidRequest(f"kv_memory of {holder.kv_memory} bytes holds not one token")
    if asked is not None and asked > possible:
        where = "kv_memory of" if not config.attention_workers else "the attention workers, with kv_memory of"
        raise InvalidRequest(f"max_model_len is {asked}; {where} {holder.kv_memory} bytes holds {possible} tokens")


def page_groups(holder: HolderConfig) -> tuple[PageGroup, ...]:
    """What the layers that keep KV of their own keep of it, counted by policy and heads."""
    groups: Counter[tuple[Policy | None, frozenset[int]]] = Counter()
    for layer in HeadPolicies.of(holder).keepers:
        heads: dict[Policy | None, set[int]] = {}
        for head, policy in enumerate(layer):
            heads.setdefault(policy if policy.seen_from(LONGEST) > 0 else None, set()).add(head)
        groups.update((policy, frozenset(those)) for policy, those in heads.items())
    return tuple(PageGroup(layers, policy, heads) for (policy, heads), layers in groups.items())


def _keys_depend_on_length(model: ModelConfig, length: int) -> bool:
    """Dynamic RoPE turns keys by their prompt's length, so prompts of unlike lengths cannot share them."""
    return model.rope.kind == "dynamic" and length > model.rope.positions


def attention_devices(config: EngineConfig) -> tuple[torch.device, ...]:
    """Where attention workers that are started here keep KV, a device each. The holder in this process is with the
    first, and alone where there are none. Raises DeviceError."""
    workers = config.attention_workers if isinstance(config.attention_workers, int) and not config.cluster else 0
    return find_each("attention_device", config.attention_device, max(1, workers), prefer_gpu=False)
