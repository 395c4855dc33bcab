"""Measures against their formulas, tasks that say where their answer is, and policies that must show."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dense_attention import DenseAttention
from engine_rig import holder_config
from evaluate.evaluation import tasks
from evaluate.evaluation.heads import read_heads, seen
from evaluate.evaluation.kept_kv import KeptKV, reads_prompts_whole
from evaluate.evaluation.measures import (
    agreement,
    cosine,
    divergence,
    exact_attention,
    negative_log_likelihood,
    quality,
    relative_error,
    score,
)
from evaluate.evaluation.running import held_share, keep, known, missed_share, read_share, read_tasks
from evaluate.evaluation.suite import ALL, compare, found
from evaluate.evaluation.tasks import Prompt, Task

from lamina.measure.probe import Probe
from lamina_workers.decoder.model import Decoder
from lamina_workers.policies.catalogue import parse
from lamina_workers.policies.policy import Policy, View, within

NARROW = "streaming(sink=2, recent=9)"


def probe(decoder: Decoder, policy: str = "full") -> Probe:
    """The tiny model, all of whose heads have that policy."""
    holder = holder_config(decoder)
    layers = holder.layers
    if policy != "full":
        layers = tuple(dataclasses.replace(spec, policies=(policy,) * spec.kv_heads) for spec in layers)
    return Probe(decoder.config, decoder, dataclasses.replace(holder, layers=layers))


def nothing(tokens: int) -> None:
    """No progress wanted."""


def ids(n: int, seed: int = 0) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.randrange(101) for _ in range(n))


# Measures.


def rows(n: int, vocab: int, seed: int, size: float = 3.0) -> torch.Tensor:
    return torch.randn(n, vocab, generator=torch.Generator().manual_seed(seed)) * size


def naive_probabilities(row: torch.Tensor) -> list[float]:
    weights = [math.exp(x - max(row.tolist())) for x in row.tolist()]
    return [w / sum(weights) for w in weights]


@pytest.mark.parametrize(("n", "vocab"), [(1, 2), (5, 7), (67, 3), (130, 11)])  # more than one split of rows too
def test_predictions_are_measured_by_their_formulas(n: int, vocab: int) -> None:
    p, q = rows(n, vocab, 1), rows(n, vocab, 2)
    targets = torch.arange(n) % vocab
    nll, kl, same = negative_log_likelihood(p, targets), divergence(p, q), agreement(p, q)
    for at in range(n):
        of_p, of_q = naive_probabilities(p[at]), naive_probabilities(q[at])
        assert nll[at] == pytest.approx(-math.log(of_p[at % vocab]), rel=1e-4, abs=1e-5)
        assert kl[at] == pytest.approx(sum(a * math.log(a / b) for a, b in zip(of_p, of_q, strict=True)), abs=1e-4)
        assert same[at] == (of_p.index(max(of_p)) == of_q.index(max(of_q)))
    assert divergence(p, p).abs().max() == 0
    assert divergence(p, q).max() > 0.01


def test_large_logits_give_finite_measures() -> None:
    p = torch.tensor([[3000.0, -3000.0, 0.0]])
    assert negative_log_likelihood(p, torch.tensor([1])).item() == 6000
    assert divergence(p, p.flip(-1)).isfinite().all()


def test_quality_is_of_the_pairs() -> None:
    full, other, targets = rows(40, 9, 1), rows(40, 9, 1) + rows(40, 9, 2, 0.5), torch.arange(40) % 9
    q = quality(full, other, targets)
    changes = [
        math.log(naive_probabilities(a)[t] / naive_probabilities(b)[t])
        for a, b, t in zip(full, other, targets.tolist(), strict=True)
    ]
    mean = sum(changes) / 40
    spread = math.sqrt(sum((c - mean) ** 2 for c in changes) / 39)
    assert q.change == pytest.approx(mean, rel=1e-4)
    assert q.error == pytest.approx(spread / math.sqrt(40), rel=1e-4)
    assert q.nll - q.full_nll == pytest.approx(q.change, abs=1e-6)
    assert q.relative == pytest.approx(q.change / q.full_nll)
    assert q.agreement == (full.argmax(-1) == other.argmax(-1)).float().mean()
    alike = quality(full, full, targets)
    assert (alike.change, alike.error, alike.divergence, alike.worst, alike.agreement) == (0, 0, 0, 0, 1)


def test_only_what_the_full_cache_answers_is_counted() -> None:
    full, other = [True, True, False, True], [True, False, True, True]
    s = score(full, other)
    assert (s.asked, s.full, s.kept) == (4, 3, 2)


@pytest.mark.parametrize(("window", "cap"), [(None, None), (4, None), (40, 2.0), (1, 3.0)])
def test_exact_attention_is_the_definition(window: int | None, cap: float | None) -> None:
    g = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(*shape, generator=g) for shape in ((6, 8), (11, 3, 8), (11, 3, 5)))
    out, weights = exact_attention(q, k, v, 0.3, window, cap)
    for head in range(6):
        logits = [0.3 * float(q[head] @ k[n, head // 2]) for n in range(11)]
        if cap is not None:
            logits = [cap * math.tanh(x / cap) for x in logits]
        w = [math.exp(x) if window is None or n > 10 - window else 0.0 for n, x in enumerate(logits)]
        assert weights[head].tolist() == pytest.approx([x / sum(w) for x in w], abs=1e-5)
        expected = sum(x / sum(w) * v[n, head // 2] for n, x in enumerate(w))
        assert torch.allclose(out[head], expected, atol=1e-5)


def test_outputs_are_compared_head_by_head() -> None:
    a = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [1e-30, 0.0]])
    b = torch.tensor([[6.0, 8.0], [0.0, 2.0], [0.0, 0.0], [0.0, 1.0], [-1e-30, 0.0]])
    assert cosine(a, b).tolist() == pytest.approx([1, 0, 1, 0, 0], abs=1e-6)  # the last one's product is too small
    assert relative_error(a[:2], b[:2]).tolist() == pytest.approx([1, math.sqrt(5)])


# Tasks.


class Words:
    """A tokenizer of words: each with the space before it is one token, other characters by themselves."""

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}

    def encode(self, text: str) -> list[int]:
        return [
            self._ids.setdefault(word, len(self._ids)) for word in re.findall(r" ?[A-Za-z_]+|\d| |[^A-Za-z_\d ]", text)
        ]

    def decode(self, tokens: tuple[int, ...]) -> str:
        words = list(self._ids)
        return "".join(words[token] for token in tokens)


def haystack() -> str:
    rng = random.Random(7)
    return "".join(f" w{'abcdefghij'[rng.randrange(10)]}" for _ in range(5000))


def made(words: Words, context: int = 3000, names: tuple[str, ...] = tasks.TASKS, seed: int = 5) -> Prompt:
    hay = words.encode(haystack())
    return tasks.make_prompt(words.encode, (words.encode("!")[0],), hay, context, 200, 12, 8, names, seed)


def test_what_is_asked_was_told() -> None:
    words = Words()
    prompt = made(words)
    text = words.decode(prompt.tokens)
    assert [task.name for task in prompt.tasks] == list(tasks.TASKS)
    assert len(prompt.tokens) + max(len(task.tokens) for task in prompt.tasks) == 3000
    assert prompt.tokens_fed == len(prompt.tokens) - 1 + sum(len(task.tokens) for task in prompt.tasks)
    by_name = {task.name: task for task in prompt.tasks}
    keys = re.findall(r"\n\nThe key of the \w+ \w+ is \d{5}\.\n\n", text)
    assert len(keys) == 12
    assert words.decode(by_name["passkeys"].tokens) != "".join(keys)  # in another order
    assert sorted(re.findall(r"is \d{5}", words.decode(by_name["passkeys"].tokens))) == sorted(
        re.findall(r"is \d{5}", text)
    )
    depths = [text.index(key) / len(text) for key in keys]
    assert max(abs(depth - (at + 0.5) / 12) for at, depth in enumerate(depths)) < 0.1
    told = dict(re.findall(r"\nThe (\w+) is (\w+)\.\n", text))
    assert len(told) == 8
    assert dict(re.findall(r"The (\w+) is (\w+)\.", words.decode(by_name["recall"].tokens))) == told
    assert words.decode(by_name["code"].tokens) in text
    assert len(by_name["text"].tokens) == len(by_name["switch"].tokens) == 200
    for passage in words.decode(by_name["switch"].tokens).split("\n\n")[1:-1]:
        assert passage in haystack()


def test_answers_are_the_values_and_stand_at_every_distance() -> None:
    words = Words()
    for task in made(words).tasks:
        answers = [words.decode(tuple(task.tokens[at] for at in answer)) for answer in task.answers]
        assert all(re.fullmatch(r" \d{5}| \w+", answer) for answer in answers)
        assert len(answers) == {"passkeys": 12, "recall": 8, "changes": 16}.get(task.name, 0)
        if task.name == "changes":
            questions = re.split(r"The (?:key of the )?[\w ]+ is [\w]+\.\n+", words.decode(task.tokens))
            assert {len(words.encode(between.strip("\n"))) for between in questions[:-1]} == set(range(8))


# Running.


@pytest.fixture(scope="module")
def prompt(decoder: Decoder) -> Prompt:
    """With a task whose answer is what the full cache says, and one whose answer is something else."""
    tokens = ids(70, 3)
    said = list(tokens)
    for _ in range(6):
        said.append(int(DenseAttention(decoder, 80).run(said)[-1].argmax()))
    own = tuple(said[70:])
    wrong = (*own[:3], (own[3] + 1) % 101, *own[4:])
    return Prompt(tokens, (Task("own", own, ((0, 1), (2, 3, 4, 5))), Task("wrong", wrong, ((0,), (3,), (0, 3)))))


def kept_in(folder: Path) -> KeptKV:
    return KeptKV(folder, "tiny")


def test_tasks_are_predicted_as_the_model_does(decoder: Decoder, prompt: Prompt, tmp_path: Path) -> None:
    fed: list[int] = []
    outcomes = read_tasks(probe(decoder), kept_in(tmp_path), prompt, 17, fed.append)
    assert sum(fed) == prompt.tokens_fed == 69 + 12
    for task in prompt.tasks:
        expected = DenseAttention(decoder, 80).run((*prompt.tokens, *task.tokens[:-1]))[69:]
        assert torch.allclose(outcomes[task.name].logits, expected, atol=1e-4)
    assert found(prompt.tasks[0], outcomes["own"].logits) == [True, True]
    assert found(prompt.tasks[1], outcomes["wrong"].logits) == [True, False, False]


@pytest.mark.parametrize("policy", ["full", "streaming(sink=0, recent=40)", "page_top_k(recent=9)", "razor"])
def test_kept_prompts_are_what_was_computed(decoder: Decoder, prompt: Prompt, tmp_path: Path, policy: str) -> None:
    """Read back, a prompt's K and V give the same logits; where a policy sees less of a prompt, it computes its own."""
    kept = kept_in(tmp_path)
    full = read_tasks(probe(decoder), kept, prompt, 32, nothing)
    stored = probe(decoder, policy)
    assert reads_prompts_whole(stored, 69) == (not policy.startswith("streaming"))
    again = read_tasks(stored, kept, prompt, 32, nothing)
    computed = read_tasks(probe(decoder, policy), kept_in(tmp_path / "other"), prompt, 32, nothing)
    for task in prompt.tasks:
        assert torch.allclose(again[task.name].logits, computed[task.name].logits, atol=1e-5)
        assert again[task.name].usage == computed[task.name].usage
    if policy == "full":
        assert torch.allclose(again["own"].logits, full["own"].logits, atol=1e-5)
    assert known(kept, prompt, "auto") is None
    keep(kept, prompt, "auto", full)
    back = known(kept, prompt, "auto")
    assert back is not None
    assert torch.equal(back["wrong"].logits, full["wrong"].logits)
    assert known(kept, prompt, "int8") is None


