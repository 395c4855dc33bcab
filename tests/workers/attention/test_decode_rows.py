"""Decode batches that are made of the batch before them, against the same batches planned anew."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

import pytest
import torch

from lamina_protocols.errors import LaminaError
from lamina_protocols.messages.layers import HolderConfig, LayerSpec
from lamina_protocols.messages.messages import (
    Announced,
    Announcement,
    Attended,
    Close,
    Fork,
    Fresh,
    Open,
    Operation,
    Query,
    Row,
    Survey,
)
from lamina_workers.attention_worker.attention_worker import AttentionWorker
from lamina_workers.attention_worker.decode_rows import is_next

FULL = LayerSpec(kv_layer=0, heads=6, kv_heads=2, d_k=16, d_v=16, scale=0.3)
LAYERS = (FULL, dataclasses.replace(FULL, kv_layer=1))
SIZE = 16


def config(pages: int, layers: Sequence[LayerSpec] = LAYERS) -> HolderConfig:
    return HolderConfig(tuple(layers), SIZE, "float32", pages * SIZE * 32 * 4)


class Anew(AttentionWorker):
    """Plans each batch anew."""

    def _followed(self, message: Announcement) -> bool:
        return False


class Following(AttentionWorker):
    """Counts the batches that were made of others."""

    followed = 0

    def _followed(self, message: Announcement) -> bool:
        done = super()._followed(message)
        self.followed += done
        return done


class Pair:
    """Two workers that get the same messages: one makes batches of others. All that they keep and answer is equal."""

    def __init__(self, pages: int = 4000, layers: Sequence[LayerSpec] = LAYERS) -> None:
        self.following = Following(config(pages, layers))
        self.anew = Anew(config(pages, layers))
        self.layers = layers
        self.batch = self.operations = 0
        self.epoch = 1
        self.generator = torch.Generator().manual_seed(1)

    @property
    def workers(self) -> tuple[AttentionWorker, AttentionWorker]:
        return self.following, self.anew

    def announce(self, operations: Sequence[Operation] = (), rows: Sequence[Row] = ()) -> Announced:
        self.batch += 1
        message = Announcement(self.epoch, self.batch, self.operations, tuple(operations), tuple(rows))
        mine, other = (self._reply(worker, message) for worker in self.workers)
        assert mine == other
        assert isinstance(mine, Announced)
        if mine.accepted:
            self.operations += len(operations)
        self.check()
        return mine

    @staticmethod
    def _reply(worker: AttentionWorker, message: Announcement) -> object:
        try:
            return worker.handle(message)
        except LaminaError as error:
            return f"{type(error).__name__}: {error}"

    def check(self) -> None:
        """Tables, pages, and where the batches in flight store are the same."""
        one, two = self.workers
        one.store.check_integrity()
        assert one._batches.keys() == two._batches.keys()
        assert one.store.parts().keys() == two.store.parts().keys()
        for handle, part in one.store.parts().items():
            twin = two.store.part(handle)
            assert (part.held, part.stored, part.lo, part.hi) == (twin.held, twin.stored, twin.lo, twin.hi)
            used = -(-(part.held - part.lo) // SIZE)
            assert (part.table[:, :, :used] == twin.table[:, :, :used]).all()
        assert (one.store._pool._stack[: one.store.free_pages] == two.store._pool._stack[: two.store.free_pages]).all()
        for number, batch in one._batches.items():
            twin_batch = two._batches[number]
            assert (batch.rows, batch.handles, batch.heads) == (twin_batch.rows, twin_batch.handles, twin_batch.heads)
            kept, twin_kept = batch.pools[0], twin_batch.pools[0]
            assert (kept.fused, kept.stores, kept.rows, kept.missing) == (
                twin_kept.fused, twin_kept.stores, twin_kept.rows, twin_kept.missing,
            )  # fmt: skip
            assert (kept.places is None) == (twin_kept.places is None)
            if kept.places is not None:
                assert torch.equal(kept.places.slots, twin_kept.places.slots)

    def run(self, rows: Sequence[Row], batch: int | None = None) -> None:
        """All layers of the batch announced last, or of `batch`."""
        batch = self.batch if batch is None else batch
        store = self.anew.store
        heads = [len(store.part(row.handle).heads) for row in rows]
        stored = sum(n * row.count for n, row in zip(heads, rows, strict=True) if row.store)
        asked = sum(n * row.count * 3 for n, row in zip(heads, rows, strict=True) if row.read is not None)
        for layer in range(len(self.layers)):
            if stored:
                k, v = torch.randn(2, stored, 16, generator=self.generator)
                for worker in self.workers:
                    worker.handle(Fresh(self.epoch, batch, layer, k, v))
            if asked:
                q = torch.randn(asked, 16, generator=self.generator)
                one, two = (worker.handle(Query(self.epoch, batch, layer, q)) for worker in self.workers)
                assert isinstance(one, Attended)
                assert isinstance(two, Attended)
                torch.testing.assert_close(one.out, two.out, rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(one.lse, two.lse, rtol=1e-5, atol=1e-5)
        self.check()


def prompt(handle: int, count: int, fused: bool = True) -> Row:
    return Row(handle, 0, count, (0, count) if fused else None, True)


def decode(handle: int, start: int, fused: bool = True, count: int = 1) -> Row:
    return Row(handle, start, count, (0, start + count * fused), True, True)


def opened(pair: Pair, lengths: dict[int, int]) -> None:
    rows = [prompt(handle, length) for handle, length in lengths.items()]
    assert pair.announce([Open(handle, 0, (0, 1), 0, 1000) for handle in lengths], rows).accepted
    pair.run(rows)


STREAMING = "streaming(sink=16, recent=40)"
MIXED = [
    dataclasses.replace(LAYERS[0], policies=("full", STREAMING)),
    dataclasses.replace(LAYERS[1], policies=("streaming(sink=32, recent=24)", "full")),
]


def under(policy: str) -> list[LayerSpec]:
    return [dataclasses.replace(layer, policies=(policy,) * 2) for layer in LAYERS]


SPECS = {  # with the number of 80 batches that are made of the one before, at least
    "full": (LAYERS, 79),
    "window": ([dataclasses.replace(layer, window=24) for layer in LAYERS], 70),
    "streaming": (under(STREAMING), 70),
    "mixed": (MIXED, 70),
    "not worth it": (
        [dataclasses.replace(layer, policies=("retrieval", "retrieval(recent=9)")) for layer in LAYERS],
        70,
    ),
    "growing": (under("span(alpha=20, beta=0.3)"), 0),
    "blocks": (under("sharded(block=16, local=1, stride=2)"), 0),
}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("layers", "least"), SPECS.values(), ids=SPECS)
def test_rows_that_grow_are_stored_freed_counted_and_attended_as_if_planned_anew(
    layers: Sequence[LayerSpec], least: int, fused: bool
) -> None:
    """Over pages' ends, tables that are full, and work that is dealt anew; from where windows hide nothing yet to where
    pages have been freed for long. Answers say what was read, what is kept and how far parts can return."""
    pair = Pair(layers=layers)
    lengths = {1: 5, 2: 16, 3: 31, 4: 100}
    opened(pair, lengths)
    for step in range(80):
        rows = [decode(handle, length + step, fused) for handle, length in lengths.items()]
        assert pair.announce((), rows).accepted
        pair.run(rows)
    assert pair.following.followed >= least
    assert pair.following.followed == 0 or least
    assert pair.following.counters == pair.anew.counters


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("count", [5, None])
@pytest.mark.parametrize("layers", [LAYERS, MIXED], ids=["full", "mixed"])
def test_rows_that_verify_drafts_are_stored_and_attended_as_if_planned_anew(
    layers: Sequence[LayerSpec], fused: bool, count: int | None
) -> None:
    """Of each row's tokens some are accepted, and the next row starts behind these. Rows that are several of the
    kernels' are planned anew."""
    rng = random.Random(7)
    pair = Pair(layers=layers)
    held = {1: 5, 2: 16, 3: 31, 4: 100}
    opened(pair, held)
    for _ in range(40):
        rows = [decode(handle, start, fused, count or rng.randint(1, 17)) for handle, start in held.items()]
        assert pair.announce((), rows).accepted
        pair.run(rows)
        held = {row.handle: row.start + rng.randint(1, row.count) for row in rows}
    assert pair.following.followed == (39 if layers is LAYERS else 0)
    assert pair.following.counters == pair.anew.counters


