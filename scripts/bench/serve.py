#!/usr/bin/env python3
"""What the server costs: its tokens/s beside the engine called directly and beside vLLM's server, and how long after
the engine's first token the client has its first byte.

    scripts/bench/serve.py                              the server against the engine, and first bytes
    scripts/bench/serve.py --peer-python PYTHON         vLLM's CPU server too, with the same client

Engine, server and vLLM take turns in each round; the client runs on the same cores. Medians and the spread are printed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import queue
import random
import re
import secrets
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from lamina.measure.bench.running import run_loop
from lamina.measure.bench.serve import Result, bench
from lamina.measure.bench.workloads import Settings
from lamina.system.machine import this_machine

MODEL = "smollm2-135m"
KV_MEMORY = "2GiB"
Contestant: TypeAlias = AbstractContextManager[Callable[[int], float]]
PATIENCE = 600.0  # seconds for a server to come up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=256, help="tokens of each prompt")
    parser.add_argument("--output", type=int, default=128, help="tokens of each answer")
    parser.add_argument("--peer-python", help="a Python with vLLM's CPU build")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="contestants whose names have one of the words")
    parser.add_argument("--skip-first-byte", action="store_true")
    parser.add_argument("--json", type=Path, help="where the numbers go")
    for hidden in ("--direct", "--client"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.direct:
        direct(args)
    elif args.client:
        print(json.dumps(run_loop(first_bytes(args.client, args.streams, args.prompt))))
    else:
        compare(args)


# The engine called directly, the server, and vLLM's, in turns.


def compare(args: argparse.Namespace) -> None:
    machine = this_machine()
    print(f"{machine.processor}, {machine.cores} cores; {MODEL}, {args.streams} x {args.prompt} + {args.output} tokens")
    rates: dict[str, list[float]] = {}
    makers: dict[str, Callable[[], Contestant]] = {
        "engine, generate": lambda: engine_child(args, "generate"),
        "engine, stream": lambda: engine_child(args, "stream"),
        "server, completions": lambda: server(args, "completions"),
        "server, chat": lambda: server(args, "chat"),
    }
    if args.peer_python:
        makers["vLLM, chat"] = lambda: vllm(args)
    with ExitStack() as stack:
        contestants = {
            name: stack.enter_context(make())
            for name, make in makers.items()
            if not args.only or any(word in name for word in args.only)
        }
        for number in range(args.rounds + 1):
            for name, measure in contestants.items():
                rate = measure(number)
                if number:  # the first round warms all up
                    rates.setdefault(name, []).append(rate)
                print(f"  round {number}  {name:20} {rate:7.1f} tokens/s", flush=True)
    print(f"\n{'':20} {'median':>8} {'least':>8} {'most':>8}   tokens/s")
    for name, measured in rates.items():
        print(f"{name:20} {statistics.median(measured):8.1f} {min(measured):8.1f} {max(measured):8.1f}")
    for name, over, asked in (
        ("server, completions", "engine, generate", 0.9),
        ("server, completions", "engine, stream", 0.9),
        ("server, chat", "vLLM, chat", 1.15),
    ):
        if over in rates and name in rates:
            ratio = statistics.median(a / b for a, b in zip(rates[name], rates[over], strict=True))
            print(f"{name} / {over}: {ratio:.3f} (median of rounds; asked: {asked})")
    late = {} if args.skip_first_byte else measure_first_bytes(args)
    if args.json:
        args.json.write_text(json.dumps({"machine": machine.processor, "rates": rates, "first_byte_ms": late}) + "\n")


@contextmanager
def engine_child(args: argparse.Namespace, how: str) -> Iterator[Callable[[int], float]]:
    """The engine in a process of its own, as it would be without a server."""
    command = [sys.executable, __file__, "--direct", how, *_shape(args)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def measure(number: int) -> float:
            if process.stdin is None or process.stdout is None:
                raise RuntimeError("the engine's process has no pipes")
            process.stdin.write(f"{number}\n")
            process.stdin.flush()
            return float(process.stdout.readline())

        try:
            yield measure
        finally:
            process.kill()


def direct(args: argparse.Namespace) -> None:
    """Read a round's number, print its tokens/s."""
    from lamina import LLM, SamplingParams

    with LLM(MODEL, kv_memory=KV_MEMORY) as llm:
        params = SamplingParams(max_tokens=args.output, ignore_eos=True, temperature=0)
        for line in sys.stdin:
            prompts = [token_ids(args.prompt, (args.direct, line, at)) for at in range(args.streams)]
            start = time.perf_counter()
            if args.direct == "stream":
                tokens = sum(1 for _ in llm.stream(prompts, params))
            else:
                tokens = sum(len(each.token_ids) for each in llm.generate(prompts, params))  # type: ignore[union-attr]
            print(tokens / (time.perf_counter() - start), flush=True)


