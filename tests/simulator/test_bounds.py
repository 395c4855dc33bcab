"""What dataclasses of the simulator refuse where they are made, by name: numbers out of bounds, and contradictions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
from planning import BIG, FHBN, H100, STEADY, dop, together

from lamina.errors import InvalidRequest
from lamina.simulator.costs.cost_model import KvPolicy, Load, Speculation
from lamina.simulator.costs.hardware import Link
from lamina.simulator.costs.model_configs import model
from lamina.simulator.costs.packing import packing
from lamina.simulator.costs.shapes import ChoiceShape, StateShape
from lamina.simulator.costs.systems import Disaggregated
from lamina.simulator.costs.uncertainty import Interval
from lamina.simulator.event_loop.failures import Failures
from lamina.simulator.event_loop.simulate import Slo
from lamina.simulator.traces.sessions import coding_agents

SMALL_WHOLE = replace(together(4), model=model("llama-3-8b"))


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Link("wire", math.nan, 0.0), "bandwidth is nan"),
        (lambda: Link("wire", math.inf, 0.0), "bandwidth is inf"),
        (lambda: Link("wire", -1.0, 0.0), "bandwidth is -1.0"),
        (lambda: Link("wire", True, 0.0), "bandwidth is True"),
        (lambda: Link("wire", "1", 0.0), "bandwidth is '1'"),  # type: ignore[arg-type]
        (lambda: replace(H100, price=-1.0), "price is -1.0"),
        (lambda: Load(-1, 10), "a batch is Load"),
        (lambda: Load(1, math.inf), "a batch is Load"),
        (lambda: Load(1, 10, 0, 5.0), "a batch is Load"),
        (lambda: KvPolicy("odd", read=0.0), "read of policy"),
        (lambda: KvPolicy("odd", held=1.5), "held of policy"),
        (lambda: KvPolicy("odd", window=0), "window of policy"),
        (lambda: KvPolicy("odd", read="a"), "read of policy 'odd' is 'a'"),  # type: ignore[arg-type]
        (lambda: replace(together(4), tensor_parallel=1.5), "tensor_parallel is 1.5"),
        (lambda: replace(together(4), tensor_parallel=True), "tensor_parallel is True"),
        (lambda: replace(together(4), kv_element=math.inf), "kv_element is inf"),
        (lambda: replace(together(4), memory_share=1.5), "memory_share is 1.5"),
        (lambda: dop(4, 1, workers=-5), "workers is -5"),
        (lambda: dop(4, 1, lanes=0), "lanes is 0"),
        (lambda: dop(4, 1, shard="rows"), "shard is 'rows'"),
        (lambda: dop(4, 1, local_share=1.1), "local_share is 1.1"),
        (lambda: dop(4, 1, attention_memory_share=0.0), "attention_memory_share is 0.0"),
        (lambda: dop(4, 1, local_share=0.5, model_replicas=2), "local_share is 0.5 with 2 replicas"),
        (lambda: Disaggregated(prefill=SMALL_WHOLE, decode=together(4), link=FHBN), "prefill has model 'llama-3-8b'"),
        (lambda: Speculation(-0.1), "acceptance is -0.1"),
        (lambda: Speculation(math.nan), "acceptance is nan"),
        (lambda: Speculation(0.5, 17), "17"),
        (lambda: Speculation(0.5, proposed=2), "proposed"),
        (lambda: Speculation(0.5, name="llama-3-8b"), "llama-3-8b"),
        (lambda: packing("q3_k"), "allowed"),
        (lambda: packing("nan"), "allowed"),
        (lambda: BIG.with_weights("iq2_xs"), r"float32, bfloat16, int4, int8, q4_0.*q6_k"),
        (lambda: StateShape("rwkv", 4, 8, 8, 4), "kind of a state is 'rwkv'"),
        (lambda: StateShape("kda", 0, 8, 8, 4), "heads of a state is 0"),
        (lambda: StateShape("kda", 4, 8, 8, 3), "3 key heads; they must divide its heads, 4"),
        (lambda: StateShape("kda", 4, 8, 8, 4, 65), "conv of a state is 65"),
        (lambda: ChoiceShape(0), "tokens of a choice is 0"),
        (lambda: Slo(tpot=-1), "tpot of the SLO is -1"),
        (lambda: STEADY.at_rate(0.0), "rate is"),
        (lambda: STEADY.at_rate(math.nan), "rate is"),
        (lambda: coding_agents(0), "count is 0; allowed is 1 to"),
        (lambda: coding_agents(True), "count is True"),
        (lambda: coding_agents(1 << 40), "count is 1099511627776"),
        (lambda: coding_agents(3, seed=-1), "seed is -1; allowed are whole numbers from 0 on"),
        (lambda: coding_agents(3, seed=1.5), "seed is 1.5"),  # type: ignore[arg-type]
        (lambda: Interval(2.0, 1.0, 3.0), "allowed is low <= value <= high"),
        (lambda: Interval(0.0, 1.0, 0.5), "allowed is low <= value <= high"),
        (lambda: Failures(0.0), "every of the failures is 0.0"),
        (lambda: Failures(5.0, restart=math.inf), "restart of the failures is inf"),
        (lambda: Failures(5.0, "raid"), "redundancy is 'raid'; allowed are none, replica, parity"),
    ],
)
def test_what_is_out_of_bounds_is_named(make: Callable[[], object], named: str) -> None:
    with pytest.raises(InvalidRequest, match=named):
        make()
