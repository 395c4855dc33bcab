#!/usr/bin/env python3
"""One stream beside machines that lend their memory: Lamina's attention workers, and llama.cpp's RPC servers.

usage: scripts/bench/joined.py FILE.gguf [--llamacpp FOLDER] [--workers 0,1,2] [--contexts 128,2048] [--tokens 64]
                               [--rounds 3] [--threads 2] [--channel grpc]

All run on this machine, over loopback, with the connections that other machines get: Lamina's workers with TLS as
`lamina join` starts them, llama.cpp's as they are, in the clear. FOLDER has `llama-bench` and `ggml-rpc-server`, built
with -DGGML_RPC=ON. The two divide different things: llama.cpp gives each server whole layers, weights and KV, and
computes one after the other; Lamina's workers have KV and attention, and the engine all weights. So "of none" says what
lending costs, each beside itself without it. Ways take turns; printed are medians over the rounds.

- tokens/s: of one sequence, after its first token;
- prompt/s: tokens of its prompt a second (llama.cpp's of its own run of that many);
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from packed import table

COLUMNS = ("way", "workers", "context", "tokens/s", "of none", "prompt/s", "of none")
Key = tuple[str, int, int]  # way, workers, context


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--llamacpp", type=Path)
    parser.add_argument("--workers", type=_numbers, default=(0, 1, 2))
    parser.add_argument("--contexts", type=_numbers, default=(128, 2048))
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--channel", choices=("grpc", "tcp"), default="grpc")
    parser.add_argument("--engine", help=argparse.SUPPRESS)  # workers and share, in a process of its own
    args = parser.parse_args()
    if args.engine is not None:
        for found in lamina(args, *json.loads(args.engine)):
            print(json.dumps(found), flush=True)
        return
    from lamina.system.machine import this_machine

    machine = this_machine()
    print(f"{machine.processor}, {machine.cores} cores, load {os.getloadavg()[0]:.1f}; {args.file.name}", flush=True)
    rates: dict[Key, list[tuple[float, float]]] = {}
    for _ in range(args.rounds):
        for count in args.workers:
            ways = [("Lamina", "auto"), ("Lamina, all KV lent", 0)] if count else [("Lamina", "auto")]
            for name, share in ways:
                for context, pair in in_a_child(count, share):
                    _note(rates, (name, count, context), pair)
            if args.llamacpp is not None:
                for context, pair in llamacpp(args, count):
                    _note(rates, ("llama.cpp RPC", count, context), pair)
    print(table([COLUMNS, *rows(rates)]))


def _note(rates: dict[Key, list[tuple[float, float]]], key: Key, pair: tuple[float, float]) -> None:
    print(f"{key}: {pair[0]:.1f} and {pair[1]:.0f} tokens/s", file=sys.stderr)
    rates.setdefault(key, []).append(pair)


def rows(rates: dict[Key, list[tuple[float, float]]]) -> Iterator[tuple[str, ...]]:
    """Lines of the table."""
    medians = {key: [statistics.median(of) for of in zip(*pairs, strict=True)] for key, pairs in rates.items()}
    for (name, count, context), found in sorted(medians.items(), key=lambda item: (item[0][2], item[0][0], item[0][1])):
        alone = medians[name.partition(",")[0], 0, context]
        of_none = [f"{own / base:.2f}" for own, base in zip(found, alone, strict=True)]
        yield name, str(count), str(context), f"{found[0]:.1f}", of_none[0], f"{found[1]:.0f}", of_none[1]


def in_a_child(count: int, share: Any) -> Iterator[tuple[int, tuple[float, float]]]:
    """What `lamina` gives, from a process of its own: torch's threads are as the first engine of a process has them."""
    command = [sys.executable, *sys.argv, "--engine", json.dumps([count, share])]
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    yield from map(json.loads, found.splitlines())


def lamina(args: argparse.Namespace, count: int, share: Any) -> Iterator[tuple[int, tuple[float, float]]]:
    """For each context, tokens and tokens of the prompt a second. The first answer, in which the engine measures its
    choices, is not counted."""
    import lamina

    settling = 8 * args.tokens if count and share == "auto" else 16

    with ExitStack() as stack:
        options: dict[str, Any] = {}
        if count:
            addresses, folder = stack.enter_context(workers(count, args.threads))
            options = {
                "attention_workers": addresses,
                "tls_dir": folder,
                "token_file": folder / "token",
                "local_share": share,
                "local_channel": False,
                "data_channel": args.channel,
            }
        llm = stack.enter_context(
            lamina.LLM(args.file, threads=args.threads, kv_memory="512MiB", prefix_cache=False, **options)
        )
        draw = random.Random(1)
        for context in args.contexts:
            prompt = [draw.randrange(1000, 20000) for _ in range(context)]
            for tokens in (settling, args.tokens):
                answer = llm.generate(prompt, max_tokens=tokens, ignore_eos=True, temperature=0)
            timing = answer.timing
            yield context, ((args.tokens - 1) / (timing.total - timing.first_token), context / timing.first_token)


@contextmanager
def workers(count: int, threads: int) -> Iterator[tuple[list[str], Path]]:
    """Attention workers with TLS and a token, which divide the threads."""
    from lamina_workers.process.credentials import make_credentials

    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "tls"
        make_credentials(made, ["127.0.0.1"])
        command = [
            sys.executable,
            "-m",
            "lamina_workers.attention_main",
            "--kv-memory",
            str(512 << 20),
            "--tls-dir",
            str(made),
            "--token-file",
            str(made / "token"),
            "--threads",
            str(max(1, threads // count)),
            "--die-with-parent",
        ]
        processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(count)]
        try:
            addresses = []
            for process in processes:
                line = process.stdout.readline().decode() if process.stdout else ""
                addresses.append(line.removeprefix("listening ").strip())
            yield addresses, made
        finally:
            for process in processes:
                process.kill()
                process.wait()


def llamacpp(args: argparse.Namespace, count: int) -> Iterator[tuple[int, tuple[float, float]]]:
    """The same for llama.cpp, with so many RPC servers, which have all layers between them."""
    port, threads = 50100, ["-t", str(args.threads)]
    servers = [
        subprocess.Popen(
            [args.llamacpp / "ggml-rpc-server", "-p", str(port + number), *threads],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for number in range(count)
    ]
    try:
        time.sleep(0.5)
        names = ",".join(f"127.0.0.1:{port + number}" for number in range(count))
        remote = ["--rpc", names, "-ngl", "99"] if count else ["-ngl", "0"]
        for context in args.contexts:
            command = [
                args.llamacpp / "llama-bench",
                "-m",
                args.file,
                "-o",
                "json",
                "-r",
                "1",
                *threads,
                *remote,
                "-p",
                str(context),
                "-n",
                "0",
            ]
            prompt = _measured(command)
            decode = _measured([*command[:-4], "-p", "0", "-n", str(args.tokens), "-d", str(context)])
            yield context, (decode, prompt)
    finally:
        for server in servers:
            server.kill()
            server.wait()


def _measured(command: Sequence[Any]) -> float:
    found = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout
    return float(json.loads(found)[-1]["avg_ts"])


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


if __name__ == "__main__":
    main()
