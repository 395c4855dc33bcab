"""A request on its way through the engine, and what comes back of it. Nouns only: importing them loads no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from lamina.completions import FinishReason
from lamina.errors import LaminaError
from lamina.sampling_params import SamplingParams
from lamina.scheduling.request import Request, ScheduledSequence
from lamina_workers.decoder.logprobs import RowLogprobs

if TYPE_CHECKING:
    from lamina.text.structured_output import Constraint


@dataclass(frozen=True, slots=True)
class EngineOutput:
    """One step of one sample: a token, or the end, at a time of the engine's clock. `error` ends the whole request."""

    sample: int
    token: int | None
    finish_reason: FinishReason | None = None
    logprobs: RowLogprobs | None = None
    error: LaminaError | None = None
    at: float = 0.0


class KvSavings(NamedTuple):
    """What KV policies have spared a request so far, in decode, over all its parts: `messages.Usage`, summed."""

    read: float = 0
    whole: float = 0
    missed: float = 0
    queries: float = 0
    worst: float = 0
    held: float = 0
    kept: float = 0

    def stats(self) -> dict[str, float]:
        """As shares of what reading and keeping everything would take; nothing where no policy did anything."""
        if not self.whole:
            return {}
        shares = {"kv_read": self.read / self.whole, "kv_held": self.held / max(1, self.kept)}
        if self.queries:
            shares |= {"missed_mass": self.missed / self.queries, "missed_mass_worst": self.worst}
        return shares


NOTHING_SPARED = KvSavings()


def nobody(ticket: EngineRequest, outputs: list[EngineOutput]) -> None:
    """The sink of a ticket that was not submitted."""


def unwatched(done: int, total: int) -> None:
    """The `prefilled` of a ticket whose prefill nobody follows."""


@dataclass(slots=True)
class EngineRequest:
    """A request and what becomes of it.

    Whoever submits it sets `submitted`, `sink`, which the engine calls with each batch's outputs, and perhaps
    `prefilled`, which it calls with how many of the prompt's tokens are computed; neither may block. The rest is the
    engine's. Times are its clock's, in seconds; None until it happened.
    """

    request: Request
    params: SamplingParams
    seed: int
    sink: Callable[[EngineRequest, list[EngineOutput]], None] = nobody
    prefilled: Callable[[int, int], None] = unwatched
    submitted: float = 0.0
    scheduled: float | None = None
    cached_tokens: int = 0
    preemptions: int = 0
    spared: KvSavings = NOTHING_SPARED
    unfinished: int = 0
    received: tuple[tuple[tuple[int, ...], bool], ...] | None = None
    """Of a request that another engine began: each sample's tokens that its client has, and whether it has ended."""
    sequences: tuple[ScheduledSequence, ...] = ()
    constraints: tuple[Constraint, ...] = ()
