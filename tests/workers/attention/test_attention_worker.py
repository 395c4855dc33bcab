"""One holder behind its messages: what it answers, against attention by its definition, and what it refuses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import pytest
import torch
from engine_rig import DEVICE
from kv_pools import pool_of

from lamina_protocols.errors import ProtocolError
from lamina_protocols.messages.layers import HolderConfig, Index, LayerSpec
from lamina_protocols.messages.messages import (
    Announced,
    Announcement,
    Attended,
    Close,
    Fetch,
    FetchPages,
    Fork,
    Fresh,
    Open,
    Operation,
    Query,
    Row,
)
from lamina_workers.attention_worker.device_worker import attention_worker
from lamina_workers.errors import KVError, PolicyError
from lamina_workers.kv_pages.head_policies import HeadPolicies

FULL = LayerSpec(kv_layer=0, heads=6, kv_heads=2, d_k=16, d_v=32, scale=0.3)
CONFIG = HolderConfig(
    layers=(FULL, dataclasses.replace(FULL, kv_layer=1, window=7, soft_cap=5.0)),
    page_size=16,
    dtype="float32",
    kv_memory=20 * 16 * (16 + 32) * 4,  # 20 pages
)
WHOLE = Open(1, 0, (0, 1), 0, 1000)


class Client:
    """Speaks to a worker."""

    def __init__(self, config: HolderConfig = CONFIG, device: str = DEVICE) -> None:
        self.layers = config.layers
        self.worker = attention_worker(config, device=torch.device(device))
        self.batch = 0
        self.operations = 0
        self.generator = torch.Generator().manual_seed(0)

    def announce(
        self, operations: Sequence[Operation] = (), rows: Sequence[Row] = (), first: int | None = None, epoch: int = 1
    ) -> Announced:
        self.batch += 1
        first = self.operations if first is None else first
        reply = self.worker.handle(Announcement(epoch, self.batch, first, tuple(operations), tuple(rows)))
        assert isinstance(reply, Announced)
        assert (reply.epoch, reply.batch, reply.free_pages) == (epoch, self.batch, self.worker.free_pages)
        self.worker.check_integrity()
        if reply.accepted:
            self.operations = max(self.operations, first + len(operations))
        return reply

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def fresh(self, n: int, layer: int = 0) -> Fresh:
        spec = self.layers[layer]
        return Fresh(1, self.batch, layer, self.random(n, spec.key_width), self.random(n, spec.d_v))

    def query(self, n: int, layer: int = 0) -> Query:
        return Query(1, self.batch, layer, self.random(n, 16))


@pytest.mark.fault("F07")
def test_only_newer_announcements_are_taken() -> None:
    client = Client()
    client.announce([WHOLE], epoch=3)
    for epoch, batch in ((3, 1), (3, 0), (2, 9)):
        client.batch = batch - 1
        with pytest.raises(ProtocolError, match=rf"\({epoch}, {batch}\) is not newer than \(3, 1\)"):
            client.announce([Close(1)], epoch=epoch)
    client.batch = 0
    client.announce(rows=[Row(1, 0, 1, None, True)], epoch=4)


@pytest.mark.fault("F07")
def test_no_operation_is_left_out_and_none_is_applied_twice() -> None:
    client = Client()
    with pytest.raises(ProtocolError, match="operation 1 announced, 0 has not come yet"):
        client.announce([WHOLE], first=1)
    client.announce([WHOLE, Open(2, 0, (0, 1), 0, 9)])
    client.announce([WHOLE, Open(2, 0, (0, 1), 0, 9), Close(1)], first=0)
    client.announce([Open(2, 0, (0, 1), 0, 9)], first=1)
    client.announce([Open(3, 0, (0, 1), 0, 9)], first=3)
    with pytest.raises(KVError, match="no part has handle 1"):
        client.announce([], [Row(1, 0, 1, None, True)])
    client.announce([], [Row(2, 0, 1, None, True), Row(3, 0, 1, None, True)])


@pytest.mark.fault("F04")
@pytest.mark.parametrize(
    "supersede",
    [
        lambda client: client.announce(rows=[Row(1, 3, 1, None, True)]),
        lambda client: client.announce([Fork(3, 2, 0), Close(1)]),
        lambda client: client.announce(epoch=2),
        lambda client: client.announce(rows=[Row(1, 0, 900, None, True)]),  # even if it is refused
    ],
)
def test_late_messages_of_a_dropped_batch_are_refused(supersede: Callable[[Client], Announced]) -> None:
    client = Client()
    client.announce([WHOLE, Open(2, 0, (0, 1), 0, 9)], [Row(1, 0, 3, (0, 3), True)])
    fresh, query = client.fresh(6), client.query(18)
    client.worker.handle(fresh)
    before = pool_of(client.worker).pages.arena.clone()
    supersede(client)
    for late in (dataclasses.replace(fresh, k=fresh.k + 1), query):
        with pytest.raises(ProtocolError, match="batch 1 of epoch 1 is not in flight"):
            client.worker.handle(late)
    assert torch.equal(pool_of(client.worker).pages.arena, before)


def test_disjoint_batches_are_in_flight_together() -> None:
    client = Client()
    client.announce([WHOLE, Open(2, 0, (0, 1), 0, 9)], [Row(1, 0, 3, (0, 3), True)])
    fresh, query = client.fresh(6), client.query(18)
    client.announce(rows=[Row(2, 0, 1, None, True)])
    client.worker.handle(client.fresh(2))
    client.worker.handle(fresh)
    assert isinstance(client.worker.handle(query), Attended)


def test_rows_that_cannot_be_planned_make_no_batch_but_their_operations_count() -> None:
    client = Client()
    client.announce([Open(1, 0, (0, 1), 0, 16)], [Row(1, 0, 16, None, True)])
    for layer in range(2):
        client.worker.handle(client.fresh(32, layer))
    with pytest.raises(ProtocolError, match="allowed: below 2"):
        client.announce([Open(2, 0, (0, 1), 0, 9)], [Row(1, 2**31, 1, (0, 16), False)])
    with pytest.raises(ProtocolError, match="is not in flight"):
        client.worker.handle(client.query(6))
    client.announce([Open(2, 0, (0, 1), 0, 9), Open(3, 0, (0, 1), 0, 9)], [Row(2, 0, 1, None, True)], first=1)
    client.worker.handle(client.fresh(2))


def test_a_row_of_more_tokens_than_a_frame_can_carry_is_refused_before_it_takes_memory() -> None:
    """A row of 2^24 tokens that reads took a worker 1.9 s and 270 MB, and larger ones were allowed."""
    client = Client()
    with pytest.raises(ProtocolError, match="rows of 67108864 tokens times heads, allowed: "):
        client.announce([Open(1, 0, (0, 1), 0, 9)], [Row(1, 0, 1 << 25, (0, 0), False)])


def test_batches_in_flight_are_bounded_by_their_tokens() -> None:
    """A batch stayed until one of its handles came again: 200 large ones took a worker with 256 MB of KV 2.7 GB."""
    client = Client()
    pool_of(client.worker).most_heads = 1 << 16
    client.announce([Open(handle, 0, (0, 1), 0, 9) for handle in range(1, 31)])
    for handle in range(1, 31):
        assert client.announce((), [Row(handle, 0, 1 << 15, (0, 0), False)]).accepted
    kept = [number for number in range(40) if client.worker.in_flight(number)]
    assert kept == list(range(client.batch - 6, client.batch + 1))


def test_what_does_not_fit_a_batch_is_refused() -> None:
    client = Client()
    client.announce([WHOLE], [Row(1, 0, 3, (0, 3), True)])
    good, query = client.fresh(6), client.query(18)
    for message, error in (
        (client.fresh(6, -1), "layer -1, there are 2"),
        (client.query(18, 2), "layer 2, there are 2"),
        (client.fresh(5), r"k must be \[6, 16\] .* got torch.float32 \[5, 16\]"),
        (client.fresh(0), r"k must be \[6, 16\] .* got torch.float32 \[0, 16\]"),
        (dataclasses.replace(good, v=good.v[1:]), r"v must be \[6, 32\] .* got torch.float32 \[5, 32\]"),
        (dataclasses.replace(good, k=good.v), r"k must be \[6, 16\] .* got torch.float32 \[6, 32\]"),
        (dataclasses.replace(good, k=good.k.flatten()), r"k must be \[6, 16\] .* got torch.float32 \[96\]"),
        (dataclasses.replace(good, k=good.k.to(torch.int8)), "k must be .* got torch.int8"),
        (client.query(17), r"q must be \[18, 16\] .* got torch.float32 \[17, 16\]"),
        (dataclasses.replace(query, q=query.q.to(torch.int8)), "q must be .* got torch.int8"),
    ):
        with pytest.raises(ProtocolError, match=error):
            client.worker.handle(message)
    client.worker.handle(good)
    client.worker.handle(client.fresh(6, 1))
    client.worker.handle(query)
    client.announce(rows=[Row(1, 3, 1, (0, 3), False)])
    for n in (0, 2):
        with pytest.raises(ProtocolError, match=f"{n} fresh vectors for batch 2, which stores 0"):
            client.worker.handle(client.fresh(n))


@pytest.mark.parametrize("lost", [0, 1])
def test_a_row_above_what_has_come_in_every_layer_is_refused(lost: int) -> None:
    """A holder took its own reservation for what it has stored: after a lost `Fresh` it attended whatever the pages had
    before, and only the engine's notes of faults could prevent that."""
    client = Client()
    client.announce([WHOLE], [Row(1, 0, 20, None, True)])
    for layer in range(2):
        client.worker.handle(client.fresh(40, layer))
    for start in (20, 21, 22):  # each made of the one before
        assert client.announce(rows=[Row(1, start, 1, (0, start + 1), True)]).accepted
        for layer in range(2):
            if (start, layer) != (22, lost):
                client.worker.handle(client.fresh(2, layer))
    for row in (Row(1, 23, 1, (0, 24), True), Row(1, 23, 1, (0, 23), True), Row(1, 23, 1, (0, 20), False)):
        answer = client.announce([Fork(2, 1, 23), Fork(3, 1, 22)], [row])
        assert (answer.accepted, answer.starts) == (False, (22,))
    assert client.announce([Fork(2, 1, 23), Fork(3, 1, 22)]).accepted
    rows = [Row(handle, start, 1, (0, start), False) for handle, start in ((2, 23), (3, 22))]
    assert client.announce(rows=rows).starts == (22, 22)
    assert client.announce(rows=[rows[1]]).accepted
    assert client.announce(rows=[Row(1, 22, 2, (0, 24), True)]).accepted


