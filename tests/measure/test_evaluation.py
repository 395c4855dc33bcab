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
from evaluate.evaluation.running import Limits, Total, answers, read_texts
from evaluate.evaluation.suite import Suite, compare, run
from evaluate.evaluation.tasks import Item

from lamina.errors import InvalidRequest
from lamina.measure.probe import Probe
from lamina_protocols.messages import Usage
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
    assert (alike.change, alike.error, alike.divergence, alike.agreement) == (0, 0, 0, 1)


def test_only_what_the_full_cache_answers_is_counted() -> None:
    full, other = [True, True, False, True], [True, False, True, True]
    s = score(full, other, 0.75)
    assert (s.asked, s.full, s.kept, s.counted) == (4, 3, 2, True)
    assert s.share == pytest.approx(2 / 3)
    assert score(full, other, 0.76).share is None
    assert score([False], [True], 0.01).share is None


def test_measures_refuse_what_does_not_fit() -> None:
    p = rows(3, 4, 0)
    with pytest.raises(ValueError, match=r"shapes \(3, 4\) and \(2, 4\)"):
        divergence(p, p[:2])
    with pytest.raises(ValueError, match=r"shapes \(3, 4\) and \(4,\)"):
        negative_log_likelihood(p, torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="at least 2"):
        quality(p[:1], p[:1], torch.tensor([0]))
    with pytest.raises(ValueError, match="2 and 1 answers"):
        score([True, True], [True], 0.5)
    with pytest.raises(ValueError, match="gate is 0"):
        score([True], [True], 0)
    with pytest.raises(ValueError, match="3 query heads"):
        exact_attention(torch.zeros(3, 4), torch.zeros(5, 2, 4), torch.zeros(5, 2, 4), 1.0)


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
            self._ids.setdefault(word, len(self._ids)) for word in re.findall(r" ?[A-Za-z]+|\d| |[^A-Za-z\d ]", text)
        ]

    def decode(self, tokens: tuple[int, ...]) -> str:
        words = list(self._ids)
        return "".join(words[token] for token in tokens)


def haystack(words: Words, n: int = 5000) -> list[int]:
    rng = random.Random(7)
    return words.encode("".join(f" w{'abcdefghij'[rng.randrange(10)]}" for _ in range(n)))


@pytest.mark.parametrize("context", [90, 401])
@pytest.mark.parametrize("begin", [(), (4321,)])
def test_a_hidden_number_lies_at_its_depth(context: int, begin: tuple[int, ...]) -> None:
    words = Words()
    hay, depths = haystack(words), (0.0, 0.25, 1.0)
    both = (
        tasks.passkey(words.encode, begin, context, depths, 5),
        tasks.needle(words.encode, begin, hay, context, depths, 5),
    )
    for items in both:
        assert len(items) == 3
        for item, depth in zip(items, depths, strict=True):
            assert len(item.prompt) + len(item.answer) == context
            assert item.prompt[: len(begin)] == begin
            text, answer = words.decode(item.prompt[len(begin) :]), words.decode(item.answer)
            assert re.fullmatch(r" \d{5}", answer)
            assert text.count(answer) == 1
            asked = text[text.rindex("\n\n") :]
            assert asked + answer + ".\n\n" in text
            before = len(words.encode(text[: text.index(asked + answer)]))
            assert before == pytest.approx(depth * context, abs=45)
            assert (item.asked, item.scored, item.name) == (1, None, f"depth {depth:g}")


def test_tasks_depend_on_the_seed_alone() -> None:
    words = Words()
    hay = haystack(words)

    def made(seed: int) -> list[Item]:
        return [
            *tasks.passkey(words.encode, (), 200, (0.5, 0.5), seed),
            *tasks.needle(words.encode, (), hay, 200, (0.5, 0.5), seed),
            *tasks.copying((), hay, 200, 2, 16, seed),
            *tasks.recall(words.encode, (), hay, 400, 2, seed),
        ]

    assert made(1) == made(1)
    assert all(a.answer != b.answer for a, b in zip(made(1), made(2), strict=True))
    assert len({item.answer for item in made(1)}) == 8  # each item is another one


