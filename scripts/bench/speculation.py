#!/usr/bin/env python3
"""Speculation beside none: tokens a second, whether the text is the same, and how much KV a token reads.

usage: scripts/bench/speculation.py [--model MODEL] [--draft MODEL] [--workers 0,2] [--prompts code_editing,json]
                                    [--ways none,ngram,draft] [--most 8] [--tokens 256] [--temperature 0]
                                    [--concurrent 1] [--json FILE]

The prompts are those of the folder `prompts` beside this file. Each way is an engine in a process of its own, without
prefix cache; for each prompt (or each group of `--concurrent` prompts) all of them answer in turn, another one first
each time. Printed are, for each kind of prompts and number of attention workers:
- tokens/s: all tokens after each answer's first, over the time that they took, and this over that of "none": of the
  sums, and the median over prompts;
- equal: answers whose tokens are those of "none"; with `--temperature`, samples have the same seeds;
- accepted: of the drafts, and tokens a step;
- KV read: bytes of KV that the holders read for each token, over those of "none". A step reads a sequence's KV once,
  however many drafts it verifies, so this counts the engine's steps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from json_child import JsonChild
from packed import table

PROMPTS = Path(__file__).with_name("prompts")
KINDS = ("code_editing", "json")
WAYS = ("none", "ngram", "draft")
COLUMNS = ("prompts", "workers", "way", "tokens/s", "of none", "median", "equal", "accepted", "tokens/step", "KV read")


class Answered(NamedTuple):
    """The answer to a group of prompts: `tokens` of each, `seconds` after the first token of the first of them,
    verified and accepted drafts, `steps` batches, and tokens of KV that these read."""

    tokens: list[list[int]]
    seconds: float
    drafts: int
    accepted: int
    steps: int
    read: float

    @property
    def counted(self) -> int:
        """The tokens that `seconds` were taken for."""
        return sum(len(own) - 1 for own in self.tokens)


class Way(JsonChild):
    """An engine in a process of its own."""

    def __init__(self, name: str, args: argparse.Namespace, workers: int) -> None:
        speculate = {"none": None, "ngram": "ngram", "draft": args.draft}[name]
        config = {"attention_workers": workers, "prefix_cache": False}
        if args.weights:
            config["weights"] = args.weights
        if workers:
            config["local_share"] = 0
        if speculate is not None:
            config |= {"speculate": speculate} | ({"num_speculative_tokens": args.most} if args.most else {})
        command = [sys.executable, __file__, "--serve", json.dumps([args.model, config])]
        super().__init__(name, command, args.log, first=args.first)
        self.name = name
        self.ready()

    def answer(self, prompts: Sequence[str], sampling: Mapping[str, Any]) -> Answered:
        """The answer to a group of prompts."""
        return Answered(*json.loads(self.ask([prompts, sampling])))


def serve(model: str, config: Mapping[str, Any]) -> None:
    """The child: answer groups of prompts until stdin closes."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # engines print
    from lamina import LLM

    with LLM(model, **config) as llm:
        print("ready", file=answers, flush=True)
        for line in sys.stdin:
            prompts, sampling = json.loads(line)
            messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
            done: Any = llm.chat(messages, **sampling)
            first = min(each.timing.first_token for each in done)
            drafts, accepted = (
                int(sum(each.stats.get(name, 0) for each in done)) for name in ("draft_tokens", "accepted_tokens")
            )
            steps, read = 0, 0.0
            for each in done:
                own = len(each.token_ids) - 1 - int(each.stats.get("accepted_tokens", 0))
                steps += own
                read += own * (each.usage.prompt_tokens + len(each.token_ids) / 2)
            tokens = [list(each.token_ids) for each in done]
            seconds = max(each.timing.total for each in done) - first
            print(json.dumps([tokens, seconds, drafts, accepted, steps, read]), file=answers, flush=True)


def read_prompts(kind: str) -> list[str]:
    """The prompts of a file, which lines of %% divide."""
    return [each.strip() for each in (PROMPTS / f"{kind}.txt").read_text().split("\n%%\n")]


