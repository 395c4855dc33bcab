"""The messages of a batch: one frozen dataclass each.

The model worker sends one `Announcement` a batch to each holder, then per layer a `Query` and a `Fresh`, or both as
one `Exchange`; the holder answers the announcement with `Announced` and each query with an `Attended`. A layer with a
recurrent state has one message instead: `Advance`, answered by `Advanced`. A holder that cannot go on answers with a
`Fault` in place of the reply.

KV moves from one holder to another by `Fetch` and `Fresh`, or, where both lay out pages alike, by `FetchPages` and
`FreshPages`. An engine that resumes the work of a previous engine asks by `Survey` what is kept.

Some policies learn from a prompt's queries. A holder says in `Announced.samples` what it wants of each row that brings
it no queries: a prompt that is attended elsewhere, or beyond the holder's range. It gets one `Sample` for each such row
and layer, once the row's K and V of the layer are on their way. A sample moves with the KV of its part, by
`FetchSample` and `Sample`. What policies have saved at one part comes back as `Usage` in `Announced`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from lamina_protocols.errors import ProtocolError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Sample:
    """Some of a prompt's queries, for the part `handle` of a row of the batch. It has no answer.

    positions: those of the tokens, ascending. heads: the part's KV heads that are asked. q: of two bytes a number,
    `[positions * heads * group, query_width]`, by position, then KV head, then its query heads.
    """

    epoch: int
    batch: int
    layer: int
    handle: int
    heads: tuple[int, ...]
    positions: tuple[int, ...]
    q: torch.Tensor


@dataclass(frozen=True, slots=True)
class FetchSample:
    """Ask for what is kept of the queries at positions [lo, hi) to a part in one layer; and for all later ones
    too where the part's range ends at `hi`. Needs no announcement, changes nothing."""

    epoch: int
    batch: int
    layer: int
    handle: int
    lo: int
    hi: int


@dataclass(frozen=True, slots=True)
class FetchedSample:
    """The answer. heads, positions and q as in `Sample`, all empty where nothing is kept."""

    epoch: int
    batch: int
    layer: int
    heads: tuple[int, ...]
    positions: tuple[int, ...]
    q: torch.Tensor


_MOST_MASS = 2.0**62  # as many queries as there may be


def _check_mass(value: float) -> None:
    if not 0 <= value <= _MOST_MASS:
        raise ProtocolError(f"attention mass of {value:g}, allowed: 0 to {_MOST_MASS:g}")


@dataclass(frozen=True, slots=True)
class Usage:
    """What policies have saved at one part. All numbers are counted, none is computed from a formula.

    `read` and `whole` are of decode so far, over all its layers and KV heads: the bytes read, of KV and to choose among
    it, and the bytes that reading everything would have taken. `missed` is the sum, over `queries` query vectors, of
    the estimated attention mass that they did not read; `worst` is the largest; `coarse` is the sum of what they read
    in 4 bits. `held` pages are in use now, where keeping everything would take `kept`; `resident` of them are in
    memory.
    """

    read: int
    whole: int
    missed: Annotated[float, _check_mass]
    queries: int
    worst: Annotated[float, _check_mass]
    held: int
    kept: int
    resident: int
    coarse: Annotated[float, _check_mass] = 0.0


MAX_PARTS = 4096  # in one `Surveyed`

# Operations create and delete parts. A part is what one holder keeps of one sequence in the layers of one pool.


@dataclass(frozen=True, slots=True)
class Open:
    """Create the empty part `handle` in the pool number `pool`, for KV heads `heads` and token positions [lo, hi).

    `policy`: how all its heads are read and kept, as `lamina_workers.policies` writes it; "": as the holder's config
    says.
    """

    handle: int
    pool: int
    heads: tuple[int, ...]
    lo: int
    hi: int
    policy: str = ""


@dataclass(frozen=True, slots=True)
class Fork:
    """Create the part `handle` as the first `length` tokens of part `parent`, sharing its pages.

    `policy` as in `Open`, of the new part. It may see nothing that the parent has let go of.
    """

    handle: int
    parent: int
    length: int
    policy: str = ""


@dataclass(frozen=True, slots=True)
class Close:
    """Delete the part `handle`. Pages that no other part shares return to the pool."""

    handle: int


@dataclass(frozen=True, slots=True)
class Bound:
    """End the range of the part `handle` at position `hi`, where a page begins: nothing is stored there or above any
    more. What the part keeps there is let go. For holders with the feature `bound` alone."""

    handle: int
    hi: int


Operation = Open | Fork | Close | Bound


