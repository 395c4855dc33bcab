#!/usr/bin/env python3
"""Writes real queries, keys and values of a few layers to .npy files, for judging what an index sees:

    scripts/evaluate/dump_attention.py --tokens 32768 --out dump/

The text is read from a file; RoPE is scaled to the length (YaRN). In the folder: q[layer].npy float16 [tokens, heads,
d], k[layer].npy and v[layer].npy float16 [tokens, kv_heads, d], all rotated as the model rotates them; dump.json has
the model, the text and the seconds of the prefill. Layers above the last one asked for change nothing below them and
are left out with --stop.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pydoc_data.topics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress

from lamina.config import DEFAULT_MODEL, EngineConfig
from lamina.launch.kv_sizing import holder_config
from lamina.launch.model_files import rescaled
from lamina.measure.probe import Probe
from lamina.models.resolve import resolve
from lamina.system.machine import native_dtype, this_machine
from lamina.text.tokenizer import Tokenizer
from lamina_workers.checkpoints.model_checkpoint import open_checkpoint
from lamina_workers.decoder.decoder_weights import load_weights
from lamina_workers.decoder.model import Decoder
from lamina_workers.model_config.config import ModelConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--text", type=Path, help="a text file; without one, Python's own help topics")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 12, 15, 22])
    parser.add_argument("--stop", action="store_true", help="leave out the layers above the last one asked for")
    parser.add_argument("--original", type=int, default=8192, help="the context that the model was made for")
    parser.add_argument("--memory", default="8GiB", help="for the KV")
    parser.add_argument("--threads", type=int, help="of the prefill; without it, one a core")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    text = args.text.read_text() if args.text else "\n\n".join(pydoc_data.topics.topics.values())
    scaling = {
        "rope_type": "yarn",
        "factor": args.tokens / args.original,
        "original_max_position_embeddings": args.original,
    }
    config = EngineConfig(
        rope_scaling=scaling if args.tokens > args.original else None, kv_memory=args.memory, threads=args.threads
    )
    model = ModelConfig.from_folder(resolve(args.model))
    if not 0 <= min(args.layers) <= max(args.layers) < model.num_hidden_layers:
        raise SystemExit(f"layers are {args.layers}; the model has 0 to {model.num_hidden_layers - 1}")
    args.out.mkdir(parents=True, exist_ok=True)
    layers = max(args.layers) + 1 if args.stop else model.num_hidden_layers
    with load(args.model, config, layers) as (probe, tokenizer), Progress() as progress:
        ids = tokenizer.encode(text)
        if len(ids) < args.tokens:
            raise SystemExit(f"the text has {len(ids)} tokens; {args.tokens} are asked for")
        seconds, cpu_seconds = dump(probe, ids[: args.tokens], args.layers, args.out, progress)
    said = {
        "model": args.model,
        "tokens": args.tokens,
        "layers": args.layers,
        "layers_computed": layers,
        "rope_scaling": config.rope_scaling and dict(config.rope_scaling),
        "prefill_seconds": round(seconds, 1),
        "prefill_cpu_seconds": round(cpu_seconds, 1),
    }
    (args.out / "dump.json").write_text(json.dumps(said, indent=1))


@contextmanager
def load(name: str, config: EngineConfig, layers: int) -> Iterator[tuple[Probe, Tokenizer]]:
    """The first `layers` of the model of that name, set up as `LLM(name, ...)` would, and its tokenizer."""
    path = resolve(name)
    machine = this_machine()
    threads = config.threads or machine.cores
    torch.set_num_threads(threads)
    whole = rescaled(ModelConfig.from_folder(path), config.rope_scaling)
    parts = {part: getattr(whole, part)[:layers] for part in ("windows", "rotary", "sparse", "mixers")}
    model = dataclasses.replace(whole, num_hidden_layers=layers, **parts)
    dtype: torch.dtype = getattr(torch, native_dtype(machine)[0] if config.dtype == "auto" else config.dtype)
    tokenizer = Tokenizer(path)
    try:
        with open_checkpoint(path) as checkpoint, torch.inference_mode():
            weights = load_weights(whole, checkpoint, dtype, torch.device("cpu"))
            decoder = Decoder(model, dataclasses.replace(weights, layers=weights.layers[:layers]))
        yield Probe(model, decoder, holder_config(path, model, config, dtype, machine), threads), tokenizer
    finally:
        tokenizer.close()


def dump(probe: Probe, ids: list[int], layers: list[int], out: Path, progress: Progress) -> tuple[float, float]:
    """Prefill `ids` and write what passes. Returns the seconds that the prefill took, by the clock and of all cores."""
    model: ModelConfig = probe.model
    heads = {"q": model.num_attention_heads, "k": model.num_key_value_heads, "v": model.num_key_value_heads}
    files = {
        (name, layer): np.lib.format.open_memmap(
            out / f"{name}{layer}.npy", "w+", np.float16, (len(ids), count, model.head_dim)
        )
        for name, count in heads.items()
        for layer in layers
    }
    at = 0

    def tap(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        nonlocal at
        if layer in layers:
            for name, x in (("q", q), ("k", k), ("v", v)):
                files[name, layer][at : at + len(x)] = x.to(torch.float16).numpy()
        if layer == model.num_hidden_layers - 1:
            at += len(q)
            progress.update(task, completed=at)

    task = progress.add_task("prefill", total=len(ids))
    begun, cpu_begun = time.perf_counter(), time.process_time()
    probe.prefill(probe.open(), ids, tap=tap)
    return time.perf_counter() - begun, time.process_time() - cpu_begun


if __name__ == "__main__":
    main()
