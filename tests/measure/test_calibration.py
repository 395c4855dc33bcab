"""Calibration, on heads whose answer is known, on a tiny model, and against the runtime that serves."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from engine_rig import TINY, Tensors, holder_config
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tokenizers import Tokenizer as WordLevelTokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from typer.testing import CliRunner

from lamina import policy_file
from lamina.cli import main
from lamina.cli.policy import calibrate, policy_app
from lamina.errors import InvalidRequest, PolicyError
from lamina.measure.calibration.calibrate import Calibration, Settings
from lamina.measure.calibration.capture import Captured, TorchPath, attend, capture, joined
from lamina.measure.calibration.data import Corpus, Passkeys, corpus, passkeys, repeated, vocabulary_words
from lamina.measure.calibration.evidence import Evidence, Wanted, influences, ramp, train
from lamina.measure.calibration.quality import Quality, Target, compare, read
from lamina.measure.calibration.report import measures, page, write_report
from lamina.measure.calibration.scores import Trial, choose, echo_and_induction, mean_attention, ranks
from lamina.measure.calibration.windows import candidates, options_at, plans
from lamina.measure.probe import Probe
from lamina.policy_file import Heads, PolicyFile, kept_share
from lamina_workers.checkpoints.model_checkpoint import fingerprint
from lamina_workers.decoder.decoder_weights import load_weights
from lamina_workers.decoder.model import Decoder
from lamina_workers.decoder.rope import Rotary
from lamina_workers.errors import UnsupportedModelError
from lamina_workers.model_config.config import ModelConfig
from lamina_workers.policies.catalogue import parse
from lamina_workers.policies.compared.span import Span
from lamina_workers.policies.full import Full
from lamina_workers.policies.policy import Policy
from lamina_workers.policies.streaming import Streaming

FULL = (("full",) * 3,) * 3
MIXED = (
    ("full", "streaming(sink=3, recent=20)", "streaming(sink=0, recent=7)"),
    ("span(alpha=9, beta=0.25)", "full", "sharded(block=16, local=2, stride=3, offset=1, step=0)"),
    ("streaming(sink=40, recent=1)", "streaming(sink=3, recent=20)", "full"),
)


class Words:
    """A tokenizer of whole words, `w` and letters for a number; what it does not know becomes token 1."""

    def __init__(self, size: int = 300) -> None:
        letters = "abcdefghijklmnopqrstuvwxyz"
        self._words = ["a", "?"] + [
            " word" + letters[number // 26] + letters[number % 26] for number in range(size - 2)
        ]
        self.vocab_size = size

    def encode(self, text: str) -> list[int]:
        return [0] if text == "a" else [1] * len(text.split())

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self._words[token] for token in ids)


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return ModelConfig.from_dict(TINY | {"vocab_size": 300})


@pytest.fixture(scope="module")
def path(config: ModelConfig) -> TorchPath:
    return TorchPath(config, Tensors(config))


def probe_of(config: ModelConfig, heads: Heads = FULL, source: Tensors | None = None) -> Probe:
    decoder = Decoder(config, load_weights(config, source or Tensors(config), torch.float32, torch.device("cpu")))
    holder = holder_config(decoder)
    layers = tuple(dataclasses.replace(spec, policies=texts) for spec, texts in zip(holder.layers, heads, strict=True))
    return Probe(config, decoder, dataclasses.replace(holder, layers=layers))


def tokens(count: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(2, 300), k=count)


def logits_of(path: TorchPath, ids: list[int], heads: Heads, context: list[Captured] | None = None) -> torch.Tensor:
    """Of the torch path, each KV head under its policy; `context` was captured of the tokens before."""
    start = context[0].k.shape[1] if context else 0

    def attention(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if context:
            k, v = joined(context[layer], k, v)
        each = [slice(head, head + 1) for head in range(len(heads[layer]))]
        spec = path.specs[layer]
        return torch.cat([attend(spec, parse(heads[layer][h.start]), q[h], k[h], v[h], start) for h in each])

    with torch.no_grad():
        return path.logits(path.hidden(torch.tensor(ids), attention, start))


class TestTorchPath:
    def test_it_says_what_the_runtime_says(self, config: ModelConfig, path: TorchPath) -> None:
        ids = tokens(150)
        probe = probe_of(config, MIXED)
        expected = probe.read(probe.open(), ids)
        torch.testing.assert_close(expected, logits_of(path, ids, MIXED), rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize(
        "more",
        [
            {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},  # biases
            {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},  # norms of q and k
            {"tie_word_embeddings": True, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 64},
        ],
    )
    def test_every_family(self, more: dict[str, object]) -> None:
        config = ModelConfig.from_dict(TINY | more)
        path = TorchPath(config, Tensors(config))
        ids = random.Random(1).choices(range(101), k=50)
        probe = probe_of(config)
        torch.testing.assert_close(probe.read(probe.open(), ids), logits_of(path, ids, FULL), rtol=1e-3, atol=1e-3)

    def test_a_tail_goes_on_from_a_captured_context(self, config: ModelConfig, path: TorchPath) -> None:
        ids = tokens(300)
        context = capture(probe_of(config), ids[:211])
        probe = probe_of(config)
        logits = probe.read(probe.open(), ids)[211:]
        torch.testing.assert_close(logits_of(path, ids[211:], FULL, context), logits, rtol=1e-3, atol=1e-3)

    def test_attention_that_is_not_plain_is_refused_by_name(self) -> None:
        indexed = {
            "architectures": ["MiniMaxM3VLForCausalLM"],
            "model_type": "minimax_m3_vl_text",
            "dense_intermediate_size": 96,
            "shared_intermediate_size": 48,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "index_block_size": 16,
            "index_topk_blocks": 2,
            "layer_types": ["minimax_m3_sparse"] * 3,
        }
        config = ModelConfig.from_dict(TINY | indexed)
        with pytest.raises(UnsupportedModelError, match="plain attention; this one has an index"):
            TorchPath(config, Tensors(config))

    def test_experts_have_gradients_too(self) -> None:
        config = ModelConfig.from_dict(
            TINY
            | {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
            | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
        )
        path, given = TorchPath(config, Tensors(config)), list[torch.Tensor]()

        def attention(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            given.append(attend(path.specs[layer], Full(), q, k, v).detach().requires_grad_())
            return given[-1]

        path.logits(path.hidden(torch.arange(20) % config.vocab_size, attention)).square().sum().backward()
        assert all(x.grad is not None and x.grad.abs().max() > 0 for x in given)

    def test_capture_gives_what_was_asked_for(self, config: ModelConfig) -> None:
        ids, reports = tokens(1500), list[tuple[int, int]]()
        layers = capture(probe_of(config), ids, [3, 1023, 1024, 1499], lambda *report: reports.append(report))
        assert [layer.k.shape for layer in layers] == [(3, 1500, 16)] * 3
        assert layers[0].q.shape == (3, 2, 4, 16)
        assert reports == [(1024, 1500), (1500, 1500)]
        alone = capture(probe_of(config), ids[:1025], [1024])
        torch.testing.assert_close(alone[2].q[:, :, 0], layers[2].q[:, :, 2], rtol=1e-3, atol=1e-3)


class TestScores:
    def test_echo_and_induction_know_their_heads(self) -> None:
        """Head 0 looks for its own token, head 1 for the place after it, head 2 for nothing at all."""
        unit, repeats = 30, 4
        codes = torch.nn.functional.one_hot(torch.arange(unit), 32).float().repeat(repeats, 1) * 8
        earlier = torch.cat([torch.zeros(1, 32), codes[:-1]])
        keys = torch.stack([codes, earlier, torch.zeros_like(codes)])
        at = list(range(unit * 3, unit * 4))
        q = torch.stack([codes, codes, codes])[:, None, at].repeat(1, 2, 1, 1)
        q[:, 0] = 0  # a KV head has the score of its best query head
        echo, induction = echo_and_induction([Captured(q, keys, keys)], at, unit, 1.0)
        # Of four equal places that head 0 looks at, three are in earlier repeats, and one is the query itself.
        np.testing.assert_allclose(echo, [[0.75, 3 / 105, 3 / 105]], atol=0.01)
        np.testing.assert_allclose(induction, [[3 / 105, 1, 3 / 105]], atol=0.01)

    def test_queries_without_an_earlier_repeat_are_refused(self) -> None:
        keys = torch.zeros(1, 9, 4)
        with pytest.raises(ValueError, match="queries from 2 on, unit 3; allowed"):
            echo_and_induction([Captured(torch.zeros(1, 1, 1, 4), keys, keys)], [2], 3, 1.0)

    def test_the_mean_query_tells_near_from_far(self, config: ModelConfig, path: TorchPath) -> None:
        """Head 0 looks at what is next to it, head 1 everywhere, head 2 at 400 tokens ago."""
        positions, d = torch.arange(600), config.head_dim
        rotary = Rotary(config.rope, d)
        cos, sin = rotary(positions, None)
        base = torch.full((600, 1, d), 3.0)

        def turned(x: torch.Tensor, by: int) -> torch.Tensor:
            far_cos, far_sin = rotary(positions + by, None)
            first, second = x.chunk(2, -1)
            far_cos, far_sin = far_cos.unsqueeze(1), far_sin.unsqueeze(1)
            return torch.cat((first * far_cos - second * far_sin, second * far_cos + first * far_sin), -1)

        keys = torch.cat([turned(base, 0), turned(base * 0, 0), turned(base, 400)], 1).transpose(0, 1)
        queries = torch.cat([turned(base, 0)] * 3, 1).transpose(0, 1).unsqueeze(1)
        at = list(range(100, 600, 5))
        score = mean_attention(config, [Captured(queries[:, :, at], keys, keys)] * 3, at)[0]
        assert cos.shape == sin.shape == (600, d // 2)
        assert score[0] < 0.1
        assert score[1] == pytest.approx(0.5, abs=0.01)
        assert score[2] > 0.7

    def test_ranks_go_from_0_to_1_and_ties_share(self) -> None:
        np.testing.assert_allclose(ranks(np.array([[5.0, 1.0], [1.0, 9.0]])), [[2 / 3, 1 / 6], [1 / 6, 1]])


class TestInfluence:
    def test_what_changes_nothing_has_none(self, config: ModelConfig, path: TorchPath) -> None:
        ids = tokens(200)
        context = capture(probe_of(config), ids[:150])
        allowed = [Streaming(0, 5), Streaming(200, 1), Streaming(0, 1 << 20), Span(64, 0.9), Full()]
        found = influences(path, context, ids[150:], allowed)
        assert found.shape == (5, 3, 3)
        assert (found[0] > 0).all()
        np.testing.assert_allclose(found[1:], 0, atol=1e-9)

    def test_it_estimates_the_divergence(self, config: ModelConfig, path: TorchPath) -> None:
        """Each head in turn is put under each policy, and the KL divergence is taken."""
        ids = tokens(260)
        context = capture(probe_of(config), ids[:200])
        allowed: list[Policy] = [Streaming(4, 16), Streaming(4, 60), Streaming(4, 130), Span(-60, 0.4)]
        estimate = influences(path, context, ids[200:], allowed, samples=60)

        def likelihood(heads: Heads) -> torch.Tensor:
            return torch.log_softmax(logits_of(path, ids[200:], heads, context), -1)

        whole, true = likelihood(FULL), np.zeros((len(allowed), 3, 3))
        for number, layer, head in np.ndindex(true.shape):
            heads = [list(of) for of in FULL]
            heads[layer][head] = str(allowed[number])
            true[number, layer, head] = (whole.exp() * (whole - likelihood(heads))).sum(-1).mean()
        order = np.corrcoef(ranks(estimate).ravel(), ranks(true).ravel())[0, 1]
        assert order > 0.9
        small = true < 0.5  # a second order in the change
        assert small.sum() > 9
        np.testing.assert_allclose(estimate[small], true[small], rtol=0.5)


class TestGates:
    def samples(self, config: ModelConfig, source: Tensors) -> list[tuple[Passkeys, list[Captured]]]:
        found = []
        for seed in range(2):
            generator = random.Random(seed)
            sample = passkeys(Words(), tokens(300, seed), 300, 3, 4, generator)  # type: ignore[arg-type]  # a fake
            found.append((sample, capture(probe_of(config, source=source), sample.document)))
        return found

    def test_only_what_matters_stays_open(self, config: ModelConfig) -> None:
        """Of one head's output alone anything gets into the residual stream: the penalty closes the others."""
        source = Tensors(config)
        for layer in range(3):
            weight = source.tensor(f"model.layers.{layer}.self_attn.o_proj.weight").view(64, 3, -1)
            for head in range(3):
                if (layer, head) != (1, 2):
                    weight[:, head] = 0
        path = TorchPath(config, source)
        alpha, losses = train(path, self.samples(config, source), 80, Streaming(2, 8))
        assert alpha.shape == (3, 3)
        others = np.delete(alpha.ravel(), 5)
        assert alpha[1, 2] > 0.7
        assert (others < 0.4).all()
        assert (alpha >= 0).all()
        assert losses[-1] < 0.7 * losses[0]

    def test_the_rate_rises_and_falls(self) -> None:
        rates = [ramp(step, 20) for step in range(20)]
        assert rates[0] == rates[-1] == 0.25
        assert rates[3:17] == [1.0] * 14

    def test_no_steps_are_refused(self, path: TorchPath) -> None:
        with pytest.raises(ValueError, match="0 steps on 0 samples; allowed"):
            train(path, [], 0, Streaming())