@dataclass(frozen=True, slots=True)
class Row:
    """What one part does in a batch for `count` tokens at positions [start, start + count).

    `read` is the range of positions whose keys the holder attends, or None. It ends at `start` at most, unless
    it ends at `start + count`, or below that where the part's range ends: then the holder stores first and attends the
    row's own tokens too, causally (`fused`), and the model worker does not attend them. A row that is computed again
    may so read own tokens that its part has stored before. `store` cuts the part back to `start`, then keeps the row's
    K and V. With `chooses`, set in decode, adaptive policies may read less; otherwise they read everything.
    `prompt` is, in a row of prefill of a part that will decode, how many tokens the prompt has, and else 0: a holder
    whose policies learn from a prompt's queries keeps some of them. Such a row may neither read nor store.
    """

    handle: int
    start: int
    count: int
    read: tuple[int, int] | None
    store: bool
    chooses: bool = False
    prompt: int = 0

    @property
    def fused(self) -> bool:
        """Whether the holder attends this row's own tokens too."""
        return self.read is not None and self.read[1] > self.start

    def stored(self, lo: int, hi: int) -> tuple[int, int]:
        """The positions [first, end) that a part of range [lo, hi) stores of this row; (0, 0) where there are none."""
        first, end = max(self.start, lo), min(self.start + self.count, hi)
        return (first, end) if self.store and first < end else (0, 0)