def test_a_batch_that_begins_to_choose_is_planned_anew() -> None:
    pair = Pair(layers=under("page_top_k(recent=16)"))
    opened(pair, {1: 90})
    for worker in pair.workers:
        worker.pools[0].reader._choosers.worth = lambda policy, tokens: sum(tokens) > 2 * 100  # type: ignore
    for step in range(20):
        assert pair.announce((), [decode(1, 90 + step)]).accepted
        pair.run([decode(1, 90 + step)])
    assert pair.following.followed == 9


def test_batches_in_turns_follow_their_own() -> None:
    pair = Pair()
    opened(pair, {1: 20, 2: 30, 3: 40})
    for step in range(20):
        mine = [decode(1, 20 + step), decode(3, 40 + step)]
        assert pair.announce((), mine).accepted
        announced = pair.batch
        assert pair.announce((), [decode(2, 30 + step)]).accepted
        pair.run([decode(2, 30 + step)])
        pair.run(mine, announced)
    assert pair.following.followed == 38


def test_late_messages_of_a_batch_that_was_followed_are_refused() -> None:
    pair = Pair()
    opened(pair, {1: 20})
    for step in range(3):
        assert pair.announce((), [decode(1, 20 + step)]).accepted
        pair.run([decode(1, 20 + step)])
    assert pair.following.followed == 2
    with pytest.raises(LaminaError, match="batch 3 of epoch 1 is not in flight"):
        pair.following.handle(Query(1, 3, 0, torch.zeros(6, 16)))
    with pytest.raises(LaminaError, match="is not newer than"):
        pair.following.handle(Announcement(1, 4, 1, (), (decode(1, 23),)))
    survey = [worker.handle(Survey(0, 1)) for worker in pair.workers]
    assert survey[0] == survey[1]
    with pytest.raises(LaminaError, match="others have taken over"):
        pair.following.handle(Announcement(1, 9, 1, (), (decode(1, 23),)))


