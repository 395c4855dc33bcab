"""vLLM with its KV on Lamina's attention workers: an attention backend that sends each layer's q, k and v there.

Blocks, prefix caching, chunked prefill and preemption are vLLM's: its block numbers are the workers'. Its own pages
shrink to a few bytes, so that its scheduler has as many blocks as the workers have memory for.

`LAMINA_ATTENTION_WORKERS` has the workers, "host:port,..." or "local:N". `LAMINA_BEHIND_TLS_DIR` and
`LAMINA_BEHIND_TOKEN_FILE` have what they ask for, `LAMINA_BEHIND_KV_MEMORY` the memory of each local one,
`LAMINA_BEHIND_POLICY` a policy or a policy file, `LAMINA_BEHIND_RECOVERY_TIMEOUT` the seconds that a lost worker is
waited for.

vLLM calls `LaminaImpl.forward` in each layer; where no batch is given it warms up, and nothing is computed.
The client is imported when vLLM sizes its KV, not before: it loads numba, and vLLM looks, when a worker of its own
starts, into all modules there are for kernels, which llvmlite's do not stand.

A model may have several processes, its ranks: each has a part of the workers, for its heads and layers. The scheduler
is in yet another process then, which learns of the workers by the specs of layers that it gets from the ranks
(`LaminaSpec`).

Where a worker is lost, all blocks count as empty: the rest of the step computes nothing of use, the worker is waited
for before the next one, and the scheduler (`_Forgetting`) drops what the step said, forgets every block and computes
all running sequences again. So their texts go on as if nothing had happened. One that does not come back ends the
requests of the step with an error, and those of later ones until it is there.

`customize_spec` is marked as temporary there (vllm-project/vllm, issue 42449): of this module only `LaminaBackend` and
`LaminaSpec` have to follow it.
"""

from __future__ import annotations

import atexit
import dataclasses
import logging
import os
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm import __version__ as vllm_version
from vllm.config import VllmConfig, get_current_vllm_config, get_layers_from_vllm_config
from vllm.distributed.parallel_state import get_tp_group, get_world_group
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheLayout, replace_as

from lamina.behind import SWITCH
from lamina.errors import InvalidRequest, UnsupportedModelError
from lamina_protocols.frames.tensors import FLOAT_NAMES
from lamina_protocols.messages.layers import BlockConfig, LayerSpec
from lamina_workers.devices.staging import staging_for
from lamina_workers.errors import HolderFault, HolderLost

if TYPE_CHECKING:
    from lamina.behind.block_tier import BlockTier, TierWorker

logger = logging.getLogger("vllm.lamina")  # shown as vLLM's own

TRIED = ("0.32",)
"""Versions of vLLM with which the tests of this room pass."""

_LOCAL = "local"  # in the place of a host: workers that are started here
_KV_MEMORY = "LAMINA_BEHIND_KV_MEMORY"
_CORES = os.sched_getaffinity(0)  # as vLLM's process was given them
_ANY = "LAMINA_BEHIND_ANY_VLLM"  # "1": a version that was not tried is used all the same
_RECOVERY_TIMEOUT = "LAMINA_BEHIND_RECOVERY_TIMEOUT"  # seconds for a lost worker to come back
_LINES = 60.0  # seconds between two lines about policies
_CELL = 8  # bytes of vLLM's own memory for a token of a layer: as few as any of its dtypes divides


def install() -> None:
    """Put the backend in the place of vLLM's own for this platform. Raises InvalidRequest for a version of vLLM that
    was not tried."""
    if not vllm_version.startswith(tuple(f"{version}." for version in TRIED) + TRIED) and os.environ.get(_ANY) != "1":
        raise InvalidRequest(
            f"vLLM is {vllm_version}; tried: {', '.join(TRIED)}. Set {_ANY}=1 to use it all the same, or unset {SWITCH}"
        )
    place = f"{__name__}.{LaminaBackend.__qualname__}"
    # The CPU's platform takes no others; those of MLA, so that it is refused.
    for member in ("CPU_ATTN", "CPU_MLA", "AMX_MLA", "CUSTOM"):
        register_backend(AttentionBackendEnum[member], place)


_OWN_FIELDS = ("blocks", "losses")  # of `LaminaSpec`
_NO_ROOM = 1 << 62  # bytes


