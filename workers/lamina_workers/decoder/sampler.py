"""The next token of every row of a batch, from its logits.

A row's token depends on that row alone: on its logits, its `RowSampling`, and the random number that hashing
(seed, sample_index, position) gives. So neither the rest of the batch nor a rerun or a preemption changes it.

The order is vLLM's (its v1 sampler): bias, penalties, suppression (and what is not allowed); then temperature, min_p,
top_k, top_p. Ties are won by the lower token id, everywhere.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import pad

from lamina_workers.decoder.logprobs import PromptScores, RowLogprobs

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy: there the likeliest token has all the probability that float32 can tell."""

_RUNGS = (64, 1024)  # how many of a row's likeliest tokens the filters look at, before they sort the vocabulary
_BLOCK = 256  # tokens whose probabilities are summed first, to find the drawn one without a sum over the vocabulary
_SLICE = 32  # rows shaped at once: few enough that the C library keeps their memory, whose page faults cost most
_BELOW_ONE = 1 - 2.0**-53
# What is added to the logits of eight tokens, by a byte of their bits: 0 where a bit is set. Taking from this table
# costs 10 us for 49,152 tokens; filling where bits are unset cost 25 to 300, by how they lie.
_OPEN = np.where(np.arange(256)[:, None] >> np.arange(8) & 1, 0, -np.inf).astype(np.float32)


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """The distinct tokens of a sequence, int64 `[n]`, and how often each was generated, float32 `[n]`: what the
    penalties need."""

    tokens: NDArray[np.int64]
    counts: NDArray[np.float32]


class TokenHistory:
    """The distinct tokens of one sequence, and how often each was generated: the input of the penalties.

    The owner of the token ids keeps it and appends each recorded token, so a step costs no walk over the context.
    """

    def __init__(self, prompt: Sequence[int]) -> None:
        self._slots = {token: slot for slot, token in enumerate(dict.fromkeys(prompt))}
        self._tokens = np.fromiter(self._slots, np.int64, len(self._slots))
        self._counts = np.zeros(len(self._slots), np.float32)

    def append(self, token: int) -> None:
        """Count one generated token."""
        slot = self._slots.setdefault(token, len(self._slots))
        if slot == len(self._tokens):
            room = max(64, slot)
            self._tokens = np.concatenate([self._tokens, np.zeros(room, np.int64)])
            self._counts = np.concatenate([self._counts, np.zeros(room, np.float32)])
        self._tokens[slot] = token
        self._counts[slot] += 1

    def ahead(self, drafts: Sequence[int]) -> TokenCounts:
        """What it will be once these tokens are generated too."""
        fresh = [token for token in dict.fromkeys(drafts) if token not in self._slots]
        tokens = np.concatenate([self.tokens, np.array(fresh, np.int64)])
        counts = np.concatenate([self.counts, np.zeros(len(fresh), np.float32)])
        slots = {token: len(self._slots) + offset for offset, token in enumerate(fresh)}
        for token in drafts:
            counts[slots[token] if token in slots else self._slots[token]] += 1
        return TokenCounts(tokens, counts)

    @property
    def tokens(self) -> NDArray[np.int64]:
        """The distinct tokens of prompt and output, int64 `[n]`, in order of appearance. A view."""
        return self._tokens[: len(self._slots)]

    @property
    def counts(self) -> NDArray[np.float32]:
        """How often each of `tokens` was generated, float32 `[n]`; 0 for a token of the prompt only. A view."""
        return self._counts[: len(self._slots)]


@dataclass(frozen=True, slots=True)
class RowSampling:
    """How one row's token is chosen; the defaults are greedy and neutral. Checked by the caller, token ids included.

    `position` counts the tokens generated before: with `seed` (below 2**64) and `sample_index` it is the random
    counter. `history` is needed where one of the penalties is not neutral. `suppressed` tokens are impossible, and with
    `allowed`, a bit a token (int32 `[ceil(vocabulary / 32)]`, token t is bit t % 32 of word t // 32), all others too.
    `logprobs` is how many of the likeliest tokens to report beside the chosen one, at most 64; None is no report.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    history: TokenHistory | TokenCounts | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    suppressed: Sequence[int] = ()
    allowed: NDArray[np.int32] | None = field(default=None, compare=False)
    seed: int = 0
    sample_index: int = 0
    position: int = 0
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if self.penalised and self.history is None:
            raise ValueError("a row with a repetition, presence or frequency penalty needs its history, got None")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature < GREEDY_BELOW

    @property
    def penalised(self) -> bool:
        """Whether earlier tokens change the logits."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def filtered(self) -> bool:
        """Whether some tokens are left out before drawing."""
        return not self.greedy and (self.top_p < 1 or self.top_k > 0 or self.min_p > 0)

    @property
    def plain(self) -> bool:
        """Whether the token is simply the largest logit's."""
        return self.greedy and not (self.penalised or self.logit_bias or self.suppressed or self.allowed is not None)


