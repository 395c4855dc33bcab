#!/usr/bin/env python3
"""vLLM or transformers with its KV on attention workers beside it alone, on the same cores: a decode step, memory.

    scripts/bench/behind.py --python ENV/bin/python MODEL [--rows 8] [--tokens 1024] [--rounds 3] [--workers 1]

ENV has the engine and Lamina (docs/behind.md). `--modes` take turns, each in a process of its own: the engine `alone`;
`quarter`, vLLM alone with memory for a quarter of the tokens; and with workers, where both sides are on both cores
(`shared`) or each has its own (`apart`). `tls` and `auto` are `shared`, with a link that is encrypted or a policy that
chooses what is read. A step is the difference of two runs over the same prompts, whose KV stays; `--whole` measures a
run with new prompts, from their first token to the last answer. Prompts are drawn token ids, or parts of `--text`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Seconds = Callable[[int, int], float]
STEPS, REPEATS, BLOCK = 32, 4, 128
MODES = ("alone", "quarter", "shared", "apart", "tls", "auto")


@dataclass(frozen=True)
class Case:
    """What one process measures."""

    engine: str
    mode: str
    model: str
    rows: int
    tokens: int
    dtype: str
    whole: int
    text: str

    def prompts(self, seed: int) -> list[list[int]]:
        if not self.text:
            draw = random.Random(seed)
            return [[draw.randrange(100, 20000) for _ in range(self.tokens)] for _ in range(self.rows)]
        from tokenizers import Tokenizer

        ids = Tokenizer.from_file(f"{self.model}/tokenizer.json").encode(Path(self.text).read_text()).ids
        places = [(seed * self.rows + row) * self.tokens for row in range(self.rows)]
        if places[-1] + self.tokens > len(ids):
            raise SystemExit(f"{self.text} has {len(ids)} tokens, {places[-1] + self.tokens} are needed")
        return [ids[place : place + self.tokens] for place in places]


def child(case: Case) -> None:
    """In the engine's environment: print a line of JSON."""
    del sys.path[0]  # this folder has modules whose names vLLM imports from elsewhere
    seconds = vllm_run(case) if case.engine == "vllm" else transformers_run(case)
    prompt = seconds(1, 0)
    steps: list[float] = []
    if case.mode != "quarter":  # there is no KV that stays
        seconds(2, 0)
        steps = [(-seconds(2, 0) + seconds(2 + STEPS, 0)) / STEPS * 1e3 for _ in range(REPEATS)]
    rate = case.rows * case.whole / seconds(case.whole, 1) if case.whole else 0.0
    memory = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    print(json.dumps({"steps": steps, "prompt": prompt, "rate": rate, "memory": int(memory.split()[1]) * 1024}))


def vllm_run(case: Case) -> Seconds:
    """The seconds in which vLLM says so many tokens after the prompts of a seed."""
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    longest = case.tokens + max(STEPS, case.whole) + BLOCK
    quarter = case.rows * (case.tokens + case.whole) // BLOCK // 4 if case.mode == "quarter" else None
    llm = LLM(
        case.model, dtype=case.dtype, max_model_len=longest, max_num_seqs=case.rows, block_size=BLOCK,
        max_num_batched_tokens=2048, enable_prefix_caching=True, skip_tokenizer_init=True,
        num_gpu_blocks_override=quarter,
    )  # fmt: skip

    def seconds(count: int, seed: int) -> float:
        prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt in case.prompts(seed)]
        begin = time.perf_counter()
        sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
        llm.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - begin

    return seconds


def transformers_run(case: Case) -> Seconds:
    """The same of transformers, whose cache is cut back to the prompts where they are those of the last call."""
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    from lamina.behind.transformers_cache import LaminaCache, register

    register()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    implementation = "sdpa" if case.mode == "alone" else "lamina"
    network = AutoModelForCausalLM.from_pretrained(
        case.model, dtype=getattr(torch, case.dtype), attn_implementation=implementation
    )
    policy = os.environ.get("LAMINA_BEHIND_POLICY", "full")
    workers = os.environ.get("LAMINA_ATTENTION_WORKERS", "").split(",")
    cache: Any = DynamicCache(config=network.config) if case.mode == "alone" else None
    present, logits = -1, torch.empty(0)

    @torch.inference_mode()
    def seconds(count: int, seed: int) -> float:
        nonlocal cache, present, logits
        begin = time.perf_counter()
        if seed != present:
            cache = cache or LaminaCache(network.config, workers=workers, policy=policy)
            for chunk in torch.tensor(case.prompts(seed)).split(2048, 1):
                logits = network(chunk, cache=cache, logits_to_keep=1).logits
            present = seed
        token = logits.argmax(-1)
        for _ in range(count - 1):
            token = network(token, cache=cache).logits.argmax(-1)
        end = time.perf_counter()
        if count > 1:
            cache.crop(1 - count)
        return end - begin

    return seconds


