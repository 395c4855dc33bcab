"""From a config and a machine to sizes (`size_kv`): dtype, devices and threads, what holders of KV are built from, and
the limits that the scheduler plans within.

The policies that requests may name follow from the holders too: `RequestPolicies` checks them, and says what is kept
under each.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from lamina.config import EngineConfig
from lamina.errors import InvalidRequest
from lamina.kv import redundancy
from lamina.kv.pages import PageGroup, PolicyKv
from lamina.kv.placement import Placement
from lamina.kv.request import SNAPSHOT_TOKENS, SchedulerConfig
from lamina.launch.model_files import ModelFiles
from lamina.policy_file import AUTO, head_policies
from lamina.system.machine import Machine, kv_share, native_dtype
from lamina.system.text_files import show_size
from lamina_protocols.frames import bounds
from lamina_protocols.messages.layers import STATES, ColdTier, HolderConfig, LayerSpec
from lamina_protocols.messages.pools import pools
from lamina_workers.attention_worker.page_layout import page_cost, state_layout
from lamina_workers.checkpoints.model_checkpoint import fingerprint
from lamina_workers.checkpoints.weight_loader import Packing
from lamina_workers.converted.models import way
from lamina_workers.decoder.shard import Shard, heads_of
from lamina_workers.devices.available import find_each, memory_available
from lamina_workers.errors import KVError, NotEnoughMemory, PolicyError, RanksError
from lamina_workers.kv_pages.cold_file import check_folder
from lamina_workers.kv_pages.head_policies import HeadPolicies
from lamina_workers.model_config.config import ModelConfig
from lamina_workers.policies.catalogue import parse
from lamina_workers.policies.policy import LONGEST, Policy

_KNOWN = 256  # policies whose groups are kept at a time

DEFAULT_BATCH_TOKENS = 1024
MAX_SEQUENCES = 256  # in one batch, where nothing else is said
SEQUENCE_TOKENS = 4096  # of a usual sequence, at most


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a model takes of the machine.

    `packing`: which weights stay packed. `devices` has one for each model worker. `threads` are the CPU threads of one
    step on this machine, `own_threads` those of each model worker. `holder` is what holders of the whole model's KV are
    built from, `seats` the part of each rank at an attention worker, `ranks` what each rank keeps itself. `taken`:
    bytes of this machine's memory that weights take, and that KV may take.
    """

    dtype: torch.dtype
    packing: Packing
    devices: tuple[torch.device, ...]
    attention_device: torch.device
    threads: int
    own_threads: int
    holder: HolderConfig
    seats: tuple[HolderConfig, ...]
    ranks: tuple[HolderConfig, ...]
    limits: SchedulerConfig
    taken: tuple[int, int]

    @property
    def device(self) -> torch.device:
        return self.devices[0]

    def kv_device(self, rank: int) -> torch.device:
        """Where a model worker keeps KV itself: on its own GPU, if KV is on GPUs and it has one."""
        device = self.devices[rank]
        return device if device.type == self.attention_device.type == "cuda" else self.attention_device

    @property
    def dtype_name(self) -> str:
        """The dtype of computing as workers know it, such as "bfloat16"."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def heads(self) -> list[tuple[int, ...]]:
        """How many KV heads each rank has, by pool."""
        return [tuple(pool.config.layers[0].kv_heads for pool in pools(holder)) for holder in self.ranks]

    @property
    def first_heads(self) -> list[int]:
        """How many KV heads each rank has in the first pool: so its seats share the memory of attention workers."""
        return [heads[0] for heads in self.heads]


def size_kv(files: ModelFiles, config: EngineConfig, machine: Machine) -> Sizes:
    """Sizes of a model on a machine. Raises InvalidRequest, DeviceError, PolicyError, RanksError, NotEnoughMemory where
    weights and KV do not fit, or UnsupportedModelError where no kernels can keep such KV."""
    threads = own_threads = config.threads or machine.cores
    if config.cluster is None:
        own_threads = max(1, threads // config.model_workers)
    devices, attention = _model_devices(config), attention_devices(config)
    dtype = _dtype(config.dtype, devices[0], machine)
    packing = files.packing(config, devices, dtype)
    weights = 0
    if devices[0].type == "cpu":  # on a cluster others have theirs elsewhere
        copies = config.replicas if config.cluster is None else 1 / config.ranks
        weights = int(files.kept_bytes(dtype, packing) * copies)
    holder = holder_config(files.path, files.model, config, dtype, machine, weights)
    if holder.cold is not None:
        _check_cold(holder.cold, attention)
    _check_shard(config, holder)
    for pool in pools(holder):
        if pool.config.layers[0].kind not in STATES:
            for device in attention:
                HeadPolicies.of(pool.config).check(device)
    limits = limits_of(config, files.model, holder, machine, dtype)
    seats = ranks = _rank_holders(holder, config.ranks)
    if isinstance(config.kv_local, int):
        _check_memory("kv_local", config.kv_local, holder, _most_memory(config, holder, machine))
        ranks = _rank_holders(replace(holder, kv_memory=config.kv_local), config.ranks)
    kv = 0
    if attention[0].type == "cpu":
        kv = sum(rank.kv_memory for rank in (ranks if config.cluster is None else ranks[:1]))
        kv = int((kv + holder.kv_memory * (config.holders_here - 1)) * (holder.cold.resident if holder.cold else 1))
        if not config.force:
            check_fits(files.path, weights, kv, machine)
    bytes_taken = (weights, kv)
    return Sizes(dtype, packing, devices, attention[0], threads, own_threads, holder, seats, ranks, limits, bytes_taken)


def check_fits(model: Path, weights: int, kv: int, machine: Machine) -> None:
    """Raise NotEnoughMemory where a machine would have to swap, or end a process, once KV is full."""
    available = machine.memory_available
    if weights + kv <= available or not available:
        return
    less = f"kv_memory that takes {show_size(available - weights)}, " if weights < available else ""
    raise NotEnoughMemory(
        f"{model}: the weights take {show_size(weights)} of memory and KV up to {show_size(kv, up=True)}, and "
        f"{show_size(available)} are available on this machine; allowed is less: {less}fewer bits (quantize, or such a "
        "file), a smaller model; or force=True (--force), which tries"
    )


def _check_cold(cold: ColdTier, devices: Sequence[torch.device]) -> None:
    for device in devices:
        try:
            check_folder(cold.folder, str(device))
        except KVError as error:
            raise InvalidRequest(str(error)) from error


def _check_shard(config: EngineConfig, holder: HolderConfig) -> None:
    workers = config.attention_workers
    count = config.most_workers if isinstance(workers, int) else len(workers)
    indexed = indexed_pools(holder)
    if config.shard == "heads" and count > 1 and all(spec.kv_heads == 1 for spec in holder.layers):
        allowed = "is" if indexed else "are shard='sequence', or"
        raise InvalidRequest(
            f"shard is 'heads' with {count} attention_workers, but the model has one KV head, which cannot be cut; "
            f"allowed {allowed} one attention worker"
        )
    if config.shard != "heads" and indexed:
        raise InvalidRequest(
            f"shard is {config.shard!r}, but an index of the model's own chooses among all keys of a sequence, which "
            "must be in one place for it; allowed is shard='heads'"
        )


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
    path: Path, model: ModelConfig, config: EngineConfig, dtype: torch.dtype, machine: Machine, weights: int = 0
) -> HolderConfig:
    """What holders of a model's KV are built from. `path` is the model's folder, `dtype` that of computing; `weights`:
    bytes that weights will take on this machine.

    Raises PolicyError for a policy that is unknown or does not fit the model.
    """
    layers = model.layer_specs()
    copies = model.kv_copies
    heads = model.num_key_value_heads // copies
    policies = head_policies(config.policy, model.attention_layers, heads, fingerprint(path))
    if policies is not None:
        of_attention = iter(policies)
        layers = tuple(
            spec if spec.kind in STATES else replace(spec, policies=_of_heads(spec, next(of_attention), copies))
            for spec in layers
        )
    elif any(spec.index for spec in layers):  # what is read is counted where a policy is named: in all layers or none
        layers = tuple(
            spec if spec.kind in STATES else replace(spec, policies=("full",) * spec.kv_heads) for spec in layers
        )
    memory = config.kv_memory if isinstance(config.kv_memory, int) else _kv_share(config, machine, weights)
    tokens = config.sequence_tokens or min(config.max_model_len or model.max_position_embeddings, SEQUENCE_TOKENS)
    if config.most_drafts and model.states is not None:  # memory is dealt for two records, drafts take three
        tokens = -(-2 * tokens // 3)
    return HolderConfig(
        layers=layers,
        page_size=config.page_size,
        dtype=str(dtype).removeprefix("torch.") if config.kv_dtype == "auto" else config.kv_dtype,
        kv_memory=memory,
        sequence_tokens=tokens,
        cold=config.cold_tier(memory, kv_share(machine, config.holders_here)),
        sketches=config.sketches,
    )


def _of_heads(spec: LayerSpec, texts: tuple[str, ...], copies: int) -> tuple[str, ...]:
    """The policies of a layer's KV heads, each of which there are `copies` of: `texts`, or where the layer has another
    number of heads the one of all."""
    if spec.kv_heads != len(texts) * copies:
        if len(set(texts)) > 1:
            raise PolicyError(
                f"policies of {len(texts) * copies} KV heads for a layer of {spec.kv_heads}; allowed there is one for "
                "all"
            )
        texts = texts[:1] * -(-spec.kv_heads // copies)
    head_texts = [str(parse(text).of_head(head)) for head, text in enumerate(texts)]
    return tuple(text for text in head_texts for _ in range(copies))[: spec.kv_heads]


def _kv_share(config: EngineConfig, machine: Machine, weights: int) -> int:
    """Bytes that the device with the least memory can give each holder. All holders are alike."""
    devices = attention_devices(config)
    on_cpu = any(device.type == "cpu" for device in devices)
    shares = [kv_share(machine, config.holders_here, weights)] if on_cpu else []
    for device in devices:
        if device.type == "cuda":  # the engine's own holder is on the device of the first worker
            gpu = replace(machine, memory_available=memory_available(device) or 0)
            shares.append(kv_share(gpu, min(2, config.holders_here)))
    return min(shares)


def _rank_holders(holder: HolderConfig, ranks: int) -> tuple[HolderConfig, ...]:
    """What the holders of each rank are built from: its own heads of every layer, and its part of the memory. Raises
    RanksError where a rank would have no head of a layer, or layers would share a pool at some ranks alone."""
    if ranks == 1:
        return (holder,)
    fewest = min(spec.key_heads or spec.kv_heads for spec in holder.layers)
    if fewest < ranks:
        raise RanksError(f"the model cannot be cut among {ranks} ranks: a layer has {fewest} KV heads")
    holders = tuple(_rank_holder(holder, Shard(rank, ranks)) for rank in range(ranks))
    pool_layers = [pool.layers for pool in pools(holder)]
    if any([pool.layers for pool in pools(rank_holder)] != pool_layers for rank_holder in holders):
        raise RanksError(
            f"the model's layers cannot be cut evenly among {ranks} ranks: their numbers of KV heads differ"
        )
    return holders


def _rank_holder(holder: HolderConfig, shard: Shard) -> HolderConfig:
    layers = []
    for spec in holder.layers:
        per_key = spec.kv_heads // spec.key_heads if spec.key_heads else 1  # heads of one key stay together
        head_groups = heads_of(spec.kv_heads // per_key, shard)
        heads = slice(head_groups.start * per_key, head_groups.stop * per_key)
        layers.append(
            replace(
                spec,
                heads=len(head_groups) * per_key * spec.group,
                kv_heads=len(head_groups) * per_key,
                key_heads=len(head_groups) if spec.key_heads else 0,
                policies=spec.policies[heads],
                decays=spec.decays[heads],
            )
        )
    memory = holder.kv_memory * layers[0].kv_heads // holder.layers[0].kv_heads
    return replace(holder, layers=tuple(layers), kv_memory=memory)


def limits_of(
    config: EngineConfig, model: ModelConfig, holder: HolderConfig, machine: Machine, dtype: torch.dtype
) -> SchedulerConfig:
    """The limits that the scheduler plans within: what the config asks for, as far as frames carry it. Raises
    InvalidRequest where settings contradict the model or the machine."""
    context = model.max_position_embeddings
    max_model_len = config.max_model_len
    if max_model_len is not None and max_model_len > context:
        raise InvalidRequest(f"max_model_len is {max_model_len}; the model's context is {context} (see rope_scaling)")
    elsewhere = config.cluster is not None and config.kv_local is not None  # and nobody here takes so much
    memory_limit = 1 << 50 if elsewhere else _most_memory(config, holder, machine)
    _check_memory("kv_memory", holder.kv_memory, holder, memory_limit)
    groups, states = page_groups(holder), state_pools(holder)
    prefix_cache = config.prefix_cache and not _keys_depend_on_length(model, max_model_len or context)
    frame_tokens = bounds.most_tokens(holder.layers, dtype.itemsize, model.hidden_size)
    rows = max_parts = bounds.most_rows(holder.layers)
    if config.model_workers > 1:
        frame_tokens = min(frame_tokens, bounds.MAX_COMMANDED_TOKENS)
    if config.replicas > 1:  # which send back the logits of rows that are not greedy
        rows = min(rows, bounds.MAX_PAYLOAD // (4 * model.vocab_size * (1 + config.most_drafts)))
    batch_tokens = min(config.max_batch_tokens or DEFAULT_BATCH_TOKENS, frame_tokens)
    return SchedulerConfig(
        max_batch_tokens=batch_tokens,
        max_sequences=min(config.max_num_seqs or MAX_SEQUENCES, batch_tokens, rows),
        max_parts=max_parts,
        frame_tokens=frame_tokens,
        max_model_len=max_model_len or context,
        page_size=config.page_size,
        page_groups=groups,
        prefix_cache=prefix_cache,
        states=states,
        snapshot_tokens=max(SNAPSHOT_TOKENS, config.page_size) if states and prefix_cache else None,
        max_drafts=min([config.most_drafts, *(state_layout(pools(holder)[pool].config).drafts for pool in states)]),
        pools=way(model) == "native",
        of_policy=RequestPolicies(holder, partial(page_groups, holder)),
        redundancy=redundancy.parse(config.redundancy),
    )


def _check_memory(name: str, given: int, holder: HolderConfig, most: int) -> None:
    """Raise InvalidRequest where a holder like `holder` cannot have so many bytes."""
    least = _least_memory(holder)
    if not least <= given <= most:
        what = "a page for each layer and KV head" + (", two records of each state" if state_pools(holder) else "")
        raise InvalidRequest(
            f"{name} is {show_size(given)}; allowed are {show_size(least, up=True)} ({what}) to {show_size(most)}"
        )


def _most_memory(config: EngineConfig, holder: HolderConfig, machine: Machine) -> int:
    """Bytes that a holder of this machine may have."""
    on_cpu = any(device.type == "cpu" for device in attention_devices(config))
    return machine.memory + _disk(holder) if machine.memory and on_cpu else 1 << 50


def _disk(holder: HolderConfig) -> int:
    """Bytes of KV for which there is room on a disk."""
    try:
        return 0 if holder.cold is None else shutil.disk_usage(holder.cold.folder).free
    except OSError:  # the holder says why it cannot use it
        return 0


def _least_memory(holder: HolderConfig) -> int:
    """The least `kv_memory` of which every pool gets a page for each layer and head, or two records of each state."""
    groups, states = page_groups(holder), state_pools(holder)
    least = 0
    for number, pool in enumerate(pools(holder)):
        heads = tuple(range(pool.config.layers[0].kv_heads))
        cells = sum(group.cells(heads) for group in groups[number]) + 2 * states.get(number, 0) * len(heads)
        needed = cells * page_cost(pool.config)
        least = max(least, -(-needed * holder.kv_memory // max(1, pool.config.kv_memory)))
    return least


def check_room(config: EngineConfig, sizes: Sizes, placement: Placement, possible: int) -> None:
    """Raise InvalidRequest where sequences cannot be as long as the config asks: `possible` tokens of one can have
    KV."""
    max_model_len, holder = config.max_model_len, sizes.holder
    if possible < 1:
        needed, capacity = sizes.limits.pages_for(placement.layout(1), 1), placement.capacity
        number, pool = shortage = min(capacity.short_of(needed))
        pool_config = pools(holder)[pool].config
        has, takes = capacity.get(shortage, 0) * page_cost(pool_config), needed[shortage] * page_cost(pool_config)
        name, kind = placement.holders[number].name or "this process", pool_config.layers[0].kind
        raise InvalidRequest(
            f"{name} has {has} bytes for {kind} layers, and one token takes {takes} there; allowed is "
            "a larger kv_memory, or more attention workers"
        )
    if max_model_len is not None and max_model_len > possible:
        workers = config.attention_workers or config.autoscale
        where = "the attention workers, with kv_memory of" if workers else "kv_memory of"
        memory = f"{where} {holder.kv_memory} bytes"
        raise InvalidRequest(f"max_model_len is {max_model_len}; {memory} holds {possible} tokens")


def state_pools(holder: HolderConfig) -> dict[int, int]:
    """The pools of states, with the number of their layers."""
    kinds = enumerate(pools(holder))
    return {number: len(pool.layers) for number, pool in kinds if pool.config.layers[0].kind in STATES}


def indexed_pools(holder: HolderConfig) -> frozenset[int]:
    """The pools whose layers have an index of their own."""
    return frozenset(number for number, pool in enumerate(pools(holder)) if pool.config.layers[0].index)


def learns(holder: HolderConfig) -> bool:
    """Whether a policy, of a holder or of a part there, may learn from prompts' queries."""
    attention = (pool.config for pool in pools(holder) if pool.config.layers[0].kind not in STATES)
    return any(HeadPolicies.of(config).sketched for config in attention)


