"""Pages as a `HolderConfig` describes them: their bytes, and what no page can be."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lamina_kernels import select
from lamina_protocols.messages.layers import HolderConfig, LayerSpec
from lamina_workers.attention_worker import page_layout as page_layouts
from lamina_workers.attention_worker.page_layout import page_count, page_layout
from lamina_workers.errors import KernelsUnavailable, KVError, UnsupportedModelError

SPEC = LayerSpec(kv_layer=0, heads=6, kv_heads=3, d_k=48, d_v=32, scale=0.1)
CONFIG = HolderConfig((SPEC, dataclasses.replace(SPEC, kv_layer=1, window=9)), 16, "bfloat16", 1 << 20)


def test_a_page_is_as_large_as_its_keys_and_values() -> None:
    layout = page_layout(CONFIG)
    assert (layout.page_size, layout.d_k, layout.d_v, layout.dtype) == (16, 48, 32, torch.bfloat16)
    assert page_count(CONFIG) == (1 << 20) // (16 * (48 + 32) * 2)


@pytest.mark.parametrize("changes", [{"kv_heads": 6}, {"heads": 3}, {"d_k": 64}, {"d_v": 16}, {"kind": "latent"}])
def test_layers_of_unlike_shapes_are_unsupported(changes: dict[str, int | str]) -> None:
    other = dataclasses.replace(SPEC, **changes)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModelError, match="unlike KV shapes"):
        page_layout(dataclasses.replace(CONFIG, layers=(SPEC, other)))


@pytest.mark.parametrize("name", ["d_k", "d_v"])
@pytest.mark.parametrize("size", [8, 40, 528])
def test_a_head_size_that_no_page_holds_is_unsupported(name: str, size: int) -> None:
    spec = dataclasses.replace(SPEC, **{name: size})  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModelError, match=f"{name} must be a multiple of 16 from 16 to 512, got {size}"):
        page_layout(dataclasses.replace(CONFIG, layers=(spec,)))


def test_int8_keeps_a_scale_for_each_key_and_value() -> None:
    layout = page_layout(dataclasses.replace(CONFIG, dtype="int8"))
    assert layout.dtype == torch.int8
    assert layout.page_bytes == 16 * (48 + 32 + 2 * 4)
    assert page_count(dataclasses.replace(CONFIG, dtype="int8")) == (1 << 20) // layout.page_bytes


def test_a_dtype_that_these_kernels_do_not_keep_is_unsupported() -> None:
    with pytest.raises(UnsupportedModelError, match=r"KV dtype must be one of .* got torch\.float8_e4m3fn"):
        page_layout(dataclasses.replace(CONFIG, dtype="float8_e4m3fn"))


def test_kernels_that_cannot_run_here_are_an_error_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_layouts, "kernels", select.kernels.__wrapped__)  # without the choice made before
    monkeypatch.setenv("LAMINA_KERNELS", "fast")
    with pytest.raises(KernelsUnavailable, match="LAMINA_KERNELS must be cpu or triton"):
        page_layout(CONFIG)


@pytest.mark.parametrize("dtype", ["float8", "int4", "torch.int8", "float64", ""])
def test_a_dtype_that_kv_is_not_kept_in_is_named(dtype: str) -> None:
    with pytest.raises(KVError, match=f"KV dtype '{dtype}', allowed: float32, bfloat16, float16, int8, float8_e4m3fn"):
        page_layout(dataclasses.replace(CONFIG, dtype=dtype))


def test_memory_for_less_than_a_page_a_layer_is_refused() -> None:
    least = 2 * page_layout(CONFIG).page_bytes
    assert page_count(dataclasses.replace(CONFIG, kv_memory=least)) == 2
    for given in (0, least - 1):
        with pytest.raises(KVError, match=f"kv_memory is {given} bytes; the least is {least}"):
            page_count(dataclasses.replace(CONFIG, kv_memory=given))