def test_what_is_copied_was_said_before() -> None:
    words = Words()
    hay = haystack(words)
    for item in tasks.copying((4321,), hay, 301, 3, 16, 0):
        block = (*item.prompt, *item.answer)[1:]
        assert len(block) == 300
        assert block[:150] == block[150:]
        assert set(block) <= set(hay)
        assert item.scored == tuple(range(1, 17))  # none is predicted by the prompt's last batch
        assert len(item.answer) == 17
        assert item.asked == 16


@pytest.mark.parametrize("pairs", [1, 8])
def test_recall_asks_for_values_that_were_told(pairs: int) -> None:
    words = Words()
    for item in tasks.recall(words.encode, (), haystack(words), 400, 3, 0, pairs):
        assert len(item.prompt) + len(item.answer) == 400
        assert item.scored is not None
        assert item.asked == len(item.scored) == pairs
        told = dict(re.findall(r"The (\w+) is (\w+)\.", words.decode(item.prompt)))
        asked = re.findall(r"The (\w+) is (\w+)\.", words.decode(item.answer))
        assert len(told) == pairs
        assert dict(asked) == told
        assert [words.decode((item.answer[at],)) for at in item.scored] == [f" {value}" for _, value in asked]


def test_pieces_of_a_text_are_spread_over_it() -> None:
    text = list(range(1000))
    pieces = tasks.windows((7,), text, 101, 3)
    assert [piece[1] for piece in pieces] == [0, 450, 900]
    assert all(len(piece) == 101 and piece[0] == 7 for piece in pieces)
    assert tasks.windows((), text, 1000, 1) == [tuple(text)]


def test_tasks_say_what_is_too_small() -> None:
    words = Words()
    hay = haystack(words)
    with pytest.raises(InvalidRequest, match="passkey needs at least"):
        tasks.passkey(words.encode, (), 20, (0.5,), 0)
    with pytest.raises(InvalidRequest, match=r"a depth is 1\.5"):
        tasks.passkey(words.encode, (), 200, (1.5,), 0)
    with pytest.raises(InvalidRequest, match="copying needs at least"):
        tasks.copying((), hay, 32, 1, 16, 0)
    with pytest.raises(InvalidRequest, match="recall needs at least"):
        tasks.recall(words.encode, (), hay, 80, 1, 0)
    with pytest.raises(InvalidRequest, match="pairs is 1000; allowed with this tokenizer are 1 to"):
        tasks.recall(words.encode, (), hay, 400, 1, 0, 1000)
    with pytest.raises(InvalidRequest, match="of a text of 10"):
        tasks.needle(words.encode, (), hay[:10], 200, (0.5,), 0)
    with pytest.raises(InvalidRequest, match="of a text of 10"):
        tasks.windows((), hay[:10], 11, 1)


# Running.


def test_texts_are_predicted_as_the_model_does(decoder: Decoder) -> None:
    texts, fed = [ids(61, seed) for seed in range(3)], []
    logits, targets = read_texts(probe(decoder), texts, 10, Limits(batch=2, chunk=17), Total(), fed.append)
    assert sum(fed) == sum(len(text) - 1 for text in texts) == 180
    assert targets.tolist() == [token for text in texts for token in text[-10:]]
    for text, of in zip(texts, logits.split(10), strict=True):
        expected = DenseAttention(decoder, 61).run(text)[-11:-1]
        assert torch.allclose(of, expected, atol=1e-4)


def test_answers_are_the_models_own(decoder: Decoder) -> None:
    """Greedy where it continues alone; given the right tokens, each scored one for itself."""
    prompts = [ids(n, n) for n in (40, 23, 31)]
    own = []
    for prompt in prompts:
        said = list(prompt)
        for _ in range(7):
            said.append(int(DenseAttention(decoder, 50).run(said)[-1].argmax()))
        own.append(tuple(said[len(prompt) :]))
    wrong = (*own[0][:3], (own[0][3] + 1) % 101, *own[0][4:])
    forced = DenseAttention(decoder, 50).run((*prompts[0], *wrong)).argmax(-1).tolist()[len(prompts[0]) - 1 :]
    items = [
        Item("own", "a", prompts[0], own[0]),
        Item("own", "b", prompts[1], own[1][:2]),
        Item("own", "c", prompts[2], own[2][:1]),
        Item("own", "d", prompts[0], wrong),
        Item("forced", "e", prompts[0], wrong, (0, 3, 5, 6)),
        Item("forced", "f", prompts[2], own[2], tuple(range(7))),
    ]
    fed: list[int] = []
    right = list(answers(probe(decoder), items, Limits(batch=4, chunk=16), Total(), fed.append))
    assert right[:4] == [[True], [True], [True], [False]]
    assert right[4] == [forced[at] == wrong[at] for at in (0, 3, 5, 6)]
    assert right[4][:2] == [True, False]
    assert right[5] == [True] * 7
    assert sum(fed) == sum(len(item.prompt) + len(item.answer) - 1 for item in items)


