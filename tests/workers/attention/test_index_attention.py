"""A holder of layers with an index: what it attends, again and in parts, and what it refuses."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lamina_protocols.errors import ProtocolError
from lamina_protocols.messages.layers import HolderConfig, Index, LayerSpec
from lamina_protocols.messages.messages import Announced, Announcement, Attended, Exchange, Open, Query, Row
from lamina_workers.attention_worker.attention_worker import AttentionWorker
from lamina_workers.errors import KVError, PolicyError
from lamina_workers.kv_pages.head_policies import HeadPolicies

SPEC = LayerSpec(0, 6, 2, 16, 16, 0.25, index=Index(width=16, heads=1, block=16, top=2, local=1))
CONFIG = HolderConfig((SPEC,), 16, "float32", 1 << 20)
LENGTH = 90


def made(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v of so many tokens. Index keys are the same at every head."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(count, 6, SPEC.query_width, generator=generator)
    k = torch.randn(count, 2, SPEC.key_width, generator=generator)
    k[:, 1, 16:] = k[:, 0, 16:]
    return q, k, torch.randn(count, 2, 16, generator=generator)


class Client:
    def __init__(self, heads: tuple[int, ...] = (0, 1)) -> None:
        self.worker = AttentionWorker(CONFIG)
        self.batch = 0
        self.heads = heads
        self.announce((), Open(1, 0, heads, 0, 1000))

    def announce(self, rows: tuple[Row, ...], *operations: Open) -> None:
        self.batch += 1
        reply = self.worker.handle(Announcement(1, self.batch, 0 if operations else 1, operations, rows))
        assert isinstance(reply, Announced)
        assert reply.accepted

    def run(self, start: int, end: int, store: bool = True) -> torch.Tensor:
        """The answer for these tokens of the sequence, `[tokens, heads, d_v]`."""
        q, k, v = (x[start:end] for x in made(LENGTH))
        own = [3 * head + j for head in self.heads for j in range(3)]
        flat = q[:, own].flatten(0, 1), k[:, list(self.heads)].flatten(0, 1), v[:, list(self.heads)].flatten(0, 1)
        self.announce((Row(1, start, end - start, (0, end), store, end - start == 1),))
        asked = Exchange(1, self.batch, 0, *flat) if store else Query(1, self.batch, 0, flat[0])
        reply = self.worker.handle(asked)
        assert isinstance(reply, Attended)
        return reply.out.view(end - start, len(own), 16)


@pytest.fixture(scope="module")
def whole() -> torch.Tensor:
    return Client().run(0, LENGTH)


def test_chunks_and_tokens_alone_read_the_same(whole: torch.Tensor) -> None:
    client = Client()
    found = torch.cat([client.run(start, end) for start, end in ((0, 1), (1, 8), (8, 50), (50, 89), (89, 90))])
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-5)


def test_a_batch_runs_again_and_what_is_stored_is_read_again(whole: torch.Tensor) -> None:
    client = Client()
    client.run(0, 80)
    for store in (True, False):
        torch.testing.assert_close(client.run(60, 80, store), whole[60:80], rtol=0, atol=1e-5)
    torch.testing.assert_close(client.run(40, 50, store=False), whole[40:50], rtol=0, atol=1e-5)
    with pytest.raises(KVError, match=r"row reads \[0, 90\) of part 1, allowed: within \[0, 80\]"):
        client.run(80, 90, store=False)


@pytest.mark.parametrize("head", [0, 1])
def test_each_kv_head_chooses_alone(whole: torch.Tensor, head: int) -> None:
    found = Client((head,)).run(0, LENGTH)
    torch.testing.assert_close(found, whole[:, 3 * head : 3 * head + 3], rtol=0, atol=1e-5)


@pytest.mark.parametrize("read", [(0, 40), (16, 41), (0, 16)])
def test_rows_that_lack_keys_are_refused(read: tuple[int, int]) -> None:
    client = Client()
    client.run(0, 40)
    with pytest.raises(ProtocolError, match=r"an index reads \[0, 41\) of part 1, not"):
        client.announce((Row(1, 40, 1, read, read[1] > 40),))


def test_queries_of_another_width_are_refused() -> None:
    client = Client()
    client.announce((Row(1, 0, 1, (0, 1), True),))
    q, k, v = (x[:1].flatten(0, 1) for x in made(1))
    with pytest.raises(ProtocolError, match=r"q must be \[6, 22\], got \[6, 16\]"):
        client.worker.handle(Exchange(1, client.batch, 0, q[:, :16], k, v))


def test_a_policy_beside_an_index_is_refused() -> None:
    spec = dataclasses.replace(SPEC, policies=("full", "page_top_k"))
    with pytest.raises(PolicyError, match=r"index chooses what a layer reads; its policy is page_top_k, allowed: full"):
        HeadPolicies.of(dataclasses.replace(CONFIG, layers=(spec,)))