def test_a_narrow_policy_beside_the_full_cache(decoder: Decoder, prompt: Prompt, tmp_path: Path) -> None:
    kept = kept_in(tmp_path)
    full = [read_tasks(probe(decoder), kept, prompt, 32, nothing)]
    same = compare([prompt], full, full)
    assert (same["own"].score.asked, same["own"].score.full, same["own"].score.kept) == (2, 2, 2)
    assert (same["wrong"].score.asked, same["wrong"].score.full) == (3, 1)
    assert (same[ALL].quality.agreement, same[ALL].quality.divergence, same[ALL].quality.tokens) == (1, 0, 12)
    narrow = compare([prompt], full, [read_tasks(probe(decoder, NARROW), kept, prompt, 32, nothing)])
    assert narrow[ALL].quality.agreement < 0.9
    assert narrow[ALL].quality.worst >= narrow[ALL].quality.divergence > 0.01
    assert narrow["own"].score.kept < 2
    assert narrow[ALL].usage.read == sum(narrow[task.name].usage.read for task in prompt.tasks)
    file = json.loads(json.dumps(narrow[ALL].as_json(), allow_nan=False))
    assert file["read"] == read_share(narrow[ALL].usage) < 0.25
    assert file["held"] == held_share(narrow[ALL].usage) < 0.6
    assert missed_share(narrow[ALL].usage) == 0  # nobody estimates it


