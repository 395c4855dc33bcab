"""What is said of systems: where moving attention and states pays, what models keep, and how many would keep an SLO."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from planning import FHBN, H20, H100, SLO, there_are

from lamina.simulator.costs.hardware import load
from lamina.simulator.costs.model_configs import model
from lamina.simulator.costs.systems import Colocated, Disaggregated, Offloaded
from lamina.simulator.event_loop.simulate import Slo, simulate
from lamina.simulator.planning.candidates import candidates
from lamina.simulator.planning.deployment import engine_keywords
from lamina.simulator.planning.reasons import MOST, overloads, would_do
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


CROWDED = Colocated(
    model=model("llama-3-70b"), device=load().device("h100").measured_or(load().engines["vllm"]), tensor_parallel=4
)
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