def test_usage_adds_up() -> None:
    total = Total()
    assert (total.read_share, total.held_share, total.missed_share) == (1, 1, 0)
    total.add(None)
    total.add(Usage(10, 40, 0.5, 4, 0.3, 3, 4))
    total.add(Usage(30, 60, 0.1, 2, 0.1, 1, 4))
    assert (total.read_share, total.held_share, total.worst) == (0.4, 0.5, 0.3)
    assert total.missed_share == pytest.approx(0.1)


def brute_force(policy: Policy, keys: int) -> list[bool]:
    (view,) = policy.views(keys - 1, 1)
    return [
        (keys - 1 - k < view.window or k < view.sinks) and (view.listed is None or k in view.listed)
        for k in range(keys)
    ]


@pytest.mark.parametrize("window", [None, 21])
@pytest.mark.parametrize(
    "text", ["full", NARROW, "span(alpha=13, beta=0.5)", "sharded(block=4, local=2, stride=3, offset=1)"]
)
def test_what_a_policy_sees(text: str, window: int | None) -> None:
    policy = within(parse(text), window)
    for keys in (1, 20, 140):
        mask = seen(policy, keys, 16)
        assert mask is not None
        assert mask.tolist() == brute_force(policy, keys)
        assert mask[-1]


def test_positions_do_not_say_what_an_adaptive_policy_sees() -> None:
    class Choosing(Policy):
        name = "choosing"
        adaptive = True

        def views(self, start: int, count: int) -> list[View]:  # type: ignore[override]  # never asked
            raise NotImplementedError

    assert seen(Choosing(), 5, 16) is None


def test_what_a_mean_stands_for_is_not_seen() -> None:
    mask = seen(parse("razor(sink=5, recent=20, share=0)"), 100, 16)  # kept from position 80 on, which begins a page
    assert mask is not None
    assert mask.nonzero().flatten().tolist() == [*range(16), *range(80, 100)]
    mask = seen(parse("razor(sink=16, recent=10, share=0.5)"), 100, 16)  # from 99 - 49 + 1 = 51 on, whose page is 48's
    assert mask is not None
    assert mask.nonzero().flatten().tolist() == [*range(16), *range(48, 100)]


def test_full_heads_return_exact_attention(decoder: Decoder, windowed: Decoder) -> None:
    for model in (decoder, windowed):
        fidelity = read_heads(probe(model), ids(90), 5, Total(), nothing, chunk=32)
        assert fidelity.cosine.shape == (3, 6)
        assert fidelity.cosine.min() > 0.99999
        assert fidelity.error.max() < 1e-4
        assert torch.allclose(fidelity.mass, torch.ones(3, 6), atol=1e-5)


def test_a_policy_shows_in_its_heads(decoder: Decoder) -> None:
    total = Total()
    fidelity = read_heads(probe(decoder, NARROW), ids(90), 5, total, nothing, chunk=32)
    assert fidelity.error.min() > 1e-3  # no head sees all of what it would attend
    assert fidelity.mass.max() < 0.9
    assert fidelity.mass.min() > 0
    assert total.read_share == pytest.approx(11 / 88, abs=0.01)  # of 86 to 89 tokens it reads 11
    assert 0 < total.held_share < 0.6


def test_a_policy_that_sees_all_is_the_full_cache(decoder: Decoder) -> None:
    text = ids(80)
    suite = Suite(texts={"text": [text]}, items=[], steps=12)
    limits = Limits(batch=2, chunk=32)
    full = run(probe(decoder), suite, limits)
    wide = compare(suite, full, run(probe(decoder, "streaming(sink=0, recent=100)"), suite, limits), 0.5)
    assert wide.texts["text"].agreement == 1
    assert wide.texts["text"].divergence < 1e-6
    assert wide.usage["texts"].read_share == wide.usage["texts"].held_share == 1


