"""What calibration measures of a model's heads before it chooses (`gather`): gathered once, kept in a file
(`Evidence`). Two of the measures need gradients, and are derived here.

Influence (`influences`) is how much the model's predictions change where a KV head sees less. Windows are chosen by it.
For queries at the end of a long text, all that a policy would take away is at hand: d = out(policy) - out(everything).
With g the gradient of the log-probability of tokens drawn from the model's own prediction, (g . d)^2 / 2 estimates the
KL divergence that d causes (the Fisher information is the KL's curvature). MoA (arXiv 2406.14909, section 3) takes the
first-order change of the loss, g . d, which is about 0 where a model has converged, and in which errors cancel.

g . d needs no output of any policy. With w_k the weight of key k and c_k = w_k (g . v_k),

    g . d = sum of c over the keys seen / sum of w over the keys seen - sum of all c

so two cumulative sums over the keys give it for every window, and blocks of keys need no sums of their own.

DuoAttention's gates (`train`; arXiv 2410.10819, section 2.3) say how much of full attention each KV head needs. They
are trained.

    out = alpha * full + (1 - alpha) * streaming, one alpha a layer and KV head, from 1, clamped to [0, 1]
    loss = mean squared error of the final hidden states on the hidden words + 0.05 * mean |alpha|

The optimiser is AdamW with learning rate 0.02, without decay. The rate rises over the first and falls over the last
fifth of the steps. Documents have many lengths, with needles at many depths. Two things are simpler than in the paper,
because training has to run on two cores. Keys and values of a document come from the full model, once; the questions at
its end alone are computed at each step. And a step asks for one needle of a document, where the paper asks for all ten.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch

from lamina.errors import PolicyError
from lamina.measure.calibration.capture import Attention, Captured, TorchPath, attend, capture, joined
from lamina.measure.calibration.data import TAIL, Corpus, Passkeys, passkeys, repeated
from lamina.measure.calibration.scores import Scores, echo_and_induction, mean_attention, ranks
from lamina.measure.probe import Probe
from lamina.system.progress import Progress
from lamina.system.text_files import read_text, write_text
from lamina.text.tokenizer import Tokenizer
from lamina_kernels.dense.dense import soft_cap
from lamina_protocols.messages.layers import LayerSpec
from lamina_workers.policies.full import Full
from lamina_workers.policies.policy import Policy, within
from lamina_workers.policies.streaming import Streaming

REPEATS = 4
_LONGEST_UNIT = 2000  # random tokens that repeat (RazorAttention uses 2500; 4 of these fit a context of 8K)
_SAMPLED = 128  # queries that scores are averaged over
_JUDGED = 384  # queries of plain text whose predictions influence is measured on
_GATE_SHORTEST = 1024  # tokens of the shortest document that gates are trained on (the paper's is as short)
_GATE_DOCUMENTS = 6  # their lengths, in equal ratios up to the context: a step takes as long as its document is
NEEDLES, WORDS = 8, 8


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to measure: influence is of each of `policies` at `length` tokens; gates choose between full and
    `streaming`, in `steps` steps."""

    length: int
    policies: Sequence[Policy]
    streaming: Streaming
    steps: int
    seed: int

    def marks(self, fingerprint: str, texts: Corpus) -> list[str]:
        """What evidence is of, for the file that keeps it."""
        gates, text = f"{self.steps} steps of {self.streaming}", zlib.crc32(np.array(texts.calibration).tobytes())
        return [fingerprint, f"text {text:08x}, seed {self.seed}", str(self.length), gates, *map(str, self.policies)]


