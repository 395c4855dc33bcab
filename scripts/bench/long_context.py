#!/usr/bin/env python3
"""Decode ms/step at long contexts under several KV policies, in turns, through `LLM.generate`.

usage: scripts/bench/long_context.py [--policies full auto FILE.toml ...] [--attention-workers N] [--shard KIND]
                                     [--rounds 9] [--tokens 48] [--prefills 3] [--kept DIR] [BATCHxCONTEXT]

Every policy has an LLM in a process of its own, with N attention workers; prompts are other pieces of one text each, so
no two share KV. Rounds take turns: each generates greedily after the same prompts, whose KV the prefix cache has. A
step is the time between two tokens of a sequence while all decode, the median over sequences and rounds. Beside it
stands what the same requests' `Completion.stats` count: KV bytes read and pages held, of all, and the attention mass
missed by estimate.

The prompts' K and V are those of the full cache: computed once, kept in --kept, and given to every LLM in the place of
a prefill's, however it is cut over workers. With --prefills each policy really prefills one prompt so often, in turns.
RoPE is scaled (YaRN) where the context is longer than the model's.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pydoc_data.topics
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

from lamina.system.machine import this_machine

LEAST = 300  # tokens of a batch whose K and V are given, not computed: more than the last pages of all prompts
ROOM = 1024  # tokens of a sequence beside its prompt


class Prompts:
    """The prompts of a model, each another piece of a text, and their K and V."""

    def __init__(self, args: argparse.Namespace, batch: int, context: int, folder: Path) -> None:
        sys.path.append(str(Path(__file__).parents[1] / "evaluate"))  # behind this folder and what is installed
        from evaluation.kept_kv import KeptKV

        from lamina.models.resolve import resolve
        from lamina.system.machine import native_dtype
        from lamina.text.tokenizer import Tokenizer
        from lamina_workers.checkpoints.model_checkpoint import fingerprint

        path = resolve(args.model)
        original = json.loads((path / "config.json").read_text())["max_position_embeddings"]
        self.room = context + ROOM
        scaling = {"rope_type": "yarn", "factor": self.room / original, "original_max_position_embeddings": original}
        self.scaling = scaling if self.room > original else None
        text = args.text.read_text() if args.text else "\n\n".join(pydoc_data.topics.topics.values())
        ids = Tokenizer(path).encode(text)
        step = max(1, (len(ids) - context) // max(1, batch - 1))
        self.each = [ids[at * step : at * step + context] for at in range(batch)]
        self.dtype = native_dtype(this_machine())[0]
        self._model = args.model
        self._kept = KeptKV(folder, json.dumps([fingerprint(path), self.scaling, self.dtype]))
        self._layers: list[list[Any]] = []

    def compute(self) -> None:
        """Those that no file has."""
        from lamina.config import EngineConfig
        from lamina.launch.kv_sizing import holder_config
        from lamina.measure.probe import Probe, loaded

        machine = this_machine()
        memory = f"{1 + self.room * 60_000 // 10**9}GB"
        config = EngineConfig(rope_scaling=self.scaling, kv_memory=memory)
        with loaded(self._model, config) as (path, model, decoder, _):
            probe = Probe(model, decoder, holder_config(path, model, config, decoder.dtype, machine), machine.cores)
            for number, prompt in enumerate(self.each):
                if not self._kept.path(prompt).is_dir():
                    begun = time.perf_counter()
                    probe.close(self._kept.begin(probe, prompt, 1024))
                    taken = time.perf_counter() - begun
                    print(f"prompt {number}: computed at {len(prompt) / taken:.0f} tokens/s", flush=True)

    def give(self) -> None:
        """From now on this process takes the prompts' K and V from the files. Rows of a prompt read few keys."""
        from lamina_workers.attention_worker.paged_reader import PagedReader
        from lamina_workers.decoder.model import Decoder

        import torch  # isort: skip  # after lamina, which sets up its threads

        dtype = getattr(torch, self.dtype)
        for prompt in self.each:
            layers = self._kept.layers(prompt, dtype)
            if layers is None:
                raise SystemExit(f"no files for a prompt in {self._kept.folder}")
            self._layers.append(layers)
        forward: Callable[..., Any] = Decoder.forward
        readings: Callable[..., Any] = PagedReader.readings

        def either(decoder: Any, batch: Any, *rest: Any, **options: Any) -> Any:
            if len(batch.token_ids) < LEAST:
                return forward(decoder, batch, *rest, **options)
            return self._given(decoder, batch)

        def shortened(reader: Any, rows: Sequence[Any]) -> Any:
            return readings(reader, [row if sum(row.count for row in rows) < LEAST else short(row) for row in rows])

        Decoder.forward = either  # type: ignore[method-assign]
        PagedReader.readings = shortened  # type: ignore[method-assign]

    def _given(self, decoder: Any, batch: Any) -> Generator[Any, Any, Any]:
        """A forward pass whose K and V are those of the files, whose queries are nothing and whose logits are too."""
        import torch

        from lamina_workers.decoder.model import KeyValueReady, QueryReady

        tokens, positions = batch.token_ids.tolist(), batch.positions.tolist()
        starts = [at for at, p in enumerate(positions) if at == 0 or p != positions[at - 1] + 1]
        pieces = []  # of each row: its prompt, and where it lies there
        for first, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
            place = slice(positions[first], positions[first] + end - first)
            pieces.append((next(n for n, own in enumerate(self.each) if own[place] == tokens[first:end]), place))
        config = decoder.config
        q = torch.zeros(len(tokens), config.num_attention_heads, config.head_dim, dtype=decoder.dtype)
        for layer in range(config.num_hidden_layers):
            k, v = (torch.cat([self._layers[n][layer][of][place] for n, place in pieces]) for of in range(2))
            yield QueryReady(layer, q)
            yield KeyValueReady(layer, k, v)
        return torch.zeros(len(batch.sampled), config.vocab_size)


