#!/usr/bin/env python3
"""An engine that owns its blocks, without Lamina's code: what crosses between it and an attention worker.

    lamina attention-worker --listen 127.0.0.1:7311 --kv-memory 1GiB
    scripts/reference_client.py 127.0.0.1:7311

It computes a few steps of two sequences that share a block, and compares each answer with attention by its definition.
Other channels (Unix socket, TCP, TLS) carry the same frames; Lamina's own client is `lamina/behind/block_tier.py`.

Calls, each a msgpack array of its fields in order, of the gRPC service `lamina.Attention`:

    Hello      protocol 8, version, session (16 to 64 characters), model, dtype of q and out, dtype of stored KV, tokens
               of a block, layers, local socket wanted, "grpc" | "tcp", engine (16 to 64 hexadecimal characters), seat,
               share of the memory (part, of), seconds that KV outlives the session, 4096, false, [], blocks, and of
               each layer the number of its block table
    a layer    layer whose KV it reads, heads, KV heads, d_k, d_v, scale, window | nil, soft cap | nil, "attention",
               policies (a text a KV head, or none), nil, 0, 0, []
    Heartbeat  session: within the lease, of which Welcome tells the seconds
    Goodbye    engine, seat, session
    Batch      the stream of frames, with the session in its metadata; a message is a frame, or the next piece of one

Frames: a prefix "LMNA", layout u16 = 7, tag u16, header bytes u32, payload bytes u64, all little-endian; then the
header; then tensors. A step is one BlockTables (tag 21) for each block table, answered by Announced (tag 2), then for
each layer an Exchange (tag 7), answered by Attended (tag 5). A Fault (tag 6) says why something was refused.

    BlockTables   msgpack [epoch, batch, table, ["i32", rows + 1], ["i32", rows], ["i32", rows, width]]; its tensors
                  query_start_loc, seq_lens, block_table begin at multiples of 64 of the payload
    Exchange      epoch i64, batch i64, vectors of q u32, of k u32, d_k u16, d_v u16, dtype of q u8, of k and v u8, d_q
                  u16, 4 zeros, layer u32, 0 f32; q, k, v at multiples of 64 of the frame: by token, then head
    Attended      the same header, of out; then out, and lse in float32: log-sum-exp of each query's logits
"""

from __future__ import annotations

import queue
import secrets
import struct
import sys
from collections.abc import Iterator
from typing import Any

import grpc
import msgpack
import numpy as np

HEADS, KV_HEADS, WIDTH, BLOCK, BLOCKS, LAYERS = 4, 2, 32, 16, 64, 2
PREFIX, LAYER = struct.Struct("<4sHHIQ"), struct.Struct("<qqIIHHBBH4xIf")
ANNOUNCED, ATTENDED, FAULT, EXCHANGE, BLOCK_TABLES, FLOAT32 = 2, 5, 6, 7, 21, 1
Array = np.ndarray[Any, Any]


class Worker:
    """One worker, over one gRPC connection."""

    def __init__(self, address: str) -> None:
        self.session, self.engine = secrets.token_hex(16), secrets.token_hex(16)
        self.channel = grpc.insecure_channel(address, [("grpc.enable_http_proxy", 0)])
        layers = [
            [number, HEADS, KV_HEADS, WIDTH, WIDTH, WIDTH**-0.5, None, None, "attention", [], None, 0, 0, []]
            for number in range(LAYERS)
        ]
        hello = [
            8, "reference", self.session, "reference", "float32", "float32", BLOCK, layers, False, "grpc", self.engine,
            0, [1, 1], 0.0, 4096, False, [], BLOCKS, [0] * LAYERS,
        ]  # fmt: skip
        welcome = msgpack.unpackb(self.call("Hello", hello))
        print(f"{welcome[0]}: {welcome[1]} bytes of KV memory, lease {welcome[3]:g} s")
        self.outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        metadata = (("lamina-session", self.session), ("lamina-checksum", "0"))
        self.incoming = self.channel.stream_stream("/lamina.Attention/Batch")(
            iter(self.outgoing.get, None), metadata=metadata
        )
        self.batch = 0

    def call(self, name: str, fields: list[Any]) -> bytes:
        answer: bytes = self.channel.unary_unary(f"/lamina.Attention/{name}")(msgpack.packb(fields), timeout=60)
        return answer

    def announce(self, starts: list[int], lengths: list[int], blocks: list[list[int]]) -> None:
        """A step: where each row's queries begin, its length, its blocks."""
        self.batch += 1
        table = np.full((len(blocks), max(map(len, blocks))), -1, np.int32)
        for row, numbers in enumerate(blocks):
            table[row, : len(numbers)] = numbers
        tensors = [np.array(starts, np.int32), np.array(lengths, np.int32), table]
        header = msgpack.packb([1, self.batch, 0, *(["i32", *tensor.shape] for tensor in tensors)])
        self.send(BLOCK_TABLES, header, aligned(tensors, 0))
        answer = msgpack.unpackb(self.receive(ANNOUNCED)[0])
        if not answer[2]:
            raise RuntimeError(f"the worker refuses the step: {answer[5]}")

    def attend(self, layer: int, q: Array, k: Array, v: Array) -> Array:
        """q `[tokens, heads, d]`, k and v `[tokens, KV heads, d]`, float32: the output, `[tokens, heads, d]`."""
        counts = len(q) * HEADS, len(k) * KV_HEADS
        header = LAYER.pack(1, self.batch, *counts, WIDTH, WIDTH, FLOAT32, FLOAT32, WIDTH, layer, 0.0)
        self.send(EXCHANGE, header, aligned([q, k, v], PREFIX.size + LAYER.size))
        _, payload = self.receive(ATTENDED)
        return np.frombuffer(payload, np.float32, counts[0] * WIDTH).reshape(q.shape)

    def send(self, tag: int, header: bytes, payload: bytes) -> None:
        frame = PREFIX.pack(b"LMNA", 7, tag, len(header), len(payload)) + header + payload
        for begin in range(0, len(frame), 4 << 20):  # gRPC takes messages up to 4 MiB
            self.outgoing.put(frame[begin : begin + (4 << 20)])

    def receive(self, expected: int) -> tuple[bytes, bytes]:
        """Header and payload of the next frame."""
        frame = next(self.incoming)
        _, _, tag, header, payload = PREFIX.unpack_from(frame)
        while len(frame) < PREFIX.size + header + payload:
            frame += next(self.incoming)
        content = frame[PREFIX.size : PREFIX.size + header]
        if tag == FAULT:
            raise RuntimeError(msgpack.unpackb(content)[2])
        if tag != expected:
            raise RuntimeError(f"a frame with tag {tag} came, expected {expected}")
        return content, frame[PREFIX.size + header :]

    def close(self) -> None:
        self.call("Goodbye", [self.engine, 0, self.session])
        self.outgoing.put(None)
        self.channel.close()


