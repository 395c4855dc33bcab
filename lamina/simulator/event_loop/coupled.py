"""Prompts on one instance and decode on another where requests come after others: both advance together, since the end
of a request on the one brings the next to the other."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from lamina.simulator.costs.systems import Disaggregated
from lamina.simulator.event_loop.instance import Instance
from lamina.simulator.event_loop.lives import Life, Totals
from lamina.simulator.traces.arrivals import Trace


def serve_sessions(
    system: Disaggregated,
    trace: Trace,
    prefix_cache: bool,
    before: Totals,
    after: Totals,
    report: Callable[[int], None],
) -> list[Life]:
    """The requests that were served; `before` counts the prefill instance, `after` the decode instance and the way of
    KV from the one to the other, one prompt after another. Prefixes are kept where prompts are computed: what was
    decoded elsewhere is computed again with the next prompt that has it."""
    finished: list[Life] = []
    begun: dict[int, Life] = {}
    free_at = 0.0

    def computed(number: int, life: Life) -> None:
        nonlocal free_at
        if trace.arrivals[number].output == 1:
            ended(number, life)
            return
        sent = system.transfer_bytes(life.arrival.prompt)
        start = max(life.last, free_at)
        free_at = start + sent / system.wire
        after.link_bytes += sent
        after.busy[2] += free_at - start
        begun[number] = life
        decode.offer(number, free_at + system.link.round_trip)

    def ended(number: int, life: Life) -> None:
        finished.append(life)
        prefill.follow(number, life)

    prompts = tuple(
        replace(a, output=1, shared=min(a.shared, 0 if a.after is None else trace.arrivals[a.after].prompt))
        for a in trace.arrivals
    )
    prefill = Instance(system.prefill, replace(trace, arrivals=prompts), True, prefix_cache, before, ended=computed)
    decode = Instance(system.decode, trace, False, False, after, begun, offered=True, ended=ended)
    while any(instance.next_at < math.inf for instance in (prefill, decode)):
        min((prefill, decode), key=lambda instance: instance.next_at).step()
        report(len(finished))
    prefill.finish()
    decode.finish()
    return finished
