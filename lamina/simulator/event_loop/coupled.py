"""Prompts on one instance and decode on another: the way of KV from the one to the other; and both together where
requests come after others, since the end of a request on the one brings the next to the other."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from lamina.simulator.costs.systems import Disaggregated
from lamina.simulator.event_loop.instance import Instance
from lamina.simulator.event_loop.lives import Life, Totals
from lamina.simulator.traces.arrivals import Trace


class Transfer:
    """The way of prompts' KV from the prefill instance to the decode instance, one prompt after another. Its bytes, and
    its seconds as those of the network, are counted in `totals`."""

    def __init__(self, system: Disaggregated, totals: Totals) -> None:
        self._system, self._totals = system, totals
        self._free_at = 0.0  # when the last prompt has left

    def arrival(self, prompt: int, ready: float) -> float:
        """The second at which the KV of a prompt of so many tokens is there. It is sent from second `ready` on."""
        sent = self._system.transfer_bytes(prompt)
        start = max(ready, self._free_at)
        self._free_at = start + sent / self._system.wire
        self._totals.link_bytes += sent
        self._totals.busy[2] += self._free_at - start
        return self._free_at + self._system.link.round_trip


def serve_sessions(
    system: Disaggregated,
    trace: Trace,
    prefix_cache: bool,
    before: Totals,
    after: Totals,
    report: Callable[[int], None],
) -> list[Life]:
    """The requests that were served; `before` counts the prefill instance, `after` the decode instance and the way
    there. Prefixes are kept where prompts are computed: what was decoded elsewhere is computed again with the next
    prompt that has it."""
    finished: list[Life] = []
    begun: dict[int, Life] = {}
    transfer = Transfer(system, after)

    def computed(number: int, life: Life) -> None:
        if trace.arrivals[number].output == 1:
            ended(number, life)
            return
        begun[number] = life
        decode.offer(number, transfer.arrival(life.arrival.prompt, life.last))

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