@dataclass(frozen=True, slots=True)
class Evidence:
    """By layer and KV head, float64 `[layers, kv_heads]`; influence `[policies, layers, kv_heads]` in nats a token.
    `alpha` are gates; `losses` `[steps]` is what their training came through."""

    echo: Scores
    induction: Scores
    mean_attention: Scores
    alpha: Scores
    losses: Scores
    influence: Scores

    def by_head(self) -> dict[str, Scores]:
        """One number a head of each measure; influence is the mean over policies."""
        scores_by_name = {name: getattr(self, name) for name in ("echo", "induction", "mean_attention", "alpha")}
        return scores_by_name | {"influence": self.influence.mean(0)}

    def combined(self) -> Scores:
        """From 0 to 1, how much speaks for seeing everything: the mean rank under all measures."""
        mean: Scores = np.mean([ranks(scores) for scores in self.by_head().values()], axis=0)
        return mean

    def save(self, path: Path, marks: Sequence[str]) -> None:
        """Keep it in a JSON file, with what it is of. Raises PolicyError."""
        lists = {item.name: getattr(self, item.name).tolist() for item in fields(self)}
        write_text(path, json.dumps({"of": list(marks), **lists}), PolicyError)

    @classmethod
    def load(cls, path: Path, marks: Sequence[str]) -> Evidence:
        """What `save` kept. Raises PolicyError for a file that is of another model or of other policies, or none."""
        try:
            content = json.loads(read_text(path, error=PolicyError))
            subject = content["of"]
            scores = cls(**{item.name: np.array(content[item.name], np.float64) for item in fields(cls)})
        except (OSError, PolicyError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise PolicyError(f"{path} has no scores that can be read: {error}") from error
        if subject != list(marks):
            raise PolicyError(f"{path} is of {subject!r:.200}; allowed is {list(marks)!r:.200}")
        return scores


@dataclass(frozen=True, slots=True)
class Subject:
    """The model that is calibrated, as a probe and with gradients (`path`), and the texts it reads."""

    probe: Probe
    path: TorchPath
    tokenizer: Tokenizer
    corpus: Corpus


def gather(subject: Subject, wanted: Wanted, progress: Progress) -> Evidence:
    """Measure what is wanted, with contexts up to its length."""
    longest, seed = wanted.length, wanted.seed
    echo, induction = _repeats(subject, longest, seed, progress)
    queries = _spread(longest // 4, longest)
    layers = capture(subject.probe, subject.corpus.calibration[:longest], queries, partial(progress, "long text"))
    mean = mean_attention(subject.probe.model, layers, queries)
    del layers
    influence = _influence(subject, wanted, progress)
    samples = gate_samples(subject, longest, seed, progress)
    alpha, losses = train(subject.path, samples, wanted.steps, wanted.streaming, seed, partial(progress, "gates"))
    return Evidence(echo, induction, mean, alpha, np.array(losses), influence)


def _repeats(subject: Subject, length: int, seed: int, progress: Progress) -> tuple[Scores, Scores]:
    """Echo and induction, over random tokens four times in a row."""
    config = subject.probe.model
    unit = min(_LONGEST_UNIT, (length - 1) // REPEATS)
    ids = repeated(config.vocab_size, unit, REPEATS, config.bos_token_id, random.Random(seed))
    queries = _spread(len(ids) - unit, len(ids))
    layers = capture(subject.probe, ids, queries, partial(progress, "repeated tokens"))
    # The token that stands before them has no earlier repeat, and none of these queries looks for one.
    return echo_and_induction(layers, queries, unit, config.layer_specs()[0].scale)


def _influence(subject: Subject, wanted: Wanted, progress: Progress) -> Scores:
    """Half of it on plain text, half on questions about hidden passkeys, `[policies, layers, kv_heads]`."""
    probe, path, corpus = subject.probe, subject.path, subject.corpus
    seed, length = wanted.seed, wanted.length
    judged = min(_JUDGED, length // 4)
    document, tail = corpus.calibration[: length - judged], corpus.calibration[length - judged : length]
    layers = capture(probe, document, report=partial(progress, "long text"))
    report = partial(progress, "influence, text")
    of_text = influences(path, layers, tail, wanted.policies, seed=seed, report=report)
    hidden = passkeys(subject.tokenizer, corpus.calibration, length - TAIL, NEEDLES, WORDS, random.Random(seed))
    layers = capture(probe, hidden.document, report=partial(progress, "passkeys"))
    report = partial(progress, "influence, passkeys")
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
        report = partial(progress, f"document {number} of {_GATE_DOCUMENTS}")
        samples.append((sample, capture(subject.probe, sample.document, report=report)))
    return samples


def _spread(first: int, end: int) -> list[int]:
    """At most `_SAMPLED` positions of [first, end), evenly."""
    return sorted({int(position) for position in torch.linspace(first, end - 1, min(_SAMPLED, end - first))})


def influences(
    path: TorchPath,
    context: Sequence[Captured],
    token_ids: Sequence[int],
    policies: Sequence[Policy],
    samples: int = 2,
    seed: int = 0,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Scores:
    """Estimated KL divergence in nats a token, float64 `[policies, layers, kv_heads]`, where one KV head follows a
    policy of windows for these queries, and the rest of the model sees everything.

    `context` has K and V of the tokens before `token_ids`, the queries judged. Each of `samples` is a backward pass
    with other tokens drawn. `report(done, total)` counts layers.
    """
    start, layers = context[0].k.shape[1], path.config.num_hidden_layers
    marks: list[torch.Tensor] = []
    tails: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def attention(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        tails.append((q.detach(), k.detach(), v.detach()))
        marks.append(torch.zeros_like(q, requires_grad=True))
        report(layer + 1, 2 * layers)
        return attend(path.specs[layer], Full(), q, *joined(context[layer], k, v), start) + marks[-1]

    logits = path.logits(path.hidden(torch.tensor(token_ids), attention, start))
    likelihood = torch.log_softmax(logits, -1)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.multinomial(likelihood.detach().exp(), samples, replacement=True, generator=generator)
    gradients = [
        torch.autograd.grad(likelihood.gather(1, sample.unsqueeze(1)).sum(), marks, retain_graph=True)
        for sample in drawn.unbind(1)
    ]
    del logits, likelihood
    divergences = np.zeros((len(policies), layers, path.config.num_key_value_heads))
    for layer, (q, k, v) in enumerate(tails):
        k, v = joined(context[layer], k, v)
        spec = path.specs[layer]
        visible = [_seen(within(policy, spec.window), start, q.shape[2]) for policy in policies]
        for head in range(len(k)):
            marked = torch.stack([gradient[layer][head] for gradient in gradients])
            divergences[:, layer, head] = _of_head(spec, q[head], k[head], v[head], marked, visible, start)
        report(layers + layer + 1, 2 * layers)
    return divergences


def _of_head(
    spec: LayerSpec,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gradients: torch.Tensor,
    seen: Sequence[tuple[torch.Tensor, torch.Tensor]],
    start: int,
) -> list[float]:
    """The influence of each entry of `seen` in one KV head: q `[group, T, d]`, k and v `[start + T, d]`, gradients
    `[samples, group, T, d_v]`."""
    count = q.shape[1]
    scores = q @ k.T * spec.scale
    if spec.soft_cap is not None:
        scores = soft_cap(scores, spec.soft_cap)
    age = torch.arange(start, start + count).unsqueeze(1) - torch.arange(len(k))
    hidden = age < 0 if spec.window is None else (age < 0) | (age >= spec.window)
    weights = scores.masked_fill_(hidden, -torch.inf).softmax(-1)
    mass = _running(weights)  # [group, T, keys + 1]
    rows = torch.arange(count)
    total = np.zeros(len(seen))
    for gradient in gradients:
        change = _running(weights * (gradient @ v.T))
        for number, (sinks, first) in enumerate(seen):
            of_mass, of_change = (
                sums[..., -1] - sums[:, rows, first] + sums[:, rows, sinks] for sums in (mass, change)
            )
            moved = of_change / of_mass - change[..., -1]
            total[number] += float(moved.sum(0).square().mean()) / 2  # a group's heads move together
    return [float(divergence) for divergence in total / len(gradients)]


def _running(x: torch.Tensor) -> torch.Tensor:
    """Sums of the first 0, 1, ... entries of the last dimension, float64: small differences of them matter."""
    return torch.nn.functional.pad(x.cumsum(-1, dtype=torch.float64), (1, 0))


def _seen(policy: Policy, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each query, int64 `[count]`: how many first keys it sees, and the first key of its window, no less."""
    sinks, first = [], []
    for view in policy.views(start, count):
        positions = torch.arange(view.start, view.start + view.count)
        first.append((positions - view.window + 1).clamp(min=0))
        sinks.append(first[-1].clamp(max=view.sinks))
    return torch.cat(sinks), torch.cat(first)


RATE = 0.02
PENALTY = 0.05
RAMP = 0.2  # of the steps, at each end


def train(
    path: TorchPath,
    samples: Sequence[tuple[Passkeys, Sequence[Captured]]],
    steps: int,
    streaming: Streaming,
    seed: int = 0,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Scores, list[float]]:
    """Gates after so many steps, each on a question about one of `samples`: a document with needles, and its K and V.
    Returns alpha, float64 `[layers, kv_heads]` in [0, 1], and the loss of each step.

    All questions come once, in random order, before any comes again. `report(done, total)` counts steps.
    """
    if steps < 1 or not samples:
        raise ValueError(f"{steps} steps on {len(samples)} samples; allowed are at least one of each")
    config = path.config
    alpha = torch.ones(config.num_hidden_layers, config.num_key_value_heads, requires_grad=True)
    optimiser = torch.optim.AdamW([alpha], lr=RATE, weight_decay=0.0)
    questions = [
        (number, needle) for number, (hidden, _) in enumerate(samples) for needle in range(len(hidden.answers))
    ]
    generator = random.Random(seed)
    order: list[tuple[int, int]] = []
    targets: dict[tuple[int, int], torch.Tensor] = {}
    losses = []
    for step in range(steps):
        order = order or generator.sample(questions, len(questions))
        number, needle = order.pop()
        hidden, context = samples[number]
        question = hidden.question(needle)
        first, end = question.answers[0]
        tail, start = torch.tensor(question.tail[: end - 1]), len(question.document)
        if (number, needle) not in targets:
            with torch.no_grad():
                targets[number, needle] = path.hidden(tail, _whole(path, context, start), start)[first - 1 :]
        for group in optimiser.param_groups:
            group["lr"] = RATE * ramp(step, steps)
        with torch.no_grad():
            alpha.clamp_(0, 1)
        states = path.hidden(tail, _gated(path, context, start, alpha, streaming), start)[first - 1 :]
        loss = (states - targets[number, needle]).float().square().mean() + PENALTY * alpha.abs().mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
        report(step + 1, steps)
    return alpha.detach().clamp(0, 1).double().numpy(), losses


def ramp(step: int, steps: int) -> float:
    """The part of the learning rate at a step: linear up, flat, linear down."""
    length = max(1.0, RAMP * steps)
    return min(1.0, (step + 1) / length, (steps - step) / length)


def _whole(path: TorchPath, context: Sequence[Captured], start: int) -> Attention:
    """Everything attends everything: what the gates are to keep up with."""

    def attention(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attend(path.specs[layer], Full(), q, *joined(context[layer], k, v), start)

    return attention


def _gated(
    path: TorchPath, context: Sequence[Captured], start: int, alpha: torch.Tensor, streaming: Streaming
) -> Attention:
    def attention(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        spec, gate = path.specs[layer], alpha[layer].view(-1, 1, 1, 1).to(q.dtype)
        k, v = joined(context[layer], k, v)
        full = attend(spec, Full(), q, k, v, start)
        return gate * full + (1 - gate) * attend(spec, streaming, q, k, v, start)

    return attention
