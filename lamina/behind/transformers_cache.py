"""transformers with its KV on Lamina's attention workers: `attn_implementation="lamina"` and a `Cache` without KV.

`LaminaCache` gives each row of the batch blocks of its own, announces a forward pass when its first layer attends, and
`_attend` sends each layer's new q, k and v. Padded tokens are not sent: their output is zero, and neither positions in
blocks nor windows count them. So texts of left-padded batches are those of transformers' own attention; a right-padded
prompt has right logits at its own tokens.

transformers asks for masks (`_padding`) before it attends. A mask is compared with that of a causal batch, and what is
left of it is which tokens are padded; so nothing is attended that a model masks.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import causal_mask_function

from lamina.behind.block_tier import BlockTier, TierWorker, room
from lamina.errors import InvalidRequest, UnsupportedModelError
from lamina.policy_file import head_policies
from lamina_protocols.frames.tensors import FLOAT_NAMES
from lamina_protocols.messages.layers import BlockConfig, LayerSpec
from lamina_workers.errors import HolderFault

NAME = "lamina"
"""What `attn_implementation` is."""

_MASK_ROWS = 256  # of a mask that are compared at once
_PATIENCE = 60.0  # seconds for a lost worker to come back


class _Turn(threading.local):
    """Which layer of which cache attends next in this thread: its KV has come, its q has not."""

    cache: LaminaCache | None = None
    layer = 0


_turn = _Turn()


def register() -> None:
    """Have transformers know `attn_implementation="lamina"`. May be called again."""
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _padding)  # without it no mask comes, and padded tokens were attended


class LaminaCache(Cache):  # type: ignore[misc]  # transformers is behind Any
    """The KV of one batch, on attention workers. One thread uses it.

    `workers`: "host:port" each, or `TierWorker`s where credentials are needed; KV heads are dealt among them. `blocks`
    of `page_size` tokens are taken, None: as many as there is memory for. `policy` chooses what is read, as in
    `EngineConfig`: "auto", a text for all heads, or a policy file. `dtype` is that of the stored KV, None: the model's.

    The workers are connected to by the first forward pass, which raises WorkerUnreachable, WorkerRefused and
    InvalidRequest. They serve one cache at a time, until it is closed or dropped; `reset` begins another batch with the
    same. Any pass may raise HolderLost. After an error comes `reset`, which waits for lost workers.
    """

    def __init__(
        self,
        model_config: Any,
        workers: Sequence[str | TierWorker],
        page_size: int = 32,
        blocks: int | None = None,
        policy: str = "full",
        dtype: torch.dtype | None = None,
    ) -> None:
        register()
        config = model_config.get_text_config(decoder=True)
        self._windows = _windows(config)
        self._soft_cap = getattr(config, "attn_logit_softcapping", None)
        super().__init__(layers=[_Layer() for _ in self._windows])
        self._model = str(getattr(config, "name_or_path", "") or config.model_type)
        self._workers = [TierWorker(worker) if isinstance(worker, str) else worker for worker in workers]
        self._page_size, self._blocks, self._policy, self._dtype = page_size, blocks, policy, dtype
        self._tier: BlockTier | None = None
        self._sinks: dict[int, torch.Tensor] = {}  # of layers, on the host
        self._lost = False
        self._forget()

    def _forget(self) -> None:
        if _turn.cache is self:
            _turn.cache = None
        for layer in self.layers:
            layer.count = 0
        self._tokens = torch.empty(0, 0, dtype=torch.bool)  # by row and column: False where padded
        self._rows: list[list[int]] = []  # the blocks of each
        self._free = list(range(self._blocks or 0))
        # Of the step under way, which tokens of its rows and columns are sent, None: all.
        self._sent: torch.Tensor | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The new tokens alone, which is all that `_attend` gets."""
        if _turn.cache is self:
            raise InvalidRequest(
                f'a LaminaCache of a model whose attn_implementation is another; allowed: "{NAME}", then `reset()`'
            )
        self.layers[layer_idx].update(key_states, value_states)
        _turn.cache, _turn.layer = self, layer_idx
        return key_states, value_states

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        padding: Padding,
        scale: float,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """The output `[batch, columns, heads, d_v]` of q `[batch, heads, columns, d_k]`, k and v of the new columns."""
        tier = self._tier = self._tier or self._connected(q, k, v, scale)
        spec = tier.holder.layers[layer]
        shape = (q.shape[1], k.shape[1], k.shape[3], v.shape[3])
        if shape != (spec.heads, spec.kv_heads, spec.d_k, spec.d_v):
            raise UnsupportedModelError(
                f"layer {layer} has (heads, KV heads, d_k, d_v) {shape}, the first one "
                f"{(spec.heads, spec.kv_heads, spec.d_k, spec.d_v)}; allowed: the same in all layers"
            )
        if padding.window != spec.window:
            raise UnsupportedModelError(
                f"layer {layer} has a mask of window {padding.window}; allowed: {spec.window}, as the config has it"
            )
        try:
            if self.layers[layer].count > self._tokens.shape[1]:
                self._begin(tier, padding, *k.shape[0::2])
            if sinks is not None and layer not in self._sinks:
                self._sinks[layer] = sinks.detach().float().cpu()
            scaled = q if scale == spec.scale else q * (scale / spec.scale)
            sinks = self._sinks.get(layer)
            flat_q, flat_k, flat_v = (part.transpose(1, 2).flatten(0, 1) for part in (scaled, k, v))
            width = spec.heads * spec.d_v
            if self._sent is None:
                out = tier.attend(layer, flat_q, flat_k, flat_v, sinks, q.new_empty(len(flat_q), width))
            else:
                out = q.new_zeros(len(flat_q), width)
            if self._sent is not None and len(self._sent):
                sent = self._sent = self._sent.to(q.device)
                flat_q, flat_k, flat_v = (part.index_select(0, sent) for part in (flat_q, flat_k, flat_v))
                out.index_copy_(0, sent, tier.attend(layer, flat_q, flat_k, flat_v, sinks))
            return out.view(q.shape[0], q.shape[2], spec.heads, spec.d_v)
        except HolderFault:
            self._lost = True
            raise

    def _connected(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> BlockTier:
        if others := {q.dtype, self._dtype or q.dtype} - set(FLOAT_NAMES):
            raise InvalidRequest(f"a model or cache in {others}; allowed: {', '.join(FLOAT_NAMES.values())}")
        shape = (q.shape[1], k.shape[1], k.shape[3], v.shape[3], scale)
        policies = head_policies(self._policy, len(self._windows), k.shape[1], None) or ((),) * len(self._windows)
        specs = [
            LayerSpec(layer, *shape, window, self._soft_cap, policies=policies[layer])
            for layer, window in enumerate(self._windows)
        ]
        stored = FLOAT_NAMES[self._dtype or q.dtype]
        tables = (0,) * len(specs)
        holder = BlockConfig(tuple(specs), self._page_size, stored, 0, blocks=self._blocks or 1, tables=tables)
        if self._blocks is None:
            self._blocks = room(self._workers, holder)
            self._free = list(range(self._blocks))
            holder = BlockConfig(tuple(specs), self._page_size, stored, 0, blocks=self._blocks, tables=tables)
        tier = BlockTier(self._workers, holder, FLOAT_NAMES[q.dtype], self._model)
        self._close = weakref.finalize(self, tier.close)
        return tier

    def _begin(self, tier: BlockTier, padding: Padding, batch: int, columns: int) -> None:
        """Give the new tokens of each row blocks, and announce them."""
        past = self._tokens.shape[1]
        tokens = torch.ones(batch, past + columns, dtype=torch.bool) if padding.tokens is None else padding.tokens
        if tokens.shape != (batch, past + columns):
            raise InvalidRequest(
                f"attention_mask has shape {tuple(tokens.shape)}; allowed: {(batch, past + columns)}, all tokens so far"
            )
        if past and (batch != len(self._rows) or not torch.equal(tokens[:, :past], self._tokens)):
            raise InvalidRequest(
                f"a batch of {batch} that goes on otherwise than the cache's of {len(self._rows)}; allowed: the same "
                "rows with the same padding, or `reset()` first"
            )
        rows = self._rows or [[] for _ in range(batch)]
        lengths, counts = tokens.sum(1).tolist(), tokens[:, past:].sum(1).tolist()
        needs = [-(-length // self._page_size) - len(blocks) for length, blocks in zip(lengths, rows, strict=True)]
        if sum(needs) > len(self._free):
            raise InvalidRequest(
                f"{sum(needs)} more blocks of {self._page_size} tokens for sequences of {lengths} tokens; "
                f"free: {len(self._free)} of {self._blocks}"
            )
        for blocks, need in zip(rows, needs, strict=True):
            blocks += [self._free.pop() for _ in range(need)]
        self._rows, self._tokens = rows, tokens
        fresh = tokens[:, past:]
        self._sent = None if fresh.all() else fresh.flatten().nonzero().view(-1)
        going = [row for row, count in enumerate(counts) if count]
        if not going:
            return
        width = max(len(rows[row]) for row in going)
        starts = torch.tensor([0, *(counts[row] for row in going)]).cumsum(0).int()
        table = torch.tensor([rows[row] + [-1] * (width - len(rows[row])) for row in going], dtype=torch.int32)
        tier.announce(0, starts, torch.tensor([lengths[row] for row in going], dtype=torch.int32), table)

    def crop(self, tokens_to_remove: int) -> None:
        """Cut -`tokens_to_remove` columns, as a rejected draft wants it."""
        if tokens_to_remove > 0:
            raise InvalidRequest(f"crop({tokens_to_remove}); allowed: 0, or minus the number of tokens to remove")
        columns = max(0, self._tokens.shape[1] + tokens_to_remove)
        self._tokens = self._tokens[:, :columns]
        for layer in self.layers:
            layer.count = columns
        for blocks, length in zip(self._rows, self._tokens.sum(1).tolist(), strict=True):
            first = -(-length // self._page_size)
            self._free += blocks[first:]
            del blocks[first:]

    def reset(self) -> None:
        """Forget all tokens; the next forward pass begins another batch. Raises HolderLost."""
        self._forget()
        if self._lost and self._tier is not None:
            self._tier.restore(_PATIENCE)
        self._lost = False

    def savings(self) -> dict[str, float]:
        """What the policy has read and missed so far, in shares as `Completion.stats` has them; empty without one."""
        return {} if self._tier is None else self._tier.savings()

    def close(self) -> None:
        """Let the workers go; as when nobody holds the cache any more."""
        if self._tier is not None:
            self._close()

    def reorder_cache(self, beam_idx: torch.Tensor) -> NoReturn:
        raise _no_beams("reorder_cache")

    def batch_repeat_interleave(self, repeats: int) -> NoReturn:
        raise _no_beams("batch_repeat_interleave")

    def batch_select_indices(self, indices: torch.Tensor) -> NoReturn:
        raise _no_beams("batch_select_indices")


class _Layer(CacheLayerMixin):  # type: ignore[misc]
    """Counts the columns that a layer has seen."""

    is_sliding, is_croppable, supports_early_init = False, True, False

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.is_initialized = True
        self.count += key_states.shape[-2]
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.count + query_length, 0

    def get_seq_length(self) -> int:
        return self.count

    def get_max_length(self) -> int:
        return -1


@dataclass(frozen=True, slots=True)
class Padding:
    """What is left of a causal mask. `tokens` `[batch, columns]`, on the host, is False where padded; None: nowhere."""

    tokens: torch.Tensor | None
    window: int | None


def _padding(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., torch.Tensor] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_: Any,
) -> Padding:
    """In the place of `sdpa_mask`, whose arguments these are. Raises UnsupportedModelError for what is not causal."""
    if use_vmap:
        raise UnsupportedModelError("a causal mask that the model adds to; allowed: causal masks with padding")
    if mask_function is not causal_mask_function:
        keys = (torch.arange(kv_length, device=device) + kv_offset)[None, None, None]
        batch = torch.arange(batch_size, device=device)[:, None, None, None]
        for queries in (torch.arange(q_length, device=device) + q_offset)[None, None, :, None].split(_MASK_ROWS, 2):
            distance = queries - keys
            expected = (distance >= 0) & (distance < (local_size or q_offset + q_length))
            if (mask_function(batch, torch.zeros_like(batch[:1]), queries, keys) != expected).any():
                raise UnsupportedModelError(
                    "a mask that is not causal, perhaps of an encoder, chunks or packed sequences; allowed: causal "
                    "masks with padding and sliding windows"
                )
    return Padding(None if attention_mask is None else attention_mask.bool().cpu(), local_size)


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    cache, _turn.cache = _turn.cache, None
    if cache is None:
        raise InvalidRequest(
            f'attn_implementation="{NAME}" in a layer without KV of its own, or without cache=LaminaCache(...);'
            " allowed: decoders each of whose layers has KV, with a LaminaCache"
        )
    refused = {
        "a mask of the caller's own": not isinstance(attention_mask, Padding),
        "attention that is not causal": kwargs.get("is_causal") is False,
        "position biases": kwargs.get("position_bias") is not None,
        "dropout": bool(dropout),
        "gradients": query.requires_grad,
        f"a soft cap of {softcap}, of which the config has {cache._soft_cap}": softcap != cache._soft_cap,
    }
    if reasons := [name for name, present in refused.items() if present]:
        raise InvalidRequest(
            f'attn_implementation="{NAME}" with {", ".join(reasons)}; allowed: causal attention of a batch '
            "with padding (attention_mask [batch, tokens]) under torch.inference_mode"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    return cache.attend(_turn.layer, query, key, value, attention_mask, scale, s_aux), None


def _windows(config: Any) -> list[int | None]:
    """The sliding window of each layer, as `DynamicCache` reads them."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if types is None:
        chunks = getattr(config, "attention_chunk_size", None)
        kind = "sliding_attention" if window else "chunked_attention" if chunks else "full_attention"
        types = [kind] * config.num_hidden_layers
    if others := sorted(set(types) - {"full_attention", "sliding_attention"}):
        raise UnsupportedModelError(
            f"layers of {', '.join(others)} in a {config.model_type}; allowed: full_attention, sliding_attention"
        )
    return [window if kind == "sliding_attention" else None for kind in types]


def _no_beams(method: str) -> InvalidRequest:
    return InvalidRequest(
        f"{method}, as for beams: a row keeps its place in a LaminaCache; allowed: greedy search and sampling "
        "(num_beams=1), assisted generation"
    )
