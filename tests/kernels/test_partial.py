"""Partials form a commutative monoid under merge, and merging is attention over the union."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina_kernels.partial import Partial, empty, merge, with_sinks


def attention(logits: torch.Tensor, v: torch.Tensor) -> Partial:
    """logits `[n, keys]`, v `[keys, d]`; no keys, or only -inf, make the empty partial."""
    return Partial(torch.softmax(logits, -1).nan_to_num(0.0) @ v, torch.logsumexp(logits, -1))


@st.composite
def partials(draw: st.DrawFn, least: int = 1) -> list[Partial]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    sizes = draw(st.lists(st.integers(0, 5), min_size=least, max_size=4))
    spread = draw(st.sampled_from([0.1, 1.0, 1e4]))
    made = []
    for size in sizes:
        logits = torch.randn(3, size, generator=generator) * spread
        logits[torch.rand(3, generator=generator) < 0.3] = -torch.inf
        made.append(attention(logits, torch.randn(size, 8, generator=generator)))
    return made


def close(a: Partial, b: Partial) -> None:
    torch.testing.assert_close(a.out, b.out, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(a.lse, b.lse)


@settings(max_examples=60)
@given(partials(), st.randoms())
def test_order_does_not_matter(parts: list[Partial], random) -> None:
    shuffled = parts.copy()
    random.shuffle(shuffled)
    close(merge(parts), merge(shuffled))


@settings(max_examples=60)
@given(partials(least=2), st.integers(1, 4))
def test_grouping_does_not_matter(parts: list[Partial], at: int) -> None:
    at = min(at, len(parts) - 1)
    close(merge([merge(parts[:at]), merge(parts[at:])]), merge(parts))


@settings(max_examples=60)
@given(partials())
def test_empty_is_the_identity(parts: list[Partial]) -> None:
    nothing = empty(3, 8)
    for part in parts:
        for merged in (merge([part, nothing]), merge([nothing, part])):
            assert torch.equal(merged.lse, part.lse)
            torch.testing.assert_close(merged.out, part.out)


@settings(max_examples=60)
@given(st.integers(0, 9), st.sampled_from([1.0, 1e4]), st.integers(0, 99))
def test_merging_is_attention_over_the_union(at: int, spread: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits, v = torch.randn(3, 9, generator=generator) * spread, torch.randn(9, 8, generator=generator)
    close(merge([attention(logits[:, :at], v[:at]), attention(logits[:, at:], v[at:])]), attention(logits, v))


@settings(max_examples=60)
@given(partials(), st.permutations(range(4)))
def test_merging_two_at_a_time_in_any_order_is_merging_all(parts: list[Partial], order: list[int]) -> None:
    total = empty(3, 8)
    for part in (parts[at] for at in order if at < len(parts)):
        total = merge([part, total])
    close(total, merge(parts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=60)
@given(whole=partials(), sinks=st.lists(st.sampled_from([-1e4, -2.0, 0.0, 3.0, 1e4]), min_size=3, max_size=3))
def test_a_sink_is_a_key_whose_value_is_zeros(dtype: torch.dtype, whole: list[Partial], sinks: list[float]) -> None:
    of = torch.tensor(sinks)
    tokens = Partial(*map(torch.cat, zip(merge(whole), whole[0], strict=True)))  # of two tokens
    given_ = tokens._replace(out=tokens.out.to(dtype))
    expected = merge([Partial(given_.out.float(), given_.lse), Partial(torch.zeros(6, 8), of.repeat(2))])
    found = with_sinks(given_, of)
    assert found.dtype == dtype
    close_to = 1e-5 if dtype is torch.float32 else 2**-7  # one unit in the last place
    torch.testing.assert_close(found.float(), expected.out, atol=2e-6, rtol=close_to)


@pytest.mark.parametrize("far", [80.0, 1e4, 3e38])
def test_the_larger_of_two_far_apart_is_all_there_is(far: float) -> None:
    v = torch.randn(2, 3, 8)
    near = Partial(v[0], torch.full((3,), -far))
    out, lse = merge([near, Partial(v[1], torch.full((3,), far))])
    assert torch.equal(out, v[1])
    assert torch.equal(lse, torch.full((3,), far))
    close(merge([near, near]), Partial(v[0], near.lse + math.log(2)))


def test_nan_is_not_hidden_and_stays_in_its_vector() -> None:
    part = attention(torch.randn(3, 5), torch.randn(5, 8))
    wrong = Partial(part.out.clone(), part.lse.clone())
    wrong.out[0, 3] = wrong.lse[1] = torch.nan
    for out, lse in (merge([part, wrong]), merge([wrong, part])):
        assert torch.isnan(out).tolist() == [[i == 3 for i in range(8)], [True] * 8, [False] * 8]
        assert torch.isnan(lse).tolist() == [False, True, False]


def test_two_empties_are_empty() -> None:
    out, lse = merge([empty(2, 4), empty(2, 4)])
    assert not out.any()
    assert (lse == -torch.inf).all()


def test_the_dtype_of_out_is_kept_and_lse_is_float32() -> None:
    part = Partial(torch.ones(2, 4, dtype=torch.bfloat16), torch.zeros(2))
    out, lse = merge([part, part])
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, part.out)
    torch.testing.assert_close(lse, torch.full((2,), 2.0).log())


def test_nothing_to_merge_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one partial"):
        merge([])
