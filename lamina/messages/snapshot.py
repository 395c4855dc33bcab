"""What an engine is doing at one moment, as numbers: for metrics and status pages.

Counters count since the engine started. Times are in seconds, sizes in bytes. Importing it loads no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from lamina_workers.ports.timing import EXCHANGE_BUCKETS

__all__ = ["BATCH_BUCKETS", "EXCHANGE_BUCKETS", "HolderSnapshot", "SequenceSnapshot", "Snapshot"]

BATCH_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
"""Upper bounds, each included, of `Snapshot.batch_counts`, in tokens; one more count is for larger batches."""


@dataclass(frozen=True, slots=True)
class HolderSnapshot:
    """One holder of KV. `channel` is "in process", "local", "tcp" or "grpc". A `local` holder is in a model worker's
    process. One that does not `keep` has no sequences, only prompts while they are computed.

    Ranks that share a model have a holder each, "rank-1" and so on beside the engine's own, and a part of the pages of
    each attention worker. Bytes and exchanges are those of the engine's process alone.

    An exchange is one layer's query and its answer, from the moment the query is handed over until the answer has been
    read. `exchange_counts` has how many took how long (see EXCHANGE_BUCKETS), `exchange_seconds` the sum of all. The
    engine computes between the two, so an answer may wait to be read: the time is an upper bound of the exchange, with
    several lanes by up to what another lane computes without a pause.

    `free_pages` is from the holder's last answer. Where the layers keep several things, KV of several shapes or
    recurrent states, the pages of each have a size of their own: then `pools` has all pages and the free ones of each.
    """

    name: str
    address: str
    channel: str
    local: bool
    total_pages: int
    free_pages: int
    bytes_sent: int
    bytes_received: int
    exchange_seconds: float
    exchange_counts: tuple[int, ...]
    keeps: bool = True
    pools: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class SequenceSnapshot:
    """One sequence with KV. `tokens` is its length, `prefill` whether its prompt (or lost KV) is still being computed,
    `pages` its pages by the name of the holder. Pages that sequences share are counted for each."""

    request: str
    sample: int
    tokens: int
    prefill: bool
    pages: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One engine.

    The time of the engine's one thread is cut in three, so no second is counted twice, even with several batches under
    way. In `idle_seconds` it waited for requests. In `attention_seconds` it computed attention, handed q, k and v to
    the holders, waited for their answers and merged them, or waited for them to accept a batch, without the time in
    which that batch was suspended and another went on. `model_seconds` is the rest, dense layers above all. Together
    they are `uptime`.

    `plan_seconds` went by in planning batches, `announce_seconds` between the announcement of a batch and the record of
    its holders' answers, over all batches, refused ones included. Both are delays, parts of the times above; with
    several lanes another batch may have computed during the second.

    `kv_read` and `kv_whole` are bytes of KV read in decode, and what reading everything would have taken; `missed_mass`
    and `missed_queries` sum the estimates of KV policies and the queries they are of. All four are 0 without a policy
    that chooses. `running` and `waiting` count samples.
    """

    uptime: float
    running: int
    waiting: int
    lanes: int
    batches: int  # complete, with rows
    prompt_tokens: int  # computed, those found in the prefix cache not counted
    generation_tokens: int
    prefix_queries: int  # tokens of prompts looked up
    prefix_hits: int  # tokens of them found
    preemptions: int
    evictions: int
    rebuilt_tokens: int
    lost_holders: int
    joined_holders: int
    failed_batches: int
    model_seconds: float
    attention_seconds: float
    kv_read: float
    kv_whole: float
    missed_mass: float
    missed_queries: float
    page_size: int
    cached_pages: Mapping[str, int]  # by holder's name, pages that the prefix cache or spares alone keep
    holders: tuple[HolderSnapshot, ...]
    sequences: tuple[SequenceSnapshot, ...]
    idle_seconds: float = 0.0
    corrupted: int = 0  # samples that ended because their logits were not finite
    blocked: int = 0  # requests that ended because nothing could be planned: an error of the scheduler
    batch_tokens: int = 0  # computed in all batches, prompts and decode
    batch_counts: tuple[int, ...] = (0,) * (len(BATCH_BUCKETS) + 1)  # batches by their tokens
    missing: tuple[str, ...] = ()  # holders that were lost and have not been replaced
    held_back: Mapping[str, str] = field(default_factory=dict)  # workers that are not used: "open", "quarantined"
    began: float = 0.0  # a reading of the engine's clock, which tells two engines apart
    returned_workers: int = 0  # model workers that were gone and came back
    plan_seconds: float = 0.0
    announce_seconds: float = 0.0
    drafts: int = 0  # rows with drafts that were verified
    draft_tokens: int = 0  # their drafts
    accepted_tokens: int = 0  # those that became tokens
    accepted_at: tuple[int, ...] = ()  # the same by position in their row; empty without speculation
    kv_resident: float = 1.0  # of the pages that requests under way hold: the share in memory, where policies count
    block_pages: int = 1  # pages that `page_size` tokens of a sequence take, in all layers and KV heads
    workers_wanted: int | None = None  # attention workers, by the autoscaler; None: there is none
    kv_full_in: float | None = None  # seconds until the holders are full, by the autoscaler; None: KV does not grow
    kv_redundant: float = 0.0  # the share of the KV at attention workers that has all its spares
    expert_bytes: int = 0  # of experts that this process's model worker read, each once a batch that chose it
    expert_rows: int = 0  # pairs of a token and an expert that it chose
    local_share: float = 1.0  # of the tokens of sequences with KV: the share whose KV is in the engine's process

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for `from_dict` and for JSON."""
        plain = _fields(self)
        plain["holders"] = [_fields(holder) for holder in self.holders]
        plain["sequences"] = [_fields(sequence) for sequence in self.sequences]
        return plain

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Snapshot:
        """The snapshot of `as_dict`'s fields, lists standing for tuples."""
        tuples = {name: tuple(fields[name]) for name in ("batch_counts", "missing", "accepted_at") if name in fields}
        holders = tuple(
            HolderSnapshot(
                **{**holder, "exchange_counts": tuple(holder["exchange_counts"]), "pools": _pairs(holder["pools"])}
            )
            for holder in fields["holders"]
        )
        sequences = tuple(SequenceSnapshot(**sequence) for sequence in fields["sequences"])
        return cls(**{**fields, **tuples, "holders": holders, "sequences": sequences})


def _pairs(pools: Iterable[Iterable[int]]) -> tuple[tuple[int, int], ...]:
    return tuple((total, free) for total, free in pools)


def _fields(noun: HolderSnapshot | SequenceSnapshot | Snapshot) -> dict[str, Any]:
    """The fields by name. `dataclasses.asdict` would copy frozen values and take 3 ms for 256 sequences."""
    return {field.name: getattr(noun, field.name) for field in fields(noun)}