class TestData:
    @given(st.integers(1, 10), st.integers(1, 6), st.integers(0, 100))
    @settings(max_examples=30)
    def test_what_is_asked_for_was_hidden(self, needles: int, words: int, seed: int) -> None:
        tokenizer, text = Words(), [1] * 500
        found = passkeys(tokenizer, text, 400, needles, words, random.Random(seed))  # type: ignore[arg-type]  # a fake
        assert len(found.document) == 400
        assert len(found.answers) == needles
        document = "".join(chr(token) for token in found.document)
        for first, end in found.answers:
            assert end - first == words
            answer = "".join(chr(token) for token in found.tail[first:end])
            place = document.index(answer)
            assert 0.01 < place / 400 < 0.99

    def test_a_question_can_be_asked_alone(self) -> None:
        found = passkeys(Words(), [1] * 500, 400, 3, 2, random.Random(0))  # type: ignore[arg-type]  # a fake
        asked = [found.question(number) for number in range(3)]
        assert sum((each.tail for each in asked), ()) == found.tail
        for each, (first, end) in zip(asked, found.answers, strict=True):
            assert each.document == found.document
            assert each.answers[0][1] == len(each.tail)
            assert each.tail[slice(*each.answers[0])] == found.tail[first:end]

    def test_what_does_not_fit_is_refused(self) -> None:
        for given_needles, length in ((0, 400), (11, 400), (3, 10), (3, 4000)):
            with pytest.raises(InvalidRequest, match="needles"):
                passkeys(Words(), [1] * 500, length, given_needles, 4, random.Random(0))  # type: ignore[arg-type]
        with pytest.raises(InvalidRequest, match="has 48 tokens that are whole words"):
            vocabulary_words(Words(50))  # type: ignore[arg-type]
        with pytest.raises(InvalidRequest, match=r"10 questions about 60 words are \d+ tokens; allowed are 512"):
            passkeys(Words(), [1] * 2000, 2000, 10, 60, random.Random(0))  # type: ignore[arg-type]

    def test_a_text_is_cut_in_two(self, tmp_path: Path) -> None:
        file = tmp_path / "text.txt"
        file.write_text("one two three four five")
        halves = corpus(Words(), file, 2)  # type: ignore[arg-type]  # a fake
        assert (len(halves.calibration), len(halves.held_out)) == (2, 3)
        with pytest.raises(InvalidRequest, match=r"half of .*text.txt is 2 tokens; at least 3 are needed"):
            corpus(Words(), file, 3)  # type: ignore[arg-type]
        file.write_bytes(b"\xff")
        for path in (file, tmp_path / "none.txt"):
            with pytest.raises(InvalidRequest, match=r"text .*: (it is not UTF-8|there is no such file|it is no file)"):
                corpus(Words(), path, 1)  # type: ignore[arg-type]

    def test_repeats(self) -> None:
        ids = repeated(100, 7, 3, 99, random.Random(0))
        assert ids[0] == 99
        assert ids[1:8] == ids[8:15] == ids[15:]
        assert len(set(ids[1:8])) == 7
        assert len(repeated(5, 9, 2, None, random.Random(0))) == 18


