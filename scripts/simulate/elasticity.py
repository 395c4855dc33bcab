#!/usr/bin/env python3
"""A load that changes, served by a fleet that grows by whole instances and by one that grows by attention workers.

usage: scripts/simulate/elasticity.py [--device NAME] [--low RATE] [--high RATE] [--context TOKENS] [--seconds N]

Decode alone, of llama-3-8b. Start times are KernelFlume's (arXiv 2606.29207): 10.8 s an instance, 412 ms a worker. The
default is a load that an A6000 with the weights and up to eight without serve.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np
from elastic_fleet import ElasticResult, Scaling, simulate_elastic

from lamina.simulator.costs.hardware import load, with_efficiency
from lamina.simulator.costs.model_configs import model
from lamina.simulator.costs.systems import Colocated, Offloaded
from lamina.simulator.traces.arrivals import Arrival, Trace

INSTANCE_START, WORKER_START = 10.8, 0.412
PERIOD, OUTPUT = 40.0, 100


def changing(low: float, high: float, context: int, seconds: float) -> Trace:
    """Requests that come by chance, `low` and `high` a second in turn, each for `PERIOD` seconds; always the same."""
    rng, at = np.random.default_rng(0), 0.0
    arrivals = []
    while at < seconds:
        at += float(rng.exponential(1 / (high if at // PERIOD % 2 else low)))
        arrivals.append(Arrival(at, context, OUTPUT))
    return Trace(f"{low:g} and {high:g} requests/s in turn", tuple(arrivals))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="a6000", help="of the catalogue; a6000 is only here")
    parser.add_argument("--low", type=float, default=1.5)
    parser.add_argument("--high", type=float, default=5.0)
    parser.add_argument("--context", type=int, default=40_000)
    parser.add_argument("--seconds", type=float, default=240.0)
    args = parser.parse_args()
    catalogue = with_efficiency(load())
    if args.device == "a6000":  # NVIDIA's data sheet; only ratios of its price matter
        near = catalogue.device("l40s")
        device = replace(near, name="a6000", memory=48e9, bandwidth=768e9, flops=155e12, price=0.8)
    else:
        device = catalogue.device(args.device)
    shape, trace = model("llama-3-8b"), changing(args.low, args.high, args.context, args.seconds)
    print(f"{shape.name} on {device.name}, typical efficiency, no SLO, decode alone, ${device.price:g}/h a device")
    print(f"{trace.name}, {args.context} + {OUTPUT} tokens; fleets grow at 0.8 of their KV; an instance starts in")
    print(f"{INSTANCE_START:g} s, an attention worker in {WORKER_START:g} s\n")
    instance = Colocated(model=shape, device=device)
    worker = Offloaded(
        model=shape,
        model_device=device,
        attention_device=device,
        link=catalogue.link("nccl-400g"),
        lanes=2,
        shard="sequence",
    )
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