class LaminaBackend(AttentionBackend):  # type: ignore[misc]  # mypy does not see vLLM, which has an environment of its own
    """Named CPU_ATTN on CPUs, whose platform takes no other; elsewhere `--attention-backend CUSTOM` chooses it."""

    supported_dtypes: ClassVar[list[torch.dtype]] = list(FLOAT_NAMES)
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto"]

    @staticmethod
    def get_name() -> str:
        return "CPU_ATTN" if current_platform.is_cpu() else "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[LaminaImpl]:
        return LaminaImpl

    @staticmethod
    def get_builder_cls() -> type[LaminaMetadataBuilder]:
        return LaminaMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(16)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        return False  # a step is announced by what the host knows of it

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Pages of a few bytes, and as many of them as the workers have memory for."""
        blocks, losses = _Tier.of_model().agreed()
        cells = {"num_head_slots": 1, "state_content_bytes": _CELL}
        return replace_as(spec, LaminaSpec, **cells, blocks=blocks, losses=losses)


@dataclass(frozen=True, kw_only=True)
class LaminaSpec(FullAttentionSpec):  # type: ignore[misc]
    """A layer whose KV is on attention workers. `blocks`: how many they have room for; `losses`: where the ranks count
    lost workers (`_Losses.place`). vLLM's ranks make it, and the process with the scheduler asks it for sizes."""

    blocks: int
    losses: str

    @classmethod
    def merge(cls, specs: list[LaminaSpec]) -> LaminaSpec:
        merged: LaminaSpec = replace_as(
            FullAttentionSpec.merge([replace_as(spec, FullAttentionSpec, drop=_OWN_FIELDS) for spec in specs]),
            cls,
            **{name: getattr(specs[0], name) for name in _OWN_FIELDS},
        )
        return merged

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """vLLM asks this in the process that schedules, before it makes the scheduler; so what that needs is set here:
        as many blocks as there are, where the user has not said how many, and a scheduler that hears of losses."""
        cache, scheduler, model = vllm_config.cache_config, vllm_config.scheduler_config, vllm_config.model_config
        if cache.num_gpu_blocks_override is None:
            cache.num_gpu_blocks_override = self.blocks
            logger.info("%d blocks on the attention workers", self.blocks)
        chosen = scheduler.get_scheduler_cls()
        if not issubclass(chosen, _Forgetting):
            parts = {"losses": _Losses(self.losses)}
            scheduler.scheduler_cls = type("LaminaScheduler", (_Forgetting, chosen), parts)
        blocks = cache.num_gpu_blocks_override - 1  # vLLM keeps one empty
        if blocks * self.block_size >= model.max_model_len:
            return int(super().max_memory_usage_bytes(vllm_config))
        if model.original_max_model_len == -1:  # vLLM looks for the longest that has room
            return _NO_ROOM
        raise InvalidRequest(
            f"a context of {model.max_model_len} tokens, and {blocks} blocks of {self.block_size}; allowed: up to "
            f"{blocks * self.block_size} (--max-model-len), or attention workers with more memory for KV"
        )


@dataclass
class LaminaMetadata:
    """A step that was announced: its tokens, without those that only fill up. None where there is no request."""

    num_actual_tokens: int