class TestPlans:
    @given(st.integers(0, 10_000), st.integers(2, 4))
    @settings(max_examples=40)
    def test_no_choice_at_that_cost_is_better(self, seed: int, count: int) -> None:
        generator = np.random.default_rng(seed)
        influence = generator.random((count, 2, 2)) * generator.random((1, 2, 2))
        influence[-1] = 0  # everything is seen
        costs = np.cumsum(generator.integers(1, 9, count)).tolist()
        found = plans(influence, costs)
        every = [np.reshape(c, (2, 2)) for c in itertools.product(range(count), repeat=4)]
        price = np.array([np.take(costs, c).sum() for c in every])
        total = np.array([np.take_along_axis(influence, c[None], 0).sum() for c in every])
        for plan in found:
            budget = plan.share * costs[-1] * 4 + 1e-6
            reached = np.take_along_axis(influence, plan.choices[None], 0).sum()
            assert reached <= total[price <= budget].min() + 1e-9
        shares = [plan.share for plan in found]
        assert shares == sorted(shares)
        assert (found[0].choices == 0).all()
        assert (found[-1].choices == count - 1).all()

    def test_costs_must_ascend(self) -> None:
        with pytest.raises(ValueError, match=r"costs are \[3, 3\]; allowed are 2, ascending"):
            plans(np.zeros((2, 1, 1)), [3, 3])


