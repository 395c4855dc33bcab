"""Which policies requests may name, and what is said of the KV under them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest

from lamina.kv.pages import PageGroup
from lamina.launch.kv_sizing import RequestPolicies, page_groups
from lamina_protocols.messages.layers import HolderConfig, Index, LayerSpec
from lamina_workers.errors import PolicyError
from lamina_workers.policies.catalogue import POLICIES, parse
from lamina_workers.policies.policy import Windowed

BOTH = frozenset((0, 1))
INDEX = Index(16, 1, 16, 4)


def policies(
    own: str = "", window: int | None = None, sketches: bool = True, index: Index | None = None
) -> RequestPolicies:
    """Of an engine with two layers, the second of which has the window."""
    spec = LayerSpec(0, 4, 2, 16, 16, 0.25, policies=(own,) * 2 if own else (), index=index)
    holder = HolderConfig((spec, replace(spec, kv_layer=1, window=window)), 16, "float32", 1 << 20, sketches=sketches)
    return RequestPolicies(holder, partial(page_groups, holder))


@pytest.mark.parametrize("text", ["full", " full ", "streaming(sink=64,recent=256)", "streaming", "auto", "retrieval"])
def test_a_policy_has_one_name_however_it_is_written(text: str) -> None:
    of = policies("page_top_k")
    name = of(text).name
    assert name == str(parse("retrieval" if text == "auto" else text))
    assert of(name) == of(text)
    assert policies(name)(text).name == ""  # the engine's own


@pytest.mark.parametrize("name", POLICIES)
def test_what_a_policy_makes_of_kv(name: str) -> None:
    own = {"full": "page_top_k", "heavy_hitter": "heavy_hitter(budget=0.5)"}
    of = policies(own.get(name, ""))(name)
    policy = parse(name)
    assert of.whole_prompts == (name not in ("streaming", "span", "sharded", "dilated"))
    assert of.chooses == (policy.adaptive or policy.compensated or policy.evicts)


def test_what_is_kept_follows_the_request_s_policy_within_the_model_s_windows() -> None:
    own = parse("streaming(sink=4, recent=40)")
    of = policies(str(own), window=8)
    assert of("").groups == ((PageGroup(1, own, BOTH), PageGroup(1, Windowed(own, 8), BOTH)),)
    assert of("full").groups == ((PageGroup(1, None, BOTH), PageGroup(1, Windowed(parse("full"), 8), BOTH)),)
    razor = parse("razor")
    assert of("razor").groups == ((PageGroup(1, razor, BOTH), PageGroup(1, Windowed(razor, 8), BOTH)),)


def test_what_cannot_be_served_is_refused_with_what_is_allowed() -> None:
    with pytest.raises(PolicyError, match="does not keep; allowed here are static policies, and any where"):
        policies(sketches=False)("page_top_k")
    assert policies("retrieval", sketches=False)("page_top_k").chooses
    with pytest.raises(PolicyError, match="builds an index of keys, which this engine does not; allowed here"):
        policies()("retrieval(index=graph)")
    assert policies("retrieval(index=ivf)")("retrieval(index=graph)").chooses
    with pytest.raises(PolicyError, match="there is no policy 'x'; allowed are full"):
        policies()("x")
    with pytest.raises(PolicyError, match="allowed is none: the model's own index"):
        policies("full", index=INDEX)("streaming")
    assert policies("full", index=INDEX)("full").name == ""
