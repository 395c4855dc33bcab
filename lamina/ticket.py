"""A request on its way through the engine, and what comes back of it. Nouns only: importing them loads no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lamina.errors import LaminaError
from lamina.request import Request
from lamina.request import Sequence as Sample
from lamina.types import FinishReason, SamplingParams

if TYPE_CHECKING:
    from lamina_workers.sampler import RowLogprobs


@dataclass(frozen=True, slots=True)
class Output:
    """One step of one sample: a token, or the end, at a time of the engine's clock. `error` ends the whole request."""

    sample: int
    token: int | None
    finish_reason: FinishReason | None = None
    logprobs: RowLogprobs | None = None
    error: LaminaError | None = None
    at: float = 0.0


def nobody(ticket: Ticket, outputs: list[Output]) -> None:
    """The sink of a ticket that was not submitted."""


def unwatched(done: int, total: int) -> None:
    """The `prefilled` of a ticket whose prefill nobody follows."""


@dataclass(slots=True)
class Ticket:
    """A request and what becomes of it.

    Whoever submits it sets `submitted`, `sink`, which the engine calls with each batch's outputs, and perhaps
    `prefilled`, which it calls with how many of the prompt's tokens are computed; neither may block. Times are the
    engine clock's, in seconds; None until it happened.
    """

    request: Request
    params: SamplingParams
    seed: int
    sink: Callable[[Ticket, list[Output]], None] = nobody
    prefilled: Callable[[int, int], None] = unwatched
    submitted: float = 0.0
    scheduled: float | None = None
    cached_tokens: int = 0
    preemptions: int = 0
    unfinished: int = 0
    sequences: tuple[Sample, ...] = ()
