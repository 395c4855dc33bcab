#!/usr/bin/env python3
"""The engines that decode.py measures, each as a process of its own: this file's child side, and the parent's `Child`.

A child reads requests, a JSON line each, and answers each with a JSON line. A peer's Python runs this file too, so
nothing of Lamina is imported before an engine of it is asked for. It measures any commit: where the Lamina that is
imported has no statistic of announcements yet, that figure is absent.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from cpu_time import children, cpu_seconds, go_first

Times = list[list[float]]  # of each prompt: when each of its tokens came
KV_MEMORY = 4 << 30  # bytes of an attention worker that is started here


class Request(NamedTuple):
    """`batch` prompts of `context` random tokens, `tokens` new ones each. Equal seeds give equal prompts."""

    batch: int
    context: int
    tokens: int
    seed: int


class Decoded(NamedTuple):
    """What happened between two batches while every sequence decoded, `steps` steps. Seconds: `cpu` of the engine's
    process, user and system, `workers_cpu` of its children, `plan` and `announce` of the engine's statistics (None
    where it has none)."""

    steps: float
    cpu: float
    workers_cpu: float
    plan: float | None
    announce: float | None


class Answer(NamedTuple):
    """When tokens came, in seconds from the beginning, and what was counted meanwhile, where the engine can."""

    times: Times
    decoded: Decoded | None = None


Run = Callable[[list[list[int]], int], Answer]  # prompts, and how many tokens each


class Options(NamedTuple):
    """Of the engines of one run. `keep`: the KV of prompts is kept, so a prompt that comes again only decodes. `lanes`
    0: as the engine chooses. `first`: its processes go before others of the machine. `query_first` as in a config."""

    attention_workers: int = 0
    shard: str = "heads"
    lanes: int = 1
    keep: bool = False
    first: bool = False
    query_first: str = "never"


# Lamina.


class Mark(NamedTuple):
    """The counters of an engine at one moment between two batches."""

    tokens: int
    cpu: float
    workers_cpu: float
    plan: float | None
    announce: float | None


def mark(snapshot: Any) -> Mark:
    """Counters now, on the engine's thread."""
    workers = sum(cpu_seconds(pid) for pid in children(os.getpid()))
    plan, announce = (getattr(snapshot, name, None) for name in ("plan_seconds", "announce_seconds"))
    return Mark(snapshot.generation_tokens, time.process_time(), workers, plan, announce)


def between(first: Mark, last: Mark, batch: int) -> Decoded | None:
    """What was counted from one mark to the other; None where no token came."""
    steps = (last.tokens - first.tokens) / batch
    if not steps:
        return None
    plan, announce = (
        None if a is None or b is None else b - a for a, b in ((first.plan, last.plan), (first.announce, last.announce))
    )
    return Decoded(steps, last.cpu - first.cpu, last.workers_cpu - first.workers_cpu, plan, announce)


def lamina(model: str, options: Options, **config: Any) -> Run:
    """Lamina, without attention workers unless `config` names some."""
    from lamina import LLM
    from lamina.config import EngineConfig

    if hasattr(EngineConfig, "query_first"):
        config["query_first"] = options.query_first
    llm = LLM(model, dtype="bfloat16", prefix_cache=options.keep, **config)

    def run(ids: list[list[int]], n: int) -> Answer:
        times: Times = [[] for _ in ids]
        marks: queue.SimpleQueue[Mark] = queue.SimpleQueue()
        engine: Any = llm._runtime.engine  # a benchmark may look inside
        begun = asked = 0
        for event in llm.stream(ids, max_tokens=n, ignore_eos=True, temperature=0):
            own = times[event.prompt_index]
            own.append(time.perf_counter())
            begun += len(own) == 1
            # Once when the last sequence has begun, once shortly before the first one ends.
            if (asked == 0 and begun == len(ids)) or (asked == 1 and len(own) == n - 4):
                engine.snapshot(lambda snapshot: marks.put(mark(snapshot)))
                asked += 1
        decoded = between(marks.get(timeout=10), marks.get(timeout=10), len(ids)) if asked == 2 else None
        return Answer(times, decoded)

    return run


def over(**config: Any) -> Callable[[str, Options], Run]:
    """Lamina with attention workers that it starts itself, and all KV there."""

    def make(model: str, options: Options) -> Run:
        return lamina(model, options, attention_workers=options.attention_workers, **split(options), **config)

    return make


def over_tls(model: str, options: Options) -> Run:
    """Lamina with attention workers over TCP with TLS, by a certificate authority that is made for the run."""
    from lamina_workers.process.credentials import make_credentials

    folder = Path(KEPT.enter_context(tempfile.TemporaryDirectory(prefix="bench-tls-")))
    make_credentials(folder, ["127.0.0.1"])
    secrets = ["--tls-dir", str(folder), "--token-file", str(folder / "token")]
    addresses = [start_worker(*secrets) for _ in range(options.attention_workers)]
    config = {"tls_dir": folder, "token_file": folder / "token", "local_channel": False, "data_channel": "tcp"}
    return lamina(model, options, attention_workers=addresses, **split(options), **config)


def split(options: Options) -> dict[str, Any]:
    """The settings of every engine with attention workers."""
    return {"local_share": 0, "lanes": options.lanes or "auto", "shard": options.shard}


