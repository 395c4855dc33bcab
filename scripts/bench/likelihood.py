#!/usr/bin/env python3
"""The mean negative log likelihood of a text's tokens, in nats: usage: scripts/bench/likelihood.py MODEL [options]

The tokens of a text are given to a model in pieces, by the engine's own decoder and attention. Pieces of a few tokens
take the paths of decode, and pieces of many those of prompts. Prints a line of JSON for each `--piece`.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from lamina_workers.devices.openmp import share_cores

share_cores()  # before torch is imported

import torch  # noqa: E402

from lamina.config import EngineConfig  # noqa: E402
from lamina.launch import model_files  # noqa: E402
from lamina.launch.model_files import ModelFiles  # noqa: E402
from lamina.measure.probe import Probe  # noqa: E402
from lamina.system.machine import native_dtype, this_machine  # noqa: E402
from lamina_protocols.messages.layers import HolderConfig  # noqa: E402
from lamina_workers.attention_worker.page_layout import page_cost  # noqa: E402
from lamina_workers.converted.models import decoder_of  # noqa: E402
from lamina_workers.decoder.model import Decoder  # noqa: E402
from lamina_workers.decoder.shard import WHOLE  # noqa: E402

TEXT = Path(__file__).parents[2] / "docs" / "internals" / "design.md"
_PAGE = 32  # tokens


def likelihood(probe: Probe, ids: list[int], piece: int) -> float:
    """Of all tokens but the first."""
    handle, total, after = probe.open(), 0.0, torch.empty(0)
    for first in range(0, len(ids), piece):
        own = ids[first : first + piece]
        logits = probe.read(handle, own)
        before = torch.cat([after, logits[:-1]])
        expected = torch.tensor(own if first else own[1:])
        total += float(torch.nn.functional.cross_entropy(before, expected, reduction="sum"))
        after = logits[-1:]
    probe.close(handle)
    return total / (len(ids) - 1)


def load(name: str, weights: str) -> tuple[ModelFiles, Decoder]:
    """A model as the engine loads it on a CPU, with weights "packed", "bfloat16" or "float32"."""
    config, cpu, machine = EngineConfig(weights=weights), torch.device("cpu"), this_machine()
    torch.set_num_threads(machine.cores)
    files = model_files.load(name, config, None)
    dtype: torch.dtype = getattr(torch, native_dtype(machine)[0] if config.dtype == "auto" else config.dtype)
    packing = files.packing(config, [cpu], dtype)
    return files, decoder_of(files.model, files.weights(dtype, packing, cpu, WHOLE, None))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--weights", default="float32", help='"packed", "bfloat16" or "float32"')
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--tokens", type=int, default=2000, help="the text's first ones")
    parser.add_argument("--piece", type=int, action="append", help="tokens that are given together")
    args = parser.parse_args()
    with torch.inference_mode():
        files, decoder = load(args.model, args.weights)
        ids = files.tokenizer.encode(args.text.read_text())[: args.tokens]
        if len(ids) < args.tokens:
            parser.error(f"{args.text} has {len(ids)} tokens; --tokens is {args.tokens}")
        layers, dtype = decoder.config.layer_specs(), str(decoder.dtype).removeprefix("torch.")
        one = HolderConfig(layers, _PAGE, dtype, 1)
        pages = sum(spec.kv_heads for spec in layers) * (-(-len(ids) // _PAGE) + 1)
        holder = HolderConfig(layers, _PAGE, dtype, pages * page_cost(one))
        probe = Probe(files.model, decoder, holder, len(os.sched_getaffinity(0)))
        for piece in args.piece or [1000]:
            print(json.dumps({"weights": args.weights, "piece": piece, "nll": likelihood(probe, ids, piece)}))


if __name__ == "__main__":
    main()
