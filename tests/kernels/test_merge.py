"""Merging in place, compiled and in plain torch, against float64 and against `partial.merge`."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import kernel_reference as reference
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina_kernels.attention import decode as cpu_decode
from lamina_kernels.compile import launch
from lamina_kernels.partial import Partial, empty, merge
from lamina_kernels.select import Kernels

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ROUNDING = {F32: 2.0**-22, BF16: 2.0**-8, F16: 2.0**-11}  # relative; of float32 there is more than one
both = pytest.mark.parametrize("kernels", [cpu_decode, reference], ids=["cpu", "reference"])
every_into = pytest.mark.parametrize("into_dtype", [F32, BF16, F16], ids=str)
every_past = pytest.mark.parametrize("past_dtype", [F32, BF16, F16], ids=str)


def random_partial(n: int, width: int, dtype: torch.dtype, seed: int = 0, spread: float = 1.0, empties: float = 0.0):
    """Of the vectors, a share of about `empties` is of no keys."""
    generator = torch.Generator().manual_seed(seed)
    out, lse = torch.randn(n, width, generator=generator), torch.randn(n, generator=generator) * spread
    none = torch.rand(n, generator=generator) < empties
    return Partial(out.masked_fill(none[:, None], 0.0).to(dtype), lse.masked_fill(none, -torch.inf))


def copied(partial: Partial) -> Partial:
    return Partial(partial.out.clone(), partial.lse.clone())


def equal(a: Partial, b: Partial) -> bool:
    """To the bit, NaN included."""
    return all(x.dtype == y.dtype and torch.equal(bits(x), bits(y)) for x, y in zip(a, b, strict=True))


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)


def exact(mine: Partial, other: Partial) -> Partial:
    """Two partials merged in float64."""
    lse = torch.stack([mine.lse.double(), other.lse.double()])
    total = torch.logsumexp(lse, 0)
    factors = torch.exp(lse - total).nan_to_num(0.0).unsqueeze(-1)  # two empties: exp(-inf - -inf)
    return Partial(factors[0] * mine.out.double() + factors[1] * other.out.double(), total)


def check(kernels: Kernels, into: Partial, past: Partial, index: torch.Tensor | None) -> None:
    found, before = copied(into), copied(past)
    kernels.merge_into(found, past, index)
    at = torch.arange(len(into.lse)) if index is None else index
    wanted = exact(Partial(into.out[at], into.lse[at]), past)
    torch.testing.assert_close(found.out[at].double(), wanted.out, rtol=ROUNDING[into.out.dtype], atol=1e-6)
    torch.testing.assert_close(found.lse[at].double(), wanted.lse, rtol=2**-22, atol=3e-7)
    others = torch.ones(len(into.lse), dtype=torch.bool)
    others[at] = False
    assert equal(Partial(found.out[others], found.lse[others]), Partial(into.out[others], into.lse[others]))
    assert equal(past, before)


@both
@every_into
@every_past
@settings(max_examples=15)
@given(
    total=st.integers(1, 70),
    picked=st.sampled_from([None, 0.0, 0.5, 1.0]),
    width=st.sampled_from([1, 7, 16, 33, 64, 100, 128, 256]),
    spread=st.sampled_from([0.1, 3.0, 1e4]),
    empties=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 99),
)
def test_any_merge_is_right(kernels, into_dtype, past_dtype, total, picked, width, spread, empties, seed) -> None:
    index = None
    if picked is not None:
        index = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[: round(total * picked)]
    n = total if index is None else len(index)
    into = random_partial(total, width, into_dtype, seed, spread, empties)
    check(kernels, into, random_partial(n, width, past_dtype, seed + 100, spread, empties), index)


@both
def test_every_pair_of_lse_is_merged_as_partial_merge_does(kernels: Kernels) -> None:
    numbers = [-torch.inf, -3e38, -1e4, -87.5, -1.0, 0.0, 1e-30, 0.4, 20.0, 1e4, 3e38, torch.inf, torch.nan]
    mine, other = (torch.tensor(column) for column in zip(*product(numbers, numbers), strict=True))
    into, past = Partial(torch.full((len(mine), 17), 2.0), mine), Partial(torch.full((len(mine), 17), -3.0), other)
    wanted = merge((into, past))
    kernels.merge_into(into, past, None)
    torch.testing.assert_close(into.out, wanted.out, equal_nan=True, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(into.lse, wanted.lse, equal_nan=True, rtol=1e-6, atol=1e-6)


@both
@every_into
def test_the_empty_one_is_neutral_to_the_bit(kernels: Kernels, into_dtype: torch.dtype) -> None:
    some, none = random_partial(37, 80, into_dtype), empty(37, 80, into_dtype)
    for into, past, wanted in ((some, none, some), (none, some, some), (none, none, none)):
        found = copied(into)
        kernels.merge_into(found, past, None)
        assert equal(found, wanted)


@pytest.mark.fault("F25")
@both
@every_into
def test_nan_is_not_hidden_whatever_its_bits(kernels: Kernels, into_dtype: torch.dtype) -> None:
    past = random_partial(4, 19, F32)
    strange = torch.tensor([0x7FFFFFFF, 0x7F800001, -1], dtype=torch.int32).view(F32)
    past.out[0, :3], past.lse[1:] = strange, strange
    into = random_partial(4, 19, into_dtype, 1)
    kernels.merge_into(into, past, None)
    assert torch.isnan(into.out[0]).tolist() == [True] * 3 + [False] * 16
    assert torch.isnan(into.out[1:]).all()
    assert torch.isnan(into.lse).tolist() == [False, True, True, True]


@both
def test_the_result_alone_is_rounded(kernels: Kernels) -> None:
    """Were past rounded to bfloat16 first, 1.0 would be left of it, and 0.75 would come out."""
    into = Partial(torch.full((1, 17), 0.5 + 2**-8, dtype=BF16), torch.zeros(1))
    kernels.merge_into(into, Partial(torch.full((1, 17), 1 + 2**-8 - 2**-20), torch.zeros(1)), None)
    assert (into.out == 0.75 + 2**-8).all()


@both
def test_strided_past_and_index_are_taken(kernels: Kernels) -> None:
    wide = random_partial(30, 64, F32, 1)
    past = Partial(wide.out[::3, 5:38], wide.lse[::3])
    check(kernels, random_partial(20, 33, BF16), past, torch.arange(20).flip(0)[::2])


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("python_threads", [False, True])
def test_many_vectors_come_out_as_one_by_one(python_threads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if python_threads:
        monkeypatch.setattr(launch, "_launcher", lambda: launch._on_python_threads)
    into, past = random_partial(2500, 96, BF16, 0, 3.0, 0.1), random_partial(1201, 96, F32, 1, 3.0, 0.1)
    index = torch.randperm(2500, generator=torch.Generator().manual_seed(2))[:1201]
    together, alone = copied(into), copied(into)
    cpu_decode.merge_into(together, past, index)
    for i in range(len(index)):
        cpu_decode.merge_into(alone, Partial(past.out[i : i + 1], past.lse[i : i + 1]), index[i : i + 1])
    assert equal(together, alone)
    check(cpu_decode, into, past, index)
    check(cpu_decode, past, random_partial(1201, 96, BF16, 3), None)


@both
class TestRefuses:
    @pytest.mark.usefixtures("two_threads")
    @pytest.mark.parametrize("n", [5, 1500])
    @pytest.mark.parametrize("wrong", [-1, 3000, 2**62, -(2**63)])
    def test_an_index_outside_and_changes_nothing(self, kernels: Kernels, n: int, wrong: int) -> None:
        into, past, index = random_partial(3000, 64, F32), random_partial(n, 64, F32, 1), torch.arange(n)
        index[n - 2] = wrong
        before = copied(into)
        with pytest.raises(ValueError, match=f"index must be from 0 to 2999, got {wrong}$"):
            kernels.merge_into(into, past, index)
        assert equal(into, before)

    def test_what_does_not_fit(self, kernels: Kernels) -> None:
        into, past, index = random_partial(6, 32, F32), random_partial(3, 32, F32), torch.arange(3)
        before = copied(into)
        for message, changed in (
            (r"past.out must be \[6, 32\]", (into, past, None)),
            (r"past.out must be \[3, 32\]", (into, past._replace(out=past.out[:, 1:]), index)),
            ("past.out must be .* got torch.float64", (into, past._replace(out=past.out.double()), index)),
            (r"past.lse must be \[3\]", (into, past._replace(lse=past.lse[1:]), index)),
            ("past.lse must be .* got torch.bfloat16", (into, past._replace(lse=past.lse.bfloat16()), index)),
            ("past.lse must be .* on meta", (into, past._replace(lse=past.lse.to("meta")), index)),
            (r"index must be \[3\]", (into, past, index[1:])),
            ("index must be .* got torch.int32", (into, past, index.int())),
            (r"into.lse must be \[6\]", (into._replace(lse=into.lse[1:]), past, index)),
            ("into.out must be .* got torch.int32", (into._replace(out=into.out.int()), past, index)),
            (r"out must be \[n, d_v\]", (into._replace(out=into.out.view(6, 4, 8)), past, index)),
            ("into must be contiguous", (into._replace(out=torch.zeros(32, 6).T), past, index)),
        ):
            with pytest.raises(ValueError, match=message):
                kernels.merge_into(*changed)
        assert equal(into, before)

    def test_any_index_where_there_are_no_vectors(self, kernels: Kernels) -> None:
        with pytest.raises(ValueError, match="index must be from 0 to -1, got 0"):
            kernels.merge_into(empty(0, 16), empty(1, 16), torch.zeros(1, dtype=torch.int64))
