"""A batch through layers of two shapes, at holders here and elsewhere, against attention by its definition."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from attention_servers import WAYS, connected, running
from pairwise import crossing
from two_pools import attend, pool_numbers, two_pools

from lamina_protocols.messages.layers import HolderConfig
from lamina_protocols.messages.messages import Announced, Announcement, Close, Open, Operation, Row
from lamina_protocols.messages.routes import Route, Span
from lamina_workers.attention_worker.attention_worker import AttentionWorker
from lamina_workers.decoder.model import KeyValueReady, QueryReady
from lamina_workers.model_worker.attention_merge import AttentionMerge
from lamina_workers.model_worker.compiled_exchange import CompiledExchange
from lamina_workers.model_worker.interface import result
from lamina_workers.ports.direct import enabled
from lamina_workers.ports.port import AttentionPort, LocalAttention, Replies

Heads = Sequence[Sequence[tuple[int, ...]]]  # by holder, then pool
WHOLE: Heads = [[(0, 1, 2, 3), (0, 1)]]
SPLIT: Heads = [[(0, 2), (1,)], [(3, 1), (0,)]]
APART: Heads = [[(0, 1, 2, 3), ()], [(), (0, 1)]]  # each holder has one pool's parts alone


class World:
    """A merge and holders, each with these heads of each pool. All sequences' k and v are drawn beforehand."""

    def __init__(self, config: HolderConfig, ports: Sequence[AttentionPort], heads: Heads, sequences: int) -> None:
        self.config = config
        self.merge = AttentionMerge(config, patience=60.0)
        self.replies = [Replies(port) for port in ports]
        self.heads = heads
        self.pool_of_layer = pool_numbers(config)
        self.batch = 0
        self.done = [0] * len(ports)  # operations
        draw = torch.Generator().manual_seed(5)
        self.k, self.v = (
            [[torch.randn(200, s.kv_heads, s.d_k, generator=draw) for s in config.layers] for _ in range(sequences)]
            for _ in range(2)
        )
        self.draw = draw

    def handle(self, sequence: int, pool: int) -> int:
        return 2 * sequence + pool

    def run(self, spans: Mapping[int, Span], fused: bool, early: bool = False, opens: bool = False) -> None:
        """One batch of these spans of sequences, compared layer by layer."""
        self.batch += 1
        routes: dict[Replies, list[Route]] = {}
        for number, replies in enumerate(self.replies):
            routed = [
                self.route(source, sequence, span, pool, heads, fused)
                for source, (sequence, span) in enumerate(spans.items())
                for pool, heads in enumerate(self.heads[number])
                if heads
            ]
            opened = [Open(route.row.handle, route.pool, route.heads, 0, 1000) for route in routed] if opens else []
            self.announce(number, opened, [route.row for route in routed])
            routes[replies] = routed
        forward = self.forward(spans, early)
        found = result(self.merge.run(forward, 1, self.batch, list(spans.values()), routes))
        assert found.item() == len(self.config.layers)

    def route(self, source: int, sequence: int, span: Span, pool: int, heads: tuple[int, ...], fused: bool) -> Route:
        end = span.start + span.count if fused else span.start
        row = Row(self.handle(sequence, pool), span.start, span.count, (0, end) if end else None, True)
        return Route(source, heads, row, (span.start, span.start + span.count), pool)

    def announce(self, number: int, operations: Sequence[Operation], rows: Sequence[Row]) -> None:
        replies = self.replies[number]
        replies.expect(1, self.batch)
        replies.port.send(Announcement(1, self.batch, self.done[number], tuple(operations), tuple(rows)))
        self.done[number] += len(operations)
        assert replies.take(Announced, self.batch, timeout=60.0).accepted
        replies.accepted(self.batch)

    def forward(
        self, spans: Mapping[int, Span], early: bool
    ) -> Generator[QueryReady | KeyValueReady, torch.Tensor | None, torch.Tensor]:
        for layer, spec in enumerate(self.config.layers):
            qs = [torch.randn(span.count, spec.heads, spec.d_k, generator=self.draw) for span in spans.values()]
            yield QueryReady(layer, torch.cat(qs), early)
            k, v = (
                torch.cat([of[sequence][layer][x.start : x.start + x.count] for sequence, x in spans.items()])
                for of in (self.k, self.v)
            )
            if spec.kv_layer != layer:  # the driver is given what that layer has stored
                k, v = (
                    torch.cat([of[s][spec.kv_layer][x.start : x.start + x.count] for s, x in spans.items()])
                    for of in (self.k, self.v)
                )
            found = yield KeyValueReady(layer, k, v)
            assert found is not None
            due = [
                attend(spec, q, self.k[s][spec.kv_layer], self.v[s][spec.kv_layer], x.start, (0, x.start + x.count))[0]
                for q, (s, x) in zip(qs, spans.items(), strict=True)
            ]
            torch.testing.assert_close(found.flatten(1), torch.cat(due).flatten(1), rtol=1e-5, atol=2e-5)
        return torch.tensor(len(self.config.layers))


@contextlib.contextmanager
def ports_of(way: str, config: HolderConfig, count: int) -> Iterator[list[AttentionPort]]:
    if way == "here":
        yield [LocalAttention(AttentionWorker(config)) for _ in range(count)]
        return
    with contextlib.ExitStack() as stack:
        ports: list[AttentionPort] = []
        for _ in range(count):
            _, address = stack.enter_context(running(kv_memory=config.kv_memory))
            asked = {"layers": config.layers, **WAYS[way]}
            ports.append(stack.enter_context(connected(address, **asked)))
        yield ports


@crossing(
    heads={"whole": WHOLE, "split": SPLIT, "apart": APART},
    way=("here", "local", "tcp", "grpc"),
    window=(40, None),
    early=(False, True),
)
def test_prompts_and_decode_are_exact(
    way: str, window: int | None, early: bool, heads: Heads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decode of each pool goes without Python."""
    config, attended, attend_layer = two_pools(window), list[int](), CompiledExchange.attend

    def spied(self: CompiledExchange, layer: int, *args: Any) -> Any:
        attended.append(layer)
        return attend_layer(self, layer, *args)

    monkeypatch.setattr(CompiledExchange, "attend", spied)
    with ports_of(way, config, len(heads)) as ports:
        world = World(config, ports, heads, sequences=3)
        world.run({0: Span(0, 37), 1: Span(0, 5), 2: Span(0, 1)}, fused=False, opens=True)
        world.run({2: Span(1, 50), 0: Span(37, 1)}, fused=False, early=early)
        lengths = [38, 5, 51]
        attended.clear()
        for step in range(20):
            world.run({n: Span(length + step, 1) for n, length in enumerate(lengths)}, fused=True)
        for number in range(len(ports)):
            world.batch += 1
            handles = [world.handle(s, pool) for s in range(3) for pool in (0, 1) if heads[number][pool]]
            world.announce(number, [Close(handle) for handle in handles], [])
    if enabled() and window is None and heads is SPLIT:
        assert attended == list(range(len(config.layers))) * 20