def start_worker(*flags: str, command: Sequence[str] = ("-m", "lamina_workers.attention_main")) -> str:
    """The address of an attention worker that is started here, and ends with this process. `command`: what Python
    runs."""
    flags = ("--kv-memory", str(KV_MEMORY), "--threads", str(cores()), "--die-with-parent", *flags)
    process = subprocess.Popen(
        [sys.executable, *command, *flags],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    line = process.stdout.readline() if process.stdout else ""
    if not line.startswith("listening "):
        raise SystemExit(f"an attention worker ended with status {process.wait()}")
    KEPT.callback(process.terminate)
    return line.split()[1]


KEPT = ExitStack()  # what an engine needs until this process ends


# Peers.


def hf(model: str, options: Options) -> Run:
    """transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    net: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)

    @torch.no_grad()
    def run(ids: list[list[int]], n: int) -> Answer:
        out = net(torch.tensor(ids), use_cache=True, logits_to_keep=1)
        times = [time.perf_counter()]
        for _ in range(n - 1):
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            out = net(token, past_key_values=out.past_key_values, use_cache=True)
            times.append(time.perf_counter())
        return Answer([times] * len(ids))

    return run


def vllm(model: str, options: Options) -> Run:
    """vLLM's CPU backend, in one process."""
    sys.path[:] = [each for each in sys.path if each != str(Path(__file__).parent)]  # has a `kernels`, as PyPI has
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "3")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{cores() - 1}")
    os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM, SamplingParams

    llm = LLM(model, dtype="bfloat16", max_model_len=8192, max_num_seqs=16, enable_prefix_caching=options.keep)

    def run(ids: list[list[int]], n: int) -> Answer:
        params = SamplingParams(max_tokens=n, ignore_eos=True, temperature=0)
        times: Times = [[] for _ in ids]
        engine = llm.llm_engine
        for number, prompt in enumerate(ids):
            engine.add_request(str(number), {"prompt_token_ids": prompt}, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                if len(output.outputs[0].token_ids) > len(times[int(output.request_id.split("-")[0])]):
                    times[int(output.request_id.split("-")[0])].append(time.perf_counter())
        return Answer(times)

    return run


def llamacpp(model: str, options: Options) -> Run:
    """llama.cpp, at batch 1 alone and without sampling."""
    from llama_cpp import Llama

    threads = cores()
    llm = Llama(model, n_ctx=8192, n_threads=threads, n_threads_batch=threads, flash_attn=True, verbose=False)

    def run(ids: list[list[int]], n: int) -> Answer:
        times = []
        llm.reset()
        llm.eval(ids[0])
        times.append(time.perf_counter())
        for _ in range(n - 1):
            llm.eval([100])
            times.append(time.perf_counter())
        return Answer([times])

    return run


def bandwidth(_model: str, _options: Options) -> Run:
    """No engine: reads a GiB several times, once the threads of the engine before have stopped spinning."""
    import torch

    data = torch.ones(1 << 28)

    def run(_ids: list[list[int]], _n: int) -> Answer:
        time.sleep(0.5)
        times = [time.perf_counter()]
        for _ in range(9):
            data.sum()
            times.append(time.perf_counter())
        return Answer([times])

    return run


ENGINES: dict[str, Callable[[str, Options], Run]] = {
    "lamina": lamina,
    "local": over(),
    "tcp": over(local_channel=False, data_channel="tcp"),
    "grpc": over(local_channel=False),
    "tls": over_tls,
    "hf": hf,
    "vllm": vllm,
    "llamacpp": llamacpp,
    "bandwidth": bandwidth,
}


def cores() -> int:
    return len(os.sched_getaffinity(0))


def prompts(batch: int, context: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randint(10, 40000) for _ in range(context)] for _ in range(batch)]


class Child:
    """One engine in its own process. `tree`: the checkout whose Lamina it measures, None for the one that is there;
    `script`: what has the engine, and calls `main`."""

    def __init__(
        self,
        engine: str,
        python: str,
        model: str,
        options: Options,
        tree: str | None = None,
        log: str = os.devnull,
        script: str = __file__,
    ) -> None:
        environment = dict(os.environ)
        if tree is not None:
            rooms = (Path(tree, room) for room in ("", "workers", "kernels", "protocols"))
            environment["PYTHONPATH"] = os.pathsep.join(map(str, rooms))
        with open(log, "a") as errors:
            self._process = subprocess.Popen(
                [python, script, engine, "--model", model, "--options", json.dumps(options)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment,
                start_new_session=options.first,
            )  # fmt: skip
        self.pid = self._process.pid
        self._engine = engine
        self._answer()
        if options.first:
            go_first(self.pid)

    def run(self, request: Request) -> Answer:
        """Have the engine serve a request, and wait for the answer."""
        print(json.dumps(request), file=self._process.stdin, flush=True)
        times, decoded = json.loads(self._answer())
        return Answer(times, decoded and Decoded(*decoded))

    def _answer(self) -> str:
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            raise SystemExit(f"{self._engine} ended with status {self._process.wait()}")
        return line

    def close(self) -> None:
        """Let the engine end, and what it has started."""
        if self._process.stdin:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def main(argv: Sequence[str] | None = None) -> None:
    """The child: serve requests until stdin closes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("--model", required=True)
    parser.add_argument("--options", type=json.loads, default=Options(), help="a JSON list of the fields of Options")
    args = parser.parse_args(argv)
    answers, sys.stdout = sys.stdout, sys.stderr  # engines print
    with KEPT:
        run = ENGINES[args.engine](args.model, Options(*args.options))
        print("ready", file=answers, flush=True)
        for line in sys.stdin:
            request = Request(*json.loads(line))
            ids = prompts(request.batch, request.context, request.seed)
            start = time.perf_counter()
            answer = run(ids, request.tokens)
            times = [[at - start for at in own] for own in answer.times]
            print(json.dumps([times, answer.decoded]), file=answers, flush=True)


if __name__ == "__main__":
    main()