class TestCandidates:
    """Candidates at 4096 tokens."""

    def test_they_keep_more_and_more_up_to_full(self) -> None:
        options, generator, size = options_at(4096, 64), np.random.default_rng(0), (5, 4)
        shares = np.array([policy_file.kept(str(policy), 4096) / 4096 for policy in options])
        influence = generator.random((1, *size)) ** 4 * (1 - shares)[:, None, None] ** 2
        found = candidates(options, dataclasses.replace(evidence(*size), influence=influence), 4096)
        shares_kept = [kept_share(heads, 4096) for heads in found]
        assert shares_kept == sorted(shares_kept)
        assert len(found) > 3
        assert found[-1] == (("full",) * 4,) * 5

    def test_options_are_windows_up_to_three_quarters_of_the_context(self) -> None:
        options = options_at(4096, 64)
        assert options[0] == Streaming(64, 32)
        assert options[-1] == Streaming(64, 3072)


class TestSelection:
    SIZES = (*(f"streaming(sink=0, recent={recent})" for recent in range(100, 1100, 100)), "full")
    TRIED = tuple(((text,) * 2,) for text in SIZES)

    @staticmethod
    def quality(good: bool, share: float, context: int = 4096) -> Quality:
        return Quality(context, 0.0 if good else 0.5, 1.0 if good else 0.5, 3, 3, 8, share)

    @pytest.mark.parametrize("least", [0.0, 0.05, 0.1, 0.25])
    def test_it_finds_the_least_that_is_good(self, least: float) -> None:
        def measure(heads: Heads) -> Quality:
            share = kept_share(heads, 4096)
            return self.quality(share >= least, share)

        best, trials = choose(self.TRIED, measure, Target(0.99))
        expected = next(heads for heads in self.TRIED if kept_share(heads, 4096) >= least)
        assert (best.heads if best else self.TRIED[-1]) == expected
        assert len(trials) <= 4
        assert all(trial.heads != self.TRIED[-1] for trial in trials)

    def test_nothing_may_be_good_enough(self) -> None:
        best, trials = choose([FULL] * 3, lambda heads: self.quality(False, 0.5), Target(0.99))
        assert best is None
        assert [trial.heads for trial in trials] == [FULL]


