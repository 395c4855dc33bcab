#!/usr/bin/env python3
"""Drafts by n-grams on a hybrid of real layer shapes, over texts that a real model says.

    python scripts/bench/hybrid_drafts.py [--speaker qwen2.5-coder-0.5b] [--count 3] [--tokens 256] [--workers 0]

The hybrid is that of `hybrid.py`, with random weights, which say nothing. So each token that it samples is replaced by
the speaker's, which has answered the prompts of the folder `prompts` before: the hybrid computes all that it would, and
drafts are accepted as they would be. Both engines answer in turns, another one first each time. Printed are tokens a
second behind an answer's first token, their ratio, and the accepted drafts.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import hybrid
from speculation import KINDS, read_prompts

from lamina.llm import LLM
from lamina.scheduling.control_plane import Step
from lamina.system.machine import this_machine


class Text(NamedTuple):
    """A prompt and its answer, as tokens of the hybrid's vocabulary."""

    kind: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...]


def spoken(args: argparse.Namespace) -> list[Text]:
    """What the speaker answers. Its tokens are numbered anew, since the hybrid's vocabulary is smaller."""
    numbers: dict[int, int] = {}

    def numbered(tokens: Sequence[int]) -> tuple[int, ...]:
        return tuple(numbers.setdefault(token, len(numbers)) for token in tokens)

    texts = []
    with LLM(args.speaker, speculate="ngram") as llm:
        for kind in KINDS:
            for prompt in read_prompts(kind)[: args.count]:
                answer: Any = llm.chat([{"role": "user", "content": prompt}], max_tokens=args.tokens, temperature=0)
                tokens = llm.tokenizer.encode(prompt)
                texts.append(Text(kind, numbered(tokens), numbered(answer.token_ids)))
    return texts


def force(texts: Sequence[Text]) -> None:
    """Have every engine of this process sample these answers."""
    answers, recorded = {text.prompt: text.answer for text in texts}, Step.recorded

    def forced(step: Step, tokens: Sequence[int | None]) -> Any:
        due = []
        for row in step.rows:
            prompt = row.sequence.request.prompt
            place = len(row.sequence.tokens) - len(prompt)
            due += answers[prompt][place : place + row.samples]
            due += [0] * max(0, place + row.samples - max(place, len(answers[prompt])))
        return recorded(step, due)

    Step.recorded = forced  # type: ignore[method-assign]  # for this process alone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speaker", default="qwen2.5-coder-0.5b")
    parser.add_argument("--count", type=int, default=3, help="prompts of each kind")
    parser.add_argument("--tokens", type=int, default=256, help="the most of an answer")
    parser.add_argument("--workers", type=int, default=0, help="attention workers")
    args = parser.parse_args()
    machine = this_machine()
    texts = spoken(args)
    force(texts)
    print(f"{machine.processor}, {machine.cores} cores; {args.workers} attention workers; answers of {args.speaker}")
    options: dict[str, Any] = {"prefix_cache": False, "kv_memory": 2 << 30, "max_model_len": 8192}
    options |= {"attention_workers": args.workers, "local_share": 0} if args.workers else {}
    with tempfile.TemporaryDirectory() as name:
        hybrid.make(Path(name), 32)
        with LLM(name, **options) as plain, LLM(name, speculate="ngram", **options) as drafting:
            ways = [plain, drafting]
            for kind in KINDS:
                rates: dict[LLM, list[float]] = {way: [] for way in ways}
                drafts = accepted = 0.0
                for text in [text for text in texts if text.kind == kind]:
                    ways.reverse()
                    for way in ways:
                        count = len(text.answer)
                        done: Any = way.generate(text.prompt, max_tokens=count, temperature=0, ignore_eos=True)
                        if done.token_ids != text.answer:
                            raise SystemExit(f"{kind}: another text")
                        rates[way].append((count - 1) / (done.timing.total - done.timing.first_token))
                        drafts += done.stats.get("draft_tokens", 0)
                        accepted += done.stats.get("accepted_tokens", 0)
                ratios = [b / a for a, b in zip(rates[plain], rates[drafting], strict=True)]
                speeds = " and ".join(f"{statistics.median(rates[way]):5.1f}" for way in (plain, drafting))
                print(f"{kind:12}  {speeds} tokens/s without and with drafts, ratio {statistics.median(ratios):.2f}")
                print(f"  ratios {min(ratios):.2f} to {max(ratios):.2f}, {accepted:.0f} of {drafts:.0f} accepted")


if __name__ == "__main__":
    main()
