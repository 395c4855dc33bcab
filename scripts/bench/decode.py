#!/usr/bin/env python3
"""Decode ms/step and prefill tokens/s of Lamina beside its peers, with the roofline, all in one run.

usage: scripts/bench/decode.py [--peer-python PYTHON] [--llama-python PYTHON --gguf FILE] [--rounds 3]
                               [--engines lamina,hf,vllm,llamacpp] [BATCHxCONTEXT ...]
       scripts/bench/decode.py --attention-workers 1 [8x2048 ...]

Every engine runs in a process of its own and waits while another one is measured; rounds take turns, so that a slow
minute of the machine meets all of them. Prompts are random token ids (none seen before: prefix caches are off),
sampling is greedy, end-of-text is ignored. A step is the median gap between two tokens of a sequence while all
sequences decode and none is in prefill; the prefill rate is the prompts' tokens over the time until all have their
first token. The roofline is (weight bytes + KV bytes read) over the read bandwidth that torch's sum reaches in the
same run; it counts bfloat16 for every engine, also where llama.cpp reads fewer bytes. `--peer-python` is a Python with
vLLM's CPU build, `--llama-python` one with llama-cpp-python, which runs a GGUF file, at batch 1 alone and without
sampling.

`--attention-workers N` measures Lamina in one process beside itself with N attention workers on this host, over each
channel, and prints what a layer of a decode step costs more.
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
from collections.abc import Callable
from itertools import pairwise
from typing import Any

STEPS = 32
WORKERS, LANES = "BENCH_ATTENTION_WORKERS", "BENCH_LANES"  # environment variables of the children
SHAPES = ["1x64", "8x512", "1x2048", "8x2048"]
Times = list[list[float]]  # of each prompt: when each of its tokens came
Run = Callable[[list[list[int]], int], Times]  # prompts, and how many tokens each


def prompts(batch: int, context: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randint(10, 40000) for _ in range(context)] for _ in range(batch)]


def lamina(model: str, **options: Any) -> Run:
    from lamina import LLM

    llm = LLM(model, dtype="bfloat16", prefix_cache=False, **options)

    def run(ids: list[list[int]], n: int) -> Times:
        times: Times = [[] for _ in ids]
        for event in llm.stream(ids, max_tokens=n, ignore_eos=True):
            times[event.prompt_index].append(time.perf_counter())
        return times

    return run


def over(**options: Any) -> Callable[[str], Run]:
    """Lamina with attention workers, whose number is in the environment."""
    return lambda model: lamina(
        model,
        attention_workers=int(os.environ[WORKERS]),
        local_share=0,
        lanes=int(os.environ.get(LANES) or 0) or "auto",
        **options,
    )


def hf(model: str) -> Run:
    import torch
    from transformers import AutoModelForCausalLM

    net: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)

    @torch.no_grad()
    def run(ids: list[list[int]], n: int) -> Times:
        out = net(torch.tensor(ids), use_cache=True, logits_to_keep=1)
        times = [time.perf_counter()]
        for _ in range(n - 1):
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            out = net(token, past_key_values=out.past_key_values, use_cache=True)
            times.append(time.perf_counter())
        return [times] * len(ids)

    return run


def vllm(model: str) -> Run:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "3")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{cores() - 1}")
    os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM, SamplingParams

    llm = LLM(model, dtype="bfloat16", max_model_len=8192, max_num_seqs=16, enable_prefix_caching=False)

    def run(ids: list[list[int]], n: int) -> Times:
        params = SamplingParams(max_tokens=n, ignore_eos=True, temperature=0)
        engine, times = llm.llm_engine, [[] for _ in ids]
        for number, prompt in enumerate(ids):
            engine.add_request(str(number), {"prompt_token_ids": prompt}, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                if len(output.outputs[0].token_ids) > len(times[int(output.request_id.split("-")[0])]):
                    times[int(output.request_id.split("-")[0])].append(time.perf_counter())
        return times

    return run


def llamacpp(model: str) -> Run:
    from llama_cpp import Llama

    threads = cores()
    llm = Llama(model, n_ctx=8192, n_threads=threads, n_threads_batch=threads, flash_attn=True, verbose=False)

    def run(ids: list[list[int]], n: int) -> Times:
        times = []
        llm.reset()
        llm.eval(ids[0])
        times.append(time.perf_counter())
        for _ in range(n - 1):
            llm.eval([100])
            times.append(time.perf_counter())
        return [times]

    return run


def bandwidth(_model: str) -> Run:
    """No engine: reads a GiB several times, once the threads of the engine before have stopped spinning."""
    import torch

    data = torch.ones(1 << 28)

    def run(_ids: list[list[int]], _n: int) -> Times:
        time.sleep(0.5)
        times = [time.perf_counter()]
        for _ in range(9):
            data.sum()
            times.append(time.perf_counter())
        return [times]

    return run


ENGINES: dict[str, Callable[[str], Run]] = {
    "lamina": lamina,
    "local": over(),
    "tcp": over(local_channel=False, data_channel="tcp"),
    "grpc": over(local_channel=False),
    "hf": hf,
    "vllm": vllm,
    "llamacpp": llamacpp,
    "bandwidth": bandwidth,
}


def cores() -> int:
    return len(os.sched_getaffinity(0))


def serve(engine: str, model: str) -> None:
    """Child: answer each line [batch, context, n, seed] with the seconds it took."""
    answers, sys.stdout = sys.stdout, sys.stderr  # engines print
    run = ENGINES[engine](model)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        batch, context, n, seed = json.loads(line)
        ids = prompts(batch, context, seed)
        start = time.perf_counter()
        times = run(ids, n)
        print(json.dumps([[at - start for at in own] for own in times]), file=answers, flush=True)


class Child:
    """One engine in its own process."""

    def __init__(self, engine: str, python: str, model: str) -> None:
        self._process = subprocess.Popen(
            [python, __file__, "--serve", engine, "--model", model],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._answer(engine)

    def run(self, batch: int, context: int, n: int, seed: int) -> Times:
        print(json.dumps([batch, context, n, seed]), file=self._process.stdin, flush=True)
        times: Times = json.loads(self._answer("the engine"))
        return times

    def _answer(self, who: str) -> str:
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            raise SystemExit(f"{who} ended with status {self._process.wait()}")
        return line

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def measure(children: dict[str, Child], batch: int, context: int, rounds: int) -> dict[str, tuple[float, float]]:
    """Per engine the medians of seconds until all have their first token, and of seconds a step; of bandwidth, of
    seconds a GiB."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in children}
    for number in range(rounds + 1):
        for name, child in children.items():
            if name == "llamacpp" and batch > 1:
                continue
            if number == 0:  # warms up
                child.run(batch, min(context, 64), STEPS, number)
                continue
            times = child.run(batch, context, tokens(batch, context), number)
            first = max(own[0] for own in times)
            taken[name].append((first, step(times) if name != "bandwidth" else statistics.median(gaps(times[0]))))
    return {
        name: (statistics.median(t[0] for t in own), statistics.median(t[1] for t in own))
        for name, own in taken.items()
        if own
    }


