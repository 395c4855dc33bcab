"""Attention as transformers' models call it, given to whoever runs the model.

Every model whose code goes through transformers' attention interface calls `attend` in place of an attention of its
own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from lamina_workers.errors import UnsupportedModelError

T = TypeVar("T")
NAME, MASKED = "lamina", "lamina_masked"
"""Under which `attend` is registered: without masks, and with those of `masked_as`."""

_IGNORED = {
    "dropout",  # 0 in inference
    "position_ids", "cache_position", "use_cache", "logits_to_keep", "output_attentions", "output_hidden_states",
    "output_router_logits", "return_dict", "layer_idx", "past_key_values", "num_items_in_batch",
}  # fmt: skip
"""What models pass on to attention that changes nothing in it."""


@dataclass(frozen=True, slots=True)
class Mask:
    """Which keys a query at p sees: those in (p - window, p], or of the chunk of `chunk` positions that p is in."""

    window: int | None = None
    chunk: int | None = None


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """One call. q: `[1, heads, T, d_k]`, k: `[1, kv_heads, T, d_k]`, v: `[1, kv_heads, T, d_v]`; sinks: `[heads]`.

    `layer` is the number that the calling module gives itself. `mask` is what the model made of its own masks, or None.
    """

    layer: int | None
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float
    window: int | None
    soft_cap: float | None
    sinks: torch.Tensor | None
    mask: Mask | None = None


Attend = Callable[[AttentionCall], torch.Tensor]
"""Gives the attention output, `[1, T, heads, d_v]`."""

_handler: ContextVar[Attend] = ContextVar("lamina_attention")
_masks: ContextVar[dict[int, tuple[torch.Tensor, Mask | UnsupportedModelError]] | None] = ContextVar(
    "lamina_masks", default=None
)


@contextmanager
def having(variable: ContextVar[T], value: T) -> Iterator[None]:
    """In here, on this thread and in this greenlet, the variable has this value."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def attention_by(handler: Attend) -> AbstractContextManager[None]:
    """Models that run in here, on this thread and in this greenlet, call `handler`."""
    return having(_handler, handler)


def masks_seen() -> AbstractContextManager[None]:
    """In here masks are made, and known again where they come to attention."""
    return having(_masks, {})


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls. Raises UnsupportedModelError for what Lamina's attention does not do."""
    causal = options.pop("is_causal", None)
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        raise UnsupportedModelError(f"the attention of {type(module).__name__} is not causal")
    scale = options.pop("scaling", None)
    window, soft_cap = options.pop("sliding_window", None), options.pop("softcap", None)
    sinks = options.pop("s_aux", None)
    _refuse_unknown(module, options)
    call = AttentionCall(
        layer=getattr(module, "layer_idx", None),
        q=query,
        k=key,
        v=value,
        scale=float(query.shape[-1] ** -0.5 if scale is None else scale),
        window=window,
        soft_cap=soft_cap,
        sinks=sinks,
        mask=_known(module, attention_mask),
    )
    return _handler.get()(call), None


def masked_as(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    **options: Any,
) -> torch.Tensor | None:
    """What transformers calls for a mask. A placeholder, known again by `attend`."""
    masks = _masks.get()
    if masks is None or mask_function is None:
        return None
    placeholder = torch.empty(batch_size, 1, q_length, kv_length, dtype=torch.bool, device="meta")
    mask: Mask | UnsupportedModelError
    try:
        mask = _mask_of(mask_function)
    except UnsupportedModelError as error:  # it may be one that no layer takes
        mask = error
    except (RuntimeError, IndexError, TypeError, NotImplementedError) as error:
        local = options.get("local_size")
        mask = UnsupportedModelError(f"a layer's mask depends on more than positions: {error}")
        if isinstance(local, int):
            mask = Mask(chunk=local)  # up to so many positions it is causal
    masks[placeholder.untyped_storage()._cdata] = placeholder, mask
    return placeholder


def _refuse_unknown(module: torch.nn.Module, options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        if value is not None and value is not False and name not in _IGNORED:
            raise UnsupportedModelError(
                f"{type(module).__name__} gives its attention {name!r}, which Lamina's attention does not know"
            )


def _known(module: torch.nn.Module, mask: torch.Tensor | None) -> Mask | None:
    if mask is None:
        return None
    entry = (_masks.get() or {}).get(mask.untyped_storage()._cdata)  # Gemma 4 gives all of it, a view
    if entry is None or (mask.shape, mask.stride()) != (entry[0].shape, entry[0].stride()):
        raise UnsupportedModelError(f"{type(module).__name__} gives its attention a mask that its own code has made")
    if isinstance(entry[1], UnsupportedModelError):
        raise entry[1]
    return entry[1]


def _mask_of(sees: Callable[..., Any]) -> Mask:
    """Probe a mask function `(batch, head, query, key) -> bool`."""

    def visible(q: int, k: int) -> bool:
        return bool(sees(0, 0, torch.tensor(q), torch.tensor(k)))

    far = 1 << 24
    if visible(3, 4) or not (visible(0, 0) and visible(far, far)):
        raise UnsupportedModelError("a layer's mask is not causal")
    if visible(far, 0):
        return Mask()
    low, high = 0, far  # the last query that sees key 0, the first that does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if visible(middle, 0) else (low, middle)
    if all(visible(high + n, n + 1) and not visible(high + n, n) for n in range(4)):
        return Mask(window=high)
    if not visible(high, high - 1) and visible(2 * high - 1, high) and not visible(2 * high, 2 * high - 1):
        return Mask(chunk=high)
    raise UnsupportedModelError("a layer's mask is neither causal nor a window")
