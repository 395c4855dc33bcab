"""What a model or its workers cannot have is refused, with what was asked and what stands against it; what an option
does in vain is said."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lamina import LLM
from lamina.config import EngineConfig
from lamina.errors import InvalidRequest
from lamina.kv.pages import PageGroup
from lamina.kv.placement import Holder, Placement
from lamina.kv.redundancy import parse
from lamina.kv.request import SchedulerConfig
from lamina.launch.checks import check_redundancy, unused_options
from lamina_protocols.messages.layers import HolderConfig, LayerSpec
from lamina_workers.policies.catalogue import parse as policy_of

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
    with pytest.raises(InvalidRequest, match=r'redundancy is "replica\(1\)" with attention_workers=0: .* only place'):
        check("replica", ())


def test_parity_over_unlike_page_layouts_is_refused_with_both() -> None:
    with pytest.raises(InvalidRequest, match=r'"parity\(2\)", .*worker-0 \(a\) and worker-2 \(b\)'):
        check("parity", ("a", "b", "b"))


def test_policies_that_let_go_of_kv_are_refused() -> None:
    streaming = PageGroup(1, policy_of("streaming(sink=5, recent=7)"))
    with pytest.raises(InvalidRequest, match=r"with policy='streaming\(sink=5, recent=7\)'"):
        check("replica", ("a", "b"), streaming, policy="streaming(sink=5, recent=7)")
    with pytest.raises(InvalidRequest, match="with windows of the model's own"):
        check("replica", ("a", "b"), streaming)


def test_recurrent_states_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="1 pools of this model have recurrent states"):
        check("replica", ("a", "b"), states=True)


def holder(policy: str = "", window: int | None = None) -> HolderConfig:
    """Three layers, of which the first two have the window."""
    policies = (policy,) * 2 if policy else ()
    specs = [LayerSpec(i, 4, 2, 16, 16, 0.25, window if i < 2 else None, policies=policies) for i in range(3)]
    return HolderConfig(tuple(specs), 16, "float32", 1 << 20)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, []),
        ({"shard": "sequence"}, ["shard='sequence' does nothing without attention_workers"]),
        ({"local_share": 0.5, "attention_workers": 1}, []),
        ({"deterministic": True}, []),
        ({"tls_dir": "x", "token_file": "y"}, ["tls_dir='x'", "token_file='y'"]),
        ({"model_parallel": "replicas"}, ["model_parallel='replicas' does nothing with one model worker"]),
        ({"worker_linger": 5, "attention_workers": 1}, ["worker_linger=5 does nothing without a journal"]),
        ({"worker_linger": 5, "journal": "j"}, []),
        ({"num_speculative_tokens": 3}, ["num_speculative_tokens=3 does nothing without speculate"]),
        ({"num_speculative_tokens": 3, "speculate": "ngram"}, []),
        ({"kv_local": 1 << 30}, ["kv_local=1073741824 does nothing without attention_workers"]),
        ({"kv_local": 1 << 30, "attention_workers": 1}, []),
        ({"kv_resident": 1 << 30}, ["kv_resident=1073741824 does nothing without kv_cold"]),
        ({"kv_resident": 1 << 30, "kv_cold": "d"}, []),
    ],
)
def test_options_without_what_they_are_for(options: dict[str, Any], said: list[str]) -> None:
    found = list(unused_options(EngineConfig(**options), holder()))
    assert len(found) == len(said)
    assert all(each.startswith(begin) for each, begin in zip(found, said, strict=True))


@pytest.mark.parametrize(
    ("policy", "window", "said"),
    [
        ("streaming(sink=0, recent=8)", None, []),
        ("streaming(sink=0, recent=8)", 8, ["changes nothing in 2 of 3 layers: their own windows are as narrow"]),
        ("streaming(sink=4, recent=7)", 8, ["hides some of the model's own window, sinks too, in 2 of 3 layers"]),
        ("dilated(block=48,sink=0,local=2)", 49, ["changes nothing in 2 of 3 layers: their own windows are as narrow"]),
        ("dilated(block=48,sink=0)", 9999, ["changes nothing in 2 of 3 layers: their own windows are as narrow"]),
        ("retrieval", 512, ["reads all of the model's own window in 2 of 3 layers, and chooses in the others"]),
    ],
)
def test_a_policy_in_layers_with_a_window(policy: str, window: int | None, said: list[str]) -> None:
    found = list(unused_options(EngineConfig(policy=policy), holder(policy, window)))
    assert found == [f"policy={policy!r} {each}" for each in said]


@pytest.mark.parametrize("policy", ["retrieval", "razor", "streaming(sink=0, recent=8)"])
def test_drafts_under_a_policy_that_chooses(policy: str) -> None:
    said = list(unused_options(EngineConfig(policy=policy, speculate="ngram"), holder(policy)))
    chooses = f"speculate='ngram' does nothing for requests under policy={policy!r}, which chooses keys for one token"
    assert said == ([] if policy[0] == "s" else [f"{chooses} at a time"])


def test_what_is_of_kv_with_states_alone() -> None:
    state = LayerSpec(0, 4, 4, 16, 16, 1.0, kind="gated_delta", key_heads=2, conv=4)
    alone = HolderConfig((state,), 16, "float32", 1 << 20)
    options = {"policy": "streaming(sink=0, recent=8)", "kv_dtype": "int8", "kv_cold": "d", "shard": "sequence"}
    options |= {"attention_workers": 1}
    found = list(unused_options(EngineConfig(**options), alone))
    assert found == [
        f"{name}={options[name]!r} does nothing with this model: no layer keeps KV"
        for name in ("policy", "kv_dtype", "kv_cold", "shard")
    ]
    beside = replace(alone, layers=(state, LayerSpec(1, 4, 2, 16, 16, 0.25)))
    assert not list(unused_options(EngineConfig(**options), beside))


def test_it_is_said_once_at_the_start(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An option that did nothing was swallowed."""
    with caplog.at_level(logging.WARNING, "lamina"), LLM(model, threads=1, kv_memory="16M", shard="sequence") as llm:
        llm.generate([[1, 2, 3]] * 2, max_tokens=3)
    assert [r.message for r in caplog.records if "does nothing" in r.message] == [
        "shard='sequence' does nothing without attention_workers"
    ]
