"""A model whose text is a checksum of its KV, in place of a decoder, and the same text without any engine.

Keys and values are small integers, hashed from token, position, layer and head. Of two query heads of a KV head, one
has q = 0: attention weighs all keys it sees alike, so its output times their number is the exact sum of their values.
The other has q = ln 2 at one dimension of k, which is 0 or 1 in each key: keys with a 1 weigh twice, so its output
times the sum of the weights is an integer too, which depends on k. A layer with states adds k v^T of every token, and
reads an integer of it. The next token is a hash of all these sums, and so are the keys and values of the next layer: KV
that is missing, there twice, out of date or of another sequence changes the text, there and for ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scenario import PLAIN, VOCABULARY, Model

from lamina_kernels.states.advance import StateWork
from lamina_protocols.messages.layers import LayerSpec
from lamina_workers.decoder.model import Batch, Forward, KeyValueReady, QueryReady, StateReady
from lamina_workers.decoder.sampler import uniform
from lamina_workers.policies.catalogue import parse

Ints = npt.NDArray[np.int64]

LAYERS = 2
KV_HEADS = 4
WIDTH = 16  # of k and v: eight values, then the eight bits of k
BITS = 8
_SCALE = 0.25
_MIXERS = np.array([0xBF58476D1CE4E5B9, 0x94D049BB133111EB], np.uint64)
_TOKEN, _POSITION, _LAYER, _HEAD = (
    np.uint64(x) for x in (0x9E3779B97F4A7C15, 0xD1B54A32D192ED03, 0xABC98388FB8FAC03, 0x8CB92BA72F3D8DD7)
)
_SHIFTS = (np.arange(8) * 6).astype(np.uint64)
_BIT_SHIFTS = (48 + np.arange(BITS)).astype(np.uint64)
_HEADS = np.arange(KV_HEADS, dtype=np.uint64) * _HEAD + np.arange(1, LAYERS + 1, dtype=np.uint64)[:, None] * _LAYER
_COEFFICIENTS = np.random.default_rng(7).integers(1 << 40, size=(LAYERS, 2 * KV_HEADS * WIDTH)).astype(np.int64)
_ALL_HEADS, _ODD = np.arange(KV_HEADS), np.arange(1, 2 * KV_HEADS, 2)
_LN2 = float(np.log(2.0)) / _SCALE


def layer_specs(model: Model = PLAIN) -> tuple[LayerSpec, ...]:
    """What holders know of the model's layers."""
    policies = (model.policy,) * KV_HEADS if model.policy else ()
    first = LayerSpec(0, 2 * KV_HEADS, KV_HEADS, WIDTH, WIDTH, _SCALE, policies=policies)
    second = replace(first, kv_layer=1, window=model.window or None)
    if model.states:  # which never decay, so that they stay integers
        first = LayerSpec(
            0, KV_HEADS, KV_HEADS, WIDTH, WIDTH, 1.0, kind="lightning", key_heads=KV_HEADS, decays=(0.0,) * KV_HEADS
        )
    return first, second


