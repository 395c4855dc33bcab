"""Decode over lists of pages, against the same asked as rows."""

from __future__ import annotations

from functools import partial

import kernel_reference as reference
import numpy as np
import pytest
import torch

from lamina_kernels.attention import decode as cpu_decode
from lamina_kernels.paged.page_lists import through_rows
from lamina_kernels.paged.pages import Pages

PAGES = 40


def filled(dtype: torch.dtype, size: int = 32, d_k: int = 64, d_v: int = 48) -> Pages:
    pages = Pages.allocate(cpu_decode.layout(size, d_k, d_v, dtype), PAGES)
    slots = torch.arange(pages.slots)[None]
    rng = torch.Generator().manual_seed(3)
    k = torch.randn(pages.slots, d_k, generator=rng)
    v = torch.randn(pages.slots, d_v, generator=rng)
    cpu_decode.append(pages, cpu_decode.plan_append(pages, slots), 0, k, v)
    return pages


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("lengths", [[1], [0, 5, 0], [32, 64, 31], [1000, 1, 1280], [7] * 9, [1280] * 3, [600]])
def test_lists_are_attended_as_rows_are(dtype, threads, lengths):
    pages, group = filled(dtype), 3
    rng = np.random.default_rng(5)
    most = -(-max(lengths) // 32) + 2
    lists = np.stack([rng.permutation(PAGES)[:most] for _ in lengths]).astype(np.int32)
    asked = np.array(lengths, np.int64)
    q = torch.randn(len(lengths) * group, 64, generator=torch.Generator().manual_seed(1))
    plan = cpu_decode.plan_lists(pages, len(lengths), group, threads)
    for _ in range(2):  # a plan is used again, with other lists
        found = cpu_decode.attend_lists(pages, plan, lists, asked, q, 0.3)
        plain = reference.plan_lists(pages, len(lengths), group, threads)
        wanted = through_rows(cpu_decode.plan, cpu_decode.attend)(pages, plain, lists, asked, q, 0.3)
        torch.testing.assert_close(found.out, wanted.out, atol=2e-3 if dtype is torch.bfloat16 else 3e-5, rtol=1e-3)
        torch.testing.assert_close(found.lse, wanted.lse, atol=1e-4, rtol=1e-5)
        assert (found.lse[torch.from_numpy(np.repeat(asked == 0, group))] == -torch.inf).all()
        lists, asked = lists[::-1].copy(), asked[::-1].copy()


def test_what_does_not_fit_is_refused():
    pages = filled(torch.float32)
    plan = cpu_decode.plan_lists(pages, 2, 3, 2)
    lists, lengths, q = np.zeros((2, 4), np.int32), np.array([40, 5]), torch.zeros(6, 64)
    attend = partial(cpu_decode.attend_lists, pages, plan)
    for page in (-1, PAGES):
        lists[1, 0] = page
        with pytest.raises(ValueError, match=r"list 1 names a page that does not exist; there are pages 0 to 39"):
            attend(lists, lengths, q, 1.0)
        lists[1, 0] = 0
    lists[1, 1] = -1  # is not read
    attend(lists, lengths, q, 1.0)
    with pytest.raises(ValueError, match="lengths has 129, allowed: 0 to 128"):
        attend(lists, np.array([129, 1]), q, 1.0)
    with pytest.raises(ValueError, match=r"lists must be int32 \[2, most\], contiguous"):
        attend(lists[:, ::2], lengths, q, 1.0)
    with pytest.raises(ValueError, match=r"q must be \[6, 64\]"):
        attend(lists, lengths, q[:5], 1.0)
    with pytest.raises(ValueError, match="other pages"):
        cpu_decode.attend_lists(filled(torch.float32), plan, lists, lengths, q, 1.0)
    with pytest.raises(ValueError, match="group must be at most 128, got 129"):
        cpu_decode.plan_lists(pages, 1, 129)
    with pytest.raises(ValueError, match="items must be at least 1, got 0"):
        cpu_decode.plan_lists(pages, 0, 1)
