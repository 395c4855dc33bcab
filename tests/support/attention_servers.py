"""Attention workers to connect to, over every kind of channel."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

from lamina_protocols.channels import control
from lamina_protocols.channels.versions import PROTOCOL_VERSION
from lamina_protocols.messages.layers import HolderConfig, LayerSpec
from lamina_protocols.messages.messages import Announced, Announcement, Attended, Exchange, Fresh, Open, Row
from lamina_workers.attention_server.attention_server import AttentionServer, ServerConfig
from lamina_workers.ports.data_channel import ChannelOptions
from lamina_workers.ports.remote import RemoteAttention, SeatOptions, connect

FULL = LayerSpec(kv_layer=0, heads=6, kv_heads=2, d_k=16, d_v=32, scale=0.3)


LAYERS = (FULL, dataclasses.replace(FULL, kv_layer=1, window=7))


PAGES = 40


KV_MEMORY = PAGES * 16 * (16 + 32) * 4


ASKED: dict[str, Any] = {
    "name": "a",
    "layers": LAYERS,
    "page_size": 16,
    "kv_dtype": "float32",
    "compute_dtype": "float32",
    "model": "tiny",
    "timeout": 10.0,
}


def open_port(address: str, **asked: Any) -> RemoteAttention:
    """A port to the worker there, by names of `ASKED` and of the fields of `SeatOptions` and `ChannelOptions`."""
    seat, channel = (
        cls(**{each.name: asked.pop(each.name) for each in dataclasses.fields(cls) if each.name in asked})
        for cls in (SeatOptions, ChannelOptions)
    )
    holder = HolderConfig(asked.pop("layers"), asked.pop("page_size"), asked.pop("kv_dtype"), kv_memory=0)
    return connect(address, **asked, holder=holder, seat=seat, channel=channel)


WAYS = {
    "local": {},
    "grpc": {"local_channel": False},
    "grpc+sum": {"local_channel": False, "checksum": True},
    "tcp": {"local_channel": False, "data_channel": "tcp"},
    "tcp+sum": {"local_channel": False, "data_channel": "tcp", "checksum": True},
}


def hello(**changes: Any) -> control.Hello:
    """What asks for a seat, by gRPC alone."""
    plain = control.Hello(
        PROTOCOL_VERSION, control.package_version(), "s" * 32, "m", "float32", "float32", 16, LAYERS, True, "grpc",
        "e" * 32, 0, (1, 1), 0.0,
    )  # fmt: skip
    return dataclasses.replace(plain, **changes)


@contextlib.contextmanager
def running(**changes: Any) -> Iterator[tuple[AttentionServer, str]]:
    server = AttentionServer(ServerConfig(**{"name": "w", "kv_memory": KV_MEMORY, **changes}))
    address = server.start()
    try:
        yield server, address
    finally:
        server.stop(0)


@contextlib.contextmanager
def connected(address: str, **changes: Any) -> Iterator[RemoteAttention]:
    port = open_port(address, **{**ASKED, **changes})
    try:
        yield port
    finally:
        port.close()
        port.parted()


def until(condition, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def one_batch(port: RemoteAttention) -> None:
    """Store three tokens, attend them, and compare with attention by its definition."""
    k, v, q = torch.randn(3, 2, 16), torch.randn(3, 2, 32), torch.randn(1, 2, 3, 16)
    port.send(Announcement(1, 1, 0, (Open(1, 0, (0, 1), 0, 100),), (Row(1, 0, 3, None, True),)))
    announced = port.receive(10)
    assert isinstance(announced, Announced)
    assert (announced.accepted, announced.free_pages) == (True, (PAGES - 4,))
    for layer in range(len(LAYERS)):
        port.send(Fresh(1, 1, layer, k.view(-1, 16), v.view(-1, 32)))
    port.send(Announcement(1, 2, 1, (), (Row(1, 3, 1, (0, 3), True),)))
    assert isinstance(port.receive(10), Announced)
    port.send(Exchange(1, 2, 0, q.view(-1, 16), k[0], v[0]))
    reply = port.receive(10)
    assert isinstance(reply, Attended)
    logits = torch.einsum("thgd,khd->thgk", q, k) * FULL.scale
    expected = torch.einsum("thgk,khd->thgd", logits.softmax(-1), v)
    torch.testing.assert_close(reply.out, expected.reshape(-1, 32))
    torch.testing.assert_close(reply.lse, logits.logsumexp(-1).flatten())


@contextlib.contextmanager
def process(*flags: str, **kwargs: Any):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "lamina_workers.attention_main",
            "--kv-memory",
            str(KV_MEMORY),
            "--threads",
            "1",
            *flags,
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **kwargs,
    )
    try:
        yield child
    finally:
        child.kill()
        child.communicate()