def short(row: Any) -> Any:
    """A row that reads its own tokens, where the holder has those, and one other."""
    if row.read is None:
        return row
    low, high = row.read
    return dataclasses.replace(row, read=(max(low, min(row.start, high) - 1), high))


def serve(args: argparse.Namespace, batch: int, context: int) -> None:
    """Child: answers each line of JSON. [] prefills one prompt anew, and is answered by the seconds; a number decodes
    so many tokens of every prompt, and is answered by what each prompt's completion was like."""
    answers, sys.stdout = sys.stdout, sys.stderr
    from lamina_workers.devices.openmp import share_cores

    if args.attention_workers:
        share_cores()  # before torch is imported, as an LLM does
    from lamina import LLM

    prompts = Prompts(args, batch, context, args.kept)
    memory = f"{2 + (batch + 1) * context * 45_000 // 10**9}GB"
    workers = {"attention_workers": args.attention_workers, "shard": args.shard, "local_share": 0}
    llm = LLM(
        args.model,
        policy=args.serve,
        kv_memory=memory,
        max_model_len=prompts.room,
        rope_scaling=prompts.scaling,
        **(workers if args.attention_workers else {}),
    )
    given = False
    with llm:
        for number, line in enumerate(sys.stdin):
            asked = json.loads(line)
            begun = time.perf_counter()
            if not asked:
                llm.generate([[*prompts.each[0][:1], number, *prompts.each[0][2:]]], max_tokens=1)
                print(json.dumps(time.perf_counter() - begun), file=answers, flush=True)
                continue
            if not given:
                prompts.give()
                llm.generate(prompts.each, max_tokens=1)
                given = True
            completions = llm.generate(prompts.each, max_tokens=asked, ignore_eos=True)
            told = [
                {"step": (c.timing.total - c.timing.first_token) / (c.timing.tokens - 1), "stats": dict(c.stats)}
                for c in completions
            ]
            print(json.dumps(told), file=answers, flush=True)


