#!/usr/bin/env python3
"""A decode step of one process with all cores beside that of ranks which share the cores, and what collectives cost.

usage: scripts/bench/tensor_parallel.py [--ranks 2] [--rounds 5] [--steps 20] [--model smollm2-135m] [8x512 ...]

Everything runs without an engine: sequences of random KV at a holder in each process, and the model's own forward pass
over them. One process computes with as many threads as there are cores; each rank with its share of them. The ranks
run twice: with Lamina's collectives, and with gloo's own all-reduce in their place. Rounds take turns, so that a slow
minute of the machine meets all of them.

Collective time is given a layer (two sums): "in a step" is what rank 0 spends there in a step, waiting for the other
ranks included; "alone" is that of sums one after another with nothing in between. Both are medians.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from lamina.system.machine import native_dtype, this_machine

TIMEOUT = 60.0  # seconds for a message between ranks
WARM_UP = 3  # steps that do not count


class Rank:
    """One process of the model: its part of the weights and of the KV. `seconds` of each kind, a step or a layer."""

    def __init__(self, model: str, rank: int, ranks: int, place: str, rows: int, context: int, steps: int) -> None:
        import torch

        from lamina.measure.hardware.decode_bench import Held
        from lamina_kernels.dense import dense
        from lamina_protocols.messages.layers import HolderConfig
        from lamina_workers.attention_worker.attention_worker import AttentionWorker
        from lamina_workers.attention_worker.page_layout import attention_kernels, page_cost, page_layout
        from lamina_workers.checkpoints.model_checkpoint import open_checkpoint
        from lamina_workers.decoder.model import Decoder
        from lamina_workers.decoder.shard import Shard, with_ranks
        from lamina_workers.model_config.config import ModelConfig
        from lamina_workers.parallel.collectives import Meeting, join
        from lamina_workers.ports.port import LocalAttention

        machine = this_machine()
        self.threads = max(1, machine.cores // ranks)
        torch.set_num_threads(self.threads)
        self._dtype: Any = getattr(torch, native_dtype(machine)[0])
        self._collectives = {"lamina": join(rank, ranks, Meeting(0, path=f"{place}/lamina"), TIMEOUT)}
        if ranks > 1:
            self._collectives["gloo"] = BareGloo(rank, ranks, f"{place}/gloo")
        shard, config = Shard(rank, ranks), with_ranks(ModelConfig.from_folder(model), ranks)
        with open_checkpoint(model) as checkpoint, torch.inference_mode():
            self._decoder = Decoder.load(
                config, checkpoint, self._dtype, shard=shard, collective=self._collectives["lamina"]
            )
        layers, heads = self._decoder.config.layer_specs(), self._decoder.config.num_key_value_heads
        holder = HolderConfig(layers, 32, str(self._dtype).removeprefix("torch."), 1)
        pages = rows * (-(-(context + steps) // holder.page_size) + 1) * heads * len(layers)
        holder = HolderConfig(layers, holder.page_size, holder.dtype, pages * page_cost(holder))
        for kernels in (
            attention_kernels().prepare(page_layout(holder)),
            dense.prepare(self._dtype, torch.device("cpu")),
        ):
            for _ in kernels:
                pass
        port = LocalAttention(AttentionWorker(holder, self.threads))
        every = {0: tuple(range(heads))}
        self._held = Held(holder, {0: port}, every, dtype=self._dtype, threads=self.threads)
        self._rows, self._context, self._layers = rows, context, len(layers)
        self._width = config.hidden_size

    def steps(self, kind: str, steps: int) -> dict[str, list[float]]:
        """Seconds of each step, and of collectives a layer of each step."""
        import torch

        from lamina.measure.hardware.decode_bench import decode_batch

        collective = self._collectives[kind]
        self._decoder.collective, cpu = collective, torch.device("cpu")
        found: dict[str, list[float]] = {"step": [], "collective": []}
        with torch.inference_mode():
            self._held.fill(self._rows, self._context)
            for at in range(WARM_UP + steps):
                before = collective.seconds
                taken = sum(self._held.step(self._decoder.forward(decode_batch(self._rows, self._context + at, cpu))))
                if at >= WARM_UP:
                    found["step"].append(taken)
                    found["collective"].append((collective.seconds - before) / self._layers)
        return found

    def sums(self, kind: str, times: int) -> dict[str, list[float]]:
        """Seconds of two sums of a step's bytes, with nothing in between."""
        import torch

        x, found = torch.zeros(self._rows, self._width, dtype=self._dtype), []
        for _ in range(WARM_UP + times):
            begun = time.perf_counter()
            self._collectives[kind].all_reduce(x)
            self._collectives[kind].all_reduce(x)
            found.append(time.perf_counter() - begun)
        return {"alone": found[WARM_UP:]}