def measured(options: argparse.Namespace, mode: str, folder: Path) -> dict[str, Any]:
    """A run of one mode. `folder` is an empty one for certificates."""
    environment = {
        **os.environ, "VLLM_CPU_NUM_OF_RESERVED_CPU": "0", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "KMP_BLOCKTIME": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "0" if mode == "apart" else "0-1", "VLLM_CPU_KVCACHE_SPACE": str(options.gib),
    }  # fmt: skip
    if mode == "auto":
        environment["LAMINA_BEHIND_POLICY"] = "auto"
    if mode == "tls":
        environment |= {"LAMINA_BEHIND_TLS_DIR": str(folder), "LAMINA_BEHIND_TOKEN_FILE": str(folder / "token")}
    workers = []
    try:
        if mode not in ("alone", "quarter"):
            workers = [worker(options, mode, folder) for _ in range(options.workers)]
            environment["LAMINA_ATTENTION_WORKERS"] = ",".join(address for _, address in workers)
        fields = {
            field.name: getattr(options, field.name) for field in dataclasses.fields(Case) if field.name != "mode"
        }
        command = [options.python, __file__, "--child", json.dumps(fields | {"mode": mode})]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if run.returncode:
            sys.exit(f"{mode}: {run.stderr[-2000:]}")
        answer: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
        return answer
    finally:
        for process, _ in workers:
            process.kill()
            process.wait()


def worker(options: argparse.Namespace, mode: str, folder: Path) -> tuple[subprocess.Popen[str], str]:
    """An attention worker's process, and where it listens."""
    threads = "1" if mode == "apart" else "2"
    cores = ["taskset", "-c", "1"] if mode == "apart" else []
    memory = str((options.gib << 30) // options.workers)
    flags = ["--kv-memory", memory, "--threads", threads]
    if mode == "tls":
        flags += ["--tls-dir", str(folder), "--token-file", str(folder / "token")]
    process = subprocess.Popen(
        [*cores, sys.executable, "-m", "lamina_workers.attention_main", *flags],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env={**os.environ, "OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "passive"},
    )  # fmt: skip
    if process.stdout is None:
        raise RuntimeError("a worker without output")
    return process, process.stdout.readline().split()[1]


def main() -> None:
    from lamina_workers.process.credentials import make_credentials  # not in vLLM's process

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder that vLLM can load")
    parser.add_argument("--engine", default="vllm", choices=["vllm", "transformers"], help="%(default)s")
    parser.add_argument("--python", default=sys.executable, help="of an environment that has the engine and Lamina")
    for name, default in (("rows", 8), ("tokens", 1024), ("rounds", 3), ("workers", 1), ("gib", 4)):
        parser.add_argument(f"--{name}", type=int, default=default, help="%(default)s")
    parser.add_argument("--dtype", default="bfloat16", help="of the model and its KV; %(default)s")
    parser.add_argument("--whole", type=int, default=0, help="tokens of each answer of the whole run; 0: none")
    parser.add_argument("--text", default="", help="a file, long enough for all prompts")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["alone", "shared", "apart"])
    options = parser.parse_args()
    runs: dict[str, list[dict[str, Any]]] = {mode: [] for mode in options.modes}
    for number in range(options.rounds):
        for mode in options.modes:
            with tempfile.TemporaryDirectory() as folder:
                make_credentials(folder, ["127.0.0.1"])
                runs[mode].append(measured(options, mode, Path(folder)))
            steps = " ".join(f"{step:.1f}" for step in runs[mode][-1]["steps"])
            print(f"round {number + 1}, {mode}: steps of {steps} ms", file=sys.stderr)
    print(f"{options.rows} x {options.tokens} tokens, {options.dtype}, {options.workers} workers")
    first = options.modes[0]
    for mode in options.modes:
        step, base = (
            statistics.median([step for run in runs[name] for step in run["steps"]] or [0]) for name in (mode, first)
        )
        prompt, rate, memory = (
            statistics.median(run[name] for run in runs[mode]) for name in ("prompt", "rate", "memory")
        )
        ratio = f"{step:7.2f} ms a step ({step / base:.2f} of {first}), " if step and base else ""
        rate_text = f", {rate:.1f} tokens/s of the whole run" if rate else ""
        print(f"{mode:7} {ratio}prompts {prompt:6.2f} s, {memory / 2**30:.2f} GiB{rate_text}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(Case(**json.loads(sys.argv[2])))
    else:
        main()
