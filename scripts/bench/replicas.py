#!/usr/bin/env python3
"""Decode throughput of one model worker beside that of two, as replicas in rotation and as ranks of a tensor parallel
model, over the same attention workers.

usage: scripts/bench/replicas.py [--sequences 16] [--tokens 512] [--new 160] [--rounds 3] [--attention-workers 1]

Whole engines with real processes, one after the other, in an order that changes from round to round. All KV is at the
attention workers. Printed: tokens a second from when the last sequence has begun (medians of rounds), of one model
worker in the same rounds, and how many lanes the engine chose.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from typing import Any

from lamina.system.machine import this_machine

KINDS: dict[str, dict[str, Any]] = {
    "one": {},
    "two replicas": {"model_workers": 2, "model_parallel": "replicas"},
    "two ranks": {"model_workers": 2, "model_parallel": "tensor"},
}


def measure(kind: dict[str, Any], prompts: list[list[int]], args: argparse.Namespace) -> tuple[float, int]:
    """Tokens a second, and lanes at the end."""
    import lamina

    options = {
        "attention_workers": args.attention_workers,
        "local_share": 0,
        "prefix_cache": False,
        "query_first": "never",
        **kind,
    }
    with lamina.LLM(args.model, kv_memory="1GiB", **options) as llm:
        begun: set[int] = set()
        since, tokens, now = 0.0, 0, 0.0
        for event in llm.stream(prompts, max_tokens=args.new, temperature=0, ignore_eos=True):
            now = time.perf_counter()
            if len(begun) == len(prompts):
                tokens += 1
            else:
                begun.add(event.prompt_index)
                since = now
        return tokens / (now - since), llm._runtime.engine._control.tuner.lanes  # type: ignore[union-attr]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--new", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--attention-workers", type=int, default=1)
    parser.add_argument("--model", default="smollm2-135m")
    args = parser.parse_args()
    rng = random.Random(0)
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in KINDS}
    for number in range(args.rounds):
        names = list(KINDS)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            prompts = [[rng.randint(10, 40000) for _ in range(args.tokens)] for _ in range(args.sequences)]
            found[name].append(measure(KINDS[name], prompts, args))
    machine = this_machine()
    print(
        f"{machine.processor}, {machine.cores} cores; {args.model}, {args.sequences} sequences of {args.tokens} tokens"
    )
    for name, rounds in found.items():
        speed = statistics.median(one[0] for one in rounds)
        ratio = statistics.median(one[0] / base[0] for one, base in zip(rounds, found["one"], strict=True))
        lanes = "/".join(str(one[1]) for one in rounds)
        print(f"{name:14} {speed:7.1f} tokens/s   {ratio:5.2f} of one   lanes {lanes}")


if __name__ == "__main__":
    main()
