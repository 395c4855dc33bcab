"""From a system to the engine that is it: keywords of `EngineConfig`, what an engine can't be, and what to run."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lamina.config import MAX_LANES
from lamina.simulator.costs.packing import QUANTIZED
from lamina.simulator.costs.systems import Colocated, Disaggregated, Offloaded, System

_COMPUTES = {"cpu": "cpu", "gpu": "cuda"}
"""The engine's name of each kind of device."""
_DTYPES = {4.0: "float32", 2.0: "bfloat16"}
_PROMPTS = 8
"""Prompts of the longest kind that the engine's own process has room for, where it keeps nothing else."""
_SERVE = "serve run lamina.server.ray_serve:build_app plan={}"


def undeployable(system: System) -> str:
    """Why no engine here is that system, in words; "" where one is."""
    if isinstance(system, Disaggregated):
        return "the engine computes prompts and decodes in one place"
    for device, _ in system.devices:
        if device.kind not in _COMPUTES:
            return f"no kernels here run on {device.name}, of kind {device.kind}; allowed are {' and '.join(_COMPUTES)}"
    if not isinstance(system, Offloaded):
        return ""
    ranks, replicas = system.model_count, system.model_replicas
    if ranks > 1 and replicas > 1:
        return f"each layer is cut among {ranks} devices and there are {replicas} replicas; an engine does one of both"
    if ranks > 1 and system.lanes > 1:
        return f"{system.lanes} lanes where {ranks} devices share each layer, which add up one batch at a time"
    if system.lanes > (limit := replicas + 1 if replicas > 1 else MAX_LANES):
        return f"{system.lanes} lanes; {replicas} replicas have {limit} at most"
    if (share := system.local_share) and (workers := ranks * replicas) > 1:
        return f"{share:.0%} of the KV with one of {workers} model workers; with several it is all elsewhere"
    if system.shard == "heads" and system.attention_count > 1 and system.model.kv_heads == 1:
        return "the model's one KV head cannot be cut by heads"
    return ""


def differences(system: System) -> tuple[str, ...]:
    """How an engine differs from a system, in words."""
    model, dense = system.model, system.devices[0][0]
    if dense.kind == "cpu" or (model.packing is None and model.element >= 2):
        return ()
    return (f"weights of fewer than 16 bits stay so on CPUs alone, so an engine on {dense.name} computes with 16 bits",)


def engine_keywords(system: System, longest: int) -> dict[str, Any]:
    """The keywords of `EngineConfig` that deploy one instance of a system; none where no engine is it. `longest`:
    tokens of the longest request."""
    if undeployable(system) or isinstance(system, Disaggregated):
        return {}
    capacity, model = system.capacity, system.model
    dense, attention = system.devices[0][0], system.devices[-1][0]
    keywords: dict[str, Any] = {
        "device": _COMPUTES[dense.kind],
        "attention_device": _COMPUTES[attention.kind],
        "max_batch_tokens": min(system.max_batch_tokens, max(1024, longest), 1 << 20),
        "max_num_seqs": min(system.max_sequences, 1 << 16),
    }
    ranks = system.devices[0][1]
    if isinstance(system, Offloaded):
        ranks = system.model_count
        holders = system.workers or system.attention_count
        keywords |= {
            "attention_workers": holders,
            "shard": system.shard,
            "local_share": system.local_share,
            "query_first": "auto" if system.overlap else "never",
        }
        if ranks == 1:  # ranks have one batch under way
            keywords["lanes"] = system.lanes
        if system.model_replicas > 1:
            keywords |= {"model_workers": system.model_replicas, "model_parallel": "replicas"}
        if all(device.network > 0 for device, _ in system.devices):  # one without a network is where the other is
            keywords["cluster"] = "auto"
        keywords |= _memories(system, holders)
    else:
        kv_bytes = capacity.tokens * system.policy.held * model.kv_bytes_per_token(system.kv_element)
        keywords["kv_memory"] = int(kv_bytes + capacity.sequences * model.state_bytes_held)
    if ranks > 1:
        keywords |= {"model_workers": ranks, "model_parallel": "tensor"}
    if model.states and model.attentions:
        keywords["sequence_tokens"] = system.sequence_tokens
    if system.policy.name != "full":
        keywords["policy"] = system.policy.name
    keywords |= _numbers(system)
    if (drafts := system.speculation) is not None:
        keywords |= {"speculate": drafts.name, "num_speculative_tokens": drafts.tokens}
    return keywords


def _memories(system: Offloaded, holders: int) -> dict[str, int]:
    """Bytes of KV of each attention worker, and of the engine's own process: what the plan counts on there, or what
    the prompts take that are being computed."""
    token_bytes, state_bytes = system.model.kv_bytes_per_token(system.kv_element), system.model.state_bytes_held
    room = float(system.prompt_tokens)
    if not system.local_share:
        room = min(room, _PROMPTS * system.model.max_context)
    local = room * token_bytes + _PROMPTS * state_bytes
    workers = system.attention_count * system.attention_device.memory * system.attention_memory_share
    if system.workers is not None:  # processes of one machine, which has the weights too
        workers -= system.model.weight_bytes + local
    return {"kv_memory": max(1, int(workers / holders)), "kv_local": max(1, int(local))}


def _numbers(system: Colocated | Offloaded) -> dict[str, Any]:
    """How weights and KV are kept: as the plan counts them."""
    model, on_cpu = system.model, system.devices[0][0].kind == "cpu"
    if model.packing is not None and on_cpu:
        name = model.packing.name
        return {"quantize": name} if name in QUANTIZED else {"weights": "packed"}
    if (dtype := _DTYPES.get(model.element)) is None:
        return {}
    keywords: dict[str, Any] = {"weights": dtype}
    kv_dtype = _DTYPES.get(system.kv_element)
    return keywords if kv_dtype in (None, dtype) else keywords | {"kv_dtype": kv_dtype}


def commands(path: Path, replicas: int, engine: Mapping[str, Any]) -> list[str]:
    """What to run to deploy the plan in a file, a line each."""
    replica = f"lamina serve --plan {shlex.quote(str(path))}"
    if replicas == 1:
        return [replica]
    fleet = _SERVE.format(shlex.quote(str(path.absolute())))
    place = "a Ray cluster with the devices of all" if engine.get("cluster") else "a Ray cluster of as many machines"
    return [f"{fleet}    # all {replicas} replicas, on {place}", f"{replica}    # or one of them by itself"]
