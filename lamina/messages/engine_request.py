"""A request on its way through the engine, and the outputs that come back. Importing it loads no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from lamina.completions import FinishReason
from lamina.errors import LaminaError
from lamina.kv.request import Request, ScheduledSequence
from lamina.sampling_params import SamplingParams
from lamina_protocols.messages.messages import Usage
from lamina_workers.decoder.logprobs import PromptScores, RowLogprobs

if TYPE_CHECKING:
    from lamina.text.structured_output import Constraint


_LOGPROB = 128  # bytes about, of one token's log probability


@dataclass(frozen=True, slots=True)
class EngineOutput:
    """One step of one sample: a token, or its end, or the `scores` of some of its prompt. `at` is in seconds of the
    engine's clock. `error` ends the whole request."""

    sample: int
    token: int | None
    finish_reason: FinishReason | None = None
    logprobs: RowLogprobs | None = None
    error: LaminaError | None = None
    at: float = 0.0
    scores: PromptScores | None = None


class KvSavings(NamedTuple):
    """What KV policies have saved a request so far: the holders' `Usage`, summed over its decode steps."""

    read: float = 0
    whole: float = 0
    missed: float = 0
    queries: float = 0
    worst: float = 0
    held: float = 0
    kept: float = 0
    resident: float = 0
    coarse: float = 0

    @classmethod
    def of(cls, usages: Sequence[Usage | KvSavings]) -> KvSavings:
        """Of several parts together."""
        # As floats: sums of integers that a holder makes up may be too large to be sent on.
        columns = [[float(getattr(usage, name)) for usage in usages] for name in cls._fields]
        return cls(*map(sum, columns))._replace(worst=max(columns[cls._fields.index("worst")], default=0.0))

    def stats(self) -> dict[str, float]:
        """The savings as shares of what reading and keeping everything would take; empty where no policy saved any."""
        if not self.whole:
            return {}
        pages = max(1, self.kept)
        shares = {"kv_read": self.read / self.whole, "kv_held": self.held / pages, "kv_resident": self.resident / pages}
        if self.queries:
            shares |= {"missed_mass": self.missed / self.queries, "missed_mass_worst": self.worst}
            shares["coarse_mass"] = self.coarse / self.queries
        return shares


NOTHING_SPARED = KvSavings()


class Received(NamedTuple):
    """The tokens of one sample that its client has, and whether the sample has ended."""

    tokens: tuple[int, ...] = ()
    ended: bool = False


def ignore_outputs(request: EngineRequest, outputs: list[EngineOutput]) -> None:
    """The sink of a request that was not submitted."""


def unwatched(done: int, total: int) -> None:
    """The `prefilled` of a request whose prefill is not followed."""


@dataclass(slots=True)
class EngineRequest:
    """A request and its state in the engine.

    The submitter sets `submitted` and `sink`, which the engine calls with each batch's outputs, and perhaps
    `prefilled`, which it calls with how many of the prompt's tokens are computed. Neither may block. The engine sets
    the rest. Times are in seconds of its clock, None until it happened.
    """

    request: Request
    params: SamplingParams
    seed: int
    sink: Callable[[EngineRequest, list[EngineOutput]], None] = ignore_outputs
    prefilled: Callable[[int, int], None] = unwatched
    submitted: float = 0.0
    scheduled: float | None = None
    cached_tokens: int = 0
    preemptions: int = 0
    drafted: int = 0  # drafts of all samples that were verified
    accepted: int = 0  # those of them that became tokens
    spared: KvSavings = NOTHING_SPARED
    pooled: tuple[float, ...] = ()  # the sum of the prompt's hidden states so far, where that is wanted
    unfinished: int = 0
    received: tuple[Received, ...] | None = None
    """For a request that another engine began: what its client has of each sample."""
    sequences: tuple[ScheduledSequence, ...] = ()
    constraints: tuple[Constraint, ...] = ()

    @property
    def size(self) -> int:
        """About how many bytes its parameters take, and the log probabilities of its prompt."""
        top = self.params.prompt_logprobs
        return self.params.size + (0 if top is None else _LOGPROB * (1 + top) * len(self.request.prompt))

    @property
    def id(self) -> str:
        return self.request.id
