#!/usr/bin/env python3
"""Decode ms/step at long contexts under several KV policies, in turns, through `LLM.generate`.

usage: scripts/bench/long_context.py [--policies full auto ...] [--rounds 5] [--tokens 48] [--text FILE] [BATCHxCONTEXT]

Every policy has an LLM in a process of its own, which first prefills the prompts: other pieces of one text each, so no
two share KV. Then rounds take turns: each generates greedily after the same prompts, whose KV the prefix cache has. A
step is the time between two tokens of a sequence while all decode, the median over sequences and rounds. Beside it
stands what the same requests' `Completion.stats` count: KV bytes read and pages held, of all, and the attention mass
missed by estimate; and what share of the tokens are those of the first policy, up to where the texts part.
RoPE is scaled (YaRN) where the context is longer than the model's.
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from lamina.system.machine import this_machine


def serve(policy: str, model: str, batch: int, context: int, text: str) -> None:
    """Child: prefill, then answer each line [tokens] with what every prompt's completion was like."""
    answers, sys.stdout = sys.stdout, sys.stderr
    from lamina import LLM
    from lamina.models.resolve import resolve
    from lamina.text.tokenizer import Tokenizer

    original = json.loads((resolve(model) / "config.json").read_text())["max_position_embeddings"]
    room = context + 1024
    scaling = {"rope_type": "yarn", "factor": room / original, "original_max_position_embeddings": original}
    memory = f"{2 + batch * context * 30_000 // 10**9}GB"
    llm = LLM(
        model, policy=policy, kv_memory=memory, max_model_len=room, rope_scaling=scaling if room > original else None
    )
    with llm:
        ids = Tokenizer(llm.model_path).encode(text)
        step = max(1, (len(ids) - context) // max(1, batch - 1))
        prompts = [ids[at * step : at * step + context] for at in range(batch)]
        begun = time.perf_counter()
        llm.generate(prompts, max_tokens=1)
        print(json.dumps(time.perf_counter() - begun), file=answers, flush=True)
        for line in sys.stdin:
            completions = llm.generate(prompts, max_tokens=json.loads(line), ignore_eos=True)
            told = [
                {
                    "step": (c.timing.total - c.timing.first_token) / (c.timing.tokens - 1),
                    "tokens": list(c.token_ids),
                    "stats": dict(c.stats),
                }
                for c in completions
            ]
            print(json.dumps(told), file=answers, flush=True)


class Child:
    """One policy's process."""

    def __init__(self, policy: str, args: argparse.Namespace, batch: int, context: int) -> None:
        command = [sys.executable, __file__, "--serve", policy, "--model", args.model, f"{batch}x{context}"]
        command += ["--text", str(args.text)] if args.text else []
        self.policy = policy
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.prefill: float = self._answer()

    def run(self, tokens: int) -> list[dict[str, Any]]:
        """What each prompt's completion was like."""
        print(json.dumps(tokens), file=self._process.stdin, flush=True)
        told: list[dict[str, Any]] = self._answer()
        return told

    def _answer(self) -> Any:
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            raise SystemExit(f"{self.policy} ended with status {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def same(a: list[int], b: list[int]) -> float:
    """How much of `a` is as `b`, up to the first difference."""
    equal = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
    return equal / len(a)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", nargs="?", default="4x32768", metavar="BATCHxCONTEXT")
    parser.add_argument("--policies", nargs="+", default=["full", "auto"])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--text", type=Path, help="a text file; without one, Python's own help topics")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    batch, context = map(int, args.shape.split("x"))
    if args.serve:
        text = args.text.read_text() if args.text else "\n\n".join(pydoc_data.topics.topics.values())
        serve(args.serve, args.model, batch, context, text)
        return
    machine = this_machine()
    print(f"{machine.processor}, {machine.cores} cores; {args.model}, {args.shape}")
    children = []
    for policy in args.policies:
        children.append(Child(policy, args, batch, context))
        print(f"{policy}: prefilled at {batch * context / children[-1].prefill:.0f} tokens/s", flush=True)
    steps: dict[str, list[float]] = {child.policy: [] for child in children}
    ratios: dict[str, list[float]] = {child.policy: [] for child in children}
    told: dict[str, list[dict[str, Any]]] = {}
    for number in range(args.rounds + 1):
        for child in children:
            told[child.policy] = child.run(args.tokens)
            if number:  # the first warms up
                steps[child.policy].append(statistics.median(own["step"] for own in told[child.policy]))
                ratios[child.policy].append(steps[child.policy][-1] / steps[children[0].policy][-1])
    first = told[children[0].policy]
    print(
        f"{'policy':>24} {'ms/step':>8} {'of ' + children[0].policy:>8} {'same text':>9}  kv_read kv_held missed worst"
    )
    for child in children:
        own = told[child.policy]
        agree = statistics.mean(same(a["tokens"], b["tokens"]) for a, b in zip(own, first, strict=True))
        stats = [
            statistics.mean(o["stats"].get(name, default) for o in own)
            for name, default in (("kv_read", 1), ("kv_held", 1), ("missed_mass", 0), ("missed_mass_worst", 0))
        ]
        print(
            f"{child.policy:>24} {statistics.median(steps[child.policy]) * 1e3:8.1f} "
            f"{statistics.median(ratios[child.policy]):8.2f} {agree:9.0%}  " + " ".join(f"{x:7.4f}" for x in stats)
        )
        child.close()


if __name__ == "__main__":
    main()
