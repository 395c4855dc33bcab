"""Drafts change no token: texts with a scripted proposer are those without one, token for token."""

from __future__ import annotations

import random

import pytest
import torch
from engine_rig import Rig, tiny_decoder
from faulty_ports import SpoiltPorts
from pairwise import crossing
from scripted_drafts import Scripted, texts_of
from small_grammars import EOS, GRAMMARS, TOKENIZER, VOCABULARY

from lamina.sampling_params import SamplingParams
from lamina.scheduling.scheduler import Scheduler, verified
from lamina_workers.decoder.sampler import RowSampling, TokenHistory, sample

rng = random.Random(5)
PROMPTS = [[rng.randrange(101) for _ in range(n)] for n in (1, 15, 16, 33, 70)]
MODELS = ("full", "windowed")
SAMPLINGS = {
    "greedy": {},
    "seeded": {"temperature": 0.9, "top_p": 0.9, "seed": 11},
    "penalised": {"temperature": 0.8, "seed": 3, "repetition_penalty": 1.2, "frequency_penalty": 0.4},
}
PLACEMENTS = {
    "one holder": {},
    "one worker, split": {"shard": "heads"},
    "heads on two": {"shard": "heads", "weights": (1, 1)},
    "ranges on two": {"shard": "sequence", "weights": (1, 2)},
    "heads and ranges, prompts local": {"shard": "heads+sequence", "weights": (1, 1, 2), "local_pool": 60},
}


@pytest.fixture(scope="module", params=MODELS)
def model(request, decoder, windowed):
    return decoder if request.param == "full" else windowed


def answers(model, prompts=PROMPTS, sampling=None, proposer=None, **options):
    rig = Rig(model, proposer=proposer, **options)
    try:
        return rig.generate(prompts, **({"max_tokens": 40} | (sampling or {}))), rig
    finally:
        rig.close()


@pytest.fixture(scope="module", params=tuple(SAMPLINGS))
def sampling(request):
    return SAMPLINGS[request.param]


@pytest.fixture(scope="module")
def expected(model, sampling):
    return answers(model, sampling=sampling)[0]


def each_model(**axes):
    return crossing(("model", "sampling"), model=MODELS, sampling=tuple(SAMPLINGS), **axes)


def scripted(model, expected, right, prompts=PROMPTS):
    return Scripted(texts_of(prompts, expected), right, model.config.vocab_size)


@each_model(right=(4, 0, "some"), placement=PLACEMENTS)
def test_text_with_drafts_is_that_without(model, sampling, expected, right, placement):
    proposer = scripted(model, expected, right)
    got, rig = answers(model, sampling=sampling, proposer=proposer, max_batch_tokens=64, **placement)
    assert got == expected
    counts = rig.engine._drafting.counts
    assert counts.drafts > 0
    if right == 0:
        assert counts.accepted_tokens == 0
    elif right == 4:
        assert counts.accepted_tokens == counts.draft_tokens
    assert len(proposer.ended_ones) == len(PROMPTS)


@pytest.mark.parametrize("right", [4, "some"])
@pytest.mark.parametrize("placement", ["ranges on two", "heads and ranges, prompts local"])
def test_drafts_lie_on_both_sides_of_the_border_of_two_ranges(model, right, placement, monkeypatch):
    crossing, record = [], Scheduler.record

    def watched(scheduler, plan, sampled):
        for row in plan.rows:
            borders = {share.hi for share in row.sequence.layout}
            crossing.extend(borders.intersection(range(row.start + 1, row.start + row.count)) if row.drafts else ())
        return record(scheduler, plan, sampled)

    monkeypatch.setattr(Scheduler, "record", watched)
    prompts = [[*prompt, *range(at)] for at, prompt in enumerate(PROMPTS * 2)]
    expected = answers(model, prompts, {"max_tokens": 60})[0]
    proposer = scripted(model, expected, right, prompts)
    assert answers(model, prompts, {"max_tokens": 60}, proposer, **PLACEMENTS[placement])[0] == expected
    assert crossing


