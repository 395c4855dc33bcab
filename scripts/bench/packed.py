#!/usr/bin/env python3
"""Lamina with packed weights beside llama.cpp and others on the same GGUF file, all in one run.

usage: scripts/bench/packed.py FILE.gguf [--llamacpp-python PYTHON] [--ik-python PYTHON]
                               [--xllamacpp-python PYTHON] [--openvino-python PYTHON]
                               [--pace-python PYTHON --folder FOLDER]
                               [--rounds 5] [--engines packed,bfloat16] [BATCHxCONTEXT ...]

Each peer is installed in an environment of its own, whose Python is given: `llama-cpp-python` (compiled on this
machine, so with all of the processor's instructions), `ik-llama-cpp-python`, `xllamacpp` (the same engine as a wheel,
without AVX512, by its own server), `openvino-genai` and `amd-pace`. PACE reads no GGUF: `--folder` has the same model
in bfloat16. A peer that cannot load the model is named and left out. "packed" and "bfloat16" are Lamina with that
`weights`. random_gguf.py makes files of large shapes.

How engines are measured is described in decode.py: processes of their own take turns, a step is the median gap while
all sequences decode, and ratios are medians of each round's. The roofline is what a step reads of the packed file, of
experts as many as rows are expected to choose, of bfloat16 KV and of states, over the bandwidth of the same run; so
"bfloat16" and PACE cannot reach it.

Besides, in processes of their own: `memory` is what a process has resident after a request of 64 tokens, without what
its libraries take, beside the file's bytes; `peak` is the most, libraries included. `likelihood` compares 2,000 tokens
of text, read in pieces as prompts are and as decode does, with the same file unpacked to float32.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from decode import STEPS, Round, Shape, measure
from engines import Child, Options, Request, Resident, resident

SHAPES = ["1x64", "8x512", "1x2048"]
OWN = ("packed", "bfloat16")
PEERS = ("llamacpp", "ik", "xllamacpp", "openvino", "pace")
BASELINES = ("llamacpp", "bfloat16")
PIECES = (1000, 8)  # tokens given together: as of a prompt, and as of decode
READINGS = (("float32", PIECES[:1]), ("bfloat16", PIECES), ("packed", PIECES))


class File(NamedTuple):
    """A GGUF file: its bytes, those that every decode step reads, those of all experts and the share of them that one
    token takes, and what a step reads of KV for each token, and of states, which it writes too, for each sequence."""

    size: int
    dense: int
    experts: int
    share: float
    kv_bytes: int
    state_bytes: int
    layers: int

    def step(self, batch: int) -> int:
        """Bytes that a decode step reads of it, where each token takes any experts alike, and of states."""
        return round(self.dense + self.experts * (1 - (1 - self.share) ** batch)) + batch * self.state_bytes


def read_file(path: Path) -> File:
    """The sizes of a GGUF file."""
    from gguf import GGUFReader

    from lamina.models.resolve import resolve

    config: dict[str, Any] = json.loads((resolve(path) / "config.json").read_text())
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    layers = config["num_hidden_layers"]
    tensors = {tensor.name: int(tensor.n_bytes) for tensor in GGUFReader(path).tensors}
    experts = sum(size for name, size in tensors.items() if name.endswith("_exps.weight"))
    dense = sum(tensors.values()) - experts
    if "output.weight" in tensors:  # else the table of the input is the head too
        dense -= tensors["token_embd.weight"]
    count = config.get("num_experts") or config.get("num_local_experts") or 1
    share = config.get("num_experts_per_tok", 1) / count
    attending, state = layers, 0
    if "linear_num_value_heads" in config:
        attending = layers // config["full_attention_interval"]
        heads, width = config["linear_num_value_heads"], config["linear_key_head_dim"]
        state = (layers - attending) * heads * width * config["linear_value_head_dim"] * 4 * 2
    kv_bytes = attending * config["num_key_value_heads"] * head_dim * 4
    return File(path.stat().st_size, dense, experts, share, kv_bytes, state, layers)


def rows(found: Mapping[str, Sequence[Round]], shape: Shape, baselines: Sequence[str]) -> Iterator[list[str]]:
    """The table's rows of one shape."""
    speed = (1 << 30) / statistics.median(one.step for one in found["bandwidth"])
    least = shape.roofline(speed, keep=False)
    for name, own in found.items():
        if name == "bandwidth":
            continue
        taken = statistics.median(one.step for one in own)
        first = statistics.median(one.first for one in own)
        cells = [f"{shape.batch}x{shape.context}", name, f"{taken * 1e3:.2f}", f"{shape.batch / taken:.0f}"]
        cells += [f"{least / taken:.0%}", f"{shape.batch * shape.context / first:.0f}"]
        for baseline in baselines:
            cells += [*ratios(found[baseline], own)]
        yield cells
    yield ["", "roofline", f"{least * 1e3:.2f}", f"{speed / 1e9:.1f} GB/s"]


def ratios(base: Sequence[Round], own: Sequence[Round]) -> tuple[str, str]:
    """Of a step's time, with its range over rounds, and of prompt tokens a second."""
    steps = [one.step / other.step for one, other in zip(own, base, strict=True)]
    prefill = statistics.median(other.first / one.first for one, other in zip(own, base, strict=True))
    return f"{statistics.median(steps):.2f} ({min(steps):.2f}-{max(steps):.2f})", f"{prefill:.2f}"