class BareGloo:
    """gloo's own all-reduce, as a collective."""

    def __init__(self, rank: int, ranks: int, path: str) -> None:
        import torch.distributed as dist

        gloo: Any = dist
        self.rank, self.ranks, self.seconds = rank, ranks, 0.0
        options = gloo.ProcessGroupGloo._Options()
        options._devices = [gloo.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        options._timeout = datetime.timedelta(seconds=TIMEOUT)
        self._group = gloo.ProcessGroupGloo(gloo.FileStore(path, ranks), rank, ranks, options)
        self._sum = gloo.AllreduceOptions()

    def all_reduce(self, x: Any) -> Any:
        begun = time.perf_counter()
        self._group.allreduce([x], self._sum).wait()
        self.seconds += time.perf_counter() - begun
        return x

    def gather_columns(self, x: Any, widths: Sequence[int]) -> Any:
        """All parts on rank 0; not counted, as a sum is measured here."""
        import torch

        parts = [x, *(x.new_empty(len(x), width) for width in widths[1:])]
        for other, part in enumerate(parts[1:], 1):
            if self.rank == 0:
                self._group.recv([part], other, 0).wait()
            elif self.rank == other:
                self._group.send([x.contiguous()], 0, 0).wait()
        return torch.cat(parts, 1) if self.rank == 0 else None

    def close(self) -> None:
        pass


def serve(args: argparse.Namespace) -> None:
    """Child: answer each line [what, kind, how often] with the seconds that it took."""
    answers, sys.stdout = sys.stdout, sys.stderr
    rank = Rank(args.model, args.rank, args.ranks, args.place, *shape(args.shapes[0]), args.steps + WARM_UP)
    print(json.dumps(rank.threads), file=answers, flush=True)
    for line in sys.stdin:
        what, kind, times = json.loads(line)
        print(json.dumps(getattr(rank, what)(kind, times)), file=answers, flush=True)


class Team:
    """The processes of one model; rank 0 reports the measurements."""

    def __init__(self, model: str, ranks: int, place: str, cell: str, steps: int) -> None:
        command = [sys.executable, __file__, "--serve", "--model", model, "--ranks", str(ranks), "--place", place]
        self._children = [
            subprocess.Popen(
                [*command, "--rank", str(rank), "--steps", str(steps), cell],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(ranks)
        ]
        self.threads = self._answers()

    def run(self, what: str, kind: str, times: int) -> dict[str, list[float]]:
        for child in self._children:
            print(json.dumps([what, kind, times]), file=child.stdin, flush=True)
        answer: dict[str, list[float]] = self._answers()
        return answer

    def _answers(self) -> Any:
        lines = [child.stdout.readline() if child.stdout else "" for child in self._children]
        if not all(lines):
            raise SystemExit("a rank ended before it was told to")
        return json.loads(lines[0])

    def close(self) -> None:
        for child in self._children:
            child.kill()
        for child in self._children:
            child.wait()


def shape(cell: str) -> tuple[int, int]:
    batch, _, context = cell.partition("x")
    return int(batch), int(context)


def measure(model: str, ranks: int, cell: str, rounds: int, steps: int) -> None:
    with tempfile.TemporaryDirectory() as place:
        teams = [Team(model, 1, place, cell, steps), Team(model, ranks, place, cell, steps)]
        alone, team = teams
        try:
            found: dict[str, dict[str, list[float]]] = {"alone": {}, "lamina": {}, "gloo": {}}
            for _ in range(rounds):
                gather(found["alone"], alone.run("steps", "lamina", steps))
                for kind in ("lamina", "gloo"):
                    gather(found[kind], team.run("steps", kind, steps))
                    gather(found[kind], team.run("sums", kind, 5 * steps))
        finally:
            for each in teams:
                each.close()
    medians = {kind: {name: statistics.median(values) for name, values in of.items()} for kind, of in found.items()}
    one, ours, gloo = (medians[kind] for kind in ("alone", "lamina", "gloo"))
    print(f"{cell}: 1 process x {alone.threads} threads {one['step'] * 1e3:.2f} ms a step")
    for name, of in (("Lamina's collectives", ours), ("gloo's all-reduce", gloo)):
        print(
            f"{cell}: {ranks} ranks x {team.threads} threads {of['step'] * 1e3:.2f} ms a step with {name}, "
            f"{of['step'] / one['step']:.2f} of one process; collectives a layer "
            f"{of['collective'] * 1e6:.0f} us in a step, {of['alone'] * 1e6:.0f} us alone"
        )
    print(
        f"{cell}: Lamina's collectives take {ours['collective'] / gloo['collective']:.2f} of gloo's in a step, "
        f"{ours['alone'] / gloo['alone']:.2f} alone",
        flush=True,
    )


def gather(into: dict[str, list[float]], found: dict[str, list[float]]) -> None:
    for name, values in found.items():
        into.setdefault(name, []).extend(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", default=["8x512"], metavar="BATCHxCONTEXT")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--place", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    import lamina  # noqa: F401  # sets what OpenMP reads when it starts

    if args.serve:
        serve(args)
        return
    from lamina.models.resolve import resolve

    if args.ranks < 2:
        raise SystemExit(f"--ranks is {args.ranks}, allowed are 2 and more")
    folder = resolve(args.model)
    machine = this_machine()
    print(f"{machine.processor}, {machine.cores} cores; {args.model} in {native_dtype(machine)[0]}", flush=True)
    for cell in args.shapes:
        measure(str(folder), args.ranks, cell, args.rounds, args.steps)


if __name__ == "__main__":
    main()