class LaminaMetadataBuilder(AttentionMetadataBuilder[LaminaMetadata]):  # type: ignore[misc]
    """Of the layers that share a block table.

    On a GPU, where none of this was run, lengths and blocks are copied from the device: what vLLM has of them on the
    host are upper bounds where it schedules ahead. The host waits for that copy here, so that workers plan a step while
    the GPU computes what comes before its first attention.
    """

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.NEVER
    """Graphs are cut at attention, which exchanges with workers."""

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._table = _Tier.of(vllm_config).add_table(layer_names)
        self._way = staging_for(device)()

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> LaminaMetadata:
        step = common_attn_metadata
        if step.causal is not True:
            raise UnsupportedModelError("attention that is not causal; Lamina's workers attend earlier tokens only")
        starts = step.query_start_loc_cpu[: step.num_reqs + 1].int()
        rows = int(starts.diff().count_nonzero())  # the size of a graph may add rows without tokens after them
        width = -(-step.max_seq_len // self.vllm_config.cache_config.block_size)
        self._way.turn()
        lengths, blocks = (
            self._way.down(x.int()) for x in (step.seq_lens[:rows], step.block_table_tensor[:rows, :width])
        )
        self._way.landed()
        if not blocks[:, :1].any():  # vLLM's null block, which no request has: it warms up, or captures graphs
            return LaminaMetadata(0)
        starts = starts[: rows + 1]
        _Tier.of(self.vllm_config).announce(self._table, starts, lengths, blocks)
        return LaminaMetadata(int(starts[-1]))


class LaminaImpl(AttentionImpl[LaminaMetadata]):  # type: ignore[misc]
    """One layer's attention. What Lamina's workers cannot do is refused by name when the model is built."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
        **further: Any,
    ) -> None:
        config = get_current_vllm_config()
        divided = (f"{kind}_parallel_size" for kind in ("data", "decode_context", "prefill_context"))
        latent, guesses = "kv_lora_rank" in further, config.speculative_config
        refused = {
            "data or context parallelism": any(getattr(config.parallel_config, size) > 1 for size in divided),
            "layers with states (Mamba, GDN) beside attention": config.model_config.is_hybrid,
            "MLA": latent,
            f"layers with {', '.join(further)}": bool(further) and not latent,
            "a draft model's KV": guesses is not None and guesses.uses_draft_kv_cache(),
            "--kv-sharing-fast-prefill": config.cache_config.kv_sharing_fast_prefill,
            "ALiBi": alibi_slopes is not None,
            "attention of an encoder": attn_type != AttentionType.DECODER,
            f"a KV cache in {kv_cache_dtype}": kv_cache_dtype != "auto",
            "images whose tokens attend each other": config.model_config.is_mm_prefix_lm,
            "windows that keep the prompt": config.model_config.rswa_window is not None,
            "micro-batches (--enable-dbo, --ubatch-size)": config.parallel_config.use_ubatching,
        }
        if reasons := [name for name, present in refused.items() if present]:
            raise UnsupportedModelError(
                f"{', '.join(reasons)}: not with {SWITCH}. Unset it to have vLLM keep the KV itself"
            )
        heads = num_kv_heads or num_heads
        self.num_heads, self.head_size, self.scale, self.num_kv_heads = num_heads, head_size, float(scale), heads
        self.spec = LayerSpec(
            0, num_heads, heads, head_size, head_size, float(scale), sliding_window, logits_soft_cap or None
        )
        self.sinks = sinks
        self._host_sinks: torch.Tensor | None = None
        self.target = kv_sharing_target_layer_name
        _Tier.model = config

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """vLLM gives a layer with a window pages of its full size, whatever `customize_spec` says. So all layers count
        as full ones there, and have one block table; the window is the workers', who keep all tokens."""
        if self.sinks is not None:
            self._host_sinks = self.sinks.detach().float().cpu()
        if _Tier.model is not None:
            for layer in get_layers_from_vllm_config(_Tier.model, Attention).values():
                if isinstance(layer.impl, LaminaImpl):
                    layer.sliding_window = None

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,
        attn_metadata: LaminaMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if attn_metadata is None or not attn_metadata.num_actual_tokens:  # vLLM warms up
            return output.zero_()
        n = attn_metadata.num_actual_tokens
        kv = None if key is None or value is None or self.target is not None else (key[:n], value[:n])
        target = output[:n].view(n, -1)
        out = _Tier.present().attend(str(layer.layer_name), query[:n], kv, self._host_sinks, target)
        return output.zero_() if out is None else output


_LOST, _GONE = b"l", b"g"  # kinds of losses: a worker is waited for, or has not come back


class _Losses:
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


class _Forgetting:
    """What Lamina adds to the scheduler of vLLM that the user has chosen."""

    losses: ClassVar[_Losses]
    _answered = 0  # losses after which the sequences were computed again

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        if kinds := self.losses.after(self._answered):
            self._answered += len(kinds)
            logger.warning("all blocks are empty: the running sequences are computed again")
            self.reset_prefix_cache(reset_running_requests=True)  # type: ignore[attr-defined]  # of vLLM's class
            if _GONE in kinds:
                requests = scheduler_output.num_scheduled_tokens
                logger.error("%d requests end, as an attention worker does not come back", len(requests))
                # vLLM ends all that it has noted here with an error, whatever the reason.
                self.grammar_compile_error_reqs.update(requests)  # type: ignore[attr-defined]
        return super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]


class _Tier:
    """The workers of this process, for all layers that it has. They are connected to with the first step, when vLLM has
    said which layers have which block table, and how many blocks there are."""

    model: VllmConfig | None = None  # of the model that was built last
    _only: _Tier | None = None

    def __init__(self, config: VllmConfig) -> None:
        self._config = config
        self._numbers: dict[str, int] = {}  # of the layers
        self._specs: list[LayerSpec] = []
        for name, layer in get_layers_from_vllm_config(config, Attention).items():
            if isinstance(layer.impl, LaminaImpl):
                number = len(self._specs)
                source = number if layer.impl.target is None else self._numbers[layer.impl.target]
                self._specs.append(dataclasses.replace(layer.impl.spec, kv_layer=source))
                self._numbers[name] = number
        self._targets = {spec.kv_layer for number, spec in enumerate(self._specs) if spec.kv_layer != number}
        self._shared: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # k and v of targets in this step
        self._tables: list[list[str]] = []
        self._tier: BlockTier | None = None
        self._broken = False  # a worker is lost; the next step waits for it
        self._recovery_timeout = self._patience = _seconds(_RECOVERY_TIMEOUT, 60.0)
        self._line_at = time.monotonic()  # the last one about policies
        self._ranks = get_world_group()
        self._workers = _workers(self._ranks.rank_in_group, self._ranks.world_size)
        self._agreed: tuple[int, str] | None = None
        self._specs = _with_policies(config, list(self._numbers), self._specs)

    @classmethod
    def of(cls, config: VllmConfig) -> _Tier:
        if cls._only is None or cls._only._config is not config:
            cls._only = _Tier(config)
        return cls._only

    @classmethod
    def present(cls) -> _Tier:
        if cls._only is None:
            raise RuntimeError("a layer's attention before its step was announced")
        return cls._only

    @classmethod
    def of_model(cls) -> _Tier:
        """For the model that was built last."""
        if cls.model is None:
            raise RuntimeError("the sizes of KV before a model")
        return cls.of(cls.model)

    def agreed(self) -> tuple[int, str]:
        """What all ranks know: for how many blocks the workers of each have room, and where losses are counted."""
        if self._agreed is None:
            from lamina.behind.block_tier import room

            self._losses = _Losses()
            answers: list[Any] = [None] * self._ranks.world_size
            answer = room(self._workers, self._holder(0)), self._losses.place
            torch.distributed.all_gather_object(answers, answer, group=self._ranks.cpu_group)
            self._agreed = min(blocks for blocks, _ in answers), answers[0][1]
            self._losses = _Losses(self._agreed[1])
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
                self._losses.add(_GONE)
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
        self._losses.add(_LOST)

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