@pytest.fixture(scope="module")
def suite(decoder: Decoder) -> Suite:
    """The answers are what the full cache says: all of the first task's, none of the second's."""
    prompts = [ids(70, seed) for seed in range(4)]
    own = []
    for prompt in prompts:
        said = list(prompt)
        for _ in range(6):
            said.append(int(DenseAttention(decoder, 80).run(said)[-1].argmax()))
        own.append(tuple(said[70:]))
    return Suite(
        texts={"a": [ids(80, 5), ids(80, 6)], "b": [ids(77, 7)]},
        items=[
            *(Item("known", f"depth {at % 2}", p, a) for at, (p, a) in enumerate(zip(prompts, own, strict=True))),
            Item("unknown", "depth 0", prompts[0], tuple((token + 1) % 101 for token in own[0])),
        ],
        heads=ids(60, 8),
        steps=12,
        head_steps=3,
    )


def test_the_full_cache_beside_itself(decoder: Decoder, suite: Suite) -> None:
    """Cut into other chunks: that is the noise floor."""
    fed: list[int] = []
    full = run(probe(decoder), suite, Limits(batch=4, chunk=64), fed.append)
    assert sum(fed) == suite.tokens
    assert suite.longest == 80
    again = compare(suite, full, run(probe(decoder), suite, Limits(batch=1, chunk=23)), 0.5)
    for of in again.texts.values():
        assert of.agreement == 1
        assert abs(of.change) < 1e-5
        assert of.divergence < 1e-6
    assert (again.tasks["known"].asked, again.tasks["known"].full, again.tasks["known"].kept) == (4, 4, 4)
    assert again.items["known"]["depth 1"].asked == 2
    assert not again.tasks["unknown"].counted
    assert again.tasks["unknown"].share is None


def test_a_narrow_policy_beside_the_full_cache(decoder: Decoder, suite: Suite) -> None:
    limits = Limits(batch=4, chunk=64)
    narrow = compare(suite, run(probe(decoder), suite, limits), run(probe(decoder, NARROW), suite, limits), 0.5)
    assert [of.tokens for of in narrow.texts.values()] == [24, 12]
    for of in narrow.texts.values():
        assert of.agreement < 0.9
        assert of.divergence > 0.01
    assert narrow.tasks["known"].share == 0  # six tokens in a row, of a model that looks at everything
    assert set(narrow.usage) == {"texts", "items", "heads"}
    assert all(of.read_share < 0.25 and of.held_share < 0.6 for of in narrow.usage.values())
    file = json.loads(json.dumps(narrow.as_json(), allow_nan=False))
    assert file["texts"]["a"]["agreement"] == narrow.texts["a"].agreement
    assert file["tasks"]["unknown"]["share"] is None
    assert file["usage"]["texts"]["read_share"] == narrow.usage["texts"].read_share
    assert len(file["heads"]["mass"]) == 3
    assert len(file["heads"]["mass"][0]) == 6


def test_suites_that_cannot_be_run_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="steps is 9; allowed are 2 to 8"):
        Suite(texts={"a": [ids(10)]}, items=[], steps=9)
    with pytest.raises(InvalidRequest, match="head_steps is 10; allowed are 2 to 9"):
        Suite(texts={}, items=[], heads=ids(10), head_steps=10)


@pytest.mark.soak
@pytest.mark.data
@pytest.mark.timeout(600)
def test_the_script_on_the_real_model(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "scripts" / "evaluate" / "long_context.py"
    policy = "streaming(sink=16, recent=64)"
    command = [
        sys.executable,
        str(script),
        "--context",
        "512",
        "--policies",
        policy,
        "--out",
        str(tmp_path),
        "--texts",
        "2",
    ]
    command += ["--steps", "16", "--samples", "1", "--head-steps", "2", "--threads", "1", "--kv-memory", "1GiB"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=550, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    floor, narrow = results["results"]["full, other chunks"], results["results"][policy]
    assert floor["tasks"]["passkey"]["full"] >= 1  # so small a model does not find all
    assert floor["tasks"]["needle"]["share"] == 1
    assert narrow["tasks"]["needle"]["share"] <= 0.2
    assert narrow["texts"]["pydoc topics"]["agreement"] < floor["texts"]["pydoc topics"]["agreement"]
    assert narrow["usage"]["texts"]["held_share"] < 0.3
    assert {"processor", "dtype", "model", "context", "seed"} <= set(results["about"])
