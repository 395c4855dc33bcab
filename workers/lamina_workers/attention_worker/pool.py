"""What an attention worker asks of a pool, whatever its layers keep: pages of KV, or states.

Layers are numbered within the pool. Operations and rows are those of the pool's own parts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

from lamina_kernels.exchange.layer_work import LayerWork
from lamina_protocols.errors import ProtocolError
from lamina_protocols.messages.layers import HolderConfig
from lamina_protocols.messages.messages import (
    Advance,
    Constants,
    Exchange,
    Fetch,
    FetchPages,
    FetchSample,
    Fresh,
    FreshPages,
    Operation,
    PartHeld,
    Query,
    Reply,
    Row,
    Sample,
    Usage,
)
from lamina_workers.kv_pages.parts import PartTable

Layered = Query | Fresh | Exchange | Sample | Advance  # a layer's message, of a batch in flight
Ints = tuple[int, ...]
B = TypeVar("B")


class PoolPart(Protocol):
    """A part: heads `heads`, positions [lo, held) of at most [lo, hi)."""

    heads: tuple[int, ...]
    lo: int
    hi: int

    @property
    def held(self) -> int: ...


class LayerPool(ABC, Generic[B]):
    """The layers of one shape at one worker. B: what it keeps of a batch in flight, its rows in this pool. `store` has
    the parts, and numbers of their pages.

    A worker announces to all its pools: each gets `update`, then all get `commit`, or, where one has raised, those that
    have not get `revert`. Then each gets `begin`. `layout` names how its pages are laid out, `most_heads` how many
    tokens times heads a batch may have.
    """

    config: HolderConfig
    layout: str
    n_pages: int
    most_heads: int
    store: PartTable[Any]

    @property
    def free_pages(self) -> int:
        """How many pages no part holds."""
        return self.store.free_pages

    @property
    def unsettled(self) -> int | None:
        """The batch of which something waits to be stored."""
        return None

    def counts_usage(self, handle: int) -> bool:
        """Whether what a part has read and keeps is counted: `usage` is empty where it is not."""
        return False

    def parts(self) -> Mapping[int, PoolPart]:
        """All parts by handle, as they are now. May be called from any thread."""
        return self.store.parts()

    def has(self, handle: int) -> bool:
        """Whether there is such a part."""
        return self.store.has(handle)

    @abstractmethod
    def held(self, handle: int) -> PartHeld:
        """What a part keeps. Raises KVError where there is no such part."""

    @abstractmethod
    def usage(self, handle: int) -> Usage:
        """What a part has read and keeps."""

    @abstractmethod
    def update(self, operations: Sequence[Operation], rows: Sequence[Row]) -> tuple[int, ...]:
        """Apply operations in order, cut back the parts that rows store to, reserve for all rows. Returns the floor of
        each row's part.

        Raises PoolExhausted, TornParts, or KVError for what parts do not allow; whatever it raises, nothing has
        changed.
        """

    @abstractmethod
    def commit(self) -> None:
        """The last update stays: what depends on it is done now."""

    def revert(self) -> None:
        """Take back the last update, with nothing done since."""
        self.store.revert()

    def size(self, rows: Sequence[Row]) -> int:
        """Tokens times heads of rows, by which batches in flight are counted. Raises ProtocolError for more than
        `most_heads`."""
        heads = sum(row.count * len(self.store.part(row.handle).heads) for row in rows)
        if heads > self.most_heads:
            raise ProtocolError(f"rows of {heads} tokens times heads, allowed: {self.most_heads}")
        return heads

    @abstractmethod
    def begin(self, rows: Sequence[Row], delay: float) -> B:
        """Plan a batch, once for all its layers. `delay`: seconds to add to each layer. Raises ProtocolError for rows
        that no batch can have."""

    @abstractmethod
    def layer_work(self, batch: B) -> LayerWork | None:
        """The work of a batch in flight for compiled callers, which `worked` counts; None where it needs Python."""

    @abstractmethod
    def worked(self, batch: B, layers: range, work: LayerWork) -> None:
        """Compiled code has done these layers of a batch in flight, by their numbers within the pool."""

    def samples(self, batch: B) -> tuple[int, ...]:
        """Of each row of a batch, the stride of positions whose queries are wanted as a `Sample`; empty for none."""
        return ()

    @abstractmethod
    def follows(self, batch: B, rows: Sequence[Row]) -> bool:
        """Whether `rows` are those of `batch`, each further, and `follow` can take them. False is always allowed."""

    @abstractmethod
    def follow(self, batch: B, rows: Sequence[Row], delay: float) -> B:
        """As `update` without operations, `commit` and `begin`, for rows that follow; `batch` is complete."""

    @abstractmethod
    def floors(self, batch: B) -> Sequence[int]:
        """The floor of each row's part, of a batch that has followed another."""

    @abstractmethod
    def end(self, batch: B) -> None:
        """A batch is complete, or given up."""

    @abstractmethod
    def handle(self, batch: B, layer: int, message: Layered) -> Reply | None:
        """Answer one message of a layer. Raises ProtocolError for a kind of message that the layer does not take, or a
        wrong shape."""

    @abstractmethod
    def constants(self, layer: int, message: Constants) -> None:
        """Keep a layer's constants. Raises ProtocolError where it has none."""

    @abstractmethod
    def settle(self) -> None:
        """Store what the last message brought, if that was not done yet."""

    @abstractmethod
    def fetch(self, layer: int, message: Fetch | FetchSample) -> Reply:
        """What a part holds, or what is kept of prompts' queries to it. Raises KVError where it does not hold it, or
        nothing is kept of any."""

    @abstractmethod
    def fetch_pages(self, message: FetchPages) -> Reply:
        """The pages of a part. Raises KVError where it does not hold them, ProtocolError for layers that are not
        there."""

    @abstractmethod
    def store_pages(self, batch: B, message: FreshPages) -> None:
        """Store whole pages of a batch's rows."""

    @abstractmethod
    def check_integrity(self) -> None:
        """Raise KVError unless all that is kept agrees."""


def samples_of(pools: Sequence[LayerPool[Any]], kept: Sequence[Any], numbers: Sequence[Ints], rows: int) -> Ints:
    """The `Announced.samples` of a batch of so many rows. `kept`: what each pool keeps of it; `numbers`: which of the
    rows are the pool's."""
    samples = [0] * rows
    for pool, batch, of_pool in zip(pools, kept, numbers, strict=True):
        for number, stride in zip(of_pool, pool.samples(batch), strict=False):  # or there are none
            samples[number] = stride
    return tuple(samples) if any(samples) else ()
