#!/usr/bin/env python3
"""vLLM's server with its KV on two attention workers, which are killed and started again under streams.

    scripts/bench/behind_kills.py --python ENV/bin/python MODEL [--kills 20] [--streams 8]

ENV has vLLM and Lamina (docs/behind.md). In each turn the streams begin; a worker, in turn, gets SIGKILL; once another
listens in its place, the next request is sent, and the seconds to its first token (TTFT) are those of the row. Turns
without a kill come in between: their TTFT is what the request's prefill takes beside the streams. All texts are
compared with those of the first turn, so `--dtype` is float32.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import IO

import httpx
from openai import OpenAI

BEGUN = 8  # tokens of each stream before a worker is killed


@dataclass(frozen=True)
class Turn:
    """The seconds to the next request's first token, and all texts: of the streams, then of that request."""

    ttft: float
    texts: tuple[str, ...]


class Server:
    """What the turns ask. `prompts`: of the streams, and of the next request, in token ids."""

    def __init__(self, client: OpenAI, prompts: list[list[int]], tokens: int) -> None:
        self.client, self.prompts, self.tokens = client, prompts, tokens
        self.pool = ThreadPoolExecutor(len(prompts))

    def streamed(self, prompt: list[int], begun: threading.Semaphore | None = None) -> tuple[float, str]:
        """The seconds to the first token of a stream, and its text."""
        begin, first, pieces = time.perf_counter(), 0.0, []
        for chunk in self.client.completions.create(
            model="model", prompt=prompt, max_tokens=self.tokens, temperature=0.0, stream=True,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        ):  # fmt: skip
            first = first or time.perf_counter() - begin
            pieces.append(chunk.choices[0].text)
            if begun is not None and len(pieces) == BEGUN:
                begun.release()
        return first, "".join(pieces)

    def turn(self, kill: Kill | None) -> Turn:
        begun = threading.Semaphore(0)
        *prompts, following = self.prompts
        streams = [self.pool.submit(self.streamed, prompt, begun) for prompt in prompts]
        for _ in prompts:
            if not begun.acquire(timeout=300.0):
                sys.exit("the streams do not begin within 300 s")
        if kill is not None:
            kill()
        ttft, text = self.streamed(following)
        return Turn(ttft, (*(stream.result()[1] for stream in streams), text))


@dataclass
class Kill:
    """Of one worker: it gets SIGKILL, and another listens in its place."""

    stack: ExitStack
    process: subprocess.Popen[str]
    address: str
    memory: int

    def __call__(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process, self.address = worker(self.stack, self.memory, self.address)


def worker(stack: ExitStack, memory: int, address: str = "127.0.0.1:0") -> tuple[subprocess.Popen[str], str]:
    """An attention worker's process, and where it listens."""
    process = subprocess.Popen(
        [sys.executable, "-m", "lamina_workers.attention_main", "--kv-memory", str(memory), "--threads", "1",
         "--listen", address],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"},
    )  # fmt: skip
    stack.callback(process.kill)
    if process.stdout is None:
        raise RuntimeError("a worker without output")
    return process, process.stdout.readline().split()[1]


@contextmanager
def serving(options: argparse.Namespace, workers: str, log: IO[str]) -> Iterator[str]:
    """The URL of vLLM's server."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        options.python, "-m", "vllm.entrypoints.openai.api_server", "--model", options.model, "--served-model-name",
        "model", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager",
        "--max-model-len", "1024", "--max-num-seqs", "16", "--block-size", "32", "--no-enable-prefix-caching",
    ]  # fmt: skip
    environment = {
        **os.environ, "LAMINA_ATTENTION_WORKERS": workers, "VLLM_CPU_KVCACHE_SPACE": "1", "KMP_BLOCKTIME": "0",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0", "VLLM_CPU_OMP_THREADS_BIND": "0",
    }  # fmt: skip
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 300.0
    try:
        while not healthy(url):
            if process.poll() is not None or time.monotonic() > deadline:
                log.seek(0)
                sys.exit(log.read()[-3000:])
            time.sleep(0.2)
        yield url
        print("vLLM has ended" if process.poll() is not None else "vLLM lives")
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5.0, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder that vLLM can load")
    parser.add_argument("--python", default=sys.executable, help="of an environment that has vLLM and Lamina")
    for name, default in (("kills", 20), ("streams", 8), ("tokens", 200), ("answer", 160), ("mib", 512)):
        parser.add_argument(f"--{name}", type=int, default=default, help="%(default)s")
    options = parser.parse_args()
    draw = random.Random(0)
    prompts = [[draw.randrange(3, 500) for _ in range(options.tokens)] for _ in range(options.streams + 1)]
    with ExitStack() as stack:
        log = stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8"))
        kills = [Kill(stack, *worker(stack, options.mib << 20), options.mib << 20) for _ in range(2)]
        url = stack.enter_context(serving(options, ",".join(kill.address for kill in kills), log))
        client = stack.enter_context(OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300.0))
        server = Server(client, prompts, options.answer)
        right = server.turn(None)
        turns: list[tuple[Turn, Turn]] = []
        for number in range(options.kills):
            turns.append((server.turn(None), server.turn(kills[number % 2])))
            calm, killed = turns[-1]
            print(f"{number + 1}: TTFT {calm.ttft:.2f} s, {killed.ttft:.2f} s after a kill", file=sys.stderr)
        equal = sum(killed.texts == right.texts for _, killed in turns)
        late = [killed.ttft - calm.ttft for calm, killed in turns]
        within = sum(seconds <= 1 for seconds in late)
        print(f"{options.kills} kills: all texts equal in {equal} turns, TTFT within its prefill + 1 s in {within}")
        print(f"beyond the prefill: median {statistics.median(late):.2f} s, worst {max(late):.2f} s")


if __name__ == "__main__":
    main()
