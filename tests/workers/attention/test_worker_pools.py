"""A worker with layers of two shapes: what it answers against tensors in a dict, and that it takes all or nothing."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_pools import pool_of
from two_pools import PAGES, SIZE, attend, pool_numbers, two_pools

from lamina_protocols.errors import LaminaError, ProtocolError
from lamina_protocols.messages.layers import HolderConfig
from lamina_protocols.messages.messages import (
    Advance,
    Announced,
    Announcement,
    Attended,
    Close,
    Constants,
    Exchange,
    Fetch,
    FetchPages,
    Fork,
    Fresh,
    FreshPages,
    Open,
    Operation,
    PartHeld,
    Query,
    Row,
    Survey,
    Surveyed,
)
from lamina_protocols.messages.pools import pools
from lamina_workers.attention_worker.attention_worker import AttentionWorker
from lamina_workers.errors import KVError, UnsupportedModelError

HEADS = (4, 2)  # KV heads of each pool


@dataclass
class Held:
    """What a part must hold. kv: by layer, k and v `[held - lo, heads, d]`."""

    pool: int
    heads: tuple[int, ...]
    lo: int
    hi: int
    kv: dict[int, tuple[torch.Tensor, torch.Tensor]]

    @property
    def end(self) -> int:
        return self.lo + len(next(iter(self.kv.values()))[0])


class Twin:
    """A worker, and beside it all that it holds, by handle."""

    def __init__(self, config: HolderConfig) -> None:
        self.config = config
        self.worker = AttentionWorker(config)
        self.pool_of_layer = pool_numbers(config)
        self.stored = {spec.kv_layer for spec in config.layers}
        self.held: dict[int, Held] = {}
        self.last = self.batch = self.operations = 0
        self.generator = torch.Generator().manual_seed(3)

    def announce(self, operations: Sequence[Operation], rows: Sequence[Row]) -> Announced:
        """Whatever is refused, by an answer or an error, nothing has changed in any pool."""
        self.batch += 1
        before = self.state()
        try:
            reply = self.worker.handle(Announcement(1, self.batch, self.operations, tuple(operations), tuple(rows)))
        except LaminaError:
            assert self.state() == before
            raise
        assert isinstance(reply, Announced)
        assert reply.free_pages == self.worker.free_pages
        if reply.accepted:
            self.operations += len(operations)
            for operation in operations:
                self.follow(operation)
        else:
            assert self.state() == before
        self.worker.check_integrity()
        return reply

    def state(self) -> list[Any]:
        found: list[Any] = []
        self.worker.settle()  # what the last message has left to do
        for number in range(len(self.worker.pools)):
            store = pool_of(self.worker, number).store
            used = {
                handle: (part.heads, part.lo, part.held, part.stored, part.freed.tolist(),
                         part.table[:, :, : -(-(part.held - part.lo) // SIZE)].tolist())
                for handle, part in store.parts().items()
            }  # fmt: skip
            found.append((used, store._pool._stack[: store.free_pages].tolist(), store._pool._references.tolist()))
        return found

    def follow(self, operation: Operation) -> None:
        match operation:
            case Open(handle, pool, heads, lo, hi):
                none = {
                    n: (torch.empty(0, len(heads), spec.d_k), torch.empty(0, len(heads), spec.d_v))
                    for n, spec in enumerate(self.config.layers)
                    if self.pool_of_layer[n] == pool and n in self.stored
                }
                self.held[handle] = Held(pool, heads, lo, hi, none)
            case Fork(handle, parent, length):
                of = self.held[parent]
                n = max(0, length - of.lo)
                kv = {layer: (k[:n], v[:n]) for layer, (k, v) in of.kv.items()}
                self.held[handle] = Held(of.pool, of.heads, of.lo, of.hi, kv)
            case Close(handle):
                del self.held[handle]

    def run(self, rows: Sequence[Row], together: bool) -> None:
        """All layers of the batch announced last, each with the rows of its pool."""
        for row in rows:
            of = self.held[row.handle]
            of.kv = {n: (k[: row.start - of.lo], v[: row.start - of.lo]) for n, (k, v) in of.kv.items()}
        for layer, spec in enumerate(self.config.layers):
            own = [row for row in rows if self.held[row.handle].pool == self.pool_of_layer[layer]]
            if own:
                self.layer(layer, spec, own, together)

    def layer(self, layer: int, spec: Any, own: list[Row], together: bool) -> None:
        heads = [len(self.held[row.handle].heads) for row in own]
        q = [self.random(r.count, h * spec.group, spec.d_k) for r, h in zip(own, heads, strict=True) if r.read]
        ids = 1, self.batch, layer
        flat = torch.cat([x.reshape(-1, spec.d_k) for x in q]) if q else torch.empty(0, spec.d_k)
        fused = any(row.fused for row in own)
        stores = layer in self.stored
        new = self.fresh(layer, spec, own) if stores else None
        if stores and fused:
            self.keep(layer, own, new)
        reply = None
        if new is not None and together and q:
            reply = self.worker.handle(Exchange(*ids, flat, *self.flat(new)))
        else:
            order = ["fresh", "query"] if fused else ["query", "fresh"]
            for what in order:
                if what == "fresh" and new is not None:
                    assert self.worker.handle(Fresh(*ids, *self.flat(new))) is None
                elif what == "query" and q:
                    reply = self.worker.handle(Query(*ids, flat))
        if q:
            assert isinstance(reply, Attended)
            self.compare(layer, spec, own, q, reply)
        if stores and not fused:
            self.keep(layer, own, new)

    def compare(self, layer: int, spec: Any, own: list[Row], q: list[torch.Tensor], reply: Attended) -> None:
        outs, lses = [], []
        reading = (row for row in own if row.read)
        for row, x in zip(reading, q, strict=True):
            of = self.held[row.handle]
            assert row.read is not None
            out, lse = attend(spec, x, *of.kv[spec.kv_layer], row.start, row.read, of.lo)
            outs.append(out.reshape(-1, spec.d_v))
            lses.append(lse.reshape(-1))
        torch.testing.assert_close(reply.out, torch.cat(outs), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(reply.lse, torch.cat(lses), rtol=1e-5, atol=1e-5)

    def fresh(self, layer: int, spec: Any, own: list[Row]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        shapes = [(row.count, len(self.held[row.handle].heads)) for row in own]
        return [(self.random(*shape, spec.d_k), self.random(*shape, spec.d_v)) for shape in shapes]

    @staticmethod
    def flat(new: list[tuple[torch.Tensor, torch.Tensor]]) -> list[torch.Tensor]:
        return [torch.cat([x[at].flatten(0, 1) for x in new]) for at in (0, 1)]

    def keep(self, layer: int, own: list[Row], new: Any) -> None:
        for row, fresh in zip(own, new, strict=True):
            kv = self.held[row.handle].kv
            kv[layer] = tuple(torch.cat(pair) for pair in zip(kv[layer], fresh, strict=True))  # type: ignore[assignment]

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def row(self, handle: int, count: int, fused: bool, back: int = 0) -> Row | None:
        """The next row of a part, which begins at most `back` tokens before its end."""
        of = self.held[handle]
        floor = self.worker.pools[of.pool].held(handle).floor
        start = max(of.lo, floor, of.end - back)
        count = min(count, of.hi - start)
        end = start + count if fused else start
        return Row(handle, start, count, (of.lo, end) if end > of.lo else None, True) if count > 0 else None


def drawn_operations(draw: Any, twin: Twin) -> list[Operation]:
    operations: list[Operation] = []
    free = sorted(twin.held)
    for kind in draw(st.lists(st.sampled_from(["open", "open", "fork", "close"]), max_size=3)):
        if kind == "open":
            twin.last += 1
            pool = draw(st.integers(0, 1))
            heads = draw(st.sampled_from([tuple(range(HEADS[pool])), (HEADS[pool] - 1,)]))
            lo = draw(st.sampled_from([0, 0, 5]))
            operations.append(Open(twin.last, pool, heads, lo, lo + draw(st.sampled_from([9, 1000]))))
        elif free:
            handle = free.pop(draw(st.integers(0, len(free) - 1)))
            of = twin.held[handle]
            if kind == "close":
                operations.append(Close(handle))
            else:
                twin.last += 1
                floor = twin.worker.pools[of.pool].held(handle).floor
                length = draw(st.integers(max(floor, of.lo), max(floor, of.end)))
                operations.append(Fork(twin.last, handle, min(length, of.end)))
    return operations


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_it_is_a_dict_of_tensors(data: st.DataObject) -> None:
    draw = data.draw
    twin = Twin(two_pools(draw(st.sampled_from([None, 40])), pages=24))
    for _ in range(draw(st.integers(1, 12))):
        if draw(st.booleans()):
            assert twin.announce(drawn_operations(draw, twin), ()).accepted
        chosen = draw(st.permutations(sorted(twin.held)))[: draw(st.integers(0, 5))]
        fused, together = draw(st.booleans()), draw(st.booleans())
        counts = [draw(st.sampled_from([1, 1, 7, 40])) for _ in chosen]
        back = draw(st.sampled_from([0, 0, 3]))
        rows = [row for h, n in zip(chosen, counts, strict=True) if (row := twin.row(h, n, fused, back))]
        for _ in range(draw(st.integers(1, 3))):  # the second and third batch may follow the first
            if not rows or not twin.announce([], rows).accepted:
                break
            twin.run(rows, together)
            rows = [row for h in chosen if (row := twin.row(h, 1, fused))]
    for handle in list(twin.held):
        assert twin.announce([Close(handle)], []).accepted
    assert twin.worker.free_pages == tuple(pool.n_pages for pool in twin.worker.pools)


WHOLE = [Open(1, 0, (0, 1, 2, 3), 0, 1000), Open(2, 1, (0, 1), 0, 1000)]


def twin_of_both(tokens: int) -> Twin:
    """Parts 1 and 2, in the one pool and in the other, hold so many tokens."""
    twin = Twin(two_pools(None))
    rows = [Row(1, 0, tokens, (0, tokens), True), Row(2, 0, tokens, (0, tokens), True)]
    assert twin.announce(WHOLE, rows).accepted
    twin.run(rows, together=True)
    return twin


def test_both_pools_have_the_pages_that_their_share_of_the_memory_holds() -> None:
    worker = AttentionWorker(two_pools())
    assert worker.free_pages == tuple(pool.n_pages for pool in worker.pools) == PAGES
    assert worker.page_layout == "; ".join(pool.layout for pool in worker.pools)


@pytest.mark.parametrize("short", [0, 1])
def test_an_announcement_for_which_one_pool_is_short_changes_no_pool(short: int) -> None:
    twin = twin_of_both(20)
    far = twin.worker.free_pages[short] * SIZE + 99
    counts = [far if pool == short else 5 for pool in (0, 1)]
    rows = [Row(handle, 20, count, None, True) for handle, count in zip((1, 2), counts, strict=True)]
    reply = twin.announce([Open(3, 1 - short, (0,), 0, 9), Fork(4, 1, 11), Fork(5, 2, 11)], rows)
    assert (reply.accepted, reply.starts) == (False, ())
    assert re.search(r"\d+ pages needed, \d+ of \d+ are free", reply.reason)
    assert set(twin.worker.pools[0].parts()) | set(twin.worker.pools[1].parts()) == {1, 2}
    with pytest.raises(ProtocolError, match="is not in flight"):
        twin.worker.handle(Query(1, twin.batch, 0, torch.zeros(8, 16)))
    assert twin.announce([Open(3, 1 - short, (0,), 0, 9)], []).accepted  # its number was not taken


def test_rows_that_need_what_is_torn_hear_where_all_rows_can_start() -> None:
    twin = twin_of_both(20)
    rows = [Row(2, 20, 3, (0, 23), True), Row(1, 20, 3, (0, 23), True)]
    assert twin.announce([], rows).accepted
    for layer in (0, 1):  # of the first pool nothing is missing, of the second one everything is
        k = torch.zeros(12, 16)
        assert twin.worker.handle(Fresh(1, twin.batch, layer, k, k)) is None
    later = [Row(2, 23, 1, (0, 24), True), Row(1, 23, 1, (0, 24), True)]
    reply = twin.announce([], later)
    assert (reply.accepted, reply.starts) == (False, (20, 23))
    assert "pages" not in reply.reason


@pytest.mark.parametrize(
    ("operations", "rows", "error"),
    [
        ([Open(3, 2, (0,), 0, 9)], [], "part 3 is in pool 2, there are 2"),
        ([Open(3, 1, (2,), 0, 9)], [], "allowed: different ones below 2"),
        ([Open(1, 1, (0,), 0, 9)], [], "handle 1 is in use"),
        ([Open(3, 0, (0,), 0, 9), Fork(3, 2, 4)], [], "handle 3 is in use"),
        ([Open(3, 0, (0,), 0, 9), Fork(4, 9, 4)], [], "no part has handle 9"),
        ([Close(2)], [Row(1, 20, 1, None, True), Row(2, 20, 1, None, True)], "no part has handle 2"),
        ([Fork(3, 1, 4)], [Row(1, 20, 1, None, True), Row(2, 20, 1, (0, 30), True)], "row reads"),
        ([Fork(3, 2, 4)], [Row(1, 20, 1, (0, 30), True), Row(2, 20, 1, None, True)], "row reads"),
    ],
)
def test_what_one_pool_does_not_allow_changes_no_pool(operations: list[Operation], rows: list[Row], error: str) -> None:
    twin = twin_of_both(20)
    with pytest.raises(KVError, match=error):
        twin.announce(operations, rows)
    twin.announce([], [Row(1, 20, 1, (0, 21), True), Row(2, 20, 1, (0, 21), True)])


def test_a_handle_may_be_closed_and_opened_in_the_other_pool_at_once() -> None:
    twin = twin_of_both(20)
    assert twin.announce([Close(1), Open(1, 1, (0, 1), 0, 9), Fork(7, 1, 0)], []).accepted
    assert [sorted(pool.parts()) for pool in twin.worker.pools] == [[], [1, 2, 7]]


def test_a_survey_names_the_pools_of_parts() -> None:
    twin = twin_of_both(20)
    assert twin.announce([Open(3, 0, (1,), 16, 99)], []).accepted
    reply = twin.worker.handle(Survey(1, 1))
    assert isinstance(reply, Surveyed)
    assert reply.parts == (
        PartHeld(1, 0, (0, 1, 2, 3), 0, 1000, 20, 0),
        PartHeld(2, 1, (0, 1), 0, 1000, 20, 0),
        PartHeld(3, 0, (1,), 16, 99, 16, 0),
    )


def test_what_is_not_of_the_layers_pool_is_refused() -> None:
    twin = twin_of_both(20)
    assert twin.announce([], [Row(2, 20, 1, (0, 21), True)]).accepted
    x, none = torch.zeros(4, 16), torch.empty(0)
    ids = 1, twin.batch
    for message, kind, error in (
        (Fresh(*ids, 0, x, x), ProtocolError, "which stores 0"),
        (Query(*ids, 0, torch.zeros(8, 16)), ProtocolError, "none of whose rows read"),
        (FreshPages(*ids, 0, 0, 1, torch.zeros(1, 1)), ProtocolError, "which stores 0"),
        (FreshPages(*ids, 2, 0, 1, torch.zeros(1, 1)), ProtocolError, "pages of pool 2, there are 2"),
        (Fetch(*ids, 0, 2, 0, 5), KVError, "no part has handle 2"),
        (FetchPages(*ids, 0, 3, 2, 0, 5), ProtocolError, r"KV of layers \[0, 3\), there are 2"),
        (Advance(*ids, 2, none, none), ProtocolError, "Advance for layer 2, whose kind is attention"),
        (Constants(*ids, 4, none, none, none), ProtocolError, "Constants for layer 4, whose kind is attention"),
    ):
        with pytest.raises(kind, match=error):
            twin.worker.handle(message)


def test_a_kind_that_the_worker_does_not_keep_is_named() -> None:
    config = two_pools()
    layers = tuple(
        dataclasses.replace(spec, kind="abacus") if n in (2, 4) else spec for n, spec in enumerate(config.layers)
    )
    with pytest.raises(UnsupportedModelError, match="layer 2 is of kind 'abacus', this worker keeps attention"):
        AttentionWorker(dataclasses.replace(config, layers=layers))
    assert len(pools(config)) == 2


def test_decode_of_both_pools_follows_the_last_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is planned anew but the first two batches, until one pool cannot go on so: then both are."""
    twin = twin_of_both(20)
    planned: list[Any] = []
    begin = AttentionWorker._begin
    monkeypatch.setattr(AttentionWorker, "_begin", lambda *args: (planned.append(args[1].batch), begin(*args)))
    for at in range(20, 70):
        rows = [Row(2, at, 1, (0, at + 1), True), Row(1, at, 1, (0, at + 1), True)]
        forks = [Fork(9, 2, 59)] if at == 60 else []
        assert twin.announce(forks, rows).accepted
        twin.run(rows, together=True)
    assert planned == [twin.batch - 49, twin.batch - 9]
