"""What calibration measures of a model's heads before it chooses: gathered once, kept in a file."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch

from lamina.errors import PolicyError
from lamina.measure.calibration.capture import capture
from lamina.measure.calibration.data import TAIL, Corpus, passkeys, repeated
from lamina.measure.calibration.gating import optimise
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
_GATE_DOCUMENT = 1536  # tokens: a step attends all of them for each token of the questions
_GATE_SAMPLES = 4
NEEDLES, WORDS = 8, 8


@dataclass(frozen=True, slots=True)
class Evidence:
    """By layer and KV head, float64 `[layers, kv_heads]`; influence `[policies, layers, kv_heads]` in nats a token.

    `alpha` are gates; `losses` `[steps]` is what their optimisation came through.
    """

    echo: Scores
    induction: Scores
    mean_attention: Scores
    alpha: Scores
    losses: Scores
    influence: Scores

    def combined(self) -> Scores:
        """From 0 to 1, how much speaks for seeing everything: the mean rank under all five measures."""
        scores = (self.echo, self.induction, self.mean_attention, self.alpha, self.influence.mean(0))
        mean: Scores = np.mean([ranks(each) for each in scores], axis=0)
        return mean

    def save(self, path: Path, fingerprint: str, policies: Sequence[Policy]) -> None:
        """Keep it in a JSON file, with what it is of."""
        lists = {field.name: getattr(self, field.name).tolist() for field in fields(self)}
        path.write_text(json.dumps({"of": [fingerprint, *map(str, policies)], **lists}))

    @classmethod
    def load(cls, path: Path, fingerprint: str, policies: Sequence[Policy]) -> Evidence:
        """What `save` kept. Raises PolicyError for a file that is of another model or of other policies, or none."""
        wanted = [fingerprint, *map(str, policies)]
        try:
            kept = json.loads(read_text(path, error=PolicyError))
            found = kept["of"]
            scores = cls(**{field.name: np.array(kept[field.name], np.float64) for field in fields(cls)})
        except (OSError, PolicyError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise PolicyError(f"{path} has no scores that can be read: {error}") from error
        if found != wanted:
            raise PolicyError(f"{path} is of {found!r:.200}; allowed is {wanted!r:.200}")
        return scores


@dataclass(frozen=True, slots=True)
class Subject:
    """The model that is calibrated, as a probe and in torch, and the texts that it reads."""

    probe: Probe
    path: TorchPath
    tokenizer: Tokenizer
    corpus: Corpus


def gather(
    subject: Subject,
    context: int,
    policies: Sequence[Policy],
    streaming: Streaming,
    steps: int,
    seed: int,
    progress: Progress,
) -> Evidence:
    """Measure everything. `context` is the length in tokens that the policies are for. Influence is measured for each
    of `policies`, and gates choose between full and `streaming` in `steps` steps."""
    probe, path, tokenizer, corpus = subject.probe, subject.path, subject.tokenizer, subject.corpus
    config, generator = probe.model, random.Random(seed)
    unit = min(_LONGEST_UNIT, (context - 1) // REPEATS)
    ids = repeated(config.vocab_size, unit, REPEATS, config.bos_token_id, generator)
    lead = len(ids) - unit * REPEATS
    queries = _spread(lead + unit * (REPEATS - 1), len(ids))
    layers = capture(probe, ids, queries, _named(progress, "repeated tokens"))
    # The token that stands before them has no earlier repeat, and none of these queries looks for one.
    echo, induction = echo_and_induction(layers, queries, unit, path.specs[0].scale)

    judged = min(_JUDGED, context // 4)
    document = corpus.calibration[: context - judged]
    queries = _spread(len(document) // 4, len(document))
    layers = capture(probe, document, queries, _named(progress, "long text"))
    mean = mean_attention(config, layers, queries)
    tail = corpus.calibration[context - judged : context]
    influence = influences(path, layers, tail, policies, seed=seed, report=_named(progress, "influence, text"))

    hidden = passkeys(tokenizer, corpus.calibration, context - TAIL, NEEDLES, WORDS, generator)
    layers = capture(probe, hidden.document, report=_named(progress, "passkeys"))
    report = _named(progress, "influence, passkeys")
    influence = (influence + influences(path, layers, hidden.tail, policies, seed=seed, report=report)) / 2
    del layers

    samples = []
    for number in range(_GATE_SAMPLES):
        text = corpus.calibration[number * len(corpus.calibration) // (2 * _GATE_SAMPLES) :]
        sample = passkeys(tokenizer, text, min(_GATE_DOCUMENT, context - TAIL), NEEDLES // 2, WORDS, generator)
        samples.append((sample, capture(probe, sample.document)))
    gates = optimise(path, samples, steps, streaming, _named(progress, "gates"))
    return Evidence(echo, induction, mean, gates.alpha, np.array(gates.losses), influence)


def _spread(first: int, end: int) -> list[int]:
    """At most `_SAMPLED` positions of [first, end), evenly."""
    return sorted({int(at) for at in torch.linspace(first, end - 1, min(_SAMPLED, end - first))})


def _named(progress: Progress, what: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(what, done, total)