class TestQuality:
    @pytest.fixture
    def hidden(self) -> Passkeys:
        return passkeys(Words(), tokens(400), 400, 3, 4, random.Random(0))  # type: ignore[arg-type]  # a fake

    def test_the_full_cache_is_as_good_as_itself(self, config: ModelConfig, hidden: Passkeys) -> None:
        reports: list[tuple[int, int]] = []
        reading = read(probe_of(config), hidden, tokens(300, 1), lambda *report: reports.append(report))
        quality = compare(700, reading, read(probe_of(config), hidden, tokens(300, 1)))
        assert (quality.nll_change, quality.agreement, quality.held) == (0, 1, 1)
        assert quality.passkeys == quality.passkeys_full
        assert quality.words == 12
        assert Target(1.0).met(quality)
        assert reports[-1][0] == reports[-1][1] == 700 + len(hidden.tail)

    def test_likelihoods_are_the_models(self, config: ModelConfig, hidden: Passkeys) -> None:
        text = tokens(300, 1)
        probe = probe_of(config)
        logits = probe.read(probe.open(), [*hidden.document, *text])[len(hidden.document) - 1 : -1]
        reading = read(probe_of(config), hidden, text)
        assert reading.nll == pytest.approx(
            float(torch.nn.functional.cross_entropy(logits, torch.tensor(text))), rel=1e-4
        )
        assert (reading.top == logits.argmax(-1).numpy()).mean() > 0.99

    def test_what_is_let_go_counts(self, config: ModelConfig, hidden: Passkeys) -> None:
        heads = (("streaming(sink=16, recent=32)",) * 3,) * 3
        full = read(probe_of(config), hidden, tokens(300, 1))
        quality = compare(700, read(probe_of(config, heads), hidden, tokens(300, 1)), full)
        # The last batch began before its end, and saw 32 tokens before that: pages of 16, sinks one more.
        assert 4 / 46 < quality.held < 0.5
        assert quality.agreement < 1
        assert re.match(r"\d+ tokens: KV held 0\.\d+, NLL [+-]\d", str(quality))

    @pytest.mark.parametrize("policy", ["razor(sink=16, recent=32, share=0.05)", "page_top_k(sink=16, recent=32)"])
    def test_some_policies_are_measured_in_decode(self, config: ModelConfig, hidden: Passkeys, policy: str) -> None:
        heads, text = ((policy,) * 3,) * 3, tokens(16, 1)
        full = read(probe_of(config), hidden, text, in_decode=True)
        assert (full.read, full.held) == (1, 1)
        quality = compare(700, read(probe_of(config, heads), hidden, text, in_decode=True), full)
        assert quality.agreement < 1
        assert quality.read is not None
        assert quality.read < 0.9
        assert quality.held == 1
        assert "read 0." in str(quality)

    def test_what_the_target_means(self) -> None:
        good = Quality(8192, 0.01, 0.97, 5, 5, 8, 0.4)
        target = Target(0.99)
        assert (target.nll_change, target.agreement) == (pytest.approx(0.01), pytest.approx(0.97))
        assert Target(0.98).met(good)
        for worse in ({"nll_change": 0.011}, {"agreement": 0.969}, {"passkeys": 4}):
            assert not target.met(dataclasses.replace(good, **worse))
        for quality in (0.4, 1.1, float("nan")):
            with pytest.raises(InvalidRequest, match="target quality is"):
                Target(quality)


