#!/usr/bin/env python3
"""Milliseconds of a decode step's attention in one layer whose index chooses, beside reading all, in turns.

usage: scripts/bench/indexes.py [--shape m3|v32] [--sequences 4] [--context 32768] [--threads 1] [--seconds 10]

Both are what an attention worker does for one message, with storing; keys and queries are random. Medians, and the
ratio of each round's two, since the machine's clock drifts.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from lamina_protocols.messages.layers import HolderConfig, Index, LayerSpec
from lamina_protocols.messages.messages import Announced, Announcement, Exchange, Fresh, Open, Row
from lamina_workers.attention_worker.attention_worker import AttentionWorker

SHAPES = {
    "m3": LayerSpec(0, 64, 4, 128, 128, 0.09, index=Index(128, 1, 128, 16, 1)),
    "v32": LayerSpec(0, 128, 1, 576, 512, 0.07, kind="latent", index=Index(128, 64, 1, 2048, weighted=True)),
}
CHUNK = 1024  # tokens stored at once


class Holder:
    """An attention worker with so many sequences of `context` tokens of one layer, in bfloat16."""

    def __init__(self, spec: LayerSpec, sequences: int, context: int, threads: int) -> None:
        vector = 2 * (spec.key_width + spec.own_v) * spec.kv_heads
        memory = sequences * (context + 4096) * vector
        self.worker = AttentionWorker(HolderConfig((spec,), 64, "bfloat16", memory), threads)
        self.spec, self.sequences, self.length, self.batch = spec, sequences, 0, 0
        opens = tuple(Open(i, 0, tuple(range(spec.kv_heads)), 0, 1 << 20) for i in range(sequences))
        while self.length < context:
            count = min(CHUNK, context - self.length)
            self._announce(tuple(Row(i, self.length, count, None, True) for i in range(sequences)), opens)
            self.worker.handle(Fresh(1, self.batch, 0, *self._kv(count)))
            self.length += count

    def _announce(self, rows: tuple[Row, ...], opens: tuple[Open, ...] = ()) -> None:
        self.batch += 1
        given = opens if self.batch == 1 else ()
        reply = self.worker.handle(Announcement(1, self.batch, 0 if given else self.sequences, given, rows))
        if not isinstance(reply, Announced) or not reply.accepted:
            raise RuntimeError(f"the worker answered {reply}")

    def _kv(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        n = self.sequences * tokens * self.spec.kv_heads
        return torch.randn(n, self.spec.key_width).bfloat16(), torch.randn(n, self.spec.own_v).bfloat16()

    def step(self) -> float:
        """A token more of each sequence. Seconds of its attention."""
        rows = tuple(Row(i, self.length, 1, (0, self.length + 1), True, True) for i in range(self.sequences))
        self._announce(rows)
        q = torch.randn(self.sequences * self.spec.heads, self.spec.query_width).bfloat16()
        message = Exchange(1, self.batch, 0, q, *self._kv(1))
        begun = time.perf_counter()
        self.worker.handle(message)
        self.length += 1
        return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="m3")
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=10.0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    spec = SHAPES[args.shape]
    plain = LayerSpec(0, spec.heads, spec.kv_heads, spec.d_k, spec.d_v, spec.scale, kind=spec.kind)
    chosen, whole = (Holder(each, args.sequences, args.context, args.threads) for each in (spec, plain))
    rounds: list[tuple[float, float]] = []
    end = time.perf_counter() + args.seconds
    while time.perf_counter() < end or len(rounds) < 5:
        rounds.append((chosen.step(), whole.step()))
    rounds = rounds[2:]
    ms = [statistics.median(each) * 1e3 for each in zip(*rounds, strict=True)]
    ratio = statistics.median(a / b for a, b in rounds)
    print(f"{args.shape}, {args.sequences} sequences of {args.context}, {args.threads} threads, {len(rounds)} rounds:")
    print(f"the index {ms[0]:.2f} ms, all keys {ms[1]:.2f} ms, ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
