#!/usr/bin/env python3
"""Decode steps of long contexts that are cut by ranges of positions over 1, 2, 3 attention workers on this host.

usage: scripts/bench/ranges.py [--workers 1 2 3] [--rounds 5] [--beside TREE] [BATCHxCONTEXT ...]

One engine for each number of workers, and one that keeps all KV in its own process, each in processes of their own,
over Unix sockets; rounds take turns. All use the same cores, so more workers give no bandwidth here: printed is what
cutting one sequence costs, beside the step that reading weights and KV once would take at the bandwidth of the same
run. A step is the median gap between two tokens while all sequences decode; tokens/s follow from it.

Prompts are not computed: in the rows that would compute them, keys and values are random numbers, dense layers are left
out, and no keys but the last few are read. They are stored where the engine puts them, and the prefix cache has them in
every round. Decode computes everything. RoPE is scaled (YaRN) where the context is longer than the model's.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
from collections.abc import Callable, Generator, Sequence
from typing import Any

import engines
from decode import Round, Shape, measure
from engines import Child, Options, Run

SHAPES = ["1x65536", "8x8192"]
ROOM = 65536 + 1024  # tokens of a sequence
LEAST = 64  # tokens of a batch that is no decode step
TAIL = 32  # keys below a prompt's chunk that are read


def random_prompts() -> None:
    """From now on this process computes no prompts."""
    from lamina_workers.attention_worker.paged_reader import PagedReader
    from lamina_workers.decoder.model import Decoder

    forward: Callable[..., Any] = Decoder.forward
    readings: Callable[..., Any] = PagedReader.readings

    def either(decoder: Any, batch: Any, *rest: Any, **options: Any) -> Any:
        if len(batch.token_ids) < LEAST:
            return forward(decoder, batch, *rest, **options)
        return made_up(decoder, batch)

    def shortened(reader: Any, rows: Sequence[Any]) -> Any:
        return readings(reader, [row if row.count == 1 else short(row) for row in rows])

    Decoder.forward = either
    PagedReader.readings = shortened


def made_up(decoder: Any, batch: Any) -> Generator[Any, Any, Any]:
    """A forward pass with random queries, keys and values, and no dense layers."""
    import torch

    from lamina_workers.decoder.model import KeyValueReady, QueryReady

    config, tokens = decoder.config, len(batch.token_ids)
    q = torch.randn(tokens, config.num_attention_heads, config.head_dim).to(decoder.dtype)
    k, v = (torch.randn(tokens, config.num_key_value_heads, config.head_dim).to(decoder.dtype) for _ in range(2))
    for layer in range(config.num_hidden_layers):
        yield QueryReady(layer, q)
        yield KeyValueReady(layer, k, v)
    return torch.randn(len(batch.sampled), config.vocab_size)


def short(row: Any) -> Any:
    """A row of a prompt that reads its own tokens, where the holder has those, and few others."""
    low, high = row.read
    return dataclasses.replace(row, read=(max(low, min(row.start, high) - TAIL), high))


def ranges(model: str, options: Options) -> Run:
    """Lamina with KV cut by ranges, at workers that compute no prompts either."""
    if options.attention_workers:
        from lamina_workers.devices.openmp import share_cores

        share_cores()  # before torch is imported, as an LLM does
    random_prompts()
    with open(os.path.join(model, "config.json")) as file:
        original = json.load(file)["max_position_embeddings"]
    scaling = {"rope_type": "yarn", "factor": ROOM / original, "original_max_position_embeddings": original}
    config: dict[str, Any] = {"max_model_len": ROOM, "rope_scaling": scaling if original < ROOM else None}
    if not options.attention_workers:
        return engines.lamina(model, options, kv_memory=engines.KV_MEMORY, **config)
    # Too little memory for prompts beside the model: workers read them too, and KV is in memory only once.
    addresses = [engines.start_worker(command=[__file__, "--worker"]) for _ in range(options.attention_workers)]
    config |= {"attention_workers": addresses, "kv_memory": "64MiB", **engines.split(options)}
    return engines.lamina(model, options, **config)


def worker() -> int:
    """An attention worker; the other arguments are its flags."""
    from lamina_workers.devices.openmp import share_cores

    share_cores()  # before torch is imported
    random_prompts()
    from lamina_workers.attention_main import main as serve

    return serve(sys.argv[2:])


def told(found: dict[str, list[Round]], shape: Shape) -> None:
    """Print one shape's rows."""
    speed = (1 << 30) / statistics.median(one.step for one in found.pop("bandwidth"))
    least = shape.roofline(speed, keep=True)
    base = next(iter(found.values()))
    for name, own in found.items():
        taken = statistics.median(one.step for one in own)
        ratio = statistics.median(one.step / other.step for one, other in zip(own, base, strict=True))
        cpu = statistics.median(one.cpu or 0.0 for one in own)
        print(
            f"{f'{shape.batch}x{shape.context}':>8} {name:>16} {taken * 1e3:9.2f} {shape.batch / taken:9.1f} "
            f"{ratio:9.2f} {least / taken:9.0%} {cpu:13.0f}",
            flush=True,
        )
    print(
        f"{'':>8} {'two cores allow' if engines.cores() == 2 else 'roofline':>16} {least * 1e3:9.2f} "
        f"{shape.batch / least:9.1f} {'':9} {speed / 1e9:5.1f} GB/s",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", default=SHAPES, metavar="BATCHxCONTEXT")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--first", action="store_true", help="go before other processes of this machine")
    parser.add_argument("--beside", metavar="TREE", help="another checkout, measured in turns")
    parser.add_argument("--log", default=os.devnull, metavar="FILE", help="for what the engines say")
    args = parser.parse_args()
    from lamina.models.resolve import resolve
    from lamina.simulator.costs.model_configs import from_folder
    from lamina.system.machine import this_machine

    folder = resolve(args.model)
    config = json.loads((folder / "config.json").read_text())
    model = from_folder(folder)
    weights = int(model.weights_read(1) * 2 / model.element)  # in bfloat16
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    layers = config["num_hidden_layers"]
    kv_bytes = layers * config["num_key_value_heads"] * head_dim * 2 * 2
    machine = this_machine()
    print(f"{machine.processor}, {machine.cores} cores, load {os.getloadavg()[0]:.1f}; {args.model}, bfloat16")
    columns = ("shape", "KV", "ms/step", "tokens/s", "of first", "roofline", "cpu, us/layer")
    print("{:>8} {:>16} {:>9} {:>9} {:>9} {:>9} {:>13}".format(*columns))
    for text in args.shapes:
        batch, context = map(int, text.split("x"))
        if context + 512 > ROOM:
            parser.error(f"a context of {context}; allowed are {ROOM - 512}")
        children = {
            "bandwidth": Child("bandwidth", sys.executable, str(folder), Options(first=args.first), log=args.log)
        }
        for count in (0, *args.workers):
            options = Options(count, "sequence", keep=True, first=args.first)
            name = f"{count} worker{'s' * (count > 1)}" if count else "one process"
            for tree in (None, args.beside) if args.beside else (None,):
                children[name + "@" * (tree is not None)] = Child(
                    "ranges", sys.executable, str(folder), options, tree, args.log, __file__
                )
        told(
            measure(children, Shape(batch, context, layers, weights, kv_bytes), args.rounds, keep=True),
            Shape(batch, context, layers, weights, kv_bytes),
        )
        for child in children.values():
            child.close()


if __name__ == "__main__":
    engines.ENGINES["ranges"] = ranges
    if sys.argv[1:2] == ["--worker"]:
        sys.exit(worker())
    engines.main() if sys.argv[1:2] == ["ranges"] else main()
