"""What was asked for and does nothing with this model on these machines, to be said once when an engine starts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from lamina.config import EngineConfig
from lamina_protocols.layers import STATES, HolderConfig, LayerSpec
from lamina_protocols.pools import pools
from lamina_workers.policies.catalogue import parse
from lamina_workers.policies.policy import LONGEST

_FOR_ATTENTION_WORKERS = (
    *("shard", "local_share", "query_first", "worker_timeout", "recovery_timeout"),
    *("local_channel", "data_channel", "tls_dir", "token_file"),
)
_DEFAULTS = {field.name: field.default for field in fields(EngineConfig)}


def unused_options(config: EngineConfig, holder: HolderConfig) -> Iterator[str]:
    """A sentence for each option that was given in vain; `holder` is what the model's KV is kept by."""
    given = {name for name, default in _DEFAULTS.items() if getattr(config, name) != default}
    if config.deterministic:
        given -= {"local_share", "query_first"}  # they follow from it
    if not config.attention_workers and config.cluster is None:
        for name in _FOR_ATTENTION_WORKERS:
            if name in given:
                yield f"{name}={getattr(config, name)!r:.80} does nothing without attention_workers"
    if "num_speculative_tokens" in given and config.speculate is None:
        yield f"num_speculative_tokens={config.num_speculative_tokens} does nothing without speculate"
    if "model_parallel" in given and config.model_workers == 1:
        yield f"model_parallel={config.model_parallel!r} does nothing with one model worker"
    if "sequence_tokens" in given and len(pools(holder)) == 1:
        yield f"sequence_tokens={config.sequence_tokens} does nothing with this model: its layers keep the same"
    if "worker_linger" in given and not config.linger:
        yield f"worker_linger={config.worker_linger:g} does nothing without a journal"
    if all(spec.kind in STATES for spec in holder.layers):
        for name in ("policy", "kv_dtype", "shard"):
            if name in given and (name != "shard" or config.attention_workers):
                yield f"{name}={str(getattr(config, name))!r:.80} does nothing with this model: no layer keeps KV"
    narrow = [spec for spec in holder.layers if spec.window is not None and spec.policies]
    if narrow:
        unseen = sum(map(_changes_nothing, narrow))
        what = f"policy={str(config.policy)!r:.80}"
        every = len(holder.layers)
        if unseen:
            yield f"{what} changes nothing in {unseen} of {every} layers: their own windows are as narrow"
        if unseen < len(narrow):
            yield f"{what} chooses within the model's own window in {len(narrow) - unseen} of {every} layers"


def _changes_nothing(spec: LayerSpec) -> bool:
    """Whether no policy of the layer hides anything that its window shows."""
    policies = [parse(text) for text in spec.policies]
    if spec.window is None or any(policy.adaptive for policy in policies):
        return False
    return all(LONGEST - policy.seen_from(LONGEST) + 1 >= spec.window for policy in policies)
