#!/usr/bin/env python3
"""Attention workers that follow the load: how soon one more stores its first token, and a server that has 1, 3, then 1.

usage: scripts/bench/autoscale.py cold|standby [--streams 8] [--tokens 4000] [--model smollm2-135m]
       scripts/bench/autoscale.py serving [--clients 24] [--seconds 60]

`cold` and `standby` ask an engine for a third and a fourth worker, once with nothing to do and once while streams of
that many tokens go on, and print the seconds from asking to each stage. A cold worker's process is started then; a
standby was started before. `serving` runs `lamina serve --autoscale 1:3` with little KV memory: two clients always, and
many for a while. It prints what the server had at each change, and fails where a request failed, or where the server
did not have three workers at the peak and one at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import lamina  # before torch, for its threads
from lamina.deploy.local import LocalAttentionWorkers
from lamina.deploy.supervision import AttentionSupervisor

KV = "64MiB"  # of a server's holder: 2,900 tokens of SmolLM2-135M
WORDS = ("the", "a", "sea", "ship", "king", "night", "river", "stone", "tree", "light", "under", "over", "again")


# Joining.


class Stages:
    """When each stage was over, in seconds from `begin`. Patches note them: they are inside of the package."""

    def __init__(self) -> None:
        from lamina.engine.holders import Holders
        from lamina.launch.attention_pool import AttentionPool

        self.since = 0.0
        self.seconds: dict[str, float] = {}
        self.address: Any = None
        self._after(LocalAttentionWorkers, "_launch", "started")
        self._after(LocalAttentionWorkers, "_takes", "listening")
        self._after(AttentionPool, "_connect", "connected")
        self._after(Holders, "join", "joined")
        joined = AttentionSupervisor._joined

        def note(workers: Any, worker: Any, address: Any) -> None:
            self.address = address
            joined(workers, worker, address)

        AttentionSupervisor._joined = note  # type: ignore[method-assign]

    def _after(self, owner: Any, name: str, stage: str) -> None:
        method = getattr(owner, name)

        def timed(*arguments: Any) -> Any:
            result = method(*arguments)
            if result is not False:
                self.seconds[stage] = time.monotonic() - self.since
            return result

        setattr(owner, name, timed)

    def begin(self) -> None:
        self.seconds, self.since = {}, time.monotonic()


def joining(model: str, standby: bool, streams: int, tokens: int) -> None:
    from lamina_protocols.channels.grpc_client import WorkerClient

    stages = Stages()
    for busy in (0, streams):
        LocalAttentionWorkers.keeps_standby = standby
        llm = lamina.LLM(model, autoscale=(2, 4), kv_memory="1GiB", local_share=0, prefix_cache=False)
        stop = threading.Event()
        first = threading.Semaphore(0)
        threads = [
            threading.Thread(target=_stream, args=(llm, tokens, at, first, stop), daemon=True) for at in range(busy)
        ]
        for thread in threads:
            thread.start()
        for _ in threads:
            first.acquire()
        pool = llm._runtime.pools.attention  # type: ignore[attr-defined]
        for count in (3, 4):
            time.sleep(9.0)  # a standby is started 5 s after the last
            stages.begin()
            pool.workers.grow(count)
            while "joined" not in stages.seconds:
                time.sleep(0.001)
            asked = threading.Thread(target=_ask, args=(llm,))
            asked.start()
            with WorkerClient(stages.address.address, stages.address.credentials) as client:
                while not client.status().stored:
                    time.sleep(0.005)
            stored = time.monotonic() - stages.since
            said = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in stages.seconds.items())
            what = f"{'standby' if standby else 'cold'} worker {count}, {busy} streams"
            print(f"{what}: {said}, first token stored {stored:.2f} s", flush=True)
            asked.join()
        stop.set()
        llm.close()


def _ask(llm: Any) -> None:
    llm.generate(_words(20, 1), max_tokens=2, ignore_eos=True)


def _stream(llm: Any, tokens: int, seed: int, first: threading.Semaphore, stop: threading.Event) -> None:
    with contextlib.suppress(lamina.EngineError):  # the engine is closed
        for at, _ in enumerate(llm.stream(_words(tokens, seed), max_tokens=2000, ignore_eos=True)):
            if at == 0:
                first.release()
            if stop.is_set():
                return


def _words(count: int, seed: int) -> str:
    return " ".join(WORDS[(seed + 7 * at * (seed + 1)) % len(WORDS)] for at in range(count))


# Serving.


async def _completion(session: Any, url: str, prompt: str, tokens: int) -> str:
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    async with session.post(f"{url}/v1/completions", json=body) as response:
        raw = (await response.read()).decode()
    if response.status != 200 or not raw.rstrip().endswith("data: [DONE]"):
        raise RuntimeError(f"status {response.status}: {raw[-200:]}")
    chunks = [json.loads(line[6:]) for line in raw.splitlines() if line.startswith("data: {")]
    return "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])


class Load:
    """Clients of a server: each sends the next request when it has its answer."""

    def __init__(self, session: Any, url: str) -> None:
        self._session, self._url = session, url
        self.answers: dict[str, set[str]] = {}  # by prompt
        self.count = 0
        self.failed: list[str] = []

    async def client(self, number: int, until: asyncio.Event) -> None:
        while not until.is_set():
            prompt = _words(150 + 10 * (number % 16), number % 12)
            try:
                text = await _completion(self._session, self._url, prompt, 150)
                self.answers.setdefault(prompt, set()).add(text)
            except Exception as error:  # noqa: BLE001  # of any kind: it is counted
                self.failed.append(repr(error))
            self.count += 1


async def _metrics(session: Any, url: str) -> dict[str, float]:
    async with session.get(f"{url}/metrics") as response:
        text = await response.text()
    up = len(re.findall(r"^lamina:attention_worker_up\{.*\} 1", text, re.MULTILINE))
    found = dict(re.findall(r"^lamina:(attention_workers_wanted|kv_full_in_seconds)\{.*\} (\S+)$", text, re.MULTILINE))
    return {"up": up} | {name: float(value) for name, value in found.items()}


async def _serve(url: str, clients: int, seconds: float) -> int:
    import aiohttp

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600)) as session:
        load, began, end, peak_over = Load(session, url), time.monotonic(), asyncio.Event(), asyncio.Event()
        few = [asyncio.create_task(load.client(at, end)) for at in range(2)]
        many: list[asyncio.Task[None]] = []
        seen: list[tuple[float, float]] = []
        while True:
            await asyncio.sleep(0.5)
            now, found = time.monotonic() - began, await _metrics(session, url)
            state = found["up"], found.get("attention_workers_wanted", 0.0)
            if not seen or seen[-1] != state:
                seen.append(state)
                full_in = found.get("kv_full_in_seconds", float("inf"))
                print(f"{now:6.1f} s: {state[0]} workers, {state[1]:g} wanted, KV full in {full_in:.1f} s", flush=True)
            if now > 10 and not many:
                many = [asyncio.create_task(load.client(at, peak_over)) for at in range(2, 2 + clients)]
                print(f"{now:6.1f} s: {2 + clients} clients", flush=True)
            if now > 10 + seconds and not peak_over.is_set():
                peak_over.set()
                print(f"{now:6.1f} s: 2 clients", flush=True)
            if (peak_over.is_set() and state == (1, 1)) or now > 10 + seconds + 300:
                break
        end.set()
        await asyncio.gather(*few, *many)
    unlike = sum(len(texts) > 1 for texts in load.answers.values())
    most, last = max(up for up, _ in seen), seen[-1][0]
    print(
        f"{load.count} requests, {len(load.failed)} failed, {unlike} of {len(load.answers)} prompts with unlike texts"
    )
    print(f"1 -> {most:g} -> {last:g} workers", *load.failed[:3], sep="\n")
    return int(bool(load.failed) or unlike > 0 or (most, last) != (3, 1))


def serving(model: str, clients: int, seconds: float) -> int:
    command = [sys.executable, "-m", "lamina", "serve", model, "--port", "0", "--autoscale", "1:3", "--kv-memory", KV]
    command += ["--weights", "float32", "--threads", "1"]  # so that no near tie depends on the batch
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    lines = iter(server.stderr or ())
    try:
        for line in lines:
            print(line, end="")
            if match := re.search(r"at (http://\S+)", line):
                break
        else:
            return 1
        threading.Thread(target=lambda: [print(line, end="") for line in lines], daemon=True).start()
        return asyncio.run(_serve(match[1], clients, seconds))
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("cold", "standby", "serving"))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args()
    if options.what == "serving":
        return serving(options.model, options.clients, options.seconds)
    joining(options.model, options.what == "standby", options.streams, options.tokens)
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # streams that were left may be in torch