def page_groups(holder: HolderConfig, policy: str = "") -> tuple[tuple[PageGroup, ...], ...]:
    """The pages of KV that one sequence of a policy ("": the engine's own) needs in each pool, as groups of layers and
    heads under the same policy. Layers that share the KV of another are not counted, nor are states. Raises PolicyError
    for a policy that the holders cannot serve."""
    states = state_pools(holder)
    return tuple(() if number in states else _groups(pool.config, policy) for number, pool in enumerate(pools(holder)))


def _groups(pool: HolderConfig, policy: str) -> tuple[PageGroup, ...]:
    groups: Counter[tuple[Policy | None, frozenset[int]]] = Counter()
    policies = HeadPolicies.of(pool, policy)
    for layer in policies.keepers:
        heads: dict[Policy | None, set[int]] = {}
        for head, of_head in enumerate(layer):
            heads.setdefault(of_head if of_head in policies.releasing else None, set()).add(head)
        groups.update((of_head, frozenset(group_heads)) for of_head, group_heads in heads.items())
    return tuple(PageGroup(layers, of_head, heads) for (of_head, heads), layers in groups.items())


def _keys_depend_on_length(model: ModelConfig, length: int) -> bool:
    """Dynamic RoPE rotates keys by the prompt's length, so prompts of different lengths cannot share them."""
    return model.rope.by_length and length > model.rope.positions


