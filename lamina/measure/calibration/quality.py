"""What a choice of policies costs, measured by the real runtime: a long text is read under the policies and under none.

The beginning of the text holds passkeys. Its end is teacher-forced, token by token, so that log likelihoods can be
compared. Then the passkeys are asked for.

Prefill is under the policies too, as it is in use. What comes after it is read in pieces, or in decode steps, since
some policies drop or choose KV only in decode steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from lamina.errors import InvalidRequest
from lamina.measure.calibration.data import Passkeys
from lamina.measure.probe import Probe

_PIECE = 256  # tokens that are read together: their logits take 50 MB at a vocabulary of 49,152


@dataclass(frozen=True, slots=True)
class Reading:
    """One reading. `nll` in nats a token over the text, `top` int64 `[n]` the likeliest token after each of them;
    `answers` bool, for each hidden word whether it was the likeliest; `held` the share of the KV's pages; `read` the
    share of the KV's bytes that decode steps read, None without such."""

    nll: float
    top: npt.NDArray[np.int64]
    answers: npt.NDArray[np.bool_]
    held: float
    read: float | None


@dataclass(frozen=True, slots=True)
class Quality:
    """A reading of `context` tokens beside that of the full cache. `nll_change` is relative; `agreement` the share of
    equal likeliest tokens; `passkeys` and `passkeys_full` count right words, of `words`."""

    context: int
    nll_change: float
    agreement: float
    passkeys: int
    passkeys_full: int
    words: int
    held: float
    read: float | None = None

    def __str__(self) -> str:
        read = "" if self.read is None else f"read {self.read:.3f}, "
        return (
            f"{self.context} tokens: KV held {self.held:.3f}, {read}NLL {self.nll_change:+.2%}, "
            f"top-1 agreement {self.agreement:.2%}, "
            f"passkey words {self.passkeys} of {self.words} (full cache {self.passkeys_full})"
        )


@dataclass(frozen=True, slots=True)
class Target:
    """What quality is enough. 0.99 stands for a likelihood whose NLL rises by 1 % at most, 97 % of likeliest tokens
    unchanged, and as many passkey words as with the full cache."""

    quality: float

    def __post_init__(self) -> None:
        if not 0.5 <= self.quality <= 1:
            raise InvalidRequest(f"target quality is {self.quality}; allowed is 0.5 to 1")

    @property
    def nll_change(self) -> float:
        return 1 - self.quality

    @property
    def agreement(self) -> float:
        return max(0.0, 1 - 3 * (1 - self.quality))

    def met(self, quality: Quality) -> bool:
        return (
            quality.nll_change <= self.nll_change
            and quality.agreement >= self.agreement
            and quality.passkeys >= quality.passkeys_full
        )


def read(
    probe: Probe,
    hidden: Passkeys,
    text: Sequence[int],
    report: Callable[[int, int], None] = lambda done, total: None,
    in_decode: bool = False,
) -> Reading:
    """Read the document with its needles, then `text`, then the questions: these in pieces, or one decode step a token.
    `report(done, total)` counts tokens."""
    ids = [*hidden.document, *text, *hidden.tail]
    begin = len(hidden.document)
    handle, fed = probe.open(), 0

    def count(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        nonlocal fed
        if layer == probe.model.num_hidden_layers - 1:
            fed += len(q)
            report(fed, len(ids))

    after = probe.prefill(handle, ids[:begin], tap=count).unsqueeze(0)
    losses, tops = [], []
    for first in range(begin, len(ids), _PIECE):
        piece = ids[first : first + _PIECE]
        logits = _steps(probe, handle, piece) if in_decode else probe.read(handle, piece)
        before = torch.cat([after, logits[:-1]])
        losses.append(torch.nn.functional.cross_entropy(before, torch.tensor(piece), reduction="none").numpy())
        tops.append(before.argmax(-1).numpy())
        after = logits[-1:]
        report(first + len(piece), len(ids))
    store = probe.worker.store
    model = probe.model
    pages = model.num_hidden_layers * model.num_key_value_heads * -(-len(ids) // probe.holder.page_size)
    held_share = (store.n_pages - store.free_pages) / pages
    usage = probe.usage(handle)
    share = (1.0 if usage is None else usage.read / usage.whole) if in_decode else None
    probe.close(handle)
    loss, top = np.concatenate(losses), np.concatenate(tops)
    expected = np.array(hidden.tail)
    places = np.concatenate([np.arange(*answer) for answer in hidden.answers])
    answers = top[len(text) :][places] == expected[places]
    return Reading(float(loss[: len(text)].mean()), top[: len(text)], answers, held_share, share)


def _steps(probe: Probe, handle: int, token_ids: Sequence[int]) -> torch.Tensor:
    return torch.cat([probe.step([(handle, token)]) for token in token_ids])


def compare(context: int, reading: Reading, full: Reading) -> Quality:
    """A reading beside that of the same text with the full cache, at what counts as that many tokens."""
    return Quality(
        context=context,
        nll_change=reading.nll / full.nll - 1,
        agreement=float((reading.top == full.top).mean()),
        passkeys=int(reading.answers.sum()),
        passkeys_full=int(full.answers.sum()),
        words=len(full.answers),
        held=reading.held,
        read=reading.read,
    )