def gaps(times: list[float]) -> list[float]:
    return [b - a for a, b in pairwise(times)]


def tokens(batch: int, context: int) -> int:
    """So many that the first sequence still decodes when the last one's prompt is through, in chunks of 512."""
    return STEPS + (batch - 1) * (context // 512 + 1)


def step(times: Times) -> float:
    """The median gap while every sequence decodes."""
    begin, end = max(own[0] for own in times), min(own[-1] for own in times)
    together = [gap for own in times for gap in gaps([at for at in own if begin <= at <= end])]
    if len(together) < STEPS // 2:
        raise SystemExit(f"all sequences decoded together for {len(together)} tokens, too few to measure a step")
    return statistics.median(together)


def main() -> None:
    from lamina.system.machine import this_machine  # a peer's Python, which runs `serve`, may not have lamina

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", default=SHAPES, metavar="BATCHxCONTEXT")
    parser.add_argument("--engines", default=None, help="comma separated; default lamina,hf and with a peer vllm")
    parser.add_argument("--peer-python", default=None)
    parser.add_argument("--llama-python", default=None)
    parser.add_argument("--gguf", default=None, help="the file that llama.cpp runs")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--attention-workers", type=int, default=0)
    parser.add_argument("--serve", choices=ENGINES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.model)
        return

    from lamina.models.resolve import resolve

    folder = resolve(args.model)
    config = json.loads((folder / "config.json").read_text())
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    kv_bytes = config["num_hidden_layers"] * config["num_key_value_heads"] * head_dim * 2 * 2
    default = "lamina,hf,vllm" if args.peer_python else "lamina,hf"
    if args.attention_workers:
        default = "lamina,local,tcp,grpc"
        os.environ[WORKERS] = str(args.attention_workers)
    names = (args.engines or default).split(",")
    layers = config["num_hidden_layers"]
    machine = this_machine()
    print(f"{machine.processor}, {machine.cores} cores; {args.model} in bfloat16")
    print(f"{weights / 1e6:.0f} MB of weights, {kv_bytes} bytes of KV a token")
    if args.llama_python and "llamacpp" not in names:
        names.append("llamacpp")
    pythons = {"vllm": args.peer_python, "llamacpp": args.llama_python}
    models = {"llamacpp": args.gguf}
    children = {
        name: Child(name, pythons.get(name) or sys.executable, models.get(name) or str(folder)) for name in names
    }
    children["bandwidth"] = Child("bandwidth", sys.executable, str(folder))
    baseline = "vllm" if "vllm" in names else "hf" if "hf" in names else names[0]
    of = f"of {baseline}"
    header = ("shape", "engine", "ms/step", of, "roofline", "prefill tok/s", of, "+ms/layer")
    print("{:>8} {:>10} {:>9} {:>9} {:>9} {:>14} {:>9} {:>10}".format(*header))
    for shape in args.shapes:
        batch, context = map(int, shape.split("x"))
        results = measure(children, batch, context, args.rounds)
        speed = (1 << 30) / results.pop("bandwidth")[1]
        read = context + tokens(batch, context) / 2
        roofline = (weights + batch * read * kv_bytes) / speed
        for name, (one, step) in results.items():
            more = (step - results[baseline][1]) * 1e3 / layers
            print(
                f"{shape:>8} {name:>10} {step * 1e3:9.2f} {step / results[baseline][1]:9.2f} {roofline / step:9.0%} "
                f"{batch * context / one:14.0f} {results[baseline][0] / one:9.2f} {more:+10.3f}",
                flush=True,
            )
        print(f"{'':>8} {'roofline':>10} {roofline * 1e3:9.2f} {'':8} {speed / 1e9:5.1f} GB/s", flush=True)
    for child in children.values():
        child.close()


if __name__ == "__main__":
    main()