def _with_policies(config: VllmConfig, names: Sequence[str], specs: Sequence[LayerSpec]) -> list[LayerSpec]:
    """The specs of these layers, with the policies of this rank's KV heads. Raises PolicyError."""
    from lamina.policy_file import head_policies

    layers, heads = config.model_config.get_total_num_hidden_layers(), config.model_config.get_total_num_kv_heads()
    policies = head_policies(os.environ.get("LAMINA_BEHIND_POLICY") or "full", layers, heads, None)
    if policies is None:
        return list(specs)
    group = get_tp_group()
    first = heads * group.rank_in_group // group.world_size
    of_rank = []
    for name, spec in zip(names, specs, strict=True):
        texts = policies[extract_layer_index(name)]
        heads_here = texts[:1] * spec.kv_heads if len(set(texts)) == 1 else texts[first : first + spec.kv_heads]
        of_rank.append(dataclasses.replace(spec, policies=heads_here))
    return of_rank


def _workers(rank: int, ranks: int) -> list[TierWorker]:
    """Those of one rank, of all that `SWITCH` names. Raises InvalidRequest, EngineError."""
    from lamina.behind.block_tier import TierWorker
    from lamina_workers.process.credentials import load_credentials

    text = os.environ[SWITCH]
    kind, _, number = text.partition(":")
    addresses = [address.strip() for address in text.split(",") if address.strip()]
    count = len(addresses)
    if kind == _LOCAL:
        count = int(number) if number.isdecimal() else 0
    if count < ranks:
        raise InvalidRequest(
            f"{SWITCH} is {text!r:.80}, for a model of {ranks} processes; allowed: host:port,... or {_LOCAL}:N, at "
            f"least one worker for each"
        )
    part = range(count * rank // ranks, count * (rank + 1) // ranks)
    if kind == _LOCAL:
        return _local_workers(len(part), count)
    tls, token = (os.environ.get(f"LAMINA_BEHIND_{name}") for name in ("TLS_DIR", "TOKEN_FILE"))
    credentials = load_credentials(tls, token) if tls or token else None
    return [TierWorker(addresses[place], credentials) for place in part]


def _local_workers(number: int, on_host: int) -> list[TierWorker]:
    """So many workers in child processes, of those that start on this host. They end with this process; one that ends
    before is started again, and its `TierWorker` then has the new address."""
    from lamina.behind.block_tier import TierWorker
    from lamina.deploy.local import LocalAttentionWorkers
    from lamina.deploy.worker_events import WorkerAddress
    from lamina.system.machine import kv_share, this_machine
    from lamina.system.text_files import parse_size

    size = os.environ.get(_KV_MEMORY)
    children = LocalAttentionWorkers(
        number,
        kv_memory=parse_size(_KV_MEMORY, size) if size else kv_share(this_machine(), on_host),
        threads=max(1, len(_CORES) // on_host),
    )
    bound = os.sched_getaffinity(0)
    os.sched_setaffinity(0, _CORES)  # vLLM has bound this thread to a core, and its children would have no other
    try:
        addresses = children.start()
    finally:
        os.sched_setaffinity(0, bound)
    atexit.register(children.close)
    workers = {address.at: TierWorker(address.address, address.credentials) for address in addresses}

    def joined(address: WorkerAddress) -> None:
        workers[address.at].address, workers[address.at].credentials = address.address, address.credentials

    children.watch(joined, lambda name: None)
    return list(workers.values())
