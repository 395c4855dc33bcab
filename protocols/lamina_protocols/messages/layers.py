"""What layers remember: their kinds, what a holder must know of each, and what it is built from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

ATTENTION, LATENT = "attention", "latent"
STATES = ("lightning", "gated_delta", "mamba2", "kda")  # the kinds of layers that keep a state, not KV


@dataclass(frozen=True, slots=True)
class Index:
    """A layer's own choice of keys, which its model was trained with: an index.

    Behind each key stands an index key of `width` numbers, the same at each KV head; behind the queries of each KV head
    stand its `heads` index queries. For each token and KV head the keys seen are cut into blocks of `block`, counted
    from position 0; the `top` blocks of the highest scores are attended, and no others. The `local` last blocks, that
    of the token itself among them, come first. A block's score is the highest of its keys'. A key's is the highest
    inner product with an index query; where `weighted`, it is the sum of the positive ones, each times a weight, and
    the weights of a token stand behind its index queries.
    """

    width: int
    heads: int
    block: int
    top: int
    local: int = 0
    weighted: bool = False

    @property
    def numbers(self) -> int:
        """Of a token's index queries and weights for a KV head."""
        return self.heads * (self.width + self.weighted)


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What a holder must know of one layer to keep what it remembers, and to read it.

    `kind` "attention": KV. `scale` multiplies q.k; `window` w lets a query at p see keys in (p - w, p]; `soft_cap` c
    turns a logit x into c * tanh(x / c). `kv_layer` names the layer whose KV this one reads (itself unless KV is
    shared). `policies` has one text per KV head, its policy as `lamina_workers.policies` writes it; empty: every KV
    head is read and kept in full. `index`: the model itself chooses what a query reads; then policies are not allowed.

    `kind` "latent": KV whose v is the first d_v numbers of k. No v is sent or stored: it is `[n, 0]`.

    `kind` one of `STATES`: a recurrent state `[d_k, d_v]` for each of `kv_heads` heads; `heads` is the same number.
    `key_heads` counts the heads of q and k, of which head h reads number h // (kv_heads // key_heads). `conv` is the
    width of the causal convolution before the state, 0: none. `decays`, of lightning alone, has the log decay a token
    of each head. `scale` multiplies q. `kv_layer` is the layer itself; `window`, `soft_cap`, `policies` and
    `index` are unset.
    """

    kv_layer: int
    heads: int
    kv_heads: int
    d_k: int
    d_v: int
    scale: float
    window: int | None = None
    soft_cap: float | None = None
    kind: str = ATTENTION
    policies: tuple[str, ...] = ()
    index: Index | None = None
    key_heads: int = 0
    conv: int = 0
    decays: tuple[float, ...] = ()

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.heads // self.kv_heads

    @property
    def own_v(self) -> int:
        """How many numbers of v are sent and stored beside k: none of a latent, whose v is the front of k."""
        return 0 if self.kind == LATENT else self.d_v

    @property
    def key_width(self) -> int:
        """Numbers of a K vector in messages and pages: `[k | index key]`."""
        return self.d_k + (self.index.width if self.index else 0)

    @property
    def query_width(self) -> int:
        """Numbers of a q vector in messages. The index queries of a KV head, and their weights, are cut into equal
        pieces, the last ones filled up with zeros; one piece stands behind each query of its group."""
        return self.d_k + (-(-self.index.numbers // self.group) if self.index else 0)

    @property
    def widths(self) -> tuple[int, int, int]:
        """Numbers of a vector of q, of k and of v in a layer's frame. A state has pieces of x for q, the gates of a
        head for k, and nothing for v."""
        if self.kind not in STATES:
            return self.query_width, self.key_width, self.own_v
        return math.gcd(self.d_k, self.d_v), {"lightning": 0, "kda": self.d_k + 1}.get(self.kind, 2), 0

    @property
    def vectors(self) -> tuple[int, int]:
        """How many vectors of q, and of k and v, a token has in a layer's frame."""
        if self.kind not in STATES:
            return self.heads, self.kv_heads
        return (2 * self.key_heads * self.d_k + self.heads * self.d_v) // self.widths[0], self.heads


class ColdTier(NamedTuple):
    """Where pages of KV go that nobody reads: a file in `folder`, on a disk. Of `kv_memory` about the share `resident`
    is kept in memory, sketches included."""

    folder: str
    resident: float = 1.0

    @classmethod
    def of(cls, folder: str | None, resident: int | None, kv_memory: int) -> ColdTier | None:
        """By the settings `kv_cold` and `kv_resident`, in bytes; None: all that there is."""
        if not folder:
            return None
        return cls(folder, 1.0 if resident is None else min(1.0, resident / kv_memory))


@dataclass(frozen=True, slots=True)
class HolderConfig:
    """What an attention worker is built from. `kv_memory` in bytes; `dtype` is the name of the storage dtype.

    `layers` has those layers alone that a holder keeps something of, in the order in which a forward pass comes to
    them; messages number them so. Layers of one shape share a pool of pages, see `pools`. `sequence_tokens` is the
    length of a usual sequence, for which the memory is dealt among pools. `sketches` of pages are kept where a policy
    of the layers reads them; with True everywhere, so that any part may have such a policy. With `cold`, pages that
    nobody reads leave memory.
    """

    layers: tuple[LayerSpec, ...]
    page_size: int
    dtype: str
    kv_memory: int
    sequence_tokens: int = 4096
    sketches: bool = False
    cold: ColdTier | None = None


@dataclass(frozen=True, slots=True)
class BlockConfig(HolderConfig):
    """What an attention worker is built from whose pages the engine owns. A block is `page_size` tokens, in each layer
    and KV head a page, and has a number below `blocks`. The engine has one or several block tables; `tables` says for
    each layer the number of its own. A block belongs to one table at a time, so layers of different tables share pages.
    """

    blocks: int = 1
    tables: tuple[int, ...] = ()
