"""What calibration measures of a model's heads before it chooses: gathered once, kept in a file."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import torch

from lamina.errors import PolicyError
from lamina.measure.calibration.capture import Captured, capture
from lamina.measure.calibration.data import TAIL, Corpus, Passkeys, passkeys, repeated
from lamina.measure.calibration.gating import train
from lamina.measure.calibration.influence import influences
from lamina.measure.calibration.scores import Scores, echo_and_induction, mean_attention, ranks
from lamina.measure.calibration.torch_path import TorchPath
from lamina.measure.probe import Probe
from lamina.system.progress import Progress
from lamina.system.text_files import read_text
from lamina.text.tokenizer import Tokenizer
from lamina_workers.policies.policy import Policy
from lamina_workers.policies.streaming import Streaming

REPEATS = 4
_LONGEST_UNIT = 2000  # random tokens that repeat (RazorAttention uses 2500; 4 of these fit a context of 8K)
_SAMPLED = 128  # queries that scores are averaged over
_JUDGED = 384  # queries of plain text whose predictions influence is measured on
_GATE_SHORTEST = 1024  # tokens of the shortest document that gates are trained on (the paper's is as short)
_GATE_DOCUMENTS = 6  # their lengths, in equal ratios up to the context: a step takes as long as its document is
NEEDLES, WORDS = 8, 8


def _nothing() -> Scores:
    return np.zeros(0)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to measure. `names` are fields of Evidence; influence is of each of `policies` at `lengths` tokens, which
    ascend; gates choose between full and `streaming`, in `steps` steps."""

    names: frozenset[str]
    lengths: tuple[int, ...]
    policies: Sequence[Policy]
    streaming: Streaming
    steps: int
    seed: int

    def marks(self, fingerprint: str) -> list[str]:
        """What evidence is of, for the file that keeps it."""
        of = [fingerprint, " ".join(sorted(self.names)), " ".join(map(str, self.lengths))]
        if "alpha" in self.names:
            of.append(f"{self.steps} steps of {self.streaming}")
        return of + [str(policy) for policy in self.policies if "influence" in self.names]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """By layer and KV head, float64 `[layers, kv_heads]`; influence `[lengths, policies, layers, kv_heads]` in nats a
    token. `alpha` are gates; `losses` `[steps]` is what their training came through. What was not wanted is empty."""

    echo: Scores = field(default_factory=_nothing)
    induction: Scores = field(default_factory=_nothing)
    mean_attention: Scores = field(default_factory=_nothing)
    alpha: Scores = field(default_factory=_nothing)
    losses: Scores = field(default_factory=_nothing)
    influence: Scores = field(default_factory=_nothing)

    def by_head(self) -> dict[str, Scores]:
        """What was measured, with one number a head; influence is the mean over policies and lengths."""
        found = {name: getattr(self, name) for name in ("echo", "induction", "mean_attention", "alpha")}
        found["influence"] = self.influence.mean((0, 1)) if self.influence.size else _nothing()
        return {name: scores for name, scores in found.items() if scores.size}

    def combined(self) -> Scores:
        """From 0 to 1, how much speaks for seeing everything: the mean rank under all that was measured."""
        mean: Scores = np.mean([ranks(each) for each in self.by_head().values()], axis=0)
        return mean

    def save(self, path: Path, marks: Sequence[str]) -> None:
        """Keep it in a JSON file, with what it is of."""
        lists = {each.name: getattr(self, each.name).tolist() for each in fields(self)}
        path.write_text(json.dumps({"of": list(marks), **lists}))

    @classmethod
    def load(cls, path: Path, marks: Sequence[str]) -> Evidence:
        """What `save` kept. Raises PolicyError for a file that is of another model or of other policies, or none."""
        try:
            kept = json.loads(read_text(path, error=PolicyError))
            found = kept["of"]
            scores = cls(**{each.name: np.array(kept[each.name], np.float64) for each in fields(cls)})
        except (OSError, PolicyError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise PolicyError(f"{path} has no scores that can be read: {error}") from error
        if found != list(marks):
            raise PolicyError(f"{path} is of {found!r:.200}; allowed is {list(marks)!r:.200}")
        return scores


@dataclass(frozen=True, slots=True)
class Subject:
    """The model that is calibrated, as a probe, and in torch where it is `differentiable`; and the texts it reads."""

    probe: Probe
    tokenizer: Tokenizer
    corpus: Corpus
    differentiable: Callable[[], TorchPath]


def gather(subject: Subject, wanted: Wanted, progress: Progress) -> Evidence:
    """Measure what is wanted, with contexts up to the last of its lengths."""
    longest = wanted.lengths[-1]
    found: dict[str, Scores] = {}
    if wanted.names & {"echo", "induction"}:
        found["echo"], found["induction"] = _repeats(subject, longest, wanted.seed, progress)
    if "mean_attention" in wanted.names:
        document = subject.corpus.calibration[:longest]
        queries = _spread(longest // 4, longest)
        layers = capture(subject.probe, document, queries, _named(progress, "long text"))
        found["mean_attention"] = mean_attention(subject.probe.model, layers, queries)
        del layers
    if wanted.names & {"alpha", "influence"}:
        path = subject.differentiable()
        if "influence" in wanted.names:
            found["influence"] = np.stack([_influence(subject, path, n, wanted, progress) for n in wanted.lengths])
        if "alpha" in wanted.names:
            samples = gate_samples(subject, longest, wanted.seed, progress)
            gates = train(path, samples, wanted.steps, wanted.streaming, wanted.seed, _named(progress, "gates"))
            found |= {"alpha": gates.alpha, "losses": np.array(gates.losses)}
    return Evidence(**found)


def _repeats(subject: Subject, length: int, seed: int, progress: Progress) -> tuple[Scores, Scores]:
    """Echo and induction, over random tokens four times in a row."""
    config = subject.probe.model
    unit = min(_LONGEST_UNIT, (length - 1) // REPEATS)
    ids = repeated(config.vocab_size, unit, REPEATS, config.bos_token_id, random.Random(seed))
    queries = _spread(len(ids) - unit, len(ids))
    layers = capture(subject.probe, ids, queries, _named(progress, "repeated tokens"))
    # The token that stands before them has no earlier repeat, and none of these queries looks for one.
    return echo_and_induction(layers, queries, unit, config.layer_specs()[0].scale)


def _influence(subject: Subject, path: TorchPath, length: int, wanted: Wanted, progress: Progress) -> Scores:
    """Half of it on plain text, half on questions about hidden passkeys, `[policies, layers, kv_heads]`."""
    probe, corpus, seed = subject.probe, subject.corpus, wanted.seed
    at = f"{length} tokens" if len(wanted.lengths) > 1 else ""
    judged = min(_JUDGED, length // 4)
    document, tail = corpus.calibration[: length - judged], corpus.calibration[length - judged : length]
    layers = capture(probe, document, report=_named(progress, f"long text {at}".strip()))
    report = _named(progress, f"influence, text {at}".strip())
    of_text = influences(path, layers, tail, wanted.policies, seed=seed, report=report)
    hidden = passkeys(subject.tokenizer, corpus.calibration, length - TAIL, NEEDLES, WORDS, random.Random(seed))
    layers = capture(probe, hidden.document, report=_named(progress, f"passkeys {at}".strip()))
    report = _named(progress, f"influence, passkeys {at}".strip())
    mean: Scores = (of_text + influences(path, layers, hidden.tail, wanted.policies, seed=seed, report=report)) / 2
    return mean


def gate_samples(
    subject: Subject, longest: int, seed: int, progress: Progress
) -> list[tuple[Passkeys, list[Captured]]]:
    """Documents with needles and their K and V, from the shortest to one of `longest` tokens with its questions."""
    text, generator = subject.corpus.calibration, random.Random(seed)
    lengths = np.geomspace(min(_GATE_SHORTEST, longest - TAIL), longest - TAIL, _GATE_DOCUMENTS)
    samples = []
    for number, length in enumerate(map(int, lengths), 1):
        begin = generator.randrange(len(text) - length + 1)
        sample = passkeys(subject.tokenizer, text[begin:], length, NEEDLES, WORDS, generator)
        report = _named(progress, f"document {number} of {_GATE_DOCUMENTS}")
        samples.append((sample, capture(subject.probe, sample.document, report=report)))
    return samples


def _spread(first: int, end: int) -> list[int]:
    """At most `_SAMPLED` positions of [first, end), evenly."""
    return sorted({int(at) for at in torch.linspace(first, end - 1, min(_SAMPLED, end - first))})


def _named(progress: Progress, what: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(what, done, total)
