"""What policies let go, against what any later query sees; and who reads what of which layer."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina_protocols.messages.layers import HolderConfig, LayerSpec
from lamina_workers.errors import PolicyError
from lamina_workers.kv_pages.head_policies import HeadPolicies, Retention
from lamina_workers.policies.catalogue import parse
from lamina_workers.policies.policy import Policy, within

SPEC = LayerSpec(kv_layer=0, heads=4, kv_heads=2, d_k=16, d_v=16, scale=0.25)
POLICIES = st.one_of(
    st.builds(lambda s, r: parse(f"streaming(sink={s}, recent={r})"), st.integers(0, 20), st.integers(1, 40)),
    st.builds(lambda a, b: parse(f"span(alpha={a}, beta={b:.3f})"), st.integers(-90, 90), st.floats(0, 1)),
    st.builds(lambda r, s: parse(f"razor(sink=9, recent={r}, share={s:.3f})"), st.integers(1, 40), st.floats(0, 1)),
    st.builds(lambda o: parse(f"sharded(block=4, local=2, stride=3, offset={o})"), st.integers(0, 5)),
    st.builds(
        lambda d, r: parse(f"dilated(block=4, sink=8, local=2, dilation={d}, reach={r})"),
        st.integers(1, 5),
        st.integers(2, 20),
    ),
    st.just(parse("full")),
)
DILATED = "dilated(block=4, sink=4, local=2, reach=9, dilation=3)"
WINDOWED = st.builds(within, POLICIES, st.one_of(st.none(), st.integers(1, 30)))


def heads_of(*layers: tuple[int, tuple[str, ...]], window: int | None = None) -> HeadPolicies:
    """Layers, each by the layer whose KV it reads and the policies of its heads."""
    specs = tuple(dataclasses.replace(SPEC, kv_layer=at, policies=texts, window=window) for at, texts in layers)
    return HeadPolicies.of(HolderConfig(specs, 16, "float32", 1 << 20))


def sees(policy: Policy, p: int) -> set[int]:
    (view,) = policy.views(p, 1)
    return {k for first, end in view.seen(p) for k in range(first, end)}


@given(WINDOWED, st.integers(0, 300), st.integers(0, 150))
@settings(max_examples=150)
def test_no_later_query_sees_what_lies_below(policy: Policy, start: int, later: int) -> None:
    lowest = policy.seen_from(start)
    assert all(k >= lowest or policy.stays(np.array([k]))[0] for k in sees(policy, start + later))


@given(WINDOWED, st.integers(0, 300), st.integers(1, 150))
@settings(max_examples=150)
def test_what_is_kept_never_moves_back(policy: Policy, start: int, later: int) -> None:
    assert 0 <= policy.seen_from(start) <= policy.seen_from(start + later) <= start + later + 1
    assert policy.seen_from(start + 1) - policy.seen_from(start) <= 1


@given(POLICIES, st.integers(0, 400))
@settings(max_examples=100)
def test_a_part_returns_as_far_as_its_queries_find_everything(policy: Policy, length: int) -> None:
    position = policy.seen_from(length)
    lowest = policy.returns_to(position)
    assert lowest <= length
    assert policy.seen_from(lowest) >= position
    assert lowest == 0 or policy.seen_from(lowest - 1) < position


def test_the_present_may_be_cut_in_any_way() -> None:
    """Views of many queries say what views of one do."""
    for text in (
        "full",
        "streaming(sink=3, recent=5)",
        "span(alpha=9, beta=0.4)",
        "sharded(block=4, local=2)",
        DILATED,
    ):
        policy = parse(text)
        for start, count in ((0, 150), (61, 9), (63, 2)):
            views = list(policy.views(start, count))
            assert [view.start for view in views] == [start, *(v.start + v.count for v in views[:-1])]
            assert sum(view.count for view in views) == count
            for view in views:
                for p in range(view.start, view.start + view.count):
                    assert {k for first, end in view.seen(p) for k in range(first, end)} == sees(policy, p)


def test_a_sliding_window_hides_sinks_too() -> None:
    ((policy, _),) = heads_of((0, ("streaming(sink=8)", "full")), window=20).reads
    assert policy.sinks == 0
    assert sees(policy, 100) == set(range(81, 101))
    assert policy.seen_from(100) == 81


def test_a_layer_names_a_policy_for_each_head() -> None:
    ((first, second),) = heads_of((0, ())).reads
    assert (first.name, second.name) == ("full", "full")
    with pytest.raises(PolicyError, match="3 policies for a layer of 2 KV heads"):
        heads_of((0, ("full",) * 3))


def test_policies_are_parsed_once_for_all_that_ask() -> None:
    layers = ((0, ("streaming", "full")), (1, ("retrieval", "full")))
    assert heads_of(*layers) is heads_of(*layers)
    assert [policy.name for policy in heads_of(*layers).distinct] == ["streaming", "full", "retrieval"]
    assert heads_of(*layers).sketched
    assert not heads_of(layers[0]).sketched


def test_heads_are_grouped_by_what_they_let_go() -> None:
    a, b = "streaming(sink=4, recent=9)", "streaming(sink=4, recent=30)"
    retention = Retention(heads_of((0, (a, "full")), (1, (b, a))))
    groups = {str(group.policy): group.cells.tolist() for group in retention.groups((0, 1))}
    assert groups == {
        "streaming(sink=4, recent=9)": [[True, False], [False, True]],
        "streaming(sink=4, recent=30)": [[False, False], [True, False]],
    }
    (group,) = retention.groups((1,))  # a part of that head alone
    assert group.cells.tolist() == [[False], [True]]
    assert Retention(heads_of((0, ()))).groups((0, 1)) == ()


@given(WINDOWED, st.integers(0, 40), st.integers(0, 40), st.sampled_from([1, 2, 4]))
@settings(max_examples=100)
def test_pages_that_stay_are_counted(policy: Policy, first: int, pages: int, size: int) -> None:
    positions = np.arange(first, first + pages) * size
    assert policy.staying(first, first + pages, size) == policy.stays(positions).sum()


SEEN = {  # whether the query in block q sees a key in block k <= q, written down a second time
    "sharded(block=4, local=2, stride=3, offset=2)": lambda q, k: q - k < 2 or (k + 2) % 3 == 0,
    "sharded(block=4, local=1, stride=1)": lambda q, k: True,
    DILATED: lambda q, k: q - k < 2 or k < 1 or (q - k < 9 and (q - k) % 3 == 0),
    "dilated(block=4, sink=0, local=1, reach=1, dilation=2)": lambda q, k: q == k,
}


@pytest.mark.parametrize("text", SEEN)
def test_blocks_that_are_seen(text: str) -> None:
    """In a layer with a sliding window of the model's own they change nothing."""
    policy = parse(text)
    assert within(policy, 22) == within(parse("full"), 22)
    for p in range(0, 130, 3):
        assert sees(policy, p) == {k for k in range(p + 1) if SEEN[text](p // 4, k // 4)}
        (view,) = policy.views(p, 1)
        assert view.keys(p, 7, 90) == sum(7 <= key < 90 for key in sees(policy, p))


def test_each_head_has_an_offset_of_its_own() -> None:
    ((first, second),) = heads_of((0, ("sharded(block=16, stride=3, offset=1, step=5)",) * 2)).reads
    assert (str(first), str(second)) == (
        "sharded(block=16, local=16, stride=3, offset=1, step=0)",
        "sharded(block=16, local=16, stride=3, offset=0, step=0)",
    )
    assert second.of_head(1) == second
    ((first, second),) = heads_of((0, ("sharded(step=0)",) * 2)).reads
    assert first == second


def test_blocks_are_whole_pages() -> None:
    with pytest.raises(PolicyError, match="sharded: block is 24; allowed are multiples of the page size, 16"):
        heads_of((0, ("sharded(block=24)", "full")), window=20)


def test_layers_that_share_keys_keep_what_either_sees() -> None:
    shared = heads_of((0, ("streaming(sink=4, recent=9)", "full")), (0, ("streaming(sink=8, recent=30)", "streaming")))
    ((first, second),) = shared.keepers
    assert (first.sinks, first.seen_from(100)) == (8, 71)
    assert second.seen_from(100) == 0
    assert first.stays(np.arange(9) * 4).tolist() == [True] * 2 + [False] * 7
    ((same, _),) = heads_of((0, ("span", "full")), (0, ("span", "full"))).keepers
    assert same == parse("span")