def aligned(tensors: list[Array], start: int) -> bytes:
    """Their bytes, each from a multiple of 64 on, where the first byte has the place `start`."""
    data = b""
    for tensor in tensors:
        data += bytes(-(start + len(data)) % 64) + tensor.tobytes()
    return data


class Sequence:
    """Its blocks, and K and V of its tokens in each layer."""

    def __init__(self, blocks: list[int], source: Sequence | None = None) -> None:
        self.blocks = blocks
        empty = np.empty((0, KV_HEADS, WIDTH), np.float32)
        shared = BLOCK if source else 0
        self.keys = [(source.keys[layer] if source else empty)[:shared] for layer in range(LAYERS)]
        self.values = [(source.values[layer] if source else empty)[:shared] for layer in range(LAYERS)]

    def attend(self, layer: int, q: Array, k: Array, v: Array) -> Array:
        """By the definition, in float64."""
        self.keys[layer] = np.concatenate([self.keys[layer], k])
        self.values[layer] = np.concatenate([self.values[layer], v])
        keys, values = (
            np.repeat(x, HEADS // KV_HEADS, 1).astype(np.float64) for x in (self.keys[layer], self.values[layer])
        )
        logits = np.einsum("qhd,khd->hqk", q, keys) * WIDTH**-0.5
        positions = np.arange(len(keys))
        logits[:, positions > positions[len(keys) - len(q) :, None]] = -np.inf
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        answer: Array = np.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdims=True), values)
        return answer


def steps() -> Iterator[list[tuple[Sequence, int]]]:
    """The rows of each step: a sequence, and how many tokens are new."""
    first = Sequence([7, 3, 12])
    yield [(first, 20)]  # a prompt
    second = Sequence([7, 9, 30], first)  # begins with the first one's first block
    yield [(first, 1), (second, 5)]  # a token of the one, a chunk of the other
    for _ in range(12):
        yield [(second, 1), (first, 1)]


def main(address: str) -> int:
    worker, random = Worker(address), np.random.default_rng(0)
    worst = 0.0
    for rows in steps():
        counts = [count for _, count in rows]
        starts = [0, *np.cumsum(counts).tolist()]
        worker.announce(starts, [len(row.keys[0]) + count for row, count in rows], [row.blocks for row, _ in rows])
        for layer in range(LAYERS):
            q, k, v = (
                random.standard_normal((starts[-1], heads, WIDTH), np.float32) for heads in (HEADS, KV_HEADS, KV_HEADS)
            )
            out = worker.attend(layer, q, k, v)
            for (row, _), begin, end in zip(rows, starts, starts[1:], strict=False):
                right = row.attend(layer, q[begin:end], k[begin:end], v[begin:end])
                worst = max(worst, float(np.abs(out[begin:end] - right).max()))
    worker.call("Heartbeat", [worker.session])
    worker.close()
    print(f"{worker.batch} steps; the largest difference to float64 is {worst:.1e}")
    return int(worst > 1e-4)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]) if len(sys.argv) == 2 else f"usage: {sys.argv[0]} HOST:PORT")