def table(lines: Sequence[Sequence[str]]) -> str:
    """Columns, each as wide as its widest cell."""
    width = max(map(len, lines))
    padded = [[*line, *[""] * (width - len(line))] for line in lines]
    widths = [max(map(len, column)) for column in zip(*padded, strict=True)]
    return "\n".join("  ".join(map(str.rjust, line, widths)).rstrip() for line in padded)


def start(args: argparse.Namespace) -> dict[str, Child]:
    """The engines that can load the model, and the bandwidth."""
    children: dict[str, Child] = {}
    pythons = {name: getattr(args, f"{name}_python") for name in PEERS}
    for name in [*args.engines, *(peer for peer in PEERS if pythons[peer]), "bandwidth"]:
        model = args.folder if name == "pace" else str(args.file)
        try:
            options = Options(first=args.first)
            children[name] = Child(name, pythons.get(name) or sys.executable, model, options, log=args.log)
        except SystemExit as error:
            print(f"{name} cannot load this model ({error}); --log FILE keeps what it says")
    return children


def memory(children: Mapping[str, Child], file: File) -> Iterator[list[str]]:
    """The memory of each engine."""
    kv = (64 + STEPS) * file.kv_bytes
    for name, child in children.items():
        if name == "bandwidth":
            continue
        child.run(Request(1, 64, STEPS, 0))
        found: Resident = resident(child.pid)
        own = found.now - child.libraries
        yield [
            name,
            *(f"{each / 1e6:.0f}" for each in (child.libraries, own)),
            f"{(own - kv) / file.size:.2f}",
            f"{found.peak / 1e6:.0f}",
        ]


def likelihoods(file: Path, names: Sequence[str]) -> Iterator[list[str]]:
    """The likelihood of a text, with weights of each kind, each in a process of its own."""
    base = None
    for weights, pieces in READINGS:
        if weights != "float32" and weights not in names:
            continue
        command = [sys.executable, str(Path(__file__).with_name("likelihood.py")), str(file), "--weights", weights]
        command += [f"--piece={piece}" for piece in pieces]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        for line in done.stdout.splitlines():
            found = json.loads(line)
            base = base or found["nll"]
            yield [weights, f"{found['piece']}", f"{found['nll']:.5f}", f"{found['nll'] / base - 1:+.3%}"]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="FILE.gguf")
    parser.add_argument("shapes", nargs="*", default=SHAPES, metavar="BATCHxCONTEXT")
    parser.add_argument("--engines", default=",".join(OWN), help="of Lamina, comma separated; may be empty")
    for name in PEERS:
        parser.add_argument(f"--{name}-python", metavar="PYTHON")
    parser.add_argument("--folder", help="the same model as safetensors in bfloat16, for PACE")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quiet", type=float, metavar="CORES", help="the most that others may use meanwhile")
    parser.add_argument("--first", action="store_true", help="go before other processes of this machine")
    parser.add_argument("--no-likelihood", action="store_true", help="leave out the text, which takes minutes")
    parser.add_argument("--json", metavar="FILE", help="add all measurements here")
    parser.add_argument("--log", default=os.devnull, metavar="FILE", help="for what the engines say")
    args = parser.parse_intermixed_args()
    args.engines = [name for name in args.engines.split(",") if name]
    if unknown := [name for name in args.engines if name not in OWN]:
        parser.error(f"--engines names {', '.join(unknown)}; allowed are {', '.join(OWN)}")
    if args.pace_python and not args.folder:
        parser.error("--pace-python needs --folder")
    return args


def main() -> None:
    args = parse()
    from lamina.system.machine import this_machine

    file, machine = read_file(args.file), this_machine()
    print(f"{machine.processor}, {machine.cores} cores, load {os.getloadavg()[0]:.1f}; {args.file.name}")
    print(
        f"{file.size / 1e6:.0f} MB, {file.step(1) / 1e6:.0f} MB read in a step of one row, {file.kv_bytes} bytes of "
        f"KV a token; {args.rounds} rounds"
    )
    children = start(args)
    print(
        "\n"
        + table([["memory, MB", "libraries", "model", "without KV, of the file", "peak"], *memory(children, file)]),
        flush=True,
    )
    baselines = [name for name in BASELINES if name in children]
    heading = ["shape", "engine", "ms/step", "tokens/s", "roofline", "prefill/s"]
    heading += [cell for name in baselines for cell in (f"step of {name}", "prefill of it")]
    for text in args.shapes:
        batch, context = map(int, text.split("x"))
        shape = Shape(batch, context, file.layers, file.step(batch), file.kv_bytes)
        found = measure(children, shape, args.rounds, False, args.quiet)
        print("\n" + table([heading, *rows(found, shape, baselines)]), flush=True)
        if args.json:
            with open(args.json, "a") as out:
                for name, own in found.items():
                    told = {"file": args.file.name, "shape": text, "engine": name}
                    out.writelines(json.dumps(told | one._asdict()) + "\n" for one in own)
    for child in children.values():
        child.close()
    if args.engines and not args.no_likelihood:
        heading = ["likelihood", "tokens together", "nats a token", "beside float32"]
        print("\n" + table([heading, *likelihoods(args.file, args.engines)]))


if __name__ == "__main__":
    main()
