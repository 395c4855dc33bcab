#!/usr/bin/env python3
"""A load that changes, served by a fleet that grows by whole instances and by one that grows by attention workers.

usage: scripts/simulate/elasticity.py [--count N] [--device NAME] [--rate SESSIONS] [--seed N]

Decode alone, of llama-3-8b. Start times are KernelFlume's (arXiv 2606.29207): 10.8 s an instance, 412 ms a worker.
"""

from __future__ import annotations

import argparse

from lamina.simulator.costs.hardware import Device, load, with_efficiency
from lamina.simulator.costs.models import model
from lamina.simulator.costs.systems import Colocated, Offloaded
from lamina.simulator.event_loop.elasticity import ElasticResult, Scaling, simulate_elastic
from lamina.simulator.traces.sessions import SESSIONS, coding_agents

INSTANCE_START, WORKER_START = 10.8, 0.412


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300, help="steps of the sessions")
    parser.add_argument("--device", default="h100")
    parser.add_argument("--rate", type=float, default=SESSIONS, help="sessions that begin in a second")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    catalogue = with_efficiency(load())
    device: Device = catalogue.device(args.device)
    shape, trace = model("llama-3-8b"), coding_agents(args.count, args.seed, args.rate)
    print(f"{shape.name} on {device.name}, typical efficiency, no SLO, decode alone; {trace.name}: {trace.remarks[0]}")
    print(f"grows at 0.8 of the KV; starts: instance {INSTANCE_START:g} s, attention worker {WORKER_START:g} s\n")
    link = catalogue.link("nccl-400g")
    instance = Colocated(model=shape, device=device)
    worker = Offloaded(
        model=shape, model_device=device, attention_device=device, link=link, lanes=2, shard="sequence"
    )  # fmt: skip
    rows = [
        ("instances", simulate_elastic(instance, trace, Scaling(INSTANCE_START))),
        ("attention workers", simulate_elastic(worker, trace, Scaling(WORKER_START))),
    ]
    print(f"{'grows by':18} {'$/M':>7} {'units, mean':>12} {'most':>5} {'TTFT p99, s':>12} {'TPOT p99, ms':>13}")
    for name, found in rows:
        print(line(name, found))
    change = rows[1][1].dollars_per_million / rows[0][1].dollars_per_million - 1
    print(f"\nattention workers cost {change:+.0%} a token")


def line(name: str, found: ElasticResult) -> str:
    return (
        f"{name:18} {found.dollars_per_million:7.2f} {found.mean_units:12.2f} {found.peak_units:5} "
        f"{found.ttft.p99:12.2f} {1e3 * found.tpot.p99:13.1f}"
    )


if __name__ == "__main__":
    main()
