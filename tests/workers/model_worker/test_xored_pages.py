"""Pages that are XORed on their way: any share of a group is the XOR of the others and the parity."""

from __future__ import annotations

import pytest
import torch

from lamina_protocols.messages.messages import FetchedPages
from lamina_workers.model_worker.kv_copy import Copy, Move

LAYERS, PAGES, SIZE = 2, 3, 64


def move(origin: int, heads: int, to: int, target_heads: int) -> Move:
    taken = min(heads, target_heads)
    return Move(origin, origin, to, to, 0, 16 * PAGES, taken, heads, 0, target_heads, 0, True, 0, True)


def combined(pages: dict[int, torch.Tensor], to: int, heads: int) -> torch.Tensor:
    copy = Copy([move(origin, each.shape[1], to, heads) for origin, each in pages.items()])
    arrived = [FetchedPages(1, 1, 0, pages[origin].reshape(-1, SIZE)) for origin, *_ in copy.sources]
    ((number, content),) = copy.pages(arrived, LAYERS)
    assert number == to
    return content.view(LAYERS, heads, PAGES, SIZE)


@pytest.mark.parametrize("heads", [(1, 1), (2, 1), (1, 3, 2)])
def test_each_share_is_the_xor_of_the_others_and_the_parity(heads: tuple[int, ...]) -> None:
    torch.manual_seed(3)
    shares = {
        number: torch.randint(0, 256, (LAYERS, count, PAGES, SIZE), dtype=torch.uint8)
        for number, count in enumerate(heads)
    }
    most = max(heads)
    parity = combined(shares, 9, most)
    for lost, count in enumerate(heads):
        others = {number: pages for number, pages in shares.items() if number != lost}
        assert torch.equal(combined(others | {9: parity}, 7, count), shares[lost])
