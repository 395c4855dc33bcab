"""Whether the redundancy that a config asks for is possible with this model and these attention workers."""

from __future__ import annotations

from lamina.config import EngineConfig
from lamina.errors import InvalidRequest
from lamina.kv.placement import Placement
from lamina.kv.request import SchedulerConfig


def check_redundancy(config: EngineConfig, limits: SchedulerConfig, placement: Placement, workers: bool) -> None:
    """Raise InvalidRequest where spares could never be kept; `workers`: whether there are attention workers."""
    if not limits.redundancy:
        return
    asked = f'redundancy is "{limits.redundancy}"'
    if not workers:
        raise InvalidRequest(
            f"{asked} with attention_workers={config.attention_workers!r:.80}: the engine's own process is the only "
            'holder of KV; allowed are "none", or attention workers'
        )
    if limits.states:
        raise InvalidRequest(
            f"{asked}, but {len(limits.states)} pools of this model have recurrent states, of which each token changes "
            'all; allowed with such a model is "none"'
        )
    if not limits.unbounded(""):
        why = "windows of the model's own" if config.policy is None else f"policy={str(config.policy)!r:.80}"
        raise InvalidRequest(
            f"{asked} with {why}, by which heads let go of KV that a lost part would be computed from; allowed are "
            '"none", or a policy that keeps everything'
        )
    layouts = {h.page_layout: f"{h.name} ({h.page_layout})" for h in placement.holders.values() if h.name}
    if limits.redundancy.kind == "parity" and len(layouts) > 1:
        raise InvalidRequest(
            f"{asked}, but attention workers lay out their pages differently, so their bytes cannot be XORed: "
            f'{" and ".join(layouts.values())}; use "replica", or workers of one kind'
        )