def _mixed(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's finalizer."""
    x = (x ^ (x >> np.uint64(30))) * _MIXERS[0]
    x = (x ^ (x >> np.uint64(27))) * _MIXERS[1]
    return x ^ (x >> np.uint64(31))


def _entering(tokens: Ints, positions: Ints) -> npt.NDArray[np.uint64]:
    """What enters layer 0, `[T]`."""
    return _mixed(tokens.astype(np.uint64) * _TOKEN + positions.astype(np.uint64) * _POSITION + np.uint64(1))


def _values(x: npt.NDArray[np.uint64], layer: int) -> Ints:
    """v, `[T, KV_HEADS, WIDTH]`: values from -32 to 31, then the bits of k."""
    z = _mixed(x[:, None] + _HEADS[layer])[..., None]
    v = np.empty((*z.shape[:2], WIDTH), np.int64)
    v[..., :8] = ((z >> _SHIFTS) & np.uint64(63)).astype(np.int64) - 32
    v[..., 8:] = ((z >> _BIT_SHIFTS) & np.uint64(1)).astype(np.int64)
    return v


def _leaving(x: npt.NDArray[np.uint64], sums: Ints, layer: int) -> npt.NDArray[np.uint64]:
    """What leaves a layer, `[T]`. sums: `[T, 2 * KV_HEADS * WIDTH]`, of the even and odd query heads in order."""
    return _mixed((sums @ _COEFFICIENTS[layer]).astype(np.uint64) + x)


def _bit_of(positions: Ints) -> Ints:
    """Which bit of k the odd query heads weigh, `[T, KV_HEADS]`."""
    return (positions[:, None] + _ALL_HEADS) % BITS


def _candidates(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """The two likeliest tokens, alike likely, in order: `[T, 2]`."""
    one = (x % np.uint64(VOCABULARY)).astype(np.int64)
    other = (one + 1 + ((x >> np.uint64(20)) % np.uint64(VOCABULARY - 1)).astype(np.int64)) % VOCABULARY
    both = np.empty((len(x), 2), np.int64)
    np.minimum(one, other, out=both[:, 0])
    np.maximum(one, other, out=both[:, 1])
    return both


class Seen:
    """Which keys a query sees in a layer: ranges of positions."""

    def __init__(self, spec: LayerSpec) -> None:
        text = spec.policies[0] if spec.policies else "full"
        self._policy = parse(text) if spec.policies or spec.window else None
        self._window = spec.window
        self.ranges = lru_cache(maxsize=4096)(self._ranges)

    def _ranges(self, position: int) -> tuple[tuple[int, int], ...]:
        if self._policy is None:
            return ((0, position + 1),)
        seen = next(self._policy.views(position, 1)).seen(position)
        low = max(0, position + 1 - self._window) if self._window else 0
        return tuple((max(first, low), end) for first, end in seen if end > low)

    def counts(self, positions: Ints) -> Ints:
        """How many keys the query at each position sees."""
        if self._policy is None:
            return positions + 1
        return np.array([sum(end - first for first, end in self.ranges(p)) for p in positions.tolist()])

    def sums(self, upto: Ints, positions: Ints) -> Ints:
        """Over what each position sees, of running sums."""
        if self._policy is None:
            return upto[positions + 1]
        ranges = [self.ranges(p) for p in positions.tolist()]
        return np.stack([sum(upto[end] - upto[first] for first, end in each) for each in ranges])  # type: ignore[arg-type]


class ChecksumDecoder:
    """As `lamina_workers.decoder.model.Decoder`, as far as a `ModelWorker` uses it."""

    def __init__(self, model: Model = PLAIN) -> None:
        self.config: Any = SimpleNamespace(
            vocab_size=VOCABULARY,
            rope=SimpleNamespace(by_length=False),
            index=None,
            layer_specs=lambda: layer_specs(model),
        )
        self.device = torch.device("cpu")
        self.dtype = torch.float32
        self._states = model.states
        self._seen = [Seen(spec) for spec in layer_specs(model)]

    experts_read = 0, 0

    def state_constants(self) -> dict[int, Any]:
        """None beside the specs."""
        return {}

    def forward(
        self,
        batch: Batch,
        hidden: torch.Tensor | None = None,
        first_layer: int = 0,
        attended: torch.Tensor | None = None,
        query_first: bool = False,
    ) -> Forward:
        """As `Decoder.forward`. `hidden`, float32 `[T, 4]`: the stream, 16 bits in each number."""
        positions = batch.positions.numpy()
        bits = _bit_of(positions)
        x = _entering(batch.token_ids.numpy(), positions) if hidden is None else _unpacked(hidden)
        tokens, rows = len(positions), np.arange(len(positions))
        for layer in range(first_layer, LAYERS):
            states = self._states and not layer
            if attended is None and states:
                state = StateReady(layer, _state_inputs(x, bits), torch.empty(tokens, KV_HEADS, 0), _packed(x))
                answer = yield state
                attended = answer.advance(layer, state.x, state.gates) if isinstance(answer, StateWork) else answer
            elif attended is None:
                v = _values(x, layer)
                q = np.zeros((tokens, 2 * KV_HEADS, WIDTH), np.float32)
                q[rows[:, None], _ODD, bits] = _LN2
                k = np.zeros((tokens, KV_HEADS, WIDTH), np.float32)
                k[..., :BITS] = v[..., 8:]
                yield QueryReady(layer, torch.from_numpy(q), early=query_first)
                attended = yield KeyValueReady(
                    layer, torch.from_numpy(k), torch.from_numpy(v.astype(np.float32)), _packed(x)
                )
            if attended is None:
                raise ValueError(f"layer {layer} needs the output that answers its last event, got None")
            out = attended.numpy()
            sums = _state_sums(out) if states else _summed(out, self._seen[layer].counts(positions), bits)
            x = _leaving(x, sums, layer)
            attended = None
        chosen = _candidates(x[batch.sampled.numpy()])
        logits = np.full((len(chosen), VOCABULARY), -1e4, np.float32)
        np.put_along_axis(logits, chosen, 5.0, 1)
        return torch.from_numpy(logits)


def _state_inputs(x: npt.NDArray[np.uint64], bits: Ints) -> torch.Tensor:
    """q, k and v of the layer with states, `[T, 3 * KV_HEADS * WIDTH]`. q has 1 at each bit of k, and 2 at one."""
    v = _values(x, 0)
    q, k = np.zeros_like(v), np.zeros_like(v)
    q[..., :BITS] = 1
    q[np.arange(len(x))[:, None], _ALL_HEADS, bits] = 2
    k[..., :BITS] = v[..., 8:]
    return torch.from_numpy(np.stack((q, k, v), 1).reshape(len(x), -1).astype(np.float32))


def _state_sums(out: npt.NDArray[np.float32]) -> Ints:
    """What was read of states, as the sums of even query heads: `[T, 2 * KV_HEADS * WIDTH]`."""
    sums = np.zeros((len(out), KV_HEADS, 2, WIDTH), np.float64)
    sums[:, :, 0] = np.rint(out.reshape(len(out), KV_HEADS, WIDTH))
    sums[~np.isfinite(sums)] = 1e9
    return sums.reshape(len(out), -1).astype(np.int64)


def _summed(attended: npt.NDArray[np.float32], counts: Ints, bits: Ints) -> Ints:
    """The sums of which the output has means, as integers `[T, 2 * KV_HEADS * WIDTH]`."""
    out = attended.reshape(len(counts), KV_HEADS, 2, WIDTH).astype(np.float64)
    even = np.rint(out[:, :, 0] * counts[:, None, None])
    ones = even[np.arange(len(counts))[:, None], _ALL_HEADS, 8 + bits]
    out[:, :, 0] = even
    out[:, :, 1] = np.rint(out[:, :, 1] * (counts[:, None] + ones)[..., None])
    out[~np.isfinite(out)] = 1e9
    return out.reshape(len(counts), -1).astype(np.int64)


def _packed(x: npt.NDArray[np.uint64]) -> torch.Tensor:
    return torch.from_numpy(x.view(np.uint16).reshape(-1, 4).astype(np.float32))


def _unpacked(hidden: torch.Tensor) -> npt.NDArray[np.uint64]:
    return hidden.numpy().astype(np.uint16).view(np.uint64).reshape(-1)


class Reference:
    """One sequence, computed without attention: running sums of its values."""

    def __init__(self, model: Model, room: int) -> None:
        self._states = model.states
        self._seen = [Seen(spec) for spec in layer_specs(model)]
        self._length = 0
        # Of the first n positions, for each layer and KV head: sums of v, and of v where a bit of k is 1.
        self._plain = np.zeros((LAYERS, room + 1, KV_HEADS, WIDTH), np.int64)
        self._weighed = np.zeros((LAYERS, room + 1, KV_HEADS, BITS, WIDTH), np.int64)

    def append(self, tokens: list[int]) -> npt.NDArray[np.int64]:
        """The candidates for the token that follows the last of these."""
        lo, hi = self._length, self._length + len(tokens)
        positions, rows = np.arange(lo, hi), np.arange(len(tokens))[:, None]
        bits = _bit_of(positions)
        x = _entering(np.array(tokens), positions)
        for layer in range(LAYERS):
            v = _values(x, layer)
            plain, weighed = self._plain[layer], self._weighed[layer]
            plain[lo + 1 : hi + 1] = plain[lo] + np.cumsum(v, 0)
            weighed[lo + 1 : hi + 1] = weighed[lo] + np.cumsum(v[..., 8:, None] * v[..., None, :], 0)
            both = np.empty((len(tokens), KV_HEADS, 2, WIDTH), np.int64)
            if self._states and not layer:
                upto = weighed[positions + 1]
                both[:, :, 0], both[:, :, 1] = upto.sum(2) + upto[rows, _ALL_HEADS, bits], 0
            else:
                both[:, :, 0] = even = self._seen[layer].sums(plain, positions)
                both[:, :, 1] = even + self._seen[layer].sums(weighed, positions)[rows, _ALL_HEADS, bits]
            x = _leaving(x, both.reshape(len(tokens), -1), layer)
        self._length = hi
        return _candidates(x[-1:])[0]


@lru_cache(maxsize=4096)
def text(prompt: tuple[int, ...], tokens: int, model: Model, seed: int | None, sample: int) -> tuple[int, ...]:
    """What the model generates: greedily, or with a temperature where there is a seed."""
    return tuple(_text(Reference(model, len(prompt) + tokens), prompt, tokens, seed, sample))


def _text(reference: Reference, prompt: tuple[int, ...], tokens: int, seed: int | None, sample: int) -> Iterator[int]:
    low, high = reference.append(list(prompt))
    for position in range(tokens):
        token = low if seed is None or uniform(seed, sample, position) < 0.5 else high
        yield int(token)
        if position < tokens - 1:
            low, high = reference.append([int(token)])