def test_rows_follow_only_the_same_rows_a_token_further() -> None:
    last = (decode(1, 20), decode(2, 30))
    further = (decode(1, 21), decode(2, 31))
    assert is_next(last, further)
    for row in (decode(1, 20), decode(1, 22), decode(3, 21)):
        assert not is_next(last, (row, further[1]))
    longer = (decode(1, 20, count=4), decode(2, 30))
    for row in (decode(1, 21), decode(1, 24), decode(1, 22, count=17)):
        assert is_next(longer, (row, further[1]))
    for row in (decode(1, 20, count=4), decode(1, 25, count=4), decode(1, 22, count=100), decode(1, 22, False, 4)):
        assert not is_next(longer, (row, further[1]))
    for change in (
        {"read": (0, 21)}, {"read": (1, 22)}, {"read": None}, {"store": False}, {"chooses": False}, {"count": 2},
    ):  # fmt: skip
        assert not is_next(last, (dataclasses.replace(further[0], **change), further[1]))
    assert not is_next(last, further[:1])
    assert not is_next(last, further[::-1])


@pytest.mark.parametrize("layers", [LAYERS, MIXED], ids=["full", "mixed"])
@pytest.mark.parametrize("seed", range(12))
def test_random_batches_are_as_if_planned_anew(seed: int, layers: Sequence[LayerSpec]) -> None:
    rng = random.Random(seed)
    pair = Pair(pages=rng.choice([60, 4000]), layers=layers)
    held: dict[int, int] = {}
    last: list[int] = []
    handles = 0
    for _ in range(120):
        operations: list[Operation] = []
        rows: list[Row] = []
        held_after = dict(held)
        event = rng.random()
        if event < 0.08 or not held:
            handles += 1
            operations.append(Open(handles, 0, rng.choice([(0, 1), (0,), (1,)]), 0, rng.choice([64, 1000])))
            held_after[handles] = 0
            rows.append(prompt(handles, rng.randint(1, 50)))
        elif event < 0.13:
            handles += 1
            parent = rng.choice(list(held))
            lowest = pair.anew.store.floor(pair.anew.store.part(parent))
            operations.append(Fork(handles, parent, length := rng.randint(min(lowest, held[parent]), held[parent])))
            held_after[handles] = length
        elif event < 0.17:
            gone = rng.choice(list(held))
            operations.append(Close(gone))
            del held_after[gone]
        elif event < 0.19:
            pair.epoch += 1
        elif event < 0.24:  # tokens again, as after a rejected draft
            back = rng.choice(list(held))
            held_after[back] = rng.randint(0, held[back])
        if event >= 0.13 and rng.random() < 0.9:
            known = [handle for handle in last if handle in held_after]
            if not known or rng.random() < 0.1:
                known = rng.sample(sorted(held_after), rng.randint(0, len(held_after)))
            last = known
            limits = {handle: part.hi for handle, part in pair.anew.store.parts().items()}
            fused = rng.random() < 0.95
            drafts = rng.choice([0, 0, 4, rng.randint(0, 16)])
            counts = {h: 1 + rng.choice([drafts, drafts, rng.randint(0, drafts)]) for h in known}
            rows += [
                decode(h, held_after[h], fused, counts[h]) for h in known if 0 < held_after[h] <= limits[h] - counts[h]
            ]
        answer = pair.announce(operations, rows)
        for row, start in zip(rows, answer.starts, strict=False):  # a batch before did not come to its end
            if row.handle in held:
                held[row.handle] = start
        if answer.accepted:
            held = held_after | {
                row.handle: row.start + (rng.randint(1, row.count) if row.chooses else row.count) for row in rows
            }
            if rows and rng.random() < 0.9:
                pair.run(rows)
    assert pair.following.followed >= 5
