"""Speculation: how many tokens a step gives, how many drafts pay, and what a token then costs. Pure.

A row of 1 + k tokens verifies k drafts over KV that is read once. If each draft is accepted with the chance `a` where
all before it were, a step gives a sequence (1 - a^(k+1)) / (1 - a) tokens in the mean (Leviathan et al.,
arXiv 2211.17192, equation 1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from lamina.errors import InvalidRequest
from lamina.scheduling.speculation import MAX_DRAFTS
from lamina.simulator.costs.cost_model import Load, StepCost, attention_time, dense_time, prefill_attention_time
from lamina.simulator.costs.hardware import Device
from lamina.simulator.costs.shapes import ModelShape
from lamina.simulator.costs.tables import number_within, text, whole

NGRAM = "ngram"
_PADDING = 1024
"""Rows by which tables of one vocabulary may differ."""


@dataclass(frozen=True, slots=True)
class Speculation:
    """Drafts that are verified beside each token. Raises InvalidRequest for a number out of bounds.

    `name`: "ngram", or the model that drafts as an engine loads it; `draft` is its shape. `tokens`: drafts of a
    sequence and step at most. `acceptance`: the chance of a draft where those before it were accepted. `proposed`: the
    share of steps in which there are any, since prompts repeat themselves only here and there; a model always drafts.
    """

    acceptance: float
    tokens: int = 4
    proposed: float = 1.0
    name: str = NGRAM
    draft: ModelShape | None = None

    def __post_init__(self) -> None:
        text("name of what drafts", self.name)
        number_within("acceptance", self.acceptance, 0, 1)
        number_within("proposed", self.proposed, 0, 1)
        whole("tokens of speculation", self.tokens, 1, MAX_DRAFTS)
        if (self.draft is None) is not (self.name == NGRAM):
            raise InvalidRequest(f"drafts are by {self.name!r:.80}; allowed are {NGRAM}, or a model with its shape")
        if self.draft is not None and self.proposed < 1:
            raise InvalidRequest(f"proposed is {self.proposed:g} of a model that drafts; allowed is 1")
        if self.draft is not None and self.draft.states:
            raise InvalidRequest(f"draft model {self.draft.name!r} keeps states, which cannot be cut back")

    def check(self, model: ModelShape) -> None:
        """Raise InvalidRequest where drafts of this model cannot be verified."""
        if model.states:
            raise InvalidRequest(f"speculation with {model.name!r}: its states cannot be cut back by rejected drafts")
        if any(group.choice is not None for group in model.groups):
            raise InvalidRequest(f"speculation with {model.name!r} is not described: each draft chooses its own tokens")
        if self.draft is None:
            return
        rows = [shape.embedding // shape.hidden for shape in (self.draft, model)]
        if abs(rows[0] - rows[1]) > _PADDING:
            raise InvalidRequest(
                f"draft model {self.draft.name!r} has a vocabulary of {rows[0]}, {model.name!r} of {rows[1]}; allowed "
                f"is the same, padded by up to {_PADDING}"
            )

    def tokens_a_step(self, drafts: int) -> float:
        """Tokens that a sequence gets in the mean of a step with so many drafts, where there are any."""
        a = self.acceptance
        whole = drafts + 1 if a == 1 else (1 - a ** (drafts + 1)) / (1 - a)
        return 1 + self.proposed * (whole - 1)

    def load(self, load: Load, drafts: int) -> Load:
        """The batch with so many drafts for each of its sequences, where there are any."""
        return replace(load, drafts=self.proposed * drafts)

    def draft_time(self, device: Device, load: Load) -> float:
        """Seconds in which the drafts of a batch are made: a step of the draft model, on one device, for each; and
        those in which it reads the batch's prompts."""
        if self.draft is None or not load.drafts:
            return 0.0
        alone = Load(load.decode, load.context)
        step = dense_time(self.draft, device, 1, alone) + attention_time(self.draft, device, alone)
        prompts = replace(load, decode=0, drafts=0, prefix_tokens=0, prefix_pairs=0, prompts=0)
        reading = dense_time(self.draft, device, 1, prompts) + prefill_attention_time(self.draft, device, 1, prompts)
        return load.drafts * step + reading


def draft_model(speculation: Speculation | None) -> ModelShape | None:
    """The model whose weights and KV the drafts need."""
    return None if speculation is None else speculation.draft


def check_drafts(speculation: Speculation | None, model: ModelShape) -> None:
    """Raise InvalidRequest where a model cannot have such drafts."""
    if speculation is not None:
        speculation.check(model)


def token_cost(speculation: Speculation | None, load: Load, step: Callable[[Load], StepCost]) -> StepCost:
    """What one more token of each decoding sequence costs, by `step` of a batch with drafts, and all of its prefill.

    There are as many drafts as give the most tokens a second without prefill: none where they do not pay.
    """
    if speculation is None or not load.decode:
        return step(load)
    drafts, alone = best_drafts(speculation, load, step)
    whole = step(speculation.load(load, drafts)) if load.prefill_tokens else alone
    return alone.shared(whole, speculation.tokens_a_step(drafts))


def best_drafts(speculation: Speculation, load: Load, step: Callable[[Load], StepCost]) -> tuple[int, StepCost]:
    """How many drafts give the most tokens a second, and what a step of decode alone takes with them."""
    decode = Load(load.decode, load.context)
    tried = ((drafts, step(speculation.load(decode, drafts))) for drafts in range(speculation.tokens + 1))
    return max(tried, key=lambda each: speculation.tokens_a_step(each[0]) / each[1].seconds)