def test_drafts_change_no_text_of_cached_prefixes(model, sampling, expected):
    """Of what was generated with drafts too: pages with rejected ones would be found as if they were of the text."""
    rig = Rig(model, prefix_cache=True, max_batch_tokens=64, proposer=scripted(model, expected, "some"))
    asked = {"max_tokens": 40} | sampling
    for _ in range(2):
        assert rig.generate(PROMPTS, **asked) == expected
    longer = [[*prompt, *text[:30]] for prompt, (text,) in zip(PROMPTS, expected, strict=True)]
    found = rig.scheduler.counters.reused_tokens
    got = rig.generate(longer, max_tokens=5)
    assert rig.scheduler.counters.reused_tokens - found > 100
    rig.close()
    assert got == answers(model, longer, {"max_tokens": 5})[0]


def test_drafts_change_none_of_several_samples(model):
    asked = {"temperature": 1.0, "seed": 5, "n": 4, "max_tokens": 20}
    plain = answers(model, PROMPTS, asked)[0]
    got, rig = answers(model, PROMPTS, asked, scripted(model, plain, "some"), prefix_cache=True)
    assert got == plain
    assert rig.scheduler.counters.reused_tokens > 200


def test_drafts_change_no_text_with_a_rope_that_depends_on_the_length():
    dynamic = tiny_decoder(
        max_position_embeddings=64, rope_scaling={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    )
    plain = answers(dynamic, max_model_len=256)[0]
    assert answers(dynamic, proposer=scripted(dynamic, plain, "some"), max_model_len=256)[0] == plain


# What bounds a text.

HELD = {
    "regex": {"regex": "[ab]{5,9}", "temperature": 1.0, "seed": 5},
    "schema": {"json_schema": '{"type": "array", "items": {"type": "boolean"}, "maxItems": 3}', "seed": 4},
    "choice": {"choice": ["abba", "true", "ab12"], "temperature": 1.0, "seed": 1},
    "stops": {"stop_token_ids": tuple(range(0, 300, 7)), "temperature": 1.0, "seed": 9},
    "least": {"stop_token_ids": tuple(range(0, 300, 3)), "min_tokens": 7, "temperature": 1.0, "seed": 9},
    "held at least": {"regex": "[ab]{3,9}", "min_tokens": 6, "temperature": 1.0, "seed": 2},
    "reported": {"logprobs": 3, "temperature": 0.7, "seed": 8, "logit_bias": {5: 2.0}},
}


def outputs(decoder, params, proposer=None, **options):
    """Tokens, reasons and log probabilities of each sample of each prompt."""
    rig = Rig(decoder, grammars=GRAMMARS, proposer=proposer, **options)
    inboxes = [rig.submit(prompt, params)[1] for prompt in PROMPTS]
    samples = []
    for inbox in inboxes:
        got = [[] for _ in range(params.n)]
        while not all(any(output.finish_reason for output in sample) for sample in got):
            for output in inbox.get(timeout=60):
                if output.error is not None:
                    raise output.error
                got[output.sample].append(output)
        samples += got
    rig.close()
    tokens = [[output.token for output in sample if output.token is not None] for sample in samples]
    reasons = [[output.finish_reason for output in sample if output.finish_reason] for sample in samples]
    reports = [output.logprobs for sample in samples for output in sample if output.logprobs is not None]
    return tokens, reasons, reports, rig


@pytest.mark.parametrize("right", [4, 0, "some"])
@pytest.mark.parametrize("name", HELD)
def test_drafts_change_nothing_of_what_bounds_a_text(name, right):
    decoder = tiny_decoder(vocab_size=VOCABULARY)
    asked = {"max_tokens": 30, "n": 2} | HELD[name]
    if "temperature" not in asked:
        asked["n"] = 1
    if not asked.get("stop_token_ids"):
        asked["stop_token_ids"] = (EOS,)
    params = SamplingParams(**asked).with_defaults({"do_sample": True} if "temperature" in asked else {})
    tokens, reasons, reports, _ = outputs(decoder, params)
    n = params.n
    known = texts_of(PROMPTS, [tokens[at * n : (at + 1) * n] for at in range(len(PROMPTS))])
    got = outputs(decoder, params, Scripted(known, right, VOCABULARY), max_batch_tokens=64)
    assert got[:2] == (tokens, reasons)
    assert len(got[2]) == len(reports)
    for report, plain in zip(got[2], reports, strict=True):
        assert [token for token, _ in report.top] == [token for token, _ in plain.top]
        assert report.chosen == pytest.approx(plain.chosen, abs=1e-4)
    counts = got[3].engine._drafting.counts
    assert right == 0 or counts.accepted_tokens > 0


def test_logits_that_are_not_finite_after_a_draft_fail_nobody(decoder):
    """The row gives its tokens up to there, or where they are not finite either it is tried again without drafts."""
    plain = answers(decoder, PROMPTS[:1])[0]
    ports = SpoiltPorts(lambda out: out[-6:] if len(out) == 5 * 6 else out[:0])  # the last token of a row of five
    rig = Rig(decoder, shard="heads", port=ports, proposer=scripted(decoder, plain, 4, PROMPTS[:1]))
    ports.on = True
    assert rig.generate(PROMPTS[:1], max_tokens=40) == plain
    assert rig.engine._stats.batches > 20  # 9 where nothing is spoilt
    rig.close()


# Why the text is the same.


def test_a_draft_is_accepted_as_often_as_the_model_gives_it_and_tokens_have_their_distribution():
    """As in rejection sampling, though nothing is rejected by chance: over many seeds."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(3, 6, generator=generator) * 1.5
    probs = logits.softmax(-1)
    drafts, seeds = (int(probs[0].argmax()), 2), 4000
    texts = []
    for seed in range(seeds):
        rows = [RowSampling(temperature=1.0, seed=seed, position=position) for position in range(3)]
        texts.append(verified(drafts, sample(logits, rows).tokens))
    accepted = sum(len(text) > 1 for text in texts) / seeds
    assert accepted == pytest.approx(float(probs[0, drafts[0]]), abs=0.03)
    for place in range(3):
        there = [text[place] for text in texts if len(text) > place]
        found = torch.bincount(torch.tensor(there), minlength=6) / len(there)
        assert torch.allclose(found, probs[place], atol=0.08 if place == 2 else 0.04)


def test_history_ahead_counts_drafts_and_keeps_its_own():
    history = TokenHistory([5, 6, 5])
    history.append(6)
    ahead = history.ahead((6, 9, 9))
    assert dict(zip(ahead.tokens.tolist(), ahead.counts.tolist(), strict=True)) == {5: 0, 6: 2, 9: 2}
    assert dict(zip(history.tokens.tolist(), history.counts.tolist(), strict=True)) == {5: 0, 6: 1}


def test_constraint_foresees_what_may_follow_drafts_and_stays_where_it_is():
    def constraint(*tokens):
        (made,) = GRAMMARS.constraints(SamplingParams(regex="a(b|c)d?"), 1)
        made.advance(*tokens)
        return made

    a, b, c, d, x = (TOKENIZER.token_to_id(letter) for letter in "abcdx")
    looking = constraint()
    before = looking.allowed.copy()
    looking.foresee(a, c, d)  # after d none may follow
    assert len(looking.foreseen) == 2
    assert (looking.after(0) == before).all()
    assert (looking.after(1) == constraint(a).allowed).all()
    assert (looking.after(2) == constraint(a, c).allowed).all()
    looking.foresee(a, x, b)
    assert len(looking.foreseen) == 1
    looking.advance(a)
    assert looking.foreseen == ()
    assert (looking.allowed == constraint(a).allowed).all()