@dataclass(frozen=True, slots=True)
class Sampled:
    """One entry a row. A token is None where the row's logits allow none: NaN or infinity among them, or all
    suppressed. Log probabilities are None there, and where none were asked for. `prompts` are the scores of the tokens
    of prompts that were to be scored, in order."""

    tokens: list[int | None]
    logprobs: list[RowLogprobs | None]
    prompts: Sequence[PromptScores] = ()


def uniform(seed: int, sample_index: int, position: int) -> float:
    """A number in [0, 1), a multiple of 2**-53, that depends on nothing but its arguments (each below 2**64)."""
    digest = hashlib.blake2b(struct.pack("<QQQ", seed, sample_index, position), digest_size=8).digest()
    return float(int.from_bytes(digest, "little") >> 11) * 2.0**-53


def sample(logits: torch.Tensor, rows: Sequence[RowSampling], prompts: Sequence[PromptScores] = ()) -> Sampled:
    """Choose a token for each row. logits: `[len(rows), vocabulary]`, any float dtype, not modified. `prompts` are
    passed on."""
    if logits.shape[0] != len(rows):
        raise ValueError(f"logits have {logits.shape[0]} rows, but {len(rows)} rows say how to sample")
    tokens = _largest(logits)
    others = [i for i, row in enumerate(rows) if tokens[i] is not None and not row.plain]
    for start in range(0, len(others), _SLICE):
        part = others[start : start + _SLICE]
        chosen = _choose(_select(logits, part).float(), [rows[i] for i in part])
        for i, token in zip(part, chosen, strict=True):
            tokens[i] = token
    return Sampled(tokens, _report(logits, tokens, rows), prompts)


