"""vLLM with its KV on Lamina's attention workers: an attention backend that sends each layer's q, k and v there.

Blocks, prefix caching, chunked prefill and preemption are vLLM's: its block numbers are the workers'. Its own pages
shrink to a few bytes, so that its scheduler has as many blocks as the workers have memory for.

vLLM calls `LaminaImpl.forward` in each layer; where no batch is given it warms up, and nothing is computed. What goes
to workers goes by the process's `VllmTier`. A model may have several processes, its ranks: each has a part of the
workers, for its heads and layers. The scheduler is in yet another one then, which learns of the workers by the specs of
layers that it gets from the ranks (`LaminaSpec`).

Where a worker is lost, all blocks count as empty: the rest of the step computes nothing of use, the worker is waited
for before the next one, and the scheduler (`_Forgetting`) drops what the step said, forgets every block and computes
all running sequences again. So their texts go on as if nothing had happened. One that does not come back ends the
requests of the step with an error, and those of later ones until it is there.

`customize_spec` is marked as temporary there (vllm-project/vllm, issue 42449): of this module only `LaminaBackend` and
`LaminaSpec` have to follow it.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm import __version__ as vllm_version
from vllm.config import VllmConfig, get_current_vllm_config, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
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
from lamina.behind.vllm_tier import GONE, Losses, TierLayer, VllmTier
from lamina.errors import InvalidRequest, UnsupportedModelError
from lamina_protocols.frames.tensors import FLOAT_NAMES
from lamina_protocols.messages.layers import LayerSpec
from lamina_workers.devices.staging import staging_for

logger = logging.getLogger("vllm.lamina")  # shown as vLLM's own

TRIED = ("0.32",)
"""Versions of vLLM with which the tests of this room pass."""

_ANY = "LAMINA_BEHIND_ANY_VLLM"  # "1": a version that was not tried is used all the same
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
        blocks, losses = _tier(LaminaImpl.model).agreed()
        cells = {"num_head_slots": 1, "state_content_bytes": _CELL}
        return replace_as(spec, LaminaSpec, **cells, blocks=blocks, losses=losses)


@dataclass(frozen=True, kw_only=True)
class LaminaSpec(FullAttentionSpec):  # type: ignore[misc]
    """A layer whose KV is on attention workers. `blocks`: how many they have room for; `losses`: where the ranks count
    lost workers (`Losses.place`). vLLM's ranks make it, and the process with the scheduler asks it for sizes."""

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
            parts = {"losses": Losses(self.losses)}
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
        self._tier = _tier(vllm_config)
        self._table = self._tier.add_table(layer_names)
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
        self._tier.announce(self._table, starts, lengths, blocks)
        return LaminaMetadata(int(starts[-1]))


class LaminaImpl(AttentionImpl[LaminaMetadata]):  # type: ignore[misc]
    """One layer's attention. What Lamina's workers cannot do is refused by name when the model is built."""

    model: ClassVar[VllmConfig]
    """Of the model that was built last."""

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
        LaminaImpl.model = config

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """vLLM gives a layer with a window pages of its full size, whatever `customize_spec` says. So all layers count
        as full ones there, and have one block table; the window is the workers', who keep all tokens."""
        if self.sinks is not None:
            self._host_sinks = self.sinks.detach().float().cpu()
        for layer in _layers(LaminaImpl.model).values():
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
        out = VllmTier.present().attend(str(layer.layer_name), query[:n], kv, self._host_sinks, target)
        return output.zero_() if out is None else output


class _Forgetting:
    """What Lamina adds to the scheduler of vLLM that the user has chosen."""

    losses: ClassVar[Losses]
    _answered = 0  # losses after which the sequences were computed again

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        if kinds := self.losses.after(self._answered):
            self._answered += len(kinds)
            logger.warning("all blocks are empty: the running sequences are computed again")
            self.reset_prefix_cache(reset_running_requests=True)  # type: ignore[attr-defined]  # of vLLM's class
            if GONE in kinds:
                requests = scheduler_output.num_scheduled_tokens
                logger.error("%d requests end, as an attention worker does not come back", len(requests))
                # vLLM ends all that it has noted here with an error, whatever the reason.
                self.grammar_compile_error_reqs.update(requests)  # type: ignore[attr-defined]
        return super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]


def _layers(config: VllmConfig) -> dict[str, Any]:
    """The layers of a model whose attention is Lamina's, by their names."""
    layers = get_layers_from_vllm_config(config, Attention)
    return {name: layer for name, layer in layers.items() if isinstance(layer.impl, LaminaImpl)}


def _tier(config: VllmConfig) -> VllmTier:
    return VllmTier.of(
        config, {name: TierLayer(layer.impl.spec, layer.impl.target) for name, layer in _layers(config).items()}
    )
