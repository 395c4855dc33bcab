#!/usr/bin/env python3
"""How long after the death of an engine its clients have their next token, beside computing everything again.

usage: scripts/bench/restart.py [--sequences 8] [--tokens 2000] [--rounds 3] [--model smollm2-135m]

The engine is the process that `lamina serve` runs, with one attention worker beside it that stays. Each round starts
the engine without anything to go on from (that is "start"), reads prompts that were never seen, lets each sequence
decode, then ends the engine with SIGKILL and starts another at once. Times are from the kill to the next token of each
stream, once with a journal, once without: then clients send what they have, and all of it is computed again. Last comes
what the journal costs a step.
"""

from __future__ import annotations

import argparse
import os
import queue
import random
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lamina.client.remote import RemoteEngine
from lamina.journal.history import BatchRecord, BatchRow, RequestRecord
from lamina.journal.journal import Facts, Journal
from lamina.kv.request import Request
from lamina.messages.engine_request import EngineOutput, EngineRequest
from lamina.sampling_params import SamplingParams
from lamina.server.processes.child_protocol import FROM_CHILD, TO_ENGINE, Failed, Ready, StartEngine
from lamina.server.processes.engine_link import SocketWire
from lamina.server.processes.supervisor import ENGINE_MODULE
from lamina.system.child_process import ChildProcess

SECRET = secrets.token_hex(32)
BEFORE = 8  # tokens of each sequence before the kill
PATIENCE = 300.0


class EngineProcess:
    """One engine; `seconds` from its start until it serves."""

    def __init__(self, model: str, config: dict[str, Any], socket: Path) -> None:
        said: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.socket = str(socket)
        start = time.perf_counter()
        self.child = ChildProcess(
            "engine",
            [sys.executable, "-m", ENGINE_MODULE],
            lambda _, text: said.put(FROM_CHILD.parse(text)),
            lambda _: said.put("ended"),
            environment=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
        self.child.say(TO_ENGINE.line(StartEngine(model, config, self.socket, SECRET, False, False)))
        while not isinstance(message := said.get(timeout=PATIENCE), Ready):
            if isinstance(message, (Failed, str)):
                raise SystemExit(f"the engine did not start: {message}")
        self.seconds = time.perf_counter() - start

    def kill(self) -> None:
        self.child.kill()
        self.child.wait(10)


class Clients:
    """Streams, and when each of their tokens came."""

    def __init__(self, count: int, tokens: int, seed: int) -> None:
        rng = random.Random(seed)
        self.times: list[list[float]] = [[] for _ in range(count)]
        self.over = False  # later tokens are not recorded
        self.requests = []
        for at in range(count):
            params = SamplingParams(max_tokens=400, ignore_eos=True, temperature=0.0).with_defaults({})
            prompt = tuple(rng.randint(10, 40000) for _ in range(tokens))
            request = EngineRequest(Request(f"{seed}-{at}", prompt, 400), params, seed=at, sink=self._sink(at))
            self.requests.append(request)

    def _sink(self, at: int) -> Callable[[EngineRequest, list[EngineOutput]], None]:
        def take(_request: EngineRequest, outputs: list[EngineOutput]) -> None:
            for output in outputs:
                if output.error is not None and not self.over:
                    print(f"stream {at} failed: {output.error}", file=sys.stderr)
                    os._exit(1)  # this is not the main thread
                self.times[at].append(time.perf_counter())

        return take

    def until(self, count: int) -> None:
        end = time.perf_counter() + PATIENCE
        while any(len(times) < count for times in self.times):
            if time.perf_counter() > end:
                raise SystemExit(f"streams have {[len(times) for times in self.times]} tokens, {count} were expected")
            time.sleep(0.002)


def start_worker() -> tuple[subprocess.Popen[str], str]:
    threads = max(1, len(os.sched_getaffinity(0)))
    command = [sys.executable, "-m", "lamina_workers.attention_main", "--kv-memory", str(2 << 30)]
    process = subprocess.Popen(
        [*command, "--threads", str(threads)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    return process, process.stdout.readline().split()[1] if process.stdout else ""


def one_round(model: str, count: int, tokens: int, seed: int, journal: bool) -> tuple[float, list[float]]:
    """Seconds of a bare start, and from the kill to each stream's next token."""
    worker, address = start_worker()
    with tempfile.TemporaryDirectory(prefix="lamina-bench-") as folder:
        place = Path(folder)
        config: dict[str, Any] = {
            "attention_workers": [address],
            "local_share": 0,
            "query_first": "never",
            "prefix_cache": False,
            "max_model_len": 4096,
        }
        if journal:
            config["journal"] = str(place / "journal")
        warm = EngineProcess(model, config, place / "warm.sock")
        warm.kill()
        first = EngineProcess(model, config, place / "first.sock")
        wire = SocketWire(first.socket, bytes.fromhex(SECRET), "bench-1")
        remote, clients = RemoteEngine(wire, time.monotonic, patience=PATIENCE), Clients(count, tokens, seed)
        for request in clients.requests:
            remote.submit(request)
        clients.until(BEFORE)
        killed = time.perf_counter()
        first.kill()
        wire.close()
        before = [len(times) for times in clients.times]
        second = EngineProcess(model, config, place / "second.sock")
        remote.rejoin(SocketWire(second.socket, bytes.fromhex(SECRET), "bench-2"))
        for at, had in enumerate(before):
            while len(clients.times[at]) <= had:
                time.sleep(0.002)
        times = [clients.times[at][had] - killed for at, had in enumerate(before)]
        clients.over = True
        second.kill()
        remote.close()
    worker.kill()
    worker.wait()
    return first.seconds, times


def journal_cost(count: int, steps: int = 3000) -> tuple[float, float]:
    """Microseconds and bytes of one decode step's records."""
    with tempfile.TemporaryDirectory(prefix="lamina-bench-") as folder:
        journal = Journal(folder, Facts("m", 32, "float32", 30))
        for at in range(count):
            journal.append(RequestRecord({"id": f"{at}-abcdef", "n": 1, "prompt": tuple(range(2000))}, {}, 0))
        journal.commit()
        size, spent = journal.size, 0.0
        for step in range(steps):
            rows = tuple(
                BatchRow(f"{at}-abcdef", 0, at, 2000 + step, (30000 + at,), None, (None,)) for at in range(count)
            )
            start = time.perf_counter()
            journal.append(BatchRecord(rows))
            journal.commit()
            spent += time.perf_counter() - start
        size = journal.size - size
        journal.close()
    return spent / steps * 1e6, size / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="smollm2-135m")
    args = parser.parse_args()
    beyond: dict[bool, list[float]] = {True: [], False: []}
    for number in range(args.rounds):
        for journal in (True, False):
            start, times = one_round(args.model, args.sequences, args.tokens, 10 * number + journal, journal)
            beyond[journal].append(max(times) - start)
            print(
                f"{'journal   ' if journal else 'no journal'}  start {start:6.2f} s   next token, first stream "
                f"{min(times):6.2f} s, last {max(times):6.2f} s   beyond the start {max(times) - start:6.2f} s",
                flush=True,
            )
    print(
        f"median beyond the start, last stream: {statistics.median(beyond[True]):.2f} s with a journal, "
        f"{statistics.median(beyond[False]):.2f} s computing again"
    )
    microseconds, size = journal_cost(args.sequences)
    print(f"the journal costs {microseconds:.0f} us and {size:.0f} bytes a step of {args.sequences} sequences")


if __name__ == "__main__":
    main()
