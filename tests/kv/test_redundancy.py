"""Which spares a text names, and what is protected together."""

from __future__ import annotations

import pytest

from lamina.config import EngineConfig
from lamina.errors import InvalidRequest
from lamina.kv.kv_shares import Share
from lamina.kv.redundancy import NONE, Redundancy, groups, parse

END = 512


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("none", NONE),
        ("replica", Redundancy("replica", 1)),
        ("replica(2)", Redundancy("replica", 2)),
        ("parity", Redundancy("parity", 2)),
        ("parity(5)", Redundancy("parity", 5)),
    ],
)
def test_text_and_back(text: str, meant: Redundancy) -> None:
    assert parse(text) == meant
    assert parse(str(meant)) == meant
    assert bool(meant) == (text != "none")


@pytest.mark.parametrize(
    "text",
    ["", "raid", "none(1)", "replica()", "replica(0)", "replica(65)", "parity(1)", "parity(-2)", "Replica", 1, None],
)
def test_other_texts_are_refused_with_what_is_allowed(text: object) -> None:
    with pytest.raises(InvalidRequest, match=r"redundancy is .*; allowed is"):
        parse(text)


@pytest.mark.parametrize(
    ("text", "workers", "instead"),
    [
        ("replica", 1, 'redundancy="none"'),
        ("replica(2)", 2, 'redundancy="replica\\(1\\)"'),
        ("parity", ("a:1", "b:1"), 'redundancy="replica\\(1\\)"'),
        ("parity(3)", 3, 'redundancy="replica\\(2\\)"'),
    ],
)
def test_too_few_workers_are_refused_with_both_values(text: str, workers: object, instead: str) -> None:
    count = workers if isinstance(workers, int) else 2
    with pytest.raises(InvalidRequest, match=rf"{parse(text).count}\)\" with {count} attention_workers.*{instead}"):
        EngineConfig(redundancy=text, attention_workers=workers)  # type: ignore[arg-type]


def test_enough_workers_are_taken() -> None:
    assert EngineConfig(redundancy="parity(3)", attention_workers=4).redundancy == "parity(3)"


def shares(count: int, lo: int = 0, hi: int = END) -> tuple[Share, ...]:
    return tuple(Share(number, (number,), lo, hi) for number in range(1, count + 1))


def test_replicas_protect_each_share_alone() -> None:
    assert groups(shares(3), parse("replica(2)"), lambda share: (1, 2, 3)) == [(share,) for share in shares(3)]


@pytest.mark.parametrize(("most", "sizes"), [(2, [2, 1]), (3, [3]), (9, [3])])
def test_parity_is_over_shares_of_different_holders(most: int, sizes: list[int]) -> None:
    found = groups(shares(3), Redundancy("parity", most), lambda share: (1, 2, 3, 4))
    assert [len(group) for group in found] == sizes
    assert sum(found, ()) == shares(3)


def test_parity_leaves_a_holder_for_itself() -> None:
    assert [len(group) for group in groups(shares(3), parse("parity(3)"), lambda share: (1, 2, 3))] == [2, 1]


def test_parity_is_not_over_other_positions_nor_one_holder_nor_unlike_holders() -> None:
    mixed = (*shares(1), *shares(2, 0, 64)[1:], Share(1, (4,), 0, END), *shares(3, 64)[2:])
    found = groups(mixed, parse("parity"), lambda share: (1, 2, 3, 4))
    assert sorted(len(group) for group in found) == [1, 1, 1, 1]
    unlike = groups(shares(4), parse("parity"), lambda share: (1, 3) if share.holder % 2 else (2, 4))
    assert {tuple(share.holder for share in group) for group in unlike} == {(1,), (2,), (3,), (4,)}