def _select(logits: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """A copy of some rows."""
    return logits.index_select(0, torch.tensor(rows, device=logits.device))


def _largest(logits: torch.Tensor) -> list[int | None]:
    """The id of each row's largest logit, None where that is not finite: argmax holds NaN for the largest of all."""
    tokens = logits.argmax(-1)
    finite = logits.gather(1, tokens.unsqueeze(1)).squeeze(1).isfinite()
    return [token if good else None for token, good in zip(tokens.tolist(), finite.tolist(), strict=True)]


def _choose(logits: torch.Tensor, rows: Sequence[RowSampling]) -> list[int | None]:
    """Tokens of rows that are not plain. logits: float32 `[len(rows), vocabulary]`, overwritten."""
    _add_bias(logits, rows)
    _penalise(logits, rows)
    _suppress(logits, rows)
    tokens = _largest(logits)
    if all(row.greedy for row in rows):
        return tokens
    failed = [i for i, token in enumerate(tokens) if token is None]
    logits[failed] = 0  # something to draw from; what is drawn counts for nothing
    drawn = _draw(logits, rows)
    return [t if t is None or row.greedy else d for t, d, row in zip(tokens, drawn, rows, strict=True)]


def _add_bias(logits: torch.Tensor, rows: Sequence[RowSampling]) -> None:
    """Samples of one request share its biases, so their tensors are made once for all of these rows."""
    biased: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        if row.logit_bias:
            biased.setdefault(id(row.logit_bias), []).append(i)
    for members in biased.values():
        bias = rows[members[0]].logit_bias
        # Thousands of numbers a row and step: through numpy, and row by row, in a third of the time of lists.
        tokens = torch.from_numpy(np.fromiter(bias, np.int64, len(bias))).to(logits.device)
        values = torch.from_numpy(np.fromiter(bias.values(), np.float32, len(bias))).to(logits.device)
        for i in members:
            logits[i].index_add_(0, tokens, values)


def _penalise(logits: torch.Tensor, rows: Sequence[RowSampling]) -> None:
    """Repetition (CTRL, arXiv 1909.05858: x / r or x * r, whichever is lower) over prompt and output, then
    frequency and presence (OpenAI: - count * f, - p) over the output."""
    penalised = [(i, row, row.history) for i, row in enumerate(rows) if row.penalised and row.history is not None]
    if not penalised:
        return
    histories = [history for _, _, history in penalised]
    tokens = torch.from_numpy(np.concatenate([history.tokens for history in histories])).to(logits.device)
    counts = torch.from_numpy(np.concatenate([history.counts for history in histories])).to(logits.device)
    # What belongs to a row, spread over the tokens of its history.
    spread = torch.from_numpy(np.repeat(np.arange(len(histories)), [len(h.tokens) for h in histories]))
    row_ids = torch.tensor([i for i, _, _ in penalised])[spread].to(logits.device)
    penalties = [(r.repetition_penalty, r.frequency_penalty, r.presence_penalty) for _, r, _ in penalised]
    repetition, frequency, presence = torch.tensor(penalties, dtype=logits.dtype)[spread].to(logits.device).unbind(1)
    x = logits[row_ids, tokens]
    x = torch.where(x > 0, x / repetition, x * repetition)
    logits[row_ids, tokens] = x - counts * frequency - (counts > 0) * presence


def _suppress(logits: torch.Tensor, rows: Sequence[RowSampling]) -> None:
    for i, row in enumerate(rows):
        if row.suppressed:
            logits[i, list(row.suppressed)] = -torch.inf
    masks = [(i, row.allowed) for i, row in enumerate(rows) if row.allowed is not None]
    if masks:
        eights = np.stack([allowed for _, allowed in masks]).astype("<i4", copy=False).view(np.uint8)
        added = torch.from_numpy(np.take(_OPEN, eights, axis=0).reshape(len(masks), -1)[:, : logits.shape[1]])
        for (i, _), row_added in zip(masks, added.to(logits.device), strict=True):
            logits[i] += row_added


def _draw(logits: torch.Tensor, rows: Sequence[RowSampling]) -> list[int]:
    """Tokens drawn at random. logits: float32 `[len(rows), vocabulary]`, each row's largest finite, overwritten."""
    temperature = torch.tensor([[max(row.temperature, GREEDY_BELOW)] for row in rows], device=logits.device)
    # The largest is taken off before the division: a small temperature would overflow.
    scaled = logits.sub_(logits.amax(1, keepdim=True)).div_(temperature)
    probs = scaled.softmax(1)
    _filter(probs, scaled, rows)
    numbers = [uniform(row.seed, row.sample_index, row.position) for row in rows]
    return _invert(probs, torch.tensor(numbers, dtype=torch.float64, device=probs.device)).tolist()


def _filter(probs: torch.Tensor, scaled: torch.Tensor, rows: Sequence[RowSampling]) -> None:
    """Zero, in place, the probabilities that min_p, top_k and top_p leave out. Both float32 `[rows, vocabulary]`.

    In order of likelihood each filter keeps a prefix, so all that is sought is the shortest prefix's length. Few of
    the likeliest tokens mostly settle it; the rows that they don't settle look at more. How far a row looks depends
    on that row alone, as everything does.
    """
    device, vocabulary = scaled.device, scaled.shape[1]
    limits = torch.tensor([[row.min_p, row.top_p] for row in rows], dtype=torch.float64, device=device)
    top_k = torch.tensor([[row.top_k if row.top_k > 0 else vocabulary] for row in rows], device=device)
    pending = torch.tensor([i for i, row in enumerate(rows) if row.filtered], dtype=torch.int64, device=device)
    for size in (*(rung for rung in _RUNGS if rung < vocabulary), vocabulary):
        if not len(pending):
            return
        values, tokens = _likeliest(scaled.index_select(0, pending), size)
        p = probs[pending.unsqueeze(1), tokens]
        length, settled = _prefix(p.double(), top_k[pending], limits[pending, :1], limits[pending, 1:], vocabulary)
        # Beyond the last token seen may be its equals, of lower ids: a prefix that ends among them is not settled.
        settled &= (values.gather(1, length - 1) > values[:, -1:]) | (size == vocabulary)
        p.masked_fill_(torch.arange(size, device=device) >= length, 0)
        done = settled.squeeze(1)
        probs.index_fill_(0, pending[done], 0)
        probs[pending[done].unsqueeze(1), tokens[done]] = p[done]
        pending = pending[~done]


def _prefix(
    p: torch.Tensor, top_k: torch.Tensor, min_p: torch.Tensor, top_p: torch.Tensor, vocabulary: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """How many of each row's likeliest tokens the filters keep, and whether those seen settle it. All but p `[n, 1]`.

    p: float64 `[n, seen]`, falling, probabilities over the whole vocabulary.
    """
    width = p.shape[1]
    mass = p.cumsum(1)
    length = torch.where(min_p > 0, (p >= min_p * p[:, :1]).sum(1, keepdim=True), vocabulary).minimum(top_k)
    settled = (length < width) | (length == vocabulary)
    # top_p is a share of what the others left: of 1 where that is everything.
    share = torch.where(length == vocabulary, 1.0, mass.gather(1, length.clamp(max=width) - 1))
    nucleus = (mass - p < top_p * share).sum(1, keepdim=True)
    length = torch.where(top_p < 1, length.minimum(nucleus), length)
    return length.clamp(max=width), settled


def _likeliest(values: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `size` largest of each row and their ids, largest first, then lower ids first. `[rows, size]` each."""
    if size == values.shape[1]:
        ordered = values.sort(dim=1, descending=True, stable=True)
        return ordered.values, ordered.indices
    likeliest, tokens = values.topk(size)
    tokens, order = tokens.sort(dim=1)  # topk leaves equals in any order
    likeliest, order = likeliest.gather(1, order).sort(dim=1, descending=True, stable=True)
    return likeliest, tokens.gather(1, order)


def _invert(probs: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """The token at which the sum of probabilities, in order of token id, passes u of the whole. `[rows]`.

    Id order rather than likelihood: two tokens that trade places by rounding then move no other token's interval.
    First a block of tokens is found so (by sums in float32), then the token within it by what is left of u.
    """
    rows, vocabulary = probs.shape
    short = -vocabulary % _BLOCK
    blocks = (pad(probs, (0, short)) if short else probs).view(rows, -1, _BLOCK)
    block, u = _pass(blocks.sum(2).double(), u)
    token, _ = _pass(blocks[torch.arange(rows, device=block.device), block].double(), u)
    return block * _BLOCK + token


def _pass(weights: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first index whose running sum exceeds u of the total, and how far into its own weight that is, in [0, 1).

    weights: float64 `[rows, n]`; a weight of 0 is never chosen. u: at most `_BELOW_ONE`, so that u * total rounds to
    less than the total.
    """
    sums = weights.cumsum(1)
    target = u.unsqueeze(1) * sums[:, -1:]
    index = torch.searchsorted(sums, target, right=True)
    weight = weights.gather(1, index)
    fraction = (target - (sums.gather(1, index) - weight)) / weight
    return index.squeeze(1), fraction.clamp(0, _BELOW_ONE).squeeze(1)


def _report(
    logits: torch.Tensor, tokens: Sequence[int | None], rows: Sequence[RowSampling]
) -> list[RowLogprobs | None]:
    reports: list[RowLogprobs | None] = [None] * len(rows)
    requests = [
        (i, token, row.logprobs)
        for i, (token, row) in enumerate(zip(tokens, rows, strict=True))
        if token is not None and row.logprobs is not None
    ]
    if requests:
        numbers, chosen, counts = zip(*requests, strict=True)
        for i, of_row in zip(numbers, report(_select(logits, numbers), chosen, counts), strict=True):
            reports[i] = of_row
    return reports


def report(logits: torch.Tensor, tokens: Sequence[int], counts: Sequence[int]) -> list[RowLogprobs]:
    """The log probabilities of one token of each row, and of its `counts` likeliest, at most 64. logits: `[len(tokens),
    vocabulary]`, any float dtype, not modified."""
    logprobs = logits.float().log_softmax(-1)
    chosen = logprobs.gather(1, torch.tensor(tokens, device=logits.device).unsqueeze(1)).squeeze(1).tolist()
    if not any(counts):
        return [RowLogprobs(logprob, ()) for logprob in chosen]
    # A fixed number is looked for, so that among equals the rest of the batch has no say.
    values, ids = _likeliest(logprobs, min(_RUNGS[0], logprobs.shape[1]))
    return [
        RowLogprobs(logprob, tuple(zip(row_ids[:count], row_values[:count], strict=True)))
        for logprob, count, row_ids, row_values in zip(chosen, counts, ids.tolist(), values.tolist(), strict=True)
    ]