def brute_force(policy: Policy, keys: int) -> list[bool]:
    (view,) = policy.views(keys - 1, 1)
    if view.ranges is None:
        return [keys - 1 - k < view.window or k < view.sinks for k in range(keys)]
    return [any(first <= k < end for first, end in view.ranges.tolist()) for k in range(keys)]


@pytest.mark.parametrize("window", [None, 21])
@pytest.mark.parametrize(
    "text", ["full", NARROW, "span(alpha=13, beta=0.5)", "sharded(block=4, local=2, stride=3, offset=1)"]
)
def test_what_a_policy_sees(text: str, window: int | None) -> None:
    policy = within(parse(text), window)
    for keys in (1, 20, 140):
        mask = seen(policy, keys)
        assert mask is not None
        assert mask.tolist() == brute_force(policy, keys)
        assert mask[-1]


def test_positions_do_not_say_what_an_adaptive_policy_sees() -> None:
    class Choosing(Policy):
        name = "choosing"
        adaptive = True

        def views(self, start: int, count: int) -> list[View]:  # type: ignore[override]  # never asked
            raise NotImplementedError

    assert seen(Choosing(), 5) is None


def test_full_heads_return_exact_attention(decoder: Decoder, windowed: Decoder) -> None:
    for model in (decoder, windowed):
        fidelity = read_heads(probe(model), ids(90), 5, nothing, chunk=32)
        assert fidelity.cosine.shape == (3, 6)
        assert fidelity.cosine.min() > 0.99999
        assert fidelity.error.max() < 1e-4
        assert torch.allclose(fidelity.mass, torch.ones(3, 6), atol=1e-5)


