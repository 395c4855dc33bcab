"""Sampling, against a slow and obvious sampler of one row: the same token for the same random number."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from lamina_workers.decoder import sampler
from lamina_workers.decoder.sampler import RowSampling, TokenHistory, sample, uniform


def history(prompt: list[int], output: list[int]) -> TokenHistory:
    kept = TokenHistory(prompt)
    for token in output:
        kept.append(token)
    return kept


def bits(vocabulary: int, tokens: Iterable[int]) -> NDArray[np.int32]:
    """The tokens that a schema or grammar lets through, as `RowSampling.allowed` has them."""
    words = np.zeros(-(-vocabulary // 32), np.uint32)
    for token in tokens:
        words[token // 32] |= np.uint32(1 << token % 32)
    return words.view(np.int32)


def obvious(logits: torch.Tensor, row: RowSampling, shift: float = 0.0, slack: float = 0.0) -> int:
    """One row's token in float64. `shift` is added to the random number, `slack` to the cut-offs."""
    x = logits.double().numpy().copy()
    for token, bias in row.logit_bias.items():
        x[token] += bias
    if row.history is not None:
        for token, count in zip(row.history.tokens, row.history.counts, strict=True):
            x[token] = x[token] / row.repetition_penalty if x[token] > 0 else x[token] * row.repetition_penalty
            x[token] -= row.frequency_penalty * count + row.presence_penalty * (count > 0)
    x[list(row.suppressed)] = -np.inf
    if row.allowed is not None:
        x[[not row.allowed[token // 32] >> token % 32 & 1 for token in range(len(x))]] = -np.inf
    order = np.lexsort((np.arange(len(x)), -x))  # likeliest first, then the lower id
    if row.greedy:
        return int(order[0])
    p = np.exp((x - x.max()) / row.temperature)
    p /= p.sum()
    kept = order
    if row.min_p > 0:
        kept = kept[p[kept] >= min(row.min_p + slack, 1.0) * p.max()]
    if row.top_k > 0:
        kept = kept[: row.top_k]
    if row.top_p < 1:
        share = p[kept] / p[kept].sum()
        kept = kept[share.cumsum() - share < row.top_p + slack]
    kept = np.sort(kept)
    u = min(max(uniform(row.seed, row.sample_index, row.position) + shift, 0.0), math.nextafter(1, 0))
    sums = p[kept].cumsum()
    return int(kept[np.searchsorted(sums, u * sums[-1], side="right")])


def test_biases_of_a_request_become_tensors_once() -> None:
    """They did for each row and step: 128 samples with 49,152 biases took another request from 1.4 to 0.1 tokens/s."""
    looked = []

    class Bias(dict[int, float]):
        def values(self) -> Any:
            looked.append(self)
            return super().values()

    shared, other = Bias({3: 9.0, 5: 2.0}), Bias({3: 9.0, 5: 20.0})
    rows = [
        RowSampling(logit_bias=shared),
        RowSampling(),
        RowSampling(logit_bias=other),
        RowSampling(logit_bias=shared),
    ]
    assert sample(torch.zeros(4, 8), rows).tokens == [3, 0, 5, 3]
    assert [id(each) for each in looked] == [id(shared), id(other)]


def allowed(logits: torch.Tensor, row: RowSampling) -> set[int]:
    """The obvious token; more than one where the random number or a cut-off is within float32's rounding of an edge."""
    nudges = (0.0, -2e-6, 2e-6)
    return {obvious(logits, row, shift, slack) for shift, slack in itertools.product(nudges, nudges)}


@st.composite
def row_samplings(draw: st.DrawFn, vocabulary: int) -> RowSampling:
    token = st.integers(0, vocabulary - 1)
    tokens = st.lists(token, max_size=12)
    suppressed = tuple(draw(st.lists(token, max_size=3))) if vocabulary > 3 else ()
    few = draw(st.sets(token, min_size=1, max_size=5)) - {*suppressed}  # what is left of it is never nothing
    return RowSampling(
        temperature=draw(st.sampled_from([0.0, 0.01, 0.71, 1.0, 3.0, 100.0])),
        top_p=draw(st.sampled_from([1.0, 0.0123, 0.3141, 0.9663])),
        top_k=draw(st.sampled_from([0, 1, 3, 63, 64, 65, 10**9])),
        min_p=draw(st.sampled_from([0.0, 0.0271, 0.577, 1.0])),
        repetition_penalty=draw(st.sampled_from([1.0, 0.5, 2.0])),
        presence_penalty=draw(st.sampled_from([0.0, -1.75, 0.875])),
        frequency_penalty=draw(st.sampled_from([0.0, -0.25, 1.125])),
        history=history(draw(tokens), draw(tokens)),
        logit_bias=draw(st.dictionaries(token, st.sampled_from([-100.0, -1.5, 2.5, 100.0]), max_size=3)),
        suppressed=suppressed,
        allowed=bits(vocabulary, few) if few and draw(st.booleans()) else None,
        seed=draw(st.integers(0, 2**64 - 1)),
        sample_index=draw(st.integers(0, 255)),
        position=draw(st.integers(0, 10**6)),
        logprobs=draw(st.sampled_from([None, 0, 5])),
    )


@given(st.data())
def test_every_row_gets_the_token_of_the_obvious_sampler(data: st.DataObject) -> None:
    vocabulary = data.draw(st.sampled_from([1, 7, 64, 65, 300]))
    rows = data.draw(st.lists(row_samplings(vocabulary), min_size=1, max_size=5))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    spread = data.draw(st.sampled_from([6, 32]))
    # Multiples of 1/8, so that many are equal, and no penalty or bias above rounds them.
    logits = torch.from_numpy(rng.integers(-spread, spread, (len(rows), vocabulary), endpoint=True) / 8).to(
        data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    )
    tokens = sample(logits, rows).tokens
    for x, row, token in zip(logits, rows, tokens, strict=True):
        assert token in allowed(x, row)


@pytest.mark.parametrize("spread", [0.01, 1.0, 8.0])
@pytest.mark.parametrize(
    "filters",
    [
        {},
        {"top_p": 0.9},
        {"top_k": 1500},
        {"min_p": 0.02},
        {"top_k": 1500, "top_p": 0.3},
        {"min_p": 0.02, "top_p": 0.6},
    ],
    ids=lambda filters: "-".join(filters) or "none",
)
def test_a_vocabulary_of_any_flatness(spread: float, filters: dict[str, float]) -> None:
    logits = (torch.randn(2503, generator=torch.Generator().manual_seed(1)) * spread).bfloat16()  # many are equal
    rows = [RowSampling(temperature=1.0, seed=seed, **filters) for seed in range(12)]
    tokens = sample(logits.expand(len(rows), -1), rows).tokens
    assert all(token in allowed(logits, row) for token, row in zip(tokens, rows, strict=True))


def mixed_rows(count: int, vocabulary: int) -> list[RowSampling]:
    """Rows of every kind, in turn."""
    past = history(list(range(0, vocabulary, 3)), [5, 5, 6])
    kinds = [
        RowSampling(),
        RowSampling(temperature=0.8, logprobs=3),
        RowSampling(temperature=1.0, top_p=0.95),
        RowSampling(temperature=2.0, top_p=0.99, logprobs=0),
        RowSampling(temperature=0.7, top_k=40, repetition_penalty=1.2, history=past),
        RowSampling(temperature=1.0, min_p=0.05, logit_bias={3: 4.0}, suppressed=(9,)),
        RowSampling(presence_penalty=1.0, frequency_penalty=0.5, history=past, logprobs=20),
        RowSampling(temperature=1.0, allowed=bits(vocabulary, [2, 17, vocabulary - 1]), logprobs=2),
    ]
    return [replace(kinds[i % len(kinds)], seed=i * i, sample_index=i % 3, position=i) for i in range(count)]


def test_the_rest_of_the_batch_changes_nothing() -> None:
    vocabulary = 5003
    logits = torch.randn(41, vocabulary, generator=torch.Generator().manual_seed(2)) * 3
    rows = mixed_rows(41, vocabulary)
    together = sample(logits, rows)
    alone = [sample(logits[i : i + 1], [row]) for i, row in enumerate(rows)]
    assert together.tokens == [one.tokens[0] for one in alone]
    assert together.logprobs == [one.logprobs[0] for one in alone]

    order = np.random.default_rng(3).permutation(len(rows)).tolist()
    shuffled = sample(logits[order], [rows[i] for i in order])
    assert shuffled.tokens == [together.tokens[i] for i in order]
    assert shuffled.logprobs == [together.logprobs[i] for i in order]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_of_bad_logits_fails_alone(bad: float, dtype: torch.dtype) -> None:
    logits = torch.randn(16, 130, generator=torch.Generator().manual_seed(4)).to(dtype)
    rows = mixed_rows(16, 130)
    sound = sample(logits, rows)
    for i in range(8):
        logits[i, 11 * i] = bad
    spoilt = sample(logits, rows)
    assert spoilt.tokens == [None] * 8 + sound.tokens[8:]
    assert spoilt.logprobs == [None] * 8 + sound.logprobs[8:]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_without_possible_tokens_fails_alone(temperature: float) -> None:
    logits = torch.zeros(4, 4)
    logits[0] = -torch.inf
    row = RowSampling(temperature=temperature, logprobs=1)
    sampled = sample(logits, [row, replace(row, suppressed=(0, 1, 2, 3)), replace(row, allowed=bits(4, [])), row])
    assert sampled.tokens[:3] == [None] * 3
    assert sampled.logprobs[:3] == [None] * 3
    assert sampled.tokens[3] is not None


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.full((1, 700), -torch.inf)
    logits[0, [255, 256, 699]] = torch.tensor([0.0, -1.0, -2.0])
    rows = [RowSampling(temperature=100.0, seed=seed, top_k=k) for seed in range(50) for k in (0, 600)]
    assert set(sample(logits.expand(len(rows), -1), rows).tokens) == {255, 256, 699}


@pytest.mark.parametrize(("number", "token"), [(0.0, 2), (1 - 2.0**-53, 600)])
def test_the_ends_of_the_random_numbers_draw_possible_tokens(
    monkeypatch: pytest.MonkeyPatch, number: float, token: int
) -> None:
    monkeypatch.setattr(sampler, "uniform", lambda *_: number)
    logits = torch.full((1, 700), -torch.inf)
    logits[0, [2, 3, 600]] = torch.tensor([-5.0, 0.0, -5.0])
    assert sample(logits, [RowSampling(temperature=1.0)]).tokens == [token]


def test_one_candidate_and_a_vanishing_temperature_are_greedy() -> None:
    logits = torch.randint(-3, 3, (9, 90), generator=torch.Generator().manual_seed(5)).float()  # the largest many times
    greedy = sample(logits, [RowSampling()] * 9).tokens
    assert greedy == [int(x.argmax()) for x in logits]
    assert sample(logits, [RowSampling(temperature=1.0, top_k=1, seed=i) for i in range(9)]).tokens == greedy
    assert sample(logits, [RowSampling(temperature=1.0, top_p=1e-9, seed=i) for i in range(9)]).tokens == greedy
    logits[:, 50] = 3.5  # now one is
    for temperature in (1e-300, 1e-4):
        rows = [RowSampling(temperature=temperature, seed=i) for i in range(9)]
        assert sample(logits * 1e37, rows).tokens == [50] * 9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_are_the_model_s_own(dtype: torch.dtype) -> None:
    logits = torch.randn(3, 1001, generator=torch.Generator().manual_seed(7)).to(dtype)
    shaped = RowSampling(temperature=0.5, top_k=9, logit_bias={4: 9.0}, suppressed=(1,), seed=3)
    shaped = replace(shaped, allowed=bits(1001, range(0, 1001, 3)))
    rows = [replace(shaped, logprobs=20), replace(shaped, logprobs=0), RowSampling()]
    sampled = sample(logits, rows)
    truth = logits.double().log_softmax(-1)
    first, second, none = sampled.logprobs
    assert none is None
    assert second is not None
    assert second.top == ()
    assert second.chosen == pytest.approx(float(truth[1, sampled.tokens[1]]), abs=1e-5)
    assert first is not None
    assert first.chosen == pytest.approx(float(truth[0, sampled.tokens[0]]), abs=1e-5)
    best = sorted(range(1001), key=lambda i: (-float(logits[0, i]), i))[:20]
    assert [token for token, _ in first.top] == best
    assert [value for _, value in first.top] == pytest.approx([float(truth[0, i]) for i in best], abs=1e-5)


def test_logprobs_of_a_vocabulary_smaller_than_the_report() -> None:
    (report,) = sample(torch.tensor([[0.0, 1.0, -1.0]]), [RowSampling(logprobs=20)]).logprobs
    assert report is not None
    assert [token for token, _ in report.top] == [1, 0, 2]


def test_the_logits_are_left_alone() -> None:
    logits = torch.randn(16, 130, generator=torch.Generator().manual_seed(8))
    before = logits.clone()
    sample(logits, mixed_rows(16, 130))
    assert torch.equal(logits, before)


def test_no_rows_give_no_tokens_and_a_wrong_number_is_refused() -> None:
    assert sample(torch.empty(0, 5), []).tokens == []
    with pytest.raises(ValueError, match="2 rows, but 1"):
        sample(torch.zeros(2, 5), [RowSampling()])


def test_penalties_without_a_history_are_refused() -> None:
    with pytest.raises(ValueError, match="needs its history"):
        RowSampling(repetition_penalty=1.1)


def test_random_numbers_depend_on_each_counter_and_fill_the_unit_interval() -> None:
    counters = [(s, i, p) for s in (0, 1, 2**64 - 1) for i in (0, 1) for p in range(500)]
    numbers = [uniform(*counter) for counter in counters]
    assert numbers == [uniform(*counter) for counter in counters]
    assert len(set(numbers)) == len(numbers)
    assert all(0 <= u < 1 for u in numbers)
    tenths = Counter(int(u * 10) for u in numbers)
    assert all(abs(tenths[i] - 300) < 100 for i in range(10))  # six standard deviations


@given(st.lists(st.integers(0, 50), max_size=30), st.lists(st.integers(0, 90), max_size=200))
def test_a_history_counts_what_was_generated(prompt: list[int], output: list[int]) -> None:
    kept = history(prompt, output)
    assert kept.tokens.tolist() == list(dict.fromkeys(prompt + output))
    assert dict(zip(kept.tokens.tolist(), kept.counts.tolist(), strict=True)) == {
        token: Counter(output)[token] for token in prompt + output
    }
