"""What callers get back: completions, events, and why an interrupted call has only some of them. Frozen values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

FinishReason = Literal["stop", "length", "abort"]
"""Why a sample ended: by a stop string or token, by `max_tokens` or the context's end, or by an abort of its caller."""


@dataclass(frozen=True, slots=True)
class Usage:
    """The tokens of one prompt. `cached_tokens` of the prompt came from the prefix cache instead of a prefill;
    `completion_tokens` counts all samples."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timing:
    """Times of one prompt, in seconds since it was submitted.

    `queued` is when it was first scheduled, `first_token` when the first token of any sample came, `total` when the
    last token of all samples came. `tokens` counts the tokens of all samples.
    """

    queued: float
    first_token: float
    total: float
    tokens: int

    @property
    def tokens_per_second(self) -> float:
        """The decode rate: tokens after the first, over the time after the first. 0 for a single token."""
        return (self.tokens - 1) / (self.total - self.first_token) if self.total > self.first_token else 0.0


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and the natural logarithm of its probability: softmax of the model's raw logits, before temperature,
    penalties and filters. `top` has the likeliest tokens at this position, likeliest first. `rank` is a prompt's
    token's own place among them, 1 for the likeliest; 0 where it was not looked for."""

    token_id: int
    text: str
    logprob: float
    top: tuple[TokenLogprob, ...] = ()
    rank: int = 0


@dataclass(frozen=True, slots=True)
class Sample:
    """One continuation of a prompt. `logprobs` has one entry for each token, or is None if none were asked for.

    `token_ids` has all generated tokens, a stop token included; `text` ends at a stop string, which is `stop_string`
    where one ended it.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: Sequence[TokenLogprob] | None = field(default=None, hash=False)
    stop_string: str | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """The `n` samples of one prompt. `str()` and the properties such as `text` are those of the first sample;
    `to_dict()` has everything.

    `stats` has counts by name: `preemptions` and `cached_tokens`. If a KV policy or an index of the model saved
    something in decode, it also has `kv_read` (bytes), `kv_held` and `kv_resident` (pages, the latter of those in
    memory) as shares of what reading and keeping everything would take, and if the policy estimates the attention mass
    that was not read, `missed_mass` and the worst query's `missed_mass_worst`, and the mass that was read in 4 bits,
    `coarse_mass`. If drafts were verified, it has `draft_tokens`, `accepted_tokens` and their share `acceptance`.

    `prompt_logprobs` has one entry for each token of the prompt, the first of them None because nothing comes before
    it, or is None if none were asked for.
    """

    samples: tuple[Sample, ...]
    usage: Usage
    timing: Timing
    stats: Mapping[str, float] = field(default_factory=dict, hash=False)
    prompt_logprobs: Sequence[TokenLogprob | None] | None = field(default=None, hash=False)

    @property
    def text(self) -> str:
        """The first sample's text."""
        return self.samples[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The first sample's tokens."""
        return self.samples[0].token_ids

    @property
    def finish_reason(self) -> FinishReason:
        """Why the first sample ended."""
        return self.samples[0].finish_reason

    @property
    def logprobs(self) -> Sequence[TokenLogprob] | None:
        """The first sample's log probabilities, one entry for each token, or None if none were asked for."""
        return self.samples[0].logprobs

    def to_dict(self) -> dict[str, Any]:
        """All of it as dicts, lists and plain values, which JSON can have."""
        samples = [
            asdict(replace(sample, logprobs=None)) | {"logprobs": _listed(sample.logprobs)} for sample in self.samples
        ]
        parts = {"samples": samples, "prompt_logprobs": _listed(self.prompt_logprobs)}
        return asdict(replace(self, samples=(), prompt_logprobs=None)) | parts

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        text = self.text if len(self.text) <= 60 else f"{self.text[:57]}..."
        more = f", {len(self.samples)} samples" if len(self.samples) > 1 else ""
        return f"<Completion {text!r}, {self.usage.completion_tokens} tokens, {self.finish_reason!r}{more}>"


def _listed(entries: Sequence[TokenLogprob | None] | None) -> list[dict[str, Any] | None] | None:
    return None if entries is None else [None if entry is None else asdict(entry) for entry in entries]


@dataclass(frozen=True, slots=True)
class Embedding:
    """The embedding of one input, and how many tokens that has."""

    embedding: tuple[float, ...]
    prompt_tokens: int

    def __repr__(self) -> str:
        return f"<Embedding of {len(self.embedding)} numbers, {self.prompt_tokens} tokens>"


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One token of a stream. `text` is what it adds to the sample's text, often nothing while a character or a possible
    stop string is incomplete. `finish_reason` is set on a sample's last event only, and so is the `stop_string` that
    ended it; a sample that its caller aborts has no such event."""

    text: str
    token_id: int
    prompt_index: int = 0
    sample_index: int = 0
    finish_reason: FinishReason | None = None
    logprob: TokenLogprob | None = None
    stop_string: str | None = None


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a call. `completions` has a completion for each finished prompt, and None for the others."""

    def __init__(self, completions: Sequence[Completion | None]) -> None:
        finished = sum(completion is not None for completion in completions)
        super().__init__(f"interrupted with {finished} of {len(completions)} prompts finished")
        self.completions = tuple(completions)