def test_a_policy_shows_in_its_heads(decoder: Decoder) -> None:
    fidelity = read_heads(probe(decoder, NARROW), ids(90), 5, nothing, chunk=32)
    assert fidelity.error.min() > 1e-3  # no head sees all of what it would attend
    assert fidelity.mass.max() < 0.9
    assert fidelity.mass.min() > 0
    assert len(fidelity.as_json()["mass"]) == 3
    assert len(fidelity.as_json()["mass"][0]) == 6


@pytest.mark.soak
@pytest.mark.data
@pytest.mark.timeout(600)
def test_the_script_on_the_real_model(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "scripts" / "evaluate" / "long_context.py"
    policy = "streaming(sink=16, recent=64)"
    command = [sys.executable, str(script), "--context", "1600", "--policies", "full", policy, "--out", str(tmp_path)]
    command += ["--steps", "16", "--depths", "4", "--pairs", "4", "--heads", "2", "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=550, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    floor, narrow = results["results"]["full"], results["results"][policy]
    assert floor["passkeys"]["answers"]["full"] >= 1  # so small a model does not find all
    assert narrow["passkeys"]["answers"]["kept"] == 0
    assert narrow["text"]["quality"]["agreement"] < floor["text"]["quality"]["agreement"]
    assert narrow["all"]["held"] < 0.3
    assert len(results["heads"][policy]["mass"]) == 30
    assert {"processor", "dtype", "model", "context", "seed"} <= set(results["about"])