def evidence(layers: int = 3, heads: int = 3, options: int = 2) -> Evidence:
    generator = np.random.default_rng(0)
    names = ("echo", "induction", "mean_attention", "alpha")
    of = {name: generator.random((layers, heads)) for name in names}
    return Evidence(**of, losses=generator.random(7), influence=generator.random((options, layers, heads)))


class TestEvidence:
    def test_it_comes_back(self, tmp_path: Path) -> None:
        evidence().save(tmp_path / "scores.json", ["ab", "x"])
        found = Evidence.load(tmp_path / "scores.json", ["ab", "x"])
        for field in dataclasses.fields(Evidence):
            np.testing.assert_array_equal(getattr(found, field.name), getattr(evidence(), field.name))
        with pytest.raises(PolicyError, match=r"is of .*; allowed is"):
            Evidence.load(tmp_path / "scores.json", ["cd", "x"])

    def test_it_is_of_what_it_was_measured_with(self) -> None:
        wanted, texts = Wanted(2048, [Streaming()], Streaming(1, 2), 9, 0), Corpus((1, 2), (3,))
        others: list[dict[str, Any]] = [{"length": 4096}, {"policies": [Streaming(3)]}, {"streaming": Streaming()}]
        for other in (*others, {"steps": 8}, {"seed": 1}):
            assert dataclasses.replace(wanted, **other).marks("ab", texts) != wanted.marks("ab", texts)
        assert wanted.marks("ab", Corpus((1, 4), (3,))) != wanted.marks("ab", texts)

    def test_other_files_are_refused(self, tmp_path: Path) -> None:
        file = tmp_path / "scores.json"
        for content in (b"", b"[]", b"{}", b'{"of": ["ab"], "echo": [[1], "x"]}', b"\xff", b"[" * 100_000):
            file.write_bytes(content)
            with pytest.raises(PolicyError, match="has no scores that can be read"):
                Evidence.load(file, ["ab"])

    def test_all_measures_count(self) -> None:
        base = evidence()
        combined = base.combined()
        assert combined.shape == (3, 3)
        assert 0 <= combined.min() < combined.max() <= 1
        for name in ("echo", "induction", "mean_attention", "alpha"):
            changed = dataclasses.replace(base, **{name: -getattr(base, name)})
            assert (changed.combined() != combined).any()