def test_kv_that_has_not_come_in_every_layer_is_not_given_to_others() -> None:
    client = Client()
    client.announce([WHOLE], [Row(1, 0, 20, None, True)])
    for layer in range(2):
        client.worker.handle(client.fresh(40, layer))
    client.announce(rows=[Row(1, 20, 5, None, True)])
    client.worker.handle(client.fresh(10))
    for message in (Fetch(1, 9, 0, 1, 0, 21), FetchPages(1, 9, 0, 1, 1, 0, 21)):
        with pytest.raises(KVError, match=r"it holds \[0, 20\)"):
            client.worker.handle(message)


# Layers with an index, which a holder reads whole.

INDEXED = dataclasses.replace(FULL, d_v=16, index=Index(width=16, heads=1, block=16, top=2, local=1))


def indexed() -> Client:
    return Client(HolderConfig((INDEXED,), 16, "float32", 1 << 20), "cpu")


@pytest.mark.parametrize("read", [(0, 40), (16, 41), (0, 16)])
def test_rows_that_lack_keys_are_refused(read: tuple[int, int]) -> None:
    client = indexed()
    client.announce([WHOLE], [Row(1, 0, 40, (0, 40), True)])
    client.worker.handle(client.fresh(80))
    with pytest.raises(ProtocolError, match=r"an index reads \[0, 41\) of part 1, not"):
        client.announce(rows=[Row(1, 40, 1, read, read[1] > 40)])


def test_queries_of_another_width_are_refused() -> None:
    client = indexed()
    client.announce([WHOLE], [Row(1, 0, 1, (0, 1), True)])
    client.worker.handle(client.fresh(2))
    with pytest.raises(ProtocolError, match=r"q must be \[6, 22\], got \[6, 16\]"):
        client.worker.handle(client.query(6))


def test_a_policy_beside_an_index_is_refused() -> None:
    spec = dataclasses.replace(INDEXED, policies=("full", "page_top_k"))
    with pytest.raises(PolicyError, match=r"index chooses what a layer reads; its policy is page_top_k, allowed: full"):
        HeadPolicies.of(HolderConfig((spec,), 16, "float32", 1 << 20))
