"""`lamina plan --behind`: what workers behind another engine can be, what they cost, and which way is recommended."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from planning import BIG, EPYC, FHBN, H20, H100, KNOWN, dop, there_are

from lamina.errors import InvalidRequest
from lamina.simulator.costs.cost_model import KvPolicy, Load
from lamina.simulator.costs.model_configs import model
from lamina.simulator.costs.systems import Colocated, Offloaded
from lamina.simulator.event_loop.simulate import Slo
from lamina.simulator.planning.behind import Weighed, made, weigh
from lamina.simulator.planning.candidates import candidates
from lamina.simulator.planning.inventory import Inventory, with_efficiency
from lamina.simulator.planning.plan import PlanRequest
from lamina.simulator.steady_state.service import held
from lamina.simulator.traces.arrivals import Arrival, Trace

L4, ETHERNET = KNOWN.device("l4"), KNOWN.link("ethernet-10g")
LLAMA = model("llama-3-8b")
ANY = Slo()


def weighed(
    inventory: Inventory,
    prompt: int,
    slo: Slo = ANY,
    every: float = 60.0,
    name: str = "llama-3-8b",
    check: int = 0,
    output: int = 50,
) -> Weighed:
    arrivals = tuple(Arrival(every * number, prompt, output) for number in range(40))
    inventory = with_efficiency(inventory, KNOWN.engines["vllm"])
    request = PlanRequest(name, model(name), inventory, Trace("even", arrivals), slo)
    return weigh(request, "vllm", check=check)


def test_only_what_the_plugin_can_be_is_considered() -> None:
    policies = (KvPolicy(), KvPolicy("auto", read=0.3, held=0.5))
    inventory = there_are((H100, 8), (H20, 5), (EPYC, 2), policies=policies)
    systems = [each.system for each in candidates(BIG, inventory, made=lambda system: made(system, "vllm"))]
    alone = [system for system in systems if isinstance(system, Colocated)]
    split = [system for system in systems if isinstance(system, Offloaded)]
    assert len(alone) + len(split) == len(systems)
    assert all(system.chunked_prefill and system.policy == KvPolicy() for system in alone)
    assert {system.policy.name for system in split} == {"full", "auto"}
    assert all(system.behind and not system.overlap and system.policy.held == 1 for system in split)
    shapes = {(s.lanes, s.model_replicas, s.local_share, s.shard) for s in split}
    assert shapes == {(1, 1, 0.0, "heads")}
    counts = {(s.model_count, s.attention_count) for s in split if s.attention_device == H20}
    assert BIG.kv_heads == 8
    assert counts == {(ranks, machines) for ranks in (2, 4, 8) for machines in (1, 2, 4)}
    assert {s.attention_device.name for s in split} == {"h100", "h20", "epyc-genoa"}
    assert not [s for s in systems if s.devices[0][0].kind == "cpu"]


def test_prompts_are_attended_by_the_workers_and_decode_is_as_ever() -> None:
    here = dop(2, 2, overlap=False)
    behind = replace(here, behind=True)
    decode = Load(16, 2000)
    assert behind.step(decode) == here.step(decode)
    prompt = Load(16, 2000, 2048, 2048 * 1024.0, 2048)
    mine, theirs = behind.step(prompt), here.step(prompt)
    assert mine.model < theirs.model
    assert mine.attention > theirs.attention
    assert mine.seconds > theirs.seconds
    assert mine.link_bytes > theirs.link_bytes
    element, rows = BIG.activation, 16 + 2048
    needed = rows * (BIG.asked_elements + BIG.output_elements) * element + rows * BIG.kv_bytes_per_token(element)
    assert mine.link_bytes == pytest.approx(needed)


def test_a_prompt_alone_is_shared_among_the_workers() -> None:
    prompt = Load(0, 0, 2048, 2048 * 1024.0, 2048)
    one, two = (replace(dop(2, count), behind=True, overlap=False).step(prompt).attention for count in (1, 2))
    assert one == pytest.approx(BIG.attention_flops(1024) * 2048 / H20.flops)
    assert one == pytest.approx(2 * two)


def test_layers_with_a_window_keep_all_tokens() -> None:
    gemma = model("gemma-2-9b")
    windows = [group.window for group in gemma.groups]
    assert None in windows
    assert [window for window in windows if window is not None and window < 20_000]
    here = Offloaded(model=gemma, model_device=H100, attention_device=EPYC, link=FHBN)
    assert held(here, 20_000.0) < 20_000
    assert held(replace(here, behind=True), 20_000.0) == 20_000


def test_the_model_fits_its_contexts_do_not() -> None:
    found = weighed(there_are((L4, 1), (EPYC, 1), links=(ETHERNET,)), 60_000)
    assert found.take is found.workers
    assert found.elsewhere is None
    room, far = Colocated(model=LLAMA, device=L4).capacity.tokens, found.workers.figures["kv_tokens"]
    assert found.answer == (
        "Take the workers: the model fits 1x l4, its contexts do not. The longest request has 60,050 tokens, "
        f"beside the weights there is room for {room:,}, and the workers have room for {far:,}."
    )
    figures = found.alone.figures
    assert figures["requests"] == figures["tokens_per_second"] == 0
    assert math.isinf(figures["dollars_per_million"])
    mine = found.workers.figures
    assert mine["step"] == pytest.approx(mine["dense"] + mine["attention"] + mine["wire"])
    assert mine["wire"] > LLAMA.layers * ETHERNET.round_trip
    cost = mine["dollars_per_hour"] / (mine["tokens_per_second"] * 3600) * 1e6
    assert mine["dollars_per_million"] == pytest.approx(cost)


def test_the_engine_alone_is_enough() -> None:
    found = weighed(there_are((L4, 1), (EPYC, 1), links=(ETHERNET,)), 1000)
    assert found.take is found.alone
    assert found.answer.startswith("Take vLLM alone: it serves all, and the workers give 0.0")
    assert found.alone.gpus == "1x l4"
    assert found.alone.figures["wire"] == 0
    assert found.workers.figures["kv_tokens"] > found.alone.figures["kv_tokens"]


def test_more_gpus_may_do_what_one_cannot() -> None:
    found = weighed(there_are((L4, 2), (EPYC, 1), links=(ETHERNET,)), 60_000)
    assert found.elsewhere is not None
    assert found.take is found.elsewhere
    assert found.workers.name == "vLLM on 1x l4, KV on 1x l4"  # the cheapest worker that has the room
    assert found.answer.startswith("Take vLLM on 2x l4 alone: it serves all, and the workers give 1.00 times ")
    assert ", a tie within the error of such a comparison; " in found.answer
    assert found.answer.endswith("; 1x l4 have no room for the longest request.")


def test_no_request_is_in_time_with_workers() -> None:
    with pytest.raises(InvalidRequest, match="no system meets the SLO"):
        weighed(there_are((L4, 1), (EPYC, 1), links=(ETHERNET,)), 60_000, Slo(tpot=0.001))
    found = weighed(there_are((L4, 1), (EPYC, 1), links=(ETHERNET,)), 1000, Slo(tpot=0.058))
    assert found.answer == ("Take vLLM alone: it serves all, and with the workers no request is within the SLO.")


def test_workers_that_are_nearly_free_let_one_gpu_serve_more() -> None:
    host = replace(H20, name="host", kind="cpu", price=0.1)  # which has no weights
    inventory = there_are((L4, 1), (host, 1), links=(FHBN,))
    found = weighed(inventory, 5000, Slo(ttft=30.0), every=10.0, output=3000)
    assert found.take is found.workers
    assert found.alone.ranked.estimate.fits > 0
    assert not found.alone.ranked.serves
    assert "requests/s within the SLO, 1x l4 alone " in found.answer


def test_the_event_loop_agrees() -> None:
    found = weighed(there_are((L4, 1), (EPYC, 1), links=(ETHERNET,)), 60_000, every=600.0, check=3)
    assert found.workers.ranked.result is not None
    assert found.alone.ranked.result is None  # nothing of it can run
    assert found.answer.startswith("Take the workers: the model fits 1x l4, its contexts do not.")
    formula = weighed(there_are((L4, 1), (EPYC, 1), links=(ETHERNET,)), 60_000, every=600.0)
    for figure in ("tpot", "ttft"):
        assert found.workers.figures[figure] == pytest.approx(formula.workers.figures[figure], rel=0.15)


@pytest.mark.parametrize(
    ("name", "said"), [("deepseek-v2-lite", "has latents"), ("nemotron-h-8b", "has layers with states")]
)
def test_models_that_the_plugin_does_not_send_to_workers_are_refused(name: str, said: str) -> None:
    with pytest.raises(InvalidRequest, match=f"'{name}' {said}; allowed behind vllm are models with plain KV alone"):
        weighed(there_are((H100, 8), (H20, 8)), 1000, name=name)


def test_an_unknown_engine_is_refused_by_name() -> None:
    request = PlanRequest("llama-3-8b", LLAMA, there_are((H100, 1)), Trace("even", (Arrival(0.0, 10, 10),)), ANY)
    with pytest.raises(InvalidRequest, match="behind is 'foo'; allowed are vllm"):
        weigh(request, "foo", check=0)


def test_devices_that_cannot_be_workers_are_said() -> None:
    with pytest.raises(InvalidRequest, match="no devices here can be attention workers of 'llama-3-8b' behind vllm"):
        weighed(there_are((L4, 1), (EPYC, 1), links=()), 1000)
