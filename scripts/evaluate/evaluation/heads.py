"""What each head returned in decode, beside exact attention over the same queries, keys and values.

The exact side is computed in float32 from what the model itself made in this run. Differences of earlier layers are in
both, so each head is judged alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lamina.measure.probe import Probe
from lamina_protocols.messages.layers import HolderConfig
from lamina_workers.kv_pages.head_policies import HeadPolicies
from lamina_workers.policies.policy import Policy

from .measures import cosine, exact_attention, relative_error
from .running import Progress


@dataclass(frozen=True, slots=True)
class Fidelity:
    """Means over steps, float32 `[layers, heads]`, of query heads.

    `cosine` and `error` (relative, L2) are of the head's output; `mass` is the attention mass of the keys that it saw,
    NaN for policies that choose: only the holder knows which keys.
    """

    cosine: torch.Tensor
    error: torch.Tensor
    mass: torch.Tensor

    def as_json(self) -> dict[str, Any]:
        """Each as `[layers][heads]`, null where nothing is known."""
        return {
            name: [[None if x != x else round(x, 6) for x in row] for row in getattr(self, name).tolist()]
            for name in ("cosine", "error", "mass")
        }


def read_heads(probe: Probe, text: Sequence[int], steps: int, progress: Progress, chunk: int = 1024) -> Fidelity:
    """Prefill `text` but its last `steps` tokens, feed these, and compare what every layer returns in each step."""
    recorder = _Recorder(probe.holder, HeadPolicies.of(probe.holder), len(text))
    handle = probe.open()
    prompt = text[:-steps]
    probe.prefill(handle, prompt, chunk, recorder.tap)
    progress(len(prompt))
    for token in text[-steps:]:
        probe.step([(handle, token)], recorder.tap, recorder.outcome)
        progress(1)
    probe.close(handle)
    return recorder.fidelity(steps)


def seen(policy: Policy, keys: int) -> torch.Tensor | None:
    """Which of `keys` keys the query of the last one sees in decode, bool `[keys]`; None where that depends on more
    than positions."""
    if policy.adaptive:
        return None
    (view,) = policy.views(keys - 1, 1)
    visible = torch.zeros(keys, dtype=torch.bool)
    for first, end in view.seen(keys - 1):
        visible[first:end] = True
    return visible


@dataclass(slots=True)
class _Recorder:
    """Keeps keys and values of all layers, and compares at once what a step returns."""

    holder: HolderConfig
    policies: HeadPolicies
    tokens: int
    _keys: dict[int, torch.Tensor] = field(default_factory=dict)  # by layer, [tokens, kv_heads, d_k]
    _values: dict[int, torch.Tensor] = field(default_factory=dict)  # [tokens, kv_heads, d_v]
    _lengths: dict[int, int] = field(default_factory=dict)
    _query: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # [heads, d_k], of the layer at work
    _sums: dict[int, torch.Tensor] = field(default_factory=dict)  # by layer, [3, heads]: cosine, error, mass

    def tap(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        if layer not in self._keys:
            self._keys[layer] = torch.empty(self.tokens, *k.shape[1:], dtype=k.dtype)
            self._values[layer] = torch.empty(self.tokens, *v.shape[1:], dtype=v.dtype)
        at = self._lengths.get(layer, 0)
        self._keys[layer][at : at + len(k)] = k
        self._values[layer][at : at + len(v)] = v
        self._lengths[layer] = at + len(k)
        self._query = q[-1].clone()

    def outcome(self, layer: int, attended: torch.Tensor) -> None:
        spec, n = self.holder.layers[layer], self._lengths[layer]
        of = spec.kv_layer
        exact, weights = exact_attention(
            self._query, self._keys[of][:n], self._values[of][:n], spec.scale, spec.window, spec.soft_cap
        )
        out = attended[-1].reshape(spec.heads, -1)
        masks = [seen(policy, n) for policy in self.policies.reads[layer]]
        mass = torch.stack(
            [
                torch.tensor(torch.nan) if (mask := masks[head // spec.group]) is None else weights[head][mask].sum()
                for head in range(spec.heads)
            ]
        )
        found = torch.stack([cosine(exact, out), relative_error(exact, out), mass])
        self._sums[layer] = self._sums.get(layer, torch.zeros_like(found)) + found

    def fidelity(self, steps: int) -> Fidelity:
        means = torch.stack([self._sums[layer] for layer in range(len(self.holder.layers))], 1) / steps
        return Fidelity(means[0], means[1], means[2])
