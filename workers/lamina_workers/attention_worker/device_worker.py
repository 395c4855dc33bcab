"""An attention worker whose pages lie on a device: what comes from the host is staged to it, answers are staged back.

All work on pages is put on one stream, whichever lane it serves, so pages are read and written in the order of the
messages.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lamina_protocols.messages.layers import BlockConfig, HolderConfig
from lamina_protocols.messages.messages import Attended, Exchange, Fresh, Query, Reply, Request
from lamina_workers.attention_worker.attention_worker import AttentionWorker
from lamina_workers.attention_worker.block_worker import BlockWorker
from lamina_workers.attention_worker.page_layout import CPU
from lamina_workers.devices.staging import Cuda, Staged

Tensors = dict[str, Any]  # of a message, by field: what `dataclasses.replace` takes


def attention_worker(config: HolderConfig, threads: int = 1, device: torch.device = CPU) -> AttentionWorker:
    """The attention worker of a device. Raises as its class does."""
    if isinstance(config, BlockConfig):
        return (
            BlockWorker(config, threads) if device.type == "cpu" else DeviceBlockWorker(config, threads, Cuda(device))
        )
    return AttentionWorker(config, threads) if device.type == "cpu" else DeviceWorker(config, threads, Cuda(device))


class DeviceWorker(AttentionWorker):
    """Tensors that come from the device are answered on the device, those from the host on the host.

    A batch under way has buffers of its own. An answer may be read until the second message of its batch after it.
    """

    def __init__(self, config: HolderConfig, threads: int, runtime: Cuda) -> None:
        self._runtime = runtime
        self._stream = runtime.stream()
        self._ways: dict[int, Staged] = {}  # by batch under way
        self._idle: list[Staged] = []
        with self._in_order():
            super().__init__(config, threads, runtime.device)

    def handle(self, request: Request) -> Reply | None:
        with self._in_order():
            reply = self._handle(request)
        if isinstance(reply, Attended) and self._runtime.here(reply.out):
            for x in (reply.out, reply.lse):  # made on this worker's stream, read on the caller's
                self._runtime.keep(x)
        return reply

    def layer_work(self, number: int, pool: int) -> None:
        """Its work is put on a stream, which needs Python."""

    def settle(self) -> None:
        if self.unsettled is not None:
            with self._in_order():
                super().settle()

    def _handle(self, request: Request) -> Reply | None:
        if isinstance(request, (Query, Fresh, Exchange)) and request.batch in self._batches:
            tensors = _tensors(request)
            if not all(map(self._runtime.here, tensors.values())):
                return self._staged(request, tensors)
            for x in tensors.values():
                self._runtime.keep(x)
        reply = super().handle(request)
        for batch in self._ways.keys() - self._batches.keys():
            self._idle.append(self._ways.pop(batch))
        return reply

    def _staged(self, request: Query | Fresh | Exchange, tensors: Tensors) -> Reply | None:
        way = self._ways.get(request.batch)
        if way is None:
            way = self._ways[request.batch] = self._idle.pop() if self._idle else Staged(self._runtime)
        way.turn()
        moved: Tensors = {name: way.up(x) for name, x in tensors.items()}
        reply = super().handle(dataclasses.replace(request, **moved))
        if isinstance(reply, Attended):
            reply = dataclasses.replace(reply, out=way.down(reply.out), lse=way.down(reply.lse))
            way.landed()
        return reply

    @contextmanager
    def _in_order(self) -> Iterator[None]:
        """Put work on the worker's stream, behind what the caller's stream has to do and before what it gets next."""
        caller = self._runtime.current()
        self._runtime.follow(self._stream, caller)
        try:
            with self._runtime.using(self._stream):
                yield
        finally:
            self._runtime.follow(caller, self._stream)


class DeviceBlockWorker(DeviceWorker, BlockWorker):
    """The same of a worker whose blocks are the engine's."""


def _tensors(request: Query | Fresh | Exchange) -> Tensors:
    return {name: getattr(request, name) for name in ("q", "k", "v") if hasattr(request, name)}