class Child:
    """One policy's process."""

    def __init__(self, policy: str, args: argparse.Namespace) -> None:
        command = [sys.executable, __file__, "--serve", policy, *sys.argv[1:], "--kept", str(args.kept)]
        self.policy = policy
        self.prefills: list[float] = []  # seconds
        self.steps: list[float] = []
        self.told: list[dict[str, Any]] = []
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def prefill(self) -> None:
        self.prefills.append(self._ask([]))

    def decode(self, tokens: int) -> None:
        self.told = self._ask(tokens)
        self.steps.append(statistics.median(own["step"] for own in self.told))

    def _ask(self, question: Any) -> Any:
        print(json.dumps(question), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            raise SystemExit(f"{self.policy} ended with status {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        if self._process.stdin:
            self._process.stdin.close()
        self._process.wait()


def ratio(own: Sequence[float], first: Sequence[float]) -> float:
    """The median of what one takes of the other's time in the same round."""
    return statistics.median(a / b for a, b in zip(own, first, strict=True))


def compare(args: argparse.Namespace, batch: int, context: int) -> None:
    Prompts(args, batch, context, args.kept).compute()
    children = [Child(policy, args) for policy in args.policies]
    for number in range(args.prefills):
        for child in children:
            child.prefill()
            print(f"{child.policy}: prefill {number} at {context / child.prefills[-1]:.0f} tokens/s", flush=True)
    for _ in range(args.rounds + 1):
        for child in children:
            child.decode(args.tokens)
    first = children[0]
    names = {"kv_read": 1, "kv_held": 1, "missed_mass": 0, "missed_mass_worst": 0}
    titles = " ".join(f"{name:>8}" for name in ("read", "held", "missed", "worst"))
    print(f"{'policy':>32} {'ms/step':>8} {'of first':>8} {'rounds':>11} {'prefill':>8} {'of first':>8} {titles}")
    for child in children:
        steps, base = child.steps[1:], first.steps[1:]  # the first round warms up
        each = sorted(a / b for a, b in zip(steps, base, strict=True))
        prefill = ["-".rjust(8)] * 2
        if child.prefills:
            prefill = [f"{statistics.median(child.prefills):7.1f}s", f"{ratio(child.prefills, first.prefills):8.3f}"]
        stats = [statistics.mean(o["stats"].get(name, default) for o in child.told) for name, default in names.items()]
        print(
            f"{Path(child.policy).name[:32]:>32} {statistics.median(steps) * 1e3:8.1f} {ratio(steps, base):8.3f} "
            f"{each[0]:5.2f}-{each[-1]:5.2f} {' '.join(prefill)} " + " ".join(f"{x:8.4f}" for x in stats)
        )
        child.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", nargs="?", default="4x32768", metavar="BATCHxCONTEXT")
    parser.add_argument("--policies", nargs="+", default=["full", "auto"])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--attention-workers", type=int, default=0)
    parser.add_argument("--shard", default="heads", help="heads, sequence or heads+sequence")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--prefills", type=int, default=0)
    parser.add_argument("--text", type=Path, help="a text file; without one, Python's own help topics")
    parser.add_argument("--kept", type=Path, help="a folder for the K and V of prompts, which other runs may share")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    batch, context = map(int, args.shape.split("x"))
    if args.serve:
        serve(args, batch, context)
        return
    machine = this_machine()
    beside = f", {args.attention_workers} attention workers by {args.shard}" if args.attention_workers else ""
    print(f"{machine.processor}, {machine.cores} cores; {args.model}, {args.shape}{beside}")
    if args.kept:
        compare(args, batch, context)
        return
    with tempfile.TemporaryDirectory() as folder:
        args.kept = Path(folder)
        compare(args, batch, context)


if __name__ == "__main__":
    main()