@dataclass(frozen=True, slots=True)
class Announcement:
    """One batch, announced to one holder: operations first, then rows. The holder reserves all it needs in all its
    pools, or refuses. A layer's messages carry the rows alone whose parts are in the layer's pool, in their order.

    `first` numbers the first operation; the holder applies each number once. An announcement without rows only
    carries operations: an idle engine flushes its closes.
    """

    epoch: int
    batch: int
    first: int
    operations: tuple[Operation, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class BlockTables:
    """One step of an engine that owns its blocks (see `BlockConfig`), for the layers of the block table number
    `table`, announced to one holder. The answer is an `Announced`; then each of these layers has one `Exchange`, of all
    rows.

    Row r has the queries [query_start_loc[r], query_start_loc[r + 1]) of the step, which are the last ones of a
    sequence of seq_lens[r] tokens; the blocks of the sequence are block_table[r]. A token's K and V are stored before
    the layer is attended, in the block and at the place of its position; so blocks of earlier tokens must have theirs.

    query_start_loc: int32 `[rows + 1]`, from 0 on, each larger than the last; seq_lens: int32 `[rows]`; block_table:
    int32 `[rows, width]`, of which a row needs its first ceil(seq_lens / page_size) numbers.
    """

    epoch: int
    batch: int
    table: int
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor


def _check_seconds(value: float) -> None:
    if value < 0:
        raise ProtocolError(f"{value:g} seconds, allowed: 0 or more")


@dataclass(frozen=True, slots=True)
class Announced:
    """The reply. `accepted=False` means that nothing changed, operations included; `reason` says what was missing:
    pages, or KV that the rows need and that has not come in every layer, or was let go. Then `starts` has, per row,
    where it can start at most; 0 where it must begin anew.

    `free_pages` counts the pages of each pool left after the reservation; `floors` has, per row, the lowest length to
    which its part can still be cut back; `usages` has, per row, what its part has read, left out and kept so far.
    `samples` has, per row, the stride of positions whose queries the holder wants as a `Sample`, since the row brings
    it none; 0: none of them. It is empty where no row wants any.
    """

    epoch: int
    batch: int
    accepted: bool
    free_pages: tuple[int, ...]
    floors: tuple[int, ...]
    reason: str = ""
    usages: tuple[Usage, ...] = ()
    starts: tuple[int, ...] = ()
    samples: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Query:
    """Queries of one layer, for the rows that read, flat in row order.

    q: `[sum over rows of count * (part's KV heads * group), query_width]`, in each row token-major, then head.
    """

    epoch: int
    batch: int
    layer: int
    q: torch.Tensor


@dataclass(frozen=True, slots=True)
class Fresh:
    """New K and V of one layer, for the rows that store, flat in row order.

    k: `[sum over rows of count * part's KV heads, key_width]`, v: the same with d_v; token-major, then head.
    """

    epoch: int
    batch: int
    layer: int
    k: torch.Tensor
    v: torch.Tensor


@dataclass(frozen=True, slots=True)
class Exchange:
    """`Query` and `Fresh` of one layer in one frame. Where a row of the batch is `fused` the holder stores first,
    otherwise it answers first.
    """

    epoch: int
    batch: int
    layer: int
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


@dataclass(frozen=True, slots=True)
class Fetch:
    """Ask for the KV that a part holds of positions [lo, hi) in one layer. Needs no announcement, changes nothing."""

    epoch: int
    batch: int
    layer: int
    handle: int
    lo: int
    hi: int


@dataclass(frozen=True, slots=True)
class Fetched:
    """The answer, in the storage dtype. k: `[(hi - lo) * part's KV heads, key_width]`, v the same with d_v, as `Fresh`.

    Positions whose pages were freed are zeros, or the mean that replaced them.
    """

    epoch: int
    batch: int
    layer: int
    k: torch.Tensor
    v: torch.Tensor


@dataclass(frozen=True, slots=True)
class FetchPages:
    """As `Fetch`, of the layers [layer, layer + layers) that have KV, for a holder with the same page layout. A page of
    the part begins at `lo`. Layers are numbered within the part's pool."""

    epoch: int
    batch: int
    layer: int
    layers: int
    handle: int
    lo: int
    hi: int


@dataclass(frozen=True, slots=True)
class FetchedPages:
    """The answer. pages: uint8 `[layers * part's KV heads * pages that hold [lo, hi), page_bytes]`, in this order.

    Freed pages are zeros. The answer is empty, `[0, 0]`, where a mean replaced some page: then use `Fetch`.
    """

    epoch: int
    batch: int
    layer: int
    pages: torch.Tensor


@dataclass(frozen=True, slots=True)
class FreshPages:
    """As `Fresh`, of the layers [layer, layer + layers) that have KV, for the rows of the pool number `pool`, each of
    which begins with a page. Layers are numbered within the pool.

    pages: uint8 `[layers * sum over rows of part's KV heads * pages that the row stores to, page_bytes]`: by layer,
    then row, then head. The last page of a row is sent whole; its bytes after the row's end have no meaning.
    """

    epoch: int
    batch: int
    pool: int
    layer: int
    layers: int
    pages: torch.Tensor


@dataclass(frozen=True, slots=True)
class Constants:
    """What a layer with a state needs besides its spec, for all its heads. It is sent once, before the first `Advance`.

    conv: float32 `[channels, conv]`, the weights of the convolution, and bias: `[channels]`, in the order q, k, v;
    skip: `[heads]`, Mamba2's D. What a layer does not have is empty, `[0]`.
    """

    epoch: int
    batch: int
    layer: int
    conv: torch.Tensor
    bias: torch.Tensor
    skip: torch.Tensor


@dataclass(frozen=True, slots=True)
class Advance:
    """The inputs of one layer with a state, for its rows, one row after another: the holder updates the states with
    them and reads.

    x: `[sum over rows of count * (2 * part's key heads * d_k + part's heads * d_v)]`, in each row token-major, then the
    order q, k, v, before the convolution. gates: float32 `[sum over rows of count * part's heads * g]`, token-major,
    then head. g and their meaning by kind: lightning 0; gated_delta 2, log decay and beta; mamba2 2, log decay and dt;
    kda d_k + 1, the log decay of each channel and beta.
    """

    epoch: int
    batch: int
    layer: int
    x: torch.Tensor
    gates: torch.Tensor


@dataclass(frozen=True, slots=True)
class Advanced:
    """The answer. out: `[sum over rows of count * part's heads, d_v]` in x's dtype, token-major, then head.

    `seconds` as in `Attended`.
    """

    epoch: int
    batch: int
    layer: int
    out: torch.Tensor
    seconds: Annotated[float, _check_seconds] = 0.0


@dataclass(frozen=True, slots=True)
class Survey:
    """Ask what a holder keeps: parts of handle `first` and above. Batches in flight are dropped.

    Needs no announcement; the asking engine numbers the batch, from 1 up. `epoch` is the last that the previous engine
    may have used. The holder then accepts only epochs above it, and above the last one announced: so it refuses the
    previous engine, should that still send.
    """

    epoch: int
    batch: int
    first: int = 0


@dataclass(frozen=True, slots=True)
class PartHeld:
    """What a holder keeps of one sequence in the pool number `pool`: KV heads `heads`, positions [lo, held) of at most
    [lo, hi), stored in every layer of the pool. The part can be cut back to the length `floor`, not below."""

    handle: int
    pool: int
    heads: tuple[int, ...]
    lo: int
    hi: int
    held: int
    floor: int


@dataclass(frozen=True, slots=True)
class Surveyed:
    """The answer: up to MAX_PARTS parts, sorted by handle. `more` counts the parts with larger handles.

    `last_epoch` is the newest epoch announced, 0 where there was none; `next_operation` the next operation's number.
    """

    epoch: int
    batch: int
    last_epoch: int
    next_operation: int
    parts: tuple[PartHeld, ...]
    more: int = 0


@dataclass(frozen=True, slots=True)
class Attended:
    """The partial attention of one `Query`, in its order. out: `[n, d_v]` in q's dtype, lse: float32 `[n]`.

    `seconds`: how long the holder attended; 0 where it was not measured.
    """

    epoch: int
    batch: int
    layer: int
    out: torch.Tensor
    lse: torch.Tensor
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Fault:
    """In place of a reply, with its numbers: what went wrong at this holder since the last reply."""

    epoch: int
    batch: int
    reason: str


Request = (
    Announcement | Query | Fresh | Exchange | Sample | Fetch | FetchPages | FetchSample | FreshPages | Survey
    | Advance | Constants | BlockTables
)  # fmt: skip
Reply = Announced | Attended | Fetched | FetchedPages | FetchedSample | Surveyed | Advanced | Fault
Message = Request | Reply


def answered(request: Request) -> bool:
    """Whether a holder answers the request: all but `Fresh`, `FreshPages`, `Sample` and `Constants` have one reply, in
    order."""
    return not isinstance(request, Fresh | FreshPages | Sample | Constants)
