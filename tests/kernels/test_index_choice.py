"""Which blocks of keys an index chooses, against the rule key by key; and the compiled loop against plain torch."""

from __future__ import annotations

import kernel_reference as reference
import numpy as np
import pytest
import torch

from lamina_kernels.attention import decode
from lamina_kernels.attention.index_choice import Queries, chosen_blocks
from lamina_kernels.paged.pages import PageLayout, Pages
from lamina_kernels.select import Kernels

D, HEADS = 32, 3


def stored(
    kernels: Kernels, dtype: torch.dtype, page_size: int, keys: torch.Tensor
) -> tuple[Pages, np.ndarray[tuple[int], np.dtype[np.int32]]]:
    """Pages with index keys `[n, D]` behind random K, in any order, and NaN in all other slots; and their table."""
    generator = torch.Generator().manual_seed(1)
    layout = kernels.layout(page_size, 48, 16, dtype)
    layout = PageLayout(page_size, 48, 16, dtype, layout.order, d_index=D)
    n = len(keys)
    table = np.random.default_rng(2).permutation(2 * -(-n // page_size) + 1).astype(np.int32)[: -(-n // page_size)]
    pages = Pages.allocate(layout, int(table.max()) + 1)
    pages.arena.fill_(255)
    slot, offset = np.divmod(np.arange(n), page_size)
    plan = kernels.plan_append(pages, torch.from_numpy(table[slot].astype(np.int64) * page_size + offset)[None])
    k = torch.cat((torch.randn(n, 48, generator=generator), keys), -1)
    kernels.append(pages, plan, 0, k, torch.randn(n, 16, generator=generator))
    return pages, table


def check(found: torch.Tensor, keys: torch.Tensor, asked: Queries, block: int, top: int, local: int) -> None:
    """The blocks are different, ascending, and none has a higher score; scores in float64, one token after another."""
    for t, position in enumerate(asked.positions.tolist()):
        for head in range(HEADS):
            products = asked.queries[t, head].double() @ keys[: position + 1].double().T
            if asked.weights is None:
                of_keys = products.amax(0)
            else:
                of_keys = (products.clamp(min=0) * asked.weights[t, head].double()[:, None]).sum(0)
            scores = torch.stack([of_block.max() for of_block in of_keys.split(block)])
            last = len(scores)
            chosen = found[t, head].tolist()
            assert chosen == sorted(set(chosen))
            assert len(chosen) == top
            assert set(range(last - local, last)) <= set(chosen)
            others = scores[: last - local]
            free = [number for number in chosen if number < last - local]
            torch.testing.assert_close(others[free].sort().values, others.topk(top - local).values.flip(0))


def queries(
    tables: list[np.ndarray[tuple[int], np.dtype[np.int32]]], positions: list[int], heads: int, weighted: bool
) -> Queries:
    generator = torch.Generator().manual_seed(3)
    of_q = torch.randn(len(positions), HEADS, heads, D, generator=generator)
    weights = torch.rand(len(positions), HEADS, heads, generator=generator) + 0.1
    weights[..., 0] *= -1  # few: blocks whose best keys score 0 would be alike
    return Queries(tables, np.array(positions), of_q, weights if weighted else None)


@pytest.mark.parametrize("kernels", [decode, reference], ids=["compiled", "plain"])
@pytest.mark.parametrize(("heads", "weighted"), [(1, False), (5, False), (5, True), (11, True)])
@pytest.mark.parametrize(("block", "top", "local"), [(16, 3, 1), (16, 2, 2), (7, 4, 0), (1, 20, 0), (1, 20, 3)])
def test_the_blocks_are_those_of_the_rule(
    kernels: Kernels, heads: int, weighted: bool, block: int, top: int, local: int
) -> None:
    """A prompt's tokens of one part, then single tokens of several parts."""
    keys = torch.randn(150, D, generator=torch.Generator().manual_seed(4))
    pages, table = stored(kernels, torch.float32, 16, keys)
    first = block * top
    prompt = queries([table], list(range(first, 150)), heads, weighted)
    check(chosen_blocks(pages, prompt, block, top, local, 2), keys, prompt, block, top, local)
    singles = queries([table] * 3, [149, first, 100], heads, weighted)
    check(chosen_blocks(pages, singles, block, top, local, 2), keys, singles, block, top, local)


@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
def test_keys_in_every_dtype(dtype: torch.dtype, page_size: int) -> None:
    """Blocks whose keys differ by more than rounding can move."""
    size = torch.randperm(20, generator=torch.Generator().manual_seed(5)).repeat_interleave(8)
    direction = torch.tensor([1.0, -1.0]).repeat(D // 2)
    keys = size[:, None] * direction
    pages, table = stored(decode, dtype, page_size, keys)
    asked = Queries([table], np.array([159]), direction.expand(1, HEADS, 1, -1), None)
    wanted = size[::8].topk(6).indices.sort().values
    assert chosen_blocks(pages, asked, 8, 6, 0).tolist() == [[wanted.tolist()] * HEADS]