class TestReport:
    @pytest.fixture
    def found(self) -> Calibration:
        quality = Quality(8192, -0.001, 0.98, 5, 5, 8, 0.45)
        trial = Trial(MIXED, quality)
        file = PolicyFile("<script>tiny</script>", "ab", MIXED, {"method": "windows"})
        return Calibration(file, evidence(), (trial,), trial, 8192)

    def test_it_stands_alone_and_trusts_no_name(self, tmp_path: Path, found: Calibration) -> None:
        write_report(tmp_path / "policy.toml", found, Target(0.99))
        text = (tmp_path / "policy.html").read_text()
        assert "<script" not in text
        assert "&lt;script&gt;tiny" in text
        assert not re.findall(r"(?:src|href)=", text)
        assert "98.00%" in text
        maps, tables = len(measures(found)), 2 + 1 + 9  # one trial and nine heads, with a heading each
        assert text.count("<tr>") == 3 * maps + tables
        assert text.count("<figure>") == maps

    def test_it_says_when_nothing_was_good_enough(self, found: Calibration) -> None:
        text = page(dataclasses.replace(found, chosen=None), Target(0.999), {})
        assert "No choice met the target" in text
        assert "99.7%" in text


def test_settings_are_checked() -> None:
    with pytest.raises(InvalidRequest, match="steps is 0"):
        Settings(steps=0)
    for wrong, said in (({"sink": -1}, "sink is -1"), ({"recent": 0}, "recent is 0")):
        with pytest.raises(PolicyError, match=said):
            Settings(**wrong)


@pytest.mark.parametrize("option", ["--out", "--scores"])
@pytest.mark.parametrize("name", ["nowhere/a", "a.txt"])
def test_a_file_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path, option: str, name: str) -> None:
    path = tmp_path / (name if "." in name else f"{name}{'.toml' if option == '--out' else '.json'}")
    words = ["calibrate", str(tmp_path / "none"), "--out", str(tmp_path / "policy.toml"), option, str(path)]
    result = CliRunner().invoke(main.app, words)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {option} is '{path}'")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny model whose tokens are words, as files, and a text for it."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY | {"vocab_size": 300}))
    tensors = Tensors(ModelConfig.from_dict(TINY | {"vocab_size": 300}))
    save_file({name: tensors.tensor(name).contiguous() for name in tensors.names()}, folder / "model.safetensors")
    words = [Words().decode([token]).strip() for token in range(300)]
    tokenizer = WordLevelTokenizer(WordLevel({word: token for token, word in enumerate(words)}, unk_token="?"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (tmp_path / "text.txt").write_text(" ".join(random.Random(0).choices(words[2:], k=6000)))
    return folder


@pytest.mark.soak
def test_the_commands(tmp_path: Path, folder: Path) -> None:
    """A model's folder in; a policy file that fits it, its report and its scores out; and measured again, the same."""
    out = tmp_path / "policy.toml"
    app = typer.Typer()
    app.command("calibrate")(calibrate)
    app.add_typer(policy_app, name="policy")

    def run(*arguments: object, context: int = 2048) -> str:
        more = ["--text", tmp_path / "text.txt", "--context", context, "--threads", 1, "--dtype", "float32"]
        result = CliRunner().invoke(app, [*map(str, arguments), *map(str, more)])
        if result.exception is not None:
            raise result.exception
        return result.stdout

    scores = ["--scores", tmp_path / "scores.json", "--steps", "3"]
    said = run("calibrate", folder, "--out", out, "--target-quality", "0.5", *scores)
    file = policy_file.read(out)
    file.check(ModelConfig.from_folder(folder), fingerprint(folder))
    assert file.about["kv_kept"] < 1
    assert f"KV held {file.about['measured_kv_held']:.3f}" in said
    report = (tmp_path / "policy.html").read_text()
    maps = {"kept", "echo", "induction", "mean_attention", "alpha", "influence", "combined"}
    assert set(re.findall("<figcaption>(.*?)</figcaption>", report)) == maps
    assert f"<pre>{escape(out.read_text())}</pre>" in report
    # The same scores and target give the same choice, and measuring it again the same quality.
    assert run("calibrate", folder, "--out", out, "--target-quality", "0.5", *scores) == said
    assert policy_file.read(out) == file
    assert re.fullmatch(r"2048 tokens: KV held 0\.\d+, read [01]\.\d+, NLL .*\n", run("policy", "measure", folder, out))
    with pytest.raises(InvalidRequest, match="context is 5000; allowed are 2048 to 4096"):
        run("policy", "measure", folder, out, context=5000)
