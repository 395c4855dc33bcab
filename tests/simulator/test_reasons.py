"""What is said of systems: where moving attention and states pays, what models keep, and how many would keep an SLO."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from planning import EPYC, FHBN, H20, H100, SLO, STEADY, there_are

from lamina.simulator.costs.cost_model import Load
from lamina.simulator.costs.hardware import load, with_efficiency
from lamina.simulator.costs.model_configs import model
from lamina.simulator.costs.systems import Colocated, Disaggregated, Offloaded
from lamina.simulator.event_loop.simulate import Slo, simulate
from lamina.simulator.planning.candidates import Candidate, candidates
from lamina.simulator.planning.deployment import engine_keywords
from lamina.simulator.planning.planner import rank
from lamina.simulator.planning.reasons import (
    MOST,
    bound_by_compute,
    compute_bound_devices,
    overloads,
    step_compared,
    why,
    would_do,
)
from lamina.simulator.reports.report import in_bytes, kept, room
from lamina.simulator.traces.arrivals import all_at_once
from lamina.simulator.traces.catalogue import at_rate, trace
from lamina.simulator.traces.demand import demand

LARGE = replace(H100, name="large", memory=141e9)


def moved(name: str, attention: object = H20, **more: object) -> Offloaded:
    whole = Offloaded(
        model=model(name), model_device=LARGE, model_count=8, attention_device=H20, attention_count=2, link=FHBN,
        shard="sequence",
    )  # fmt: skip
    return replace(whole, attention_device=attention, **more)


def test_latents_on_a_cpu_are_bound_by_compute() -> None:
    said = bound_by_compute(model("deepseek-v3"), EPYC, 4096)
    assert (
        "it takes 242 FLOPs a byte of KV, the device has 32 a byte of bandwidth, of which it uses 13% at best" in said
    )
    assert bound_by_compute(model("deepseek-v3"), H100, 4096) == ""
    assert bound_by_compute(model("llama-3-70b"), EPYC, 4096) == ""
    pure = model("qwen3-next-80b-a3b")
    pure = replace(pure, groups=tuple(group for group in pure.groups if group.state))
    assert bound_by_compute(pure, EPYC, 4096) == ""


def test_each_device_is_named_once() -> None:
    systems = [moved("deepseek-v3", EPYC), moved("deepseek-v3", EPYC, lanes=2), moved("deepseek-v3", H20)]
    said = compute_bound_devices([*systems, Colocated(model=model("deepseek-v3"), device=LARGE)], 4096)
    assert [sentence.split(" is ")[0] for sentence in said] == [
        "Attention of deepseek-v3 on epyc-genoa",
        "Attention of deepseek-v3 on h20",
    ]


def test_the_plan_says_that_latents_do_not_pay_on_a_cpu_and_why() -> None:
    whole = Colocated(model=model("deepseek-v3"), device=LARGE, tensor_parallel=8)
    systems = (whole, moved("deepseek-v3", EPYC))
    ranked = rank([Candidate(system, 1) for system in systems], STEADY, SLO)
    said = why(ranked, STEADY, SLO)
    assert any(sentence.startswith("Offloading attention does not pay here") for sentence in said)
    assert said[-1].startswith("Attention of deepseek-v3 on epyc-genoa is bound by compute: it takes 242 FLOPs a byte")
    spent = said[-2]
    assert spent.endswith("ms.")
    assert "on 8x large, without a wire, attention takes" in spent


def test_a_step_of_a_hybrid_is_told_apart() -> None:
    system, whole = (
        moved("qwen3-next-80b-a3b"),
        Colocated(model=model("qwen3-next-80b-a3b"), device=LARGE, tensor_parallel=8),
    )
    states = 10 * 2 * 80_805_888 / H20.bandwidth / 2
    wire = system.lane(Load(10, 2000)).exchange.seconds
    said = step_compared(system, whole, 10.2, 2000)
    assert said.startswith("For 10 sequences of 2000 tokens attention takes ")
    assert f"and states {states * 1000:.2g} ms a step on 2x h20 and the wire {wire * 1000:.2g} ms; on 8x" in said
    assert "states" not in step_compared(moved("glm-5"), replace(whole, model=model("glm-5")), 10, 2000)


@pytest.mark.parametrize(
    ("count", "said"), [(0, "0 B"), (999, "999 B"), (24_576, "24.6 KB"), (999_999, "1 MB"), (1.6e14, "160 TB")]
)
def test_bytes_in_words(count: float, said: str) -> None:
    assert in_bytes(count) == said


def test_kv_and_states_stand_apart() -> None:
    assert kept(model("qwen3-next-80b-a3b")) == (
        "24.6 KB of KV a token (12 layers); 162 MB of states a sequence (36 layers, 2 records of 80.8 MB)"
    )
    assert kept(model("deepseek-v3")) == "70.3 KB of KV a token (61 layers)"
    assert room(moved("qwen3-next-80b-a3b")) == "room for 2,698,650 tokens of KV and 658 sequences' states"
    assert room(moved("deepseek-v3")) == "room for 2,459,016 tokens of KV"


def test_a_plan_divides_memory_for_the_sequences_that_come() -> None:
    hybrid = model("kimi-linear-48b-a3b")
    found = candidates(hybrid, there_are((H100, 4), (H20, 2)), sequence_tokens=1234)
    kinds = {type(each.system).__name__ for each in found}
    assert kinds == {"Colocated", "Disaggregated", "Offloaded"}
    for each in found:
        system = each.system.decode if isinstance(each.system, Disaggregated) else each.system
        assert system.sequence_tokens == 1234
    engine = engine_keywords(found[0].system, 4096)
    assert engine["sequence_tokens"] == 1234
    capacity = found[0].system.capacity
    asked = capacity.tokens * hybrid.kv_bytes_per_token() + capacity.sequences * hybrid.state_bytes_held
    assert engine["kv_memory"] == int(asked)
    assert "sequence_tokens" not in engine_keywords(
        Colocated(model=model("llama-3-70b"), device=H100, tensor_parallel=4), 1
    )


CROWDED = Colocated(model=model("llama-3-70b"), device=with_efficiency(load()).device("h100"), tensor_parallel=4)
BUSY = at_rate(trace("azure-conv", 300, 0), 20.0)


def test_as_many_as_are_said_to_do_keep_the_slo_in_the_event_loop() -> None:
    (said,) = overloads([CROWDED], [simulate(CROWDED, BUSY, slo=SLO)], demand(BUSY), SLO)
    found = re.search(
        r"% within the SLO at 20 requests/s.* By formula (\d+) replicas .*, for \$([\d,.]+) an hour", said
    )
    assert found is not None
    count = int(found[1])
    assert float(found[2]) == pytest.approx(44.24 * count)
    assert simulate(CROWDED, BUSY, slo=SLO, replicas=count).slo_share >= 0.9


def test_nothing_is_said_where_more_are_no_answer() -> None:
    at_once = all_at_once(BUSY)
    result = simulate(CROWDED, at_once, slo=SLO)
    assert result.slo_share < 0.9
    assert overloads([CROWDED], [result], demand(at_once), SLO) == []
    assert overloads([CROWDED], [result], demand(BUSY), Slo()) == []


def test_no_number_does() -> None:
    assert would_do(CROWDED, demand(BUSY), Slo(tpot=0.001)).startswith("By formula no number of replicas keeps the SLO")
    assert f"not even {MOST} replicas keep the SLO" in would_do(CROWDED, demand(BUSY).at_rate(1e6), SLO)
