"""Redundancy that a model or its workers cannot have is refused, with what was asked and what stands against it."""

from __future__ import annotations

import pytest

from lamina.config import EngineConfig
from lamina.errors import InvalidRequest
from lamina.kv.pages import PageGroup
from lamina.kv.placement import Holder, Placement
from lamina.kv.redundancy import parse
from lamina.kv.request import SchedulerConfig
from lamina.launch.checks import check_redundancy
from lamina_workers.policies.catalogue import parse as policy

KEPT = PageGroup(1)


def check(text: str, layouts: tuple[str, ...], group: PageGroup = KEPT, states: bool = False, **config: object):
    limits = SchedulerConfig(
        16, 8, 64, 16, ((group,), *([()] * states)), prefix_cache=False, states={1: 2} if states else {},
        redundancy=parse(text),
    )  # fmt: skip
    holders = {n: Holder((9,), name=f"worker-{n}", page_layout=layout) for n, layout in enumerate(layouts)}
    placement = Placement(holders, heads=((2,),), page_size=16, max_model_len=64)
    check_redundancy(EngineConfig(**config), limits, placement, bool(layouts))  # type: ignore[arg-type]


def test_what_is_possible_is_taken() -> None:
    check("none", ())
    check("replica", ("a", "b"))
    check("parity", ("a", "a", "a"))


def test_one_holder_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r'redundancy is "replica\(1\)" with attention_workers=0: .* only holder'):
        check("replica", ())


def test_parity_over_unlike_page_layouts_is_refused_with_both() -> None:
    with pytest.raises(InvalidRequest, match=r'"parity\(2\)", .*worker-0 \(a\) and worker-2 \(b\)'):
        check("parity", ("a", "b", "b"))


def test_policies_that_let_go_of_kv_are_refused() -> None:
    streaming = PageGroup(1, policy("streaming(sink=5, recent=7)"))
    with pytest.raises(InvalidRequest, match=r"with policy='streaming\(sink=5, recent=7\)'"):
        check("replica", ("a", "b"), streaming, policy="streaming(sink=5, recent=7)")
    with pytest.raises(InvalidRequest, match="with windows of the model's own"):
        check("replica", ("a", "b"), streaming)


def test_recurrent_states_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="1 pools of this model have recurrent states"):
        check("replica", ("a", "b"), states=True)
