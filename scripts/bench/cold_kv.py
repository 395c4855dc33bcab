#!/usr/bin/env python3
"""What holding less KV in memory costs: `kv_cold` on real decode, in one process.

usage: scripts/bench/cold_kv.py [--model smollm2-135m] [--policy auto] [--rounds 9] [--tokens 64] [DIR] [BATCHxCONTEXT]

Prints the step time with everything in memory, the tracker on beside off, in turns; then, as pages leave, the step time
and what is in memory: by Lamina's count and by the system's (Pss of the process, which includes mapped pages of the
file, and the file's cached pages). Last what it takes to come back: a step of which all pages that it reads have left,
and a prompt that reads everything.
"""

from __future__ import annotations

import argparse
import gc
import json
import pydoc_data.topics
import statistics
import time
from pathlib import Path
from typing import Any

from lamina import LLM
from lamina.models.resolve import resolve
from lamina.system.machine import this_machine
from lamina.text.tokenizer import Tokenizer
from lamina_workers.attention_worker import cold_pages
from lamina_workers.attention_worker.kv_pool import KVPool

NEVER = 1 << 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default="/var/tmp", metavar="DIR")
    parser.add_argument("shape", nargs="?", default="2x32768", metavar="BATCHxCONTEXT")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--policy", default="auto")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=48)
    args = parser.parse_args()
    batch, context = map(int, args.shape.split("x"))
    original = json.loads((resolve(args.model) / "config.json").read_text())["max_position_embeddings"]
    room = context + 4096
    scaling = {"rope_type": "yarn", "factor": room / original, "original_max_position_embeddings": original}
    memory = 2 * 10**9 + batch * context * 30_000
    idle, cold_pages.IDLE_BATCHES = cold_pages.IDLE_BATCHES, NEVER
    machine = this_machine()
    print(f"{machine.processor}, {machine.cores} cores; {args.model}, {args.shape}, {args.policy}", flush=True)
    with LLM(
        args.model,
        policy=args.policy,
        kv_memory=memory,
        kv_resident=memory,
        kv_cold=args.folder,
        max_model_len=room,
        rope_scaling=scaling if room > original else None,
    ) as llm:
        (pool,) = (x for x in gc.get_objects() if type(x) is KVPool)
        ids = Tokenizer(llm.model_path).encode("\n\n".join(pydoc_data.topics.topics.values()))
        step = max(1, (len(ids) - context) // max(1, batch - 1))
        prompts = [ids[at * step : at * step + context] for at in range(batch)]
        begun = time.perf_counter()
        llm.generate(prompts, max_tokens=1)
        print(f"prefilled in {time.perf_counter() - begun:.0f} s; Pss {pss():.0f} MB", flush=True)

        def decode(tokens: int = args.tokens) -> tuple[float, dict[str, float]]:
            """Milliseconds of a step, and what was counted of the first sequence."""
            found = llm.generate(prompts, max_tokens=tokens, ignore_eos=True)
            took = [(c.timing.total - c.timing.first_token) / (c.timing.tokens - 1) for c in found]
            return statistics.median(took) * 1e3, dict(found[0].stats)

        watching, times = pool._cold, {False: [], True: []}
        begin = pool._begin_cold
        for number in range(args.rounds + 1):
            for watched in (False, True):
                pool._begin_cold = begin if watched else lambda *_: None
                pool.reader.touch = watching.touch if watching and watched else None
                took, _ = decode()
                if number:
                    times[watched].append(took)
        off, on = (statistics.median(times[watched]) for watched in (False, True))
        ratio = statistics.median(b / a for a, b in zip(times[False], times[True], strict=True))
        print(f"everything in memory: {off:.1f} ms/step without the tracker, {on:.1f} with it: {ratio:.3f}", flush=True)
        cold_pages.IDLE_BATCHES = idle
        for _ in range(6):
            took, stats = decode(128)
            print(f"{took:6.1f} ms/step, kv_resident {stats.get('kv_resident', 1):.3f}; {memory_of(pool)}", flush=True)
        forget(pool)
        first, again = decode(2)[0], decode(2)[0]
        print(f"a step all of whose pages have left: {first:.1f} ms, the next time {again:.1f} ms")
        forget(pool)
        for what in ("all of which has left", "the next time"):
            begun = time.perf_counter()
            llm.generate([[*prompts[0], *ids[:64]]], max_tokens=1)
            print(f"64 tokens behind {context} tokens, {what}: {time.perf_counter() - begun:.2f} s")


def forget(pool: Any) -> None:
    """Let everything leave that was saved."""
    cold = pool._cold
    pages = (cold._valid() & cold._pages.in_memory).nonzero()[0]
    pages = pages[cold._file_chunks[cold._chunks(pages)]]
    for first, end in cold_pages._runs(pages):
        cold._file.drop(first * cold._size, end * cold._size)
    cold._pages.in_memory[pages] = False
    cold._dropped_at = cold._clock
    print(f"{len(pages) / max(1, (pool.store.references > 0).sum()):.2f} of the pages leave; {memory_of(pool)}")


def memory_of(pool: Any) -> str:
    held = int((pool.store.references > 0).sum()) * pool.pages.layout.page_bytes / 1e6
    cold = pool._cold
    here = int(cold._pages.in_memory.sum()) * pool.pages.layout.page_bytes / 1e6
    return (
        f"{here:.0f} MB of {held:.0f} MB of pages in memory by count, Pss {pss():.0f} MB, page cache {cached():.0f} MB"
    )


def pss() -> float:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1e3


def cached() -> float:
    """MB of the whole machine: files that are in memory, mapped or not."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Cached:")) / 1e3


if __name__ == "__main__":
    main()
