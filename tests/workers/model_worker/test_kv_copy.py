"""KV goes from holder to holder: whole pages as they lie where that can be, token by token elsewhere, the same in the
end."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from engine_rig import BytesPort
from kv_pools import pool_of

from lamina_protocols.errors import ProtocolError
from lamina_protocols.messages.layers import HolderConfig, LayerSpec
from lamina_protocols.messages.messages import (
    Announced,
    Announcement,
    Fetch,
    Fetched,
    FetchedPages,
    FetchedSample,
    FetchPages,
    Fresh,
    FreshPages,
    Open,
    Row,
    Survey,
    Surveyed,
)
from lamina_protocols.messages.routes import HolderBatch, Route
from lamina_workers.attention_worker.attention_worker import AttentionWorker
from lamina_workers.attention_worker.page_layout import page_bytes
from lamina_workers.errors import HolderFault, HolderLost, KVError
from lamina_workers.model_worker.interface import result
from lamina_workers.model_worker.kv_copy import Copy, Move
from lamina_workers.model_worker.model_worker import ModelWorker
from lamina_workers.model_worker.prompt_samples import check_sample

SPEC = LayerSpec(kv_layer=0, heads=4, kv_heads=2, d_k=16, d_v=32, scale=0.3)
LAYERS = tuple(dataclasses.replace(SPEC, kv_layer=layer) for layer in range(3))
SIZE = 16


class Holders:
    """A model worker and three holders; part 1 of the first has 100 tokens, of both heads."""

    def __init__(self, decoder, dtype: str = "float32", layers: Sequence[LayerSpec] = LAYERS, begins: int = 0) -> None:
        self.config = HolderConfig(tuple(layers), SIZE, dtype, 200 * SIZE * 48 * 4)
        self.workers = [AttentionWorker(self.config) for _ in range(3)]
        self.seen: list[object] = []
        self.ports = [BytesPort(worker, self.seen.append) for worker in self.workers]
        self.model_worker = ModelWorker(decoder, self.config, dict(enumerate(self.ports)))
        self._first = [0, 0, 0]
        self.begins = begins
        self.fill(100)

    def share(self, number: int, handle: int, lo: int, hi: int, heads=(0, 1), begins=None, opens=True, read=None):
        opened = (Open(handle, 0, heads, lo if begins is None else begins, 1000),) * opens
        share = HolderBatch(
            self._first[number],
            opened,
            (Route(0, heads, Row(handle, lo, hi - lo, read, True, read is not None), (lo, hi)),),
        )
        self._first[number] += opens
        return share

    def fill(self, count: int) -> None:
        generator = torch.Generator().manual_seed(1)
        batch, answers = self.model_worker.announce_now({0: self.share(0, 1, self.begins, self.begins + count)})
        assert answers[0].accepted
        for layer in range(len(self.config.layers)):
            k, v = (torch.randn(2 * count, d, generator=generator) for d in (16, 32))
            self.ports[0].send(Fresh(1, batch, layer, k, v))
        self.end = self.begins + count

    def vectors(self, number: int, handle: int, lo: int, hi: int) -> list[torch.Tensor]:
        replies = [
            self.workers[number].handle(Fetch(1, 1, at, handle, lo, hi)) for at in range(len(self.config.layers))
        ]
        assert all(isinstance(reply, Fetched) for reply in replies)
        return [x for reply in replies for x in (reply.k, reply.v)]

    def pages(self, number: int, handle: int, lo: int, hi: int) -> torch.Tensor:
        reply = self.workers[number].handle(FetchPages(1, 1, 0, len(self.config.layers), handle, lo, hi))
        assert isinstance(reply, FetchedPages)
        return reply.pages

    def sent(self, kind: type) -> int:
        return sum(isinstance(request, kind) for request in self.seen)


def move(origin, source, to, target, lo, hi, paged=True, heads=(2, 2, 0, 2, 0)) -> Move:
    return Move(origin, source, to, target, lo, hi, *heads, paged)


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)


BF16 = torch.bfloat16


@pytest.mark.parametrize(
    ("positions", "q"),
    [
        ((4, 4), torch.zeros(8, 16, dtype=BF16)),
        ((4, 50), torch.zeros(8, 16, dtype=BF16)),
        ((4,), torch.zeros(8, 16, dtype=BF16)),
        ((4, 6), torch.zeros(8, 16)),
        ((), torch.zeros(8, 16, dtype=BF16)),
    ],
    ids=["twice the same", "behind the prompt", "too few positions", "four bytes a number", "nothing, with queries"],
)
def test_a_sample_that_cannot_be_is_the_holders_fault(decoder, positions, q):
    replies = Holders(decoder).model_worker._replies[0]
    check_sample(replies, FetchedSample(1, 1, 0, (0, 1), (4, 6), torch.zeros(8, 16, dtype=BF16)), SPEC, 50)
    with pytest.raises(HolderLost, match="a sample of"):
        check_sample(replies, FetchedSample(1, 1, 0, (0, 1), positions, q), SPEC, 50)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
@pytest.mark.parametrize("frame", [1, 1 << 20])
def test_pages_go_as_they_lie(decoder, dtype, frame, monkeypatch):
    monkeypatch.setattr("lamina_workers.model_worker.kv_transfer._FRAME", frame)
    holders = Holders(decoder, dtype)
    for lo, hi in ((0, 64), (64, 100)):
        share = holders.share(1, 2, lo, hi, opens=lo == 0)
        assert result(holders.model_worker.copy([move(0, 1, 1, 2, lo, hi)], {1: share}))
    assert torch.equal(holders.pages(0, 1, 0, 96), holders.pages(1, 2, 0, 96))
    same(holders.vectors(1, 2, 0, 100), holders.vectors(0, 1, 0, 100))
    assert holders.sent(FetchPages) == holders.sent(FreshPages) == (6 if frame == 1 else 2)
    assert holders.sent(Fetch) == 0
    assert holders.workers[1].counters.vectors_stored == 100 * 2 * 3
    survey = holders.workers[1].handle(Survey(1, 100))
    assert isinstance(survey, Surveyed)
    assert [part.held for part in survey.parts] == [100]


def test_heads_that_are_cut_over_holders_and_put_together_again(decoder):
    holders = Holders(decoder)
    shares = {to: holders.share(to, 2, 0, 100, heads=(to - 1,)) for to in (1, 2)}
    moves = [move(0, 1, to, 2, 0, 100, heads=(1, 2, to - 1, 1, 0)) for to in (1, 2)]
    assert result(holders.model_worker.copy(moves, shares))
    for head in (0, 1):
        expected = [x.view(100, 2, -1)[:, head] for x in holders.vectors(0, 1, 0, 100)]
        same(holders.vectors(head + 1, 2, 0, 100), expected)
    back = [move(origin, 2, 0, 3, 0, 100, heads=(1, 1, 0, 2, origin - 1)) for origin in (1, 2)]
    assert result(holders.model_worker.copy(back, {0: holders.share(0, 3, 0, 100)}))
    same(holders.vectors(0, 3, 0, 100), holders.vectors(0, 1, 0, 100))
    assert holders.sent(Fetch) == 0


def test_what_begins_inside_a_page_goes_token_by_token(decoder):
    holders = Holders(decoder)
    assert result(holders.model_worker.copy([move(0, 1, 1, 2, 5, 70, paged=False)], {1: holders.share(1, 2, 5, 70)}))
    same(holders.vectors(1, 2, 5, 70), holders.vectors(0, 1, 5, 70))
    assert holders.sent(FetchPages) == 0


@pytest.mark.parametrize("name", ["", "another"])
def test_holders_of_unlike_pages_send_tokens(decoder, name):
    holders = Holders(decoder)
    holders.ports[1].page_layout = name
    assert result(holders.model_worker.copy([move(0, 1, 1, 2, 0, 100)], {1: holders.share(1, 2, 0, 100)}))
    same(holders.vectors(1, 2, 0, 100), holders.vectors(0, 1, 0, 100))
    assert (holders.sent(FetchPages), holders.sent(Fetch)) == (0, 3)


def test_pages_that_were_let_go_are_zeros(decoder):
    windowed = (LAYERS[0], dataclasses.replace(LAYERS[1], window=20), LAYERS[2])
    holders = Holders(decoder, layers=windowed)
    row = holders.share(0, 1, 100, 101, opens=False, read=(0, 100))
    assert holders.model_worker.announce_now({0: row})[1][0].accepted
    assert (holders.workers[0].store.part(1).table[1] < 0).any()
    assert result(holders.model_worker.copy([move(0, 1, 1, 2, 0, 96)], {1: holders.share(1, 2, 0, 96)}))
    same(holders.vectors(1, 2, 0, 96), holders.vectors(0, 1, 0, 96))
    assert holders.sent(Fetch) == 0


def test_layers_that_share_kv(decoder):
    holders = Holders(decoder, layers=(LAYERS[0], LAYERS[1], LAYERS[0]))
    assert result(holders.model_worker.copy([move(0, 1, 1, 2, 0, 100)], {1: holders.share(1, 2, 0, 100)}))
    same(holders.vectors(1, 2, 0, 100), holders.vectors(0, 1, 0, 100))


def test_pages_of_a_wrong_size_are_refused(decoder):
    holders = Holders(decoder)
    size = page_bytes(holders.config)
    wrong = torch.zeros(41, size, dtype=torch.uint8)
    pool_of(holders.workers[0])._fetching.fetch_pages = lambda request: FetchedPages(
        request.epoch, request.batch, request.layer, wrong
    )
    with pytest.raises(HolderFault, match=rf"pages \[42, {size}\] were due, got \(torch.uint8, \(41, {size}\)\)"):
        result(holders.model_worker.copy([move(0, 1, 1, 2, 0, 100)], {1: holders.share(1, 2, 0, 100)}))


def test_a_holder_refuses_pages_that_it_cannot_have(decoder):
    holders = Holders(decoder)
    worker = holders.workers[1]
    size = page_bytes(holders.config)
    pages = torch.zeros(2 * 3 * 2, size, dtype=torch.uint8)
    rows = (Row(2, 0, 20, None, True),)
    reply = worker.handle(Announcement(1, 90, 0, (Open(2, 0, (0, 1), 0, 1000),), rows))
    assert isinstance(reply, Announced)
    assert reply.accepted
    for content in (pages[1:], pages[:, 8:], pages.view(torch.int8)):
        with pytest.raises(ProtocolError, match="fresh pages of batch 90: pages must be uint8"):
            worker.handle(FreshPages(1, 90, 0, 0, 3, content))
    for first, count in ((0, 4), (3, 1), (1, 0), (-1, 2)):
        with pytest.raises(ProtocolError, match="there are 3"):
            worker.handle(FreshPages(1, 90, 0, first, count, pages))
        with pytest.raises(ProtocolError, match="there are 3"):
            worker.handle(FetchPages(1, 90, first, count, 2, 0, 0))
    with pytest.raises(ProtocolError, match="batch 91 of epoch 1 is not in flight"):
        worker.handle(FreshPages(1, 91, 0, 0, 3, pages))
    worker.handle(FreshPages(1, 90, 0, 0, 2, pages[:8]))
    with pytest.raises(KVError, match=r"it holds \[0, 0\)"):  # a layer has not come
        worker.handle(FetchPages(1, 90, 0, 1, 2, 0, 20))
    worker.handle(FreshPages(1, 90, 0, 2, 1, pages[:4]))
    with pytest.raises(KVError, match="number 3 of its page"):
        worker.handle(FetchPages(1, 90, 0, 1, 2, 3, 20))
    with pytest.raises(KVError, match=r"it holds \[0, 20\)"):
        worker.handle(FetchPages(1, 90, 0, 1, 2, 0, 21))
    held = worker.handle(Survey(1, 92))
    assert isinstance(held, Surveyed)
    assert [part.held for part in held.parts] == [20]


def test_a_row_inside_a_page_takes_no_pages(decoder):
    worker = Holders(decoder).workers[1]
    rows = (Row(2, 4, 20, None, True),)
    worker.handle(Announcement(1, 90, 0, (Open(2, 0, (0, 1), 0, 1000),), (Row(2, 0, 4, None, True),)))
    worker.handle(FreshPages(1, 90, 0, 0, 3, torch.zeros(6, page_bytes(worker.config), dtype=torch.uint8)))
    worker.handle(Announcement(1, 91, 1, (), rows))
    with pytest.raises(KVError, match="number 4 of its page"):
        worker.handle(FreshPages(1, 91, 0, 0, 1, torch.zeros(4, page_bytes(worker.config), dtype=torch.uint8)))


# Pages that are XORed on their way: any share of a group is the XOR of the others and the parity.

PARITY_LAYERS, PAGES, PAGE_BYTES = 2, 3, 64


def whole_part(origin: int, heads: int, to: int, target_heads: int) -> Move:
    taken = min(heads, target_heads)
    return Move(origin, origin, to, to, 0, 16 * PAGES, taken, heads, 0, target_heads, 0, True, 0, True)


def combined(pages: dict[int, torch.Tensor], to: int, heads: int) -> torch.Tensor:
    copy = Copy([whole_part(origin, each.shape[1], to, heads) for origin, each in pages.items()])
    arrived = [FetchedPages(1, 1, 0, pages[origin].reshape(-1, PAGE_BYTES)) for origin, *_ in copy.sources]
    ((number, content),) = copy.pages(arrived, PARITY_LAYERS)
    assert number == to
    return content.view(PARITY_LAYERS, heads, PAGES, PAGE_BYTES)


@pytest.mark.parametrize("heads", [(1, 1), (2, 1), (1, 3, 2)])
def test_each_share_is_the_xor_of_the_others_and_the_parity(heads: tuple[int, ...]) -> None:
    torch.manual_seed(3)
    shares = {
        number: torch.randint(0, 256, (PARITY_LAYERS, count, PAGES, PAGE_BYTES), dtype=torch.uint8)
        for number, count in enumerate(heads)
    }
    most = max(heads)
    parity = combined(shares, 9, most)
    for lost, count in enumerate(heads):
        others = {number: pages for number, pages in shares.items() if number != lost}
        assert torch.equal(combined(others | {9: parity}, 7, count), shares[lost])
