#!/usr/bin/env python3
"""vLLM with its KV on attention workers beside vLLM alone, on the same cores: milliseconds of a decode step, memory.

    scripts/bench/behind.py --python ENV/bin/python MODEL [--rows 8] [--tokens 1024] [--rounds 3] [--workers 1]

ENV has vLLM and Lamina (`python -c "help('lamina.behind')"` says how). Both take turns, each in a process of its own; a
step is the difference of two runs over the same prompts, whose KV vLLM's prefix cache keeps. Two ways to share two
cores are measured: both sides on both ("shared"), or a core for each ("apart").
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

STEPS, REPEATS = 32, 4


def child(model: str, rows: int, tokens: int, dtype: str) -> None:
    """In vLLM's environment: print a line of JSON."""
    del sys.path[0]  # this folder has modules whose names vLLM imports from elsewhere
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    llm = LLM(
        model, dtype=dtype, max_model_len=tokens + STEPS + 128, max_num_seqs=rows, block_size=128,
        max_num_batched_tokens=2048, enable_prefix_caching=True, skip_tokenizer_init=True,
    )  # fmt: skip
    draw = random.Random(0)
    prompts = [TokensPrompt(prompt_token_ids=[draw.randrange(100, 20000) for _ in range(tokens)]) for _ in range(rows)]

    def seconds(count: int) -> float:
        begin = time.perf_counter()
        sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
        llm.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - begin

    prompt = seconds(1)
    seconds(2)
    steps = [(-seconds(2) + seconds(2 + STEPS)) / STEPS * 1e3 for _ in range(REPEATS)]
    memory = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    print(json.dumps({"steps": steps, "prompt": prompt, "memory": int(memory.split()[1]) * 1024}))


def measured(options: argparse.Namespace, mode: str) -> dict[str, Any]:
    """A run of one of "alone", "shared", "apart"."""
    environment = {
        **os.environ, "VLLM_CPU_NUM_OF_RESERVED_CPU": "0", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "KMP_BLOCKTIME": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "0" if mode == "apart" else "0-1", "VLLM_CPU_KVCACHE_SPACE": str(options.gib),
    }  # fmt: skip
    workers = []
    try:
        if mode != "alone":
            workers = [worker(options, mode) for _ in range(options.workers)]
            environment["LAMINA_ATTENTION_WORKERS"] = ",".join(address for _, address in workers)
        command = [options.python, __file__, "--child", options.model, str(options.rows), str(options.tokens)]
        run = subprocess.run([*command, options.dtype], env=environment, capture_output=True, text=True, check=False)
        if run.returncode:
            sys.exit(f"{mode}: {run.stderr[-2000:]}")
        answer: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
        return answer
    finally:
        for process, _ in workers:
            process.kill()
            process.wait()


def worker(options: argparse.Namespace, mode: str) -> tuple[subprocess.Popen[str], str]:
    """An attention worker's process, and where it listens."""
    threads = "1" if mode == "apart" else "2"
    cores = ["taskset", "-c", "1"] if mode == "apart" else []
    memory = str((options.gib << 30) // options.workers)
    flags = ["--kv-memory", memory, "--threads", threads]
    process = subprocess.Popen(
        [*cores, sys.executable, "-m", "lamina_workers.attention_main", *flags],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env={**os.environ, "OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "passive"},
    )  # fmt: skip
    if process.stdout is None:
        raise RuntimeError("a worker without output")
    return process, process.stdout.readline().split()[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder that vLLM can load")
    parser.add_argument("--python", required=True, help="of an environment that has vLLM and Lamina")
    for name, default in (("rows", 8), ("tokens", 1024), ("rounds", 3), ("workers", 1), ("gib", 4)):
        parser.add_argument(f"--{name}", type=int, default=default, help="%(default)s")
    parser.add_argument("--dtype", default="bfloat16", help="of the model and its KV; %(default)s")
    options = parser.parse_args()
    modes = ("alone", "shared", "apart")
    runs: dict[str, list[dict[str, Any]]] = {mode: [] for mode in modes}
    for number in range(options.rounds):
        for mode in modes:
            runs[mode].append(measured(options, mode))
            steps = " ".join(f"{step:.1f}" for step in runs[mode][-1]["steps"])
            print(f"round {number + 1}, {mode}: steps of {steps} ms", file=sys.stderr)
    medians = {mode: statistics.median(step for run in runs[mode] for step in run["steps"]) for mode in modes}
    print(f"{options.rows} x {options.tokens} tokens, {options.dtype}, {options.workers} workers")
    for mode in modes:
        prompt, memory = (statistics.median(run[name] for run in runs[mode]) for name in ("prompt", "memory"))
        ratio = medians[mode] / medians["alone"]
        print(
            f"{mode:7} {medians[mode]:7.2f} ms a step ({ratio:.2f}), prompts {prompt:6.2f} s, {memory / 2**30:.2f} GiB"
        )


if __name__ == "__main__":
    child(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]) if sys.argv[1:2] == ["--child"] else main()
