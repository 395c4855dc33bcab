"""What runs ask for: rates are exact, lengths within their range, prompts differ where they should and share where they
should; words have the tokens that were counted."""

from __future__ import annotations

import asyncio
import math
import statistics
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.errors import EngineError, InvalidRequest
from lamina.measure.bench.prompts import ENOUGH, Words, Writer, find_words, guessed_words
from lamina.measure.bench.workloads import Item, Lengths, arrivals, capped, drawn, fresh, of_trace
from lamina.simulator.traces.arrivals import Arrival, Trace

COUNTS = st.integers(0, 60)
SEEDS = st.integers(0, 1 << 40)
WORDS = Words([f"w{n}" for n in range(40)])


@given(COUNTS, st.floats(0.01, 1000), st.floats(0.05, 50), SEEDS)
def test_arrivals_rise_and_have_their_rate(count, rate, burstiness, seed):
    at = arrivals(count, rate, burstiness, seed)
    assert len(at) == count
    assert at == sorted(at) == arrivals(count, rate, burstiness, seed)
    if count > 1:
        assert at[0] == 0
        assert (count - 1) / at[-1] == pytest.approx(rate)


def test_burstiness_is_vllms():
    def variation(burstiness):
        at = arrivals(4000, 10.0, burstiness)
        gaps = [b - a for a, b in pairwise(at)]
        return statistics.pstdev(gaps) / statistics.fmean(gaps)

    for burstiness in (0.25, 1.0, 4.0):  # of a gamma distribution: 1 / sqrt(shape)
        assert variation(burstiness) == pytest.approx(burstiness**-0.5, rel=0.15)
    assert arrivals(3, math.inf) == [0.0, 0.0, 0.0]


@given(COUNTS, st.integers(1, 200), st.integers(1, 200), st.floats(0, 0.99), SEEDS)
def test_lengths_are_in_their_range(count, prompt, output, ratio, seed):
    lengths = Lengths(prompt=prompt, output=output, ratio=ratio)
    items = drawn(count, lengths, seed=seed)
    for item in items:
        for length, wanted in ((item.prompt, prompt), (item.output, output)):
            assert max(1, wanted * (1 - ratio) - 1e-6) <= length <= wanted * (1 + ratio) + 1e-6
    assert items == drawn(count, lengths, seed=seed)
    assert len({item.parts[0][0] for item in items}) == count


@given(st.integers(1, 40), st.integers(1, 50), st.integers(1, 5), SEEDS)
def test_shared_prefixes_are_few_and_whole(count, prefix, prefixes, seed):
    items = drawn(count, Lengths(prompt=9, output=1, prefix=prefix, prefixes=prefixes), seed=seed)
    writer = Writer(WORDS, seed)
    begins = {tuple(writer.text(item).split()[:prefix]) for item in items}
    assert len(begins) <= prefixes
    assert {item.prompt for item in items} == {prefix + 9}
    assert len({item.parts[1][0] for item in items}) == count


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=20), st.integers(20, 400))
def test_what_is_cut_fits_and_what_fits_is_kept(lengths, context):
    items = [Item(0.0, (("p", prompt // 2), (f"r{n}", prompt)), output) for n, (prompt, output) in enumerate(lengths)]
    fitting, cut = capped(items, context, 8)
    for before, after in zip(items, fitting, strict=True):
        assert after.prompt >= 1
        assert after.output >= 1
        assert after.prompt + after.output + 8 <= context
        if before.prompt + before.output + 8 <= context and before.output <= (context - 8) // 2:
            assert after == before
    assert cut == sum(before != after for before, after in zip(items, fitting, strict=True))


def test_a_context_without_room_is_refused():
    with pytest.raises(InvalidRequest, match="context is 9"):
        capped([], 9, 8)


def test_traces_keep_times_lengths_and_blocks():
    trace = Trace("t", (Arrival(2.0, 700, 5, (3, 4)), Arrival(2.5, 1030, 6, (3, 9)), Arrival(4.0, 10, 7)))
    items = of_trace(trace)
    assert [(item.at, item.prompt, item.output) for item in items] == [(0.0, 700, 5), (0.5, 1030, 6), (2.0, 10, 7)]
    assert [part for item in items for part in item.parts] == [
        ("b3", 512), ("b4", 188), ("b3", 512), ("b9", 512), ("t1", 6), ("t2", 10),
    ]  # fmt: skip
    writer = Writer(WORDS, 1)
    first, second = (writer.text(item).split() for item in items[:2])
    assert first[:512] == second[:512]
    assert first[512:] != second[512:700]


def test_runs_and_warm_ups_share_no_prompt():
    items = drawn(20, Lengths(prompt=32, output=4))
    texts = {nonce: [Writer(WORDS, nonce).text(item) for item in items] for nonce in (1, 2)}
    warm = [Writer(WORDS, 1).text(item) for item in fresh(items, "w")]
    whole = [*texts[1], *texts[2], *warm]
    assert len({tuple(text.split()[:8]) for text in whole}) == len(whole)
    assert texts[1] == [Writer(WORDS, 1).text(item) for item in items]
    assert {len(text.split()) for text in whole} == {32}
    assert [item.prompt for item in fresh(items, "w")] == [item.prompt for item in items]


@given(st.integers(1, 60), st.integers(1, 60))
def test_a_shorter_part_begins_a_longer_one(short, long):
    texts = [Writer(WORDS, 5).text(Item(0, (("b1", size),), 1)) for size in sorted((short, long))]
    assert texts[1].startswith(texts[0])


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Lengths(prompt=0, output=1),
        lambda: Lengths(prompt=1, output=0),
        lambda: Lengths(prompt=1, output=1, ratio=1.0),
        lambda: Lengths(prompt=1, output=1, ratio=math.nan),
        lambda: Lengths(prompt=1, output=1, prefix=3),
        lambda: Lengths(prompt=1, output=1, prefixes=3),
        lambda: drawn(-1, Lengths(prompt=1, output=1)),
        lambda: drawn(1 << 15, Lengths(prompt=1 << 14, output=1)),
        lambda: arrivals(2, 0.0),
        lambda: arrivals(2, math.nan),
        lambda: arrivals(2, 1.0, 0.0),
    ],
)
def test_wrong_values_are_refused(wrong):
    with pytest.raises(InvalidRequest, match="allowed"):
        wrong()


CANDIDATES = [f"c{n}" for n in range(128)]


@pytest.mark.parametrize("around", [0, 1, 31])
@pytest.mark.parametrize("hard", [0, 5, 40, 128])
def test_words_of_one_token_are_found_whatever_comes_around(around, hard):
    """`hard` of the words have 2 tokens."""
    calls = 0

    async def count(text):
        nonlocal calls
        calls += 1
        return around + sum(2 if int(word[1:]) % 128 * 37 % 128 < hard else 1 for word in text.split())

    found = asyncio.run(find_words(count, "me", CANDIDATES))
    assert calls < 100
    if hard == 128:
        assert (found.exact, found.tokens, len(found.words)) == (False, 2.0, 128)
        assert len(Writer(found, 0).text(Item(0, (("r", 50),), 1)).split()) == 25
    else:
        assert found.exact
        assert ENOUGH <= len(found.words) <= 128 - hard
        assert all(int(word[1:]) * 37 % 128 >= hard for word in found.words)


def test_what_fails_to_count_is_said():
    async def count(text):
        raise EngineError("no")

    with pytest.raises(EngineError):
        asyncio.run(find_words(count, "me"))
    assert not guessed_words().exact
