"""FuseMax's claim as a property: decode attention is one pass over K and V, counted in bytes, and the cost model counts
the same (FuseMax, arXiv 2406.10491: the online softmax of FlashAttention is a one-pass cascade, where two products with
a softmax between them would be two or three).

In Triton's interpreter the loads from the pages are counted as they are made. The compiled loops for CPUs cannot be
watched: there, what is counted are the keys of the pieces that they walk, each block of which they read once.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_attention import Row, World, attend, build, errors

from lamina.simulator.costs.cost_model import Load, attention_time
from lamina.simulator.costs.hardware import load
from lamina.simulator.costs.model_configs import model
from lamina_kernels.attention import decode as cpu_decode

HEADS, GROUP, WIDTH = 8, 8, 128
"""Of Llama-3-70B: KV heads, query heads to each, and numbers of a key and of a value."""


def needed(world: World) -> int:
    """Bytes of K and V that these decode rows see, each once."""
    rows, at = world.rows, world.pages.layout
    seen = int(((rows.hi - rows.lo) * rows.kv_heads).sum())
    return seen * (at.d_k + at.own_v) * at.dtype.itemsize


@settings(max_examples=25, deadline=None)
@given(
    held=st.lists(st.integers(1, 900), min_size=1, max_size=6), heads=st.integers(1, 4),
    group=st.sampled_from([1, 3, 8, 16]), threads=st.integers(1, 9),
)  # fmt: skip
def test_the_pieces_of_a_decode_batch_read_each_key_once(held: list[int], heads: int, group: int, threads: int) -> None:
    at = cpu_decode.layout(32, 64, 64, torch.bfloat16)
    world = build(cpu_decode, at, [Row(each - 1, 1, 0, each) for each in held], heads, group)
    pieces = cpu_decode.plan(world.pages, world.rows, threads).keep[1]
    keys = int((pieces["hi"] - pieces["lo"]).sum())
    assert keys * (at.d_k + at.d_v) * at.dtype.itemsize == needed(world)
    assert set(pieces["rows"]) == {group}  # so the heads of a group share what is read
    shared = pieces["partial"] >= 0
    assert int(pieces["rows"][shared].sum()) <= (threads + len(held) * heads) * group  # S H_q (d_v + 1) 4 bytes more


@pytest.mark.parametrize(("dtype", "latent"), [(torch.bfloat16, False), (torch.float32, True)], ids=str)
def test_the_triton_kernels_load_each_key_once(
    dtype: torch.dtype, latent: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    if device != "cpu" or os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("loads are counted in Triton's interpreter alone")
    from triton.runtime.interpreter import InterpreterBuilder

    from lamina_kernels.gpu import decode as triton_decode

    at = triton_decode.layout(16, 80, 64, dtype, True) if latent else triton_decode.layout(16, 64, 48, dtype)
    rows = [Row(599, 1, 0, 600), Row(40, 1, 0, 41), Row(130, 1, 0, 131)]
    world = build(triton_decode, at, rows, 1 if latent else 2, 5, device=device)
    begin, loaded = world.pages.arena.data_ptr(), [0]
    end = begin + world.pages.arena.nbytes
    original = InterpreterBuilder.create_masked_load

    def counted(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        found = original(self, ptrs, mask, *rest)
        inside = (ptrs.data >= begin) & (ptrs.data < end) & mask.data
        loaded[0] += int(np.count_nonzero(inside)) * found.data.dtype.itemsize
        return found

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counted)
    attend(triton_decode, world, 4)
    assert loaded[0] == needed(world)
    monkeypatch.undo()
    assert max(errors(triton_decode, world, 4)) <= 1


def test_the_cost_model_reads_what_the_kernels_read() -> None:
    """Llama-3-70B, three sequences of 600, 41 and 131 tokens, a layer: 772 tokens x 8 heads x (128 + 128) x 2 bytes =
    3,162,112. Over 80 layers at 4 TB/s that is 63.24 us."""
    at = cpu_decode.layout(32, WIDTH, WIDTH, torch.bfloat16)
    world = build(cpu_decode, at, [Row(599, 1, 0, 600), Row(40, 1, 0, 41), Row(130, 1, 0, 131)], HEADS, GROUP)
    assert needed(world) == 3_162_112
    llama, h20 = model("llama-3-70b"), replace(load().device("h20"), flops=1e18)
    assert llama.kv_bytes_read(772) == 80 * needed(world)
    assert attention_time(llama, h20, Load(3, 772 / 3)) == pytest.approx(80 * needed(world) / 4e12)
