"""Results as a simulation would give them, made up for tests of reports: five systems on one trace."""

from __future__ import annotations

import math
import random

from lamina.simulator.event_loop.results import Distribution, RunResult, Sampled

SECONDS = 3540.0
_SYSTEMS = (
    # name, policy, $/h, watts, mean batch, tok/s, TTFT p50, TPOT p50, shares of model, attention, network
    ("vLLM 4x H100", "full", 44.24, 2200.0, 214.0, 4180.0, 0.41, 0.0512, 0.71, 0.29, 0.0),
    ("vLLM 4x H100, chunked prefill", "full", 44.24, 2260.0, 208.0, 4215.0, 0.62, 0.0493, 0.74, 0.26, 0.0),
    ("Prefill / decode, 2 + 2 H100", "full", 44.24, 2090.0, 131.0, 3920.0, 0.28, 0.0334, 0.62, 0.31, 0.04),
    ("Lamina DOP(2, 4), overlap, 2 lanes", "full", 40.64, 2310.0, 512.0, 5075.0, 0.47, 0.1009, 0.93, 0.64, 0.22),
    ("Lamina DOP(2, 8 EPYC), streaming", "streaming", 29.9, 0.0, 655.0, 4460.0, 12.9, 0.147, 0.55, 0.95, 0.31),
)


def run(place: int = 3, samples: int = 1500, **changes: object) -> RunResult:
    """One of five; `changes` are fields of RunResult."""
    system, policy, price, power, batch, rate, ttft, tpot, model, attention, network = _SYSTEMS[place]
    rng = random.Random(place)
    taken = []
    for n in range(samples):
        at = SECONDS * n / samples
        load = (1 - math.exp(-at / 240)) * (1 + 0.16 * math.sin(at / 310) + rng.gauss(0, 0.05))
        load *= min(1.0, (SECONDS - at) / 200)
        decode = max(int(batch * load), 1)
        taken.append(
            Sampled(
                at=at,
                seconds=tpot * (0.6 + 0.4 * load),
                decode=decode,
                prefill_tokens=rng.choice((0, 0, 0, 512)),
                running=decode + rng.randrange(3),
                waiting=max(0, int(40 * (load - 1) + rng.gauss(0, 2))),
                model_share=min(1.0, model * (0.8 + 0.2 * load)),
                attention_share=min(1.0, attention * load),
                network_share=min(1.0, network * load),
            )
        )
    fields: dict[str, object] = {
        "system": system,
        "model": "Llama-3-70B",
        "trace": "Azure-Conv",
        "policy": policy,
        "requests": 19366,
        "finished": 19366,
        "prompt_tokens": 22_361_870,
        "output_tokens": int(rate * SECONDS),
        "reused_tokens": 0,
        "preemptions": 12,
        "steps": 61_234,
        "seconds": SECONDS,
        "price": price,
        "power": power,
        "mean_batch": batch,
        "peak_batch": int(batch * 1.3),
        "ttft": Distribution(ttft * 1.3, ttft, ttft * 2.4, ttft * 5.1),
        "tpot": Distribution(tpot * 1.02, tpot, tpot * 1.25, tpot * 1.6),
        "tbt": Distribution(tpot, tpot * 0.97, tpot * 1.3, tpot * 2.2),
        "goodput": 5.4 * rate / 5075.0,
        "slo_share": 0.991 if place != 4 else 0.12,
        "model_utilisation": model,
        "attention_utilisation": attention,
        "network_utilisation": network,
        "link_bytes": 2.95e6 * rate * SECONDS if network else 0.0,
        "seed": 0,
        "assumptions": {
            "usable memory": "90 % of each device's holds weights and KV (assumed, as the baseline's default)",
            "efficiency": "bare roofline" if place != 3 else "0.82 of the bandwidth, fitted to one published cell",
        },
        "samples": tuple(taken),
    }
    return RunResult(**(fields | changes))  # type: ignore[arg-type]


def five() -> tuple[RunResult, ...]:
    return tuple(run(place) for place in range(len(_SYSTEMS)))


def candidates() -> list[tuple[str, float, float, bool]]:
    """Points of a Pareto plot: name, tokens a dollar, tok/s a user, feasible."""
    rng = random.Random(1)
    made = []
    for model in (1, 2, 3, 4):
        for attention in (1, 2, 4, 6, 8):
            for batch in (32, 64, 128, 256, 512, 1024):
                step = 0.02 + batch / (2300.0 * model) + batch / (9000.0 * attention) + 0.004 * rng.random()
                price = 11.06 * model + 4.63 * attention
                rate = batch / step
                made.append((f"DOP({model}, {attention}) batch {batch}", rate * 3600 / price, 1 / step, step <= 0.1))
    return made


def plan() -> dict[str, object]:
    best = max((point for point in candidates() if point[3]), key=lambda point: point[1])
    return {
        "chosen": best[0],
        "points": candidates(),
        "why": [
            "Most tokens a dollar of the 120 candidates that meet TPOT 100 ms.",
            "The model workers are the bottleneck: one more attention worker adds 1 %.",
        ],
        "ranked": [
            {"candidate": best[0], "$/h": 40.64, "M tok/$": best[1] / 1e6, "limit": "compute of the model workers"},
            {
                "candidate": "DOP(1, 2) batch 128",
                "$/h": 20.32,
                "M tok/$": 0.318,
                "limit": "bandwidth of the attention workers",
            },
        ],
        "what would change it": {
            "price of an H20": "above $6.90 an hour the co-located baseline is as cheap",
            "link": "below 12 GB/s the network is the bottleneck",
        },
    }