def token_ids(count: int, seed: object) -> list[int]:
    rng = random.Random(repr(seed))
    return [rng.randrange(100, 40000) for _ in range(count)]


def _shape(args: argparse.Namespace) -> list[str]:
    return ["--streams", str(args.streams), "--prompt", str(args.prompt), "--output", str(args.output)]


@contextmanager
def server(args: argparse.Namespace, endpoint: str) -> Iterator[Callable[[int], float]]:
    command = [sys.executable, "-m", "lamina", "serve", MODEL, "--port", "0", "--kv-memory", KV_MEMORY]
    with _process(command, r"serving \S+ at (http://\S+)") as url:
        yield lambda number: rate(args, url, endpoint)


@contextmanager
def vllm(args: argparse.Namespace) -> Iterator[Callable[[int], float]]:
    """vLLM's CPU server on both cores, as many sequences at once as there are streams."""
    sys.path.append(str(Path(__file__).parents[1]))  # behind this folder and what is installed
    from model_export import export

    from lamina.models.resolve import resolve

    port = _free_port()
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": "0-1",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    with tempfile.TemporaryDirectory(prefix="bench-serve-") as room:
        model = export(resolve(MODEL), Path(room, "model"))  # vLLM reads no GGUF
        command = [
            args.peer_python,
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            str(model),
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--dtype",
            "bfloat16",
            "--max-model-len",
            "2048",
            "--max-num-seqs",
            str(args.streams),
            "--served-model-name",
            MODEL,
        ]
        with _process(command, "", environment):
            url = f"http://127.0.0.1:{port}"
            _until_healthy(url)
            yield lambda number: rate(args, url, "chat")


def rate(args: argparse.Namespace, url: str, endpoint: str) -> float:
    """Output tokens a second of one round: all requests at once, with prompts that were never seen."""
    settings = Settings(
        base_url=url,
        endpoint=endpoint,
        num_prompts=args.streams,
        max_concurrency=args.streams,
        input_len=args.prompt,
        output_len=args.output,
        ignore_eos=True,
        num_warmups=1,
        tokenizer=MODEL,
    )
    result: Result = run_loop(bench(settings))
    if result.summary.failures or result.summary.answers_shorter_than_asked:
        raise RuntimeError(f"{url}: {result.details}, {result.summary.answers_shorter_than_asked} answers too short")
    return result.summary.output_throughput


