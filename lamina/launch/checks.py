"""What is said of a config once the model and the machines are known, when an engine starts.

`unused_options` names what was asked for and does nothing with them, `cut_options` what is less than was asked for.
`check_redundancy` refuses a redundancy that the model or the attention workers cannot have.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from lamina.config import EngineConfig
from lamina.errors import InvalidRequest
from lamina.kv.placement import Placement
from lamina.kv.request import SchedulerConfig
from lamina_protocols.messages.layers import STATES, HolderConfig, LayerSpec
from lamina_protocols.messages.pools import pools
from lamina_workers.policies.catalogue import parse
from lamina_workers.policies.policy import LONGEST

_FOR_ATTENTION_WORKERS = (
    *("shard", "local_share", "kv_local", "query_first", "worker_timeout", "recovery_timeout"),
    *("local_channel", "data_channel", "tls_dir", "token_file"),
)
_DEFAULTS = {field.name: field.default for field in fields(EngineConfig)}


def unused_options(config: EngineConfig, holder: HolderConfig, relayed: bool = False) -> Iterator[str]:
    """A sentence for each option that was given in vain; `holder` is what the model's KV is kept by. `relayed`: there
    are attention workers that the config does not name."""
    changed = {name for name, default in _DEFAULTS.items() if getattr(config, name) != default}
    if config.deterministic:
        changed -= {"local_share", "query_first"}  # they follow from it
    workers = config.attention_workers or config.autoscale or relayed
    if not workers and config.cluster is None:
        for name in _FOR_ATTENTION_WORKERS:
            if name in changed:
                yield f"{name}={getattr(config, name)!r:.80} does nothing without attention_workers"
    if "num_speculative_tokens" in changed and config.speculate is None:
        yield f"num_speculative_tokens={config.num_speculative_tokens} does nothing without speculate"
    if "kv_resident" in changed and config.kv_cold is None:
        yield f"kv_resident={config.kv_resident} does nothing without kv_cold"
    if "model_parallel" in changed and config.model_workers == 1:
        yield f"model_parallel={config.model_parallel!r} does nothing with one model worker"
    if "sequence_tokens" in changed and len(pools(holder)) == 1:
        yield f"sequence_tokens={config.sequence_tokens} does nothing with this model: its layers keep the same"
    if "worker_linger" in changed and config.journal is None and config.ranks == 1:
        yield f"worker_linger={config.worker_linger:g} does nothing without a journal"
    if all(spec.kind in STATES for spec in holder.layers):
        for name in ("policy", "sketches", "kv_dtype", "kv_cold", "autoscale", "shard"):
            if name in changed and (name != "shard" or workers):
                yield f"{name}={str(getattr(config, name))!r:.80} does nothing with this model: no layer keeps KV"
    if config.sketches and any(spec.index for spec in holder.layers):
        yield "sketches=True does nothing with this model: an index of its own chooses what is read"
    policies = [parse(text) for text in dict.fromkeys(text for spec in holder.layers for text in spec.policies)]
    if config.speculate is not None and any(policy.adaptive for policy in policies):
        what = f"policy={str(config.policy)!r:.80}, which chooses keys for one token at a time"
        yield f"speculate={str(config.speculate)!r:.80} does nothing for requests under {what}"
    narrow = [spec for spec in holder.layers if spec.window is not None and spec.policies]
    if narrow:
        adaptive = sum(any(parse(text).adaptive for text in spec.policies) for spec in narrow)
        unseen = sum(map(_changes_nothing, narrow))
        what = f"policy={str(config.policy)!r:.80}"
        every = len(holder.layers)
        if unseen:
            yield f"{what} changes nothing in {unseen} of {every} layers: their own windows are as narrow"
        if adaptive:
            others = "and chooses in the others" if adaptive < every else "so it chooses nothing"
            yield f"{what} reads all of the model's own window in {adaptive} of {every} layers, {others}"
        if unseen + adaptive < len(narrow):
            narrowed = len(narrow) - unseen - adaptive
            yield f"{what} hides some of the model's own window, sinks too, in {narrowed} of {every} layers"


def cut_options(config: EngineConfig, limits: SchedulerConfig) -> Iterator[str]:
    """A sentence for each option beyond what the frames of a batch carry with this model: it is cut to that."""
    tokens, rows = limits.max_batch_tokens, limits.max_sequences
    cuts = [("max_batch_tokens", tokens)]
    if rows < tokens:  # else the tokens of a batch are what bounds them
        cuts.append(("max_num_seqs", rows))
    for name, cut in cuts:
        if (getattr(config, name) or 0) > cut:
            yield f"{name}={getattr(config, name)} is cut to {cut}, as many as the frames of a batch carry"
    if limits.max_drafts < config.most_drafts:
        yield (
            f"num_speculative_tokens={config.most_drafts} is cut to {limits.max_drafts}: a page of this model's states "
            "keeps the inputs of no more"
        )


def _changes_nothing(spec: LayerSpec) -> bool:
    """Whether no policy of the layer hides anything that its window shows."""
    policies = [parse(text) for text in spec.policies]
    if spec.window is None or any(policy.adaptive for policy in policies):
        return False
    views = (next(policy.within(spec.window).views(LONGEST, 1)) for policy in policies)
    return all(view.seen(LONGEST)[-1][0] <= LONGEST - spec.window + 1 for view in views)


def check_redundancy(config: EngineConfig, limits: SchedulerConfig, placement: Placement, workers: bool) -> None:
    """Raise InvalidRequest where spares could never be kept; `workers`: whether there are attention workers."""
    if not limits.redundancy:
        return
    option = f'redundancy is "{limits.redundancy}"'
    if not workers:
        raise InvalidRequest(
            f"{option} with attention_workers={config.attention_workers!r:.80}: the engine's own process is the only "
            'place for KV; allowed are "none", or attention workers'
        )
    if limits.states:
        raise InvalidRequest(
            f"{option}, but {len(limits.states)} pools of this model have recurrent states, of which each token "
            'changes all; allowed with such a model is "none"'
        )
    if not limits.unbounded(""):
        why = "windows of the model's own" if config.policy is None else f"policy={str(config.policy)!r:.80}"
        raise InvalidRequest(
            f"{option} with {why}, by which heads let go of KV that a lost part would be computed from; allowed are "
            '"none", or a policy that keeps everything'
        )
    layouts = {h.page_layout: f"{h.name} ({h.page_layout})" for h in placement.holders.values() if h.name}
    if limits.redundancy.kind == "parity" and len(layouts) > 1:
        raise InvalidRequest(
            f"{option}, but attention workers lay out their pages differently, so their bytes cannot be XORed: "
            f'{" and ".join(layouts.values())}; use "replica", or workers of one kind'
        )