def attention_devices(config: EngineConfig) -> tuple[torch.device, ...]:
    """The devices on which KV is kept: one for each attention worker that is started here. The engine's own holder uses
    the first. Raises DeviceError."""
    workers = 0 if config.cluster else config.most_workers
    return find_each("attention_device", config.attention_device, max(1, workers), prefer_gpu=False)


class RequestPolicies:
    """Gives the `PolicyKv` of each text. "" is what the engine's own policy makes of KV, which may differ by head.
    `groups(policy)` says what is kept, and raises PolicyError where the holders cannot serve a policy."""

    def __init__(self, holder: HolderConfig, groups: Callable[[str], tuple[tuple[PageGroup, ...], ...]]) -> None:
        self._groups = groups
        attention = [spec for spec in holder.layers if spec.kind not in STATES]
        texts = dict.fromkeys(text for spec in attention for text in spec.policies or ("full",))
        self._engine_policies = tuple(map(parse, texts))
        self._policy_kvs: dict[str, PolicyKv] = {}  # not an lru_cache, which no Ray actor could send
        self._engine = self._kv("", self._engine_policies)

    def __call__(self, text: str) -> PolicyKv:
        """What becomes of KV under a policy. Raises PolicyError where the text is none, or the engine cannot serve it.
        Any thread may call."""
        if not text:
            return self._engine
        policy_kv = self._policy_kvs.get(text)
        if policy_kv is None:
            policy_kv = self._known(text)
            if len(self._policy_kvs) >= _KNOWN:
                self._policy_kvs.clear()
            self._policy_kvs[text] = policy_kv
        return policy_kv

    def _known(self, text: str) -> PolicyKv:
        policy = parse(AUTO if text == "auto" else text)
        if set(self._engine_policies) == {policy}:
            return self._engine
        if not self._engine_policies:
            raise PolicyError(f"the policy is {text!r:.80}; allowed is none: no layer of this model keeps KV")
        return self._kv(str(policy), (policy,))

    def _kv(self, name: str, policies: tuple[Policy, ...]) -> PolicyKv:
        return PolicyKv(
            name,
            self._groups(name),
            all(_keys_seen(policy, LONGEST) == LONGEST + 1 for policy in policies),
            any(policy.adaptive for policy in policies),
        )


def _keys_seen(policy: Policy, position: int) -> int:
    """How many keys a query of a prompt sees there."""
    (view,) = policy.views(position, 1)
    return view.keys(position, 0, position + 1)