@contextmanager
def _process(command: Sequence[str], ready: str, environment: dict[str, str] | None = None) -> Iterator[str]:
    """A server, once its output matches `ready`; the match's first group."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | (environment or {}))
        try:
            deadline = time.monotonic() + PATIENCE
            while not (match := re.search(ready, _text(log))):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{command[0]} did not start: {_text(log)[-3000:]}")
                time.sleep(0.2)
            yield match[1] if match.groups() else match[0]
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def _text(log: Any) -> str:
    log.seek(0)
    return str(log.read())


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
    return port


def _until_healthy(url: str) -> None:
    import urllib.request

    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError(f"{url} is not healthy")


# How long the first byte takes from the engine to the client. This process is supervisor and engine, so that it sees
# both clocks, which on one host are one; the HTTP process is the real one, the client a third.


def measure_first_bytes(args: argparse.Namespace) -> dict[str, list[float]]:
    from lamina.config import EngineConfig
    from lamina.launch.builder import start
    from lamina.server.processes.child_protocol import FROM_CHILD, TO_HTTP, Connected, EngineReady, StartHttp
    from lamina.server.processes.engine_link import EngineListener
    from lamina.system.child_process import ChildProcess, end_all

    runtime = start(MODEL, EngineConfig(kv_memory=KV_MEMORY))
    recorder = Recorder(runtime.engine)
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0), backlog=100) as sock:
        path, secret = f"{folder}/engine.sock", secrets.token_hex(32)
        EngineListener(path, bytes.fromhex(secret), recorder, time.monotonic)
        said: queue.SimpleQueue[Any] = queue.SimpleQueue()
        command = [sys.executable, "-m", "lamina.server.processes.http_main"]
        child = ChildProcess(
            "http", command, lambda _, text: said.put(FROM_CHILD.parse(text)), said.put, pass_fds=[sock.fileno()]
        )
        facts = {
            "socket": path,
            "folder": str(runtime.model_path),
            "context": runtime.limits.max_model_len,
            "possible": runtime.possible,
            "vocab_size": runtime.model.vocab_size,
            "restarts": 0,
        }
        child.say(TO_HTTP.line(StartHttp({"model": MODEL}, sock.fileno(), secret)))
        child.say(TO_HTTP.line(EngineReady(MODEL, facts)))
        while said.get(timeout=PATIENCE) != Connected(MODEL):
            pass
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        for streams in dict.fromkeys((1, args.streams)):
            client = [
                sys.executable,
                __file__,
                "--client",
                url,
                "--streams",
                str(streams),
                "--prompt",
                str(args.prompt),
            ]
            times = json.loads(subprocess.run(client, capture_output=True, text=True, check=True).stdout)
            late = sorted(1e3 * (at - recorder.first[tuple(ids)]) for ids, at in times)
            found[str(streams)] = late
            middle = statistics.median(late)
            print(
                f"first byte after the engine's first token, {streams} streams: median {middle:.2f} ms, "
                f"p95 {late[int(len(late) * 0.95)]:.2f}, most {late[-1]:.2f}, of {len(late)} (asked: p95 of 10 ms)"
            )
        end_all([child])
    runtime.stop()
    return found


class Recorder:
    """An engine that notes when each prompt's first token came."""

    def __init__(self, engine: Any) -> None:
        self.first: dict[tuple[int, ...], float] = {}
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def submit(self, ticket: Any) -> None:
        sink = ticket.sink

        def noting(ticket: Any, outputs: Any) -> None:
            self.first.setdefault(ticket.request.prompt, outputs[0].at)
            sink(ticket, outputs)

        ticket.sink = noting
        self._engine.submit(ticket)


async def first_bytes(url: str, streams: int, prompt: int) -> list[tuple[list[int], float]]:
    """Each prompt, and when the first byte of its answer's first chunk came, on this host's steady clock."""
    import aiohttp

    found: list[tuple[list[int], float]] = []

    async def one(session: aiohttp.ClientSession, ids: list[int], output: int) -> None:
        body = {"prompt": ids, "max_tokens": output, "stream": True, "ignore_eos": True}
        async with session.post(f"{url}/v1/completions", json=body) as response:
            await response.content.readany()
            found.append((ids, time.monotonic()))
            response.raise_for_status()
            async for _ in response.content.iter_any():
                pass

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        for number in range(40 if streams == 1 else 10):
            # Answers of unlike lengths, so that new requests begin while others stream.
            ids = [token_ids(prompt, (secrets.token_hex(8), number, at)) for at in range(streams)]
            await asyncio.gather(*(one(session, each, 8 + 4 * at) for at, each in enumerate(ids)))
    return found


if __name__ == "__main__":
    main()