def measure(ways: Sequence[Way], kind: str, args: argparse.Namespace) -> dict[str, list[Answered]]:
    """Each way's answers, in turns."""
    prompts = read_prompts(kind)[: args.count]
    groups = [prompts[at : at + args.concurrent] for at in range(0, len(prompts), args.concurrent)]
    found: dict[str, list[Answered]] = {way.name: [] for way in ways}
    for way in ways:
        way.answer(groups[0][:1], {"max_tokens": 32, "temperature": 0})  # warms up
    for number, group in enumerate(groups):
        sampling = {"max_tokens": args.tokens, "temperature": args.temperature, "seed": number}
        for turn in range(len(ways)):
            way = ways[(number + turn) % len(ways)]
            found[way.name].append(way.answer(group, sampling))
    return found


def rows(found: Mapping[str, Sequence[Answered]], kind: str, workers: int) -> Iterator[list[str]]:
    """The table's rows of one kind of prompts."""
    base = found.get("none")
    for name, own in found.items():
        counted, steps = sum(each.counted for each in own), sum(each.steps for each in own)
        drafts, accepted = sum(each.drafts for each in own), sum(each.accepted for each in own)
        cells = [kind, str(workers), name, f"{rate(own):.1f}"]
        if base:
            ratios = [rate([one]) / rate([other]) for one, other in zip(own, base, strict=True)]
            pairs = [
                pair
                for one, other in zip(own, base, strict=True)
                for pair in zip(one.tokens, other.tokens, strict=True)
            ]
            cells += [f"{rate(own) / rate(base):.2f}", f"{statistics.median(ratios):.2f}"]
            cells += [f"{sum(a == b for a, b in pairs)} of {len(pairs)}"]
        else:
            cells += ["-", "-", "-"]
        cells += [f"{accepted / drafts:.2f}" if drafts else "-", f"{counted / steps:.2f}"]
        read = sum(each.read for each in own) / counted
        yield [
            *cells,
            f"{read / (sum(each.read for each in base) / sum(e.counted for e in base)):.2f}" if base else "-",
        ]


def rate(answers: Sequence[Answered]) -> float:
    """Tokens a second."""
    return sum(each.counted for each in answers) / sum(each.seconds for each in answers)


def reading(answers: Sequence[Answered]) -> float:
    """Tokens of KV that are read for one token."""
    return sum(each.read for each in answers) / sum(each.counted for each in answers)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--model", default="qwen2.5-coder-1.5b")
    parser.add_argument("--draft", default="qwen2.5-coder-0.5b")
    parser.add_argument("--weights", help="as the engine chooses if not given")
    parser.add_argument("--workers", default="0,2", help="numbers of attention workers, comma separated")
    parser.add_argument("--prompts", default=",".join(KINDS))
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--count", type=int, default=20, help="prompts of each kind")
    parser.add_argument("--most", type=int, help="num_speculative_tokens; as the engine's default if not given")
    parser.add_argument("--tokens", type=int, default=256, help="the most of an answer")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--concurrent", type=int, default=1, help="prompts that are answered together")
    parser.add_argument("--first", action="store_true", help="go before other processes of this machine")
    parser.add_argument("--json", metavar="FILE", help="add all answers here")
    parser.add_argument("--log", default=os.devnull, metavar="FILE", help="for what the engines say")
    args = parser.parse_args()
    for name, allowed in (("prompts", KINDS), ("ways", WAYS)):
        setattr(args, name, getattr(args, name).split(","))
        if unknown := [each for each in getattr(args, name) if each not in allowed]:
            parser.error(f"--{name} names {', '.join(unknown)}; allowed are {', '.join(allowed)}")
    return args


def main() -> None:
    args = parse()
    if args.serve:
        serve(*json.loads(args.serve))
        return
    from lamina.system.machine import this_machine

    machine = this_machine()
    print(f"{machine.processor}, {machine.cores} cores, load {os.getloadavg()[0]:.1f}")
    print(
        f"{args.model}, draft {args.draft}, weights {args.weights or 'as chosen'}; {args.concurrent} at a time, "
        f"temperature {args.temperature}"
    )
    for workers in map(int, args.workers.split(",")):
        ways = [Way(name, args, workers) for name in args.ways]
        for kind in args.prompts:
            found = measure(ways, kind, args)
            print(table([COLUMNS, *rows(found, kind, workers)]) + "\n", flush=True)
            if args.json:
                with open(args.json, "a") as out:
                    for name, own in found.items():
                        told = {"prompts": kind, "workers": workers, "way": name}
                        out.writelines(json.dumps(told | one._asdict()) + "\n" for one in own)
        for way in ways:
            way.close()


if __name__ == "__main__":
    main()
