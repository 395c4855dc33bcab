"""Checkpoints quantised by GPTQ, AWQ and compressed-tensors: numbers packed here one by one come back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_rig import TINY, Tensors
from safetensors.torch import save_file

from lamina_kernels.packed.pack import FORMATS
from lamina_workers.checkpoints.model_checkpoint import fingerprint, open_checkpoint
from lamina_workers.checkpoints.weight_loader import Packing
from lamina_workers.decoder.decoder_weights import load_weights
from lamina_workers.errors import ModelFileError, UnsupportedModelError
from lamina_workers.model_config.config import ModelConfig

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # the column of each four bits (AutoAWQ, packing_utils.py)
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


def compressed(format: str, bits: int, strategy: str, symmetric: bool = True, **weights: Any) -> dict[str, Any]:
    scheme = {"num_bits": bits, "type": "int", "strategy": strategy, "symmetric": symmetric} | weights
    group = {"targets": ["Linear"], "weights": scheme, "input_activations": None}
    return {"quant_method": "compressed-tensors", "format": format, "config_groups": {"group_0": group}}


def pack(numbers: torch.Tensor, bits: int, order: list[int] | None = None) -> torch.Tensor:
    """`[n, m]` as int32 `[n, m / each]`, by shifting and adding."""
    each = 32 // bits
    found = torch.zeros(len(numbers), numbers.shape[1] // each, dtype=torch.int64)
    for place, column in enumerate(order or range(each)):
        found += numbers[:, column::each].long() << (bits * place)
    return torch.where(found >= 1 << 31, found - (1 << 32), found).int()


class Made:
    """A random quantised matrix `[n_out, n_in]`: codes, zero points and scales by group, and its values."""

    def __init__(
        self, n_out: int, n_in: int, group: int, bits: int = 4, symmetric: bool = False, seed: int = 0
    ) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.codes = torch.randint(1 << bits, (n_out, n_in), generator=draw)
        groups = n_in // group
        self.scales = (torch.rand(n_out, groups, generator=draw) + 0.5).mul(0.02).half()
        self.zeros = torch.randint(1, 1 << bits, (n_out, groups), generator=draw)
        if symmetric:
            self.zeros.fill_(1 << (bits - 1))
        self.groups = torch.arange(n_in) // group

    @property
    def values(self) -> torch.Tensor:
        return (self.codes - self.zeros[:, self.groups]).double() * self.scales.double()[:, self.groups]


def write(folder: Path, tensors: dict[str, torch.Tensor], quantization: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(TINY | {"quantization_config": quantization}))
    return folder


def gptq(made: Made, at: str, bits: int = 4, less: int = 1) -> dict[str, torch.Tensor]:
    return {
        f"{at}.qweight": pack(made.codes, bits).T,
        f"{at}.qzeros": pack(made.zeros.T - less, bits),
        f"{at}.scales": made.scales.T,
        f"{at}.g_idx": made.groups.int(),
    }


def awq(made: Made, at: str) -> dict[str, torch.Tensor]:
    return {
        f"{at}.qweight": pack(made.codes.T, 4, AWQ_ORDER),
        f"{at}.qzeros": pack(made.zeros.T, 4, AWQ_ORDER),
        f"{at}.scales": made.scales.T,
    }


def pack_quantized(made: Made, at: str, bits: int, zeros: bool) -> dict[str, torch.Tensor]:
    found = {
        f"{at}.weight_packed": pack(made.codes, bits),
        f"{at}.weight_scale": made.scales.bfloat16() if not zeros else made.scales,
        f"{at}.weight_shape": torch.tensor(made.codes.shape),
    }
    if zeros:
        found[f"{at}.weight_zero_point"] = pack(made.zeros.T, bits).T
    return found


def check(folder: Path, wanted: torch.Tensor, packs: bool) -> None:
    with open_checkpoint(folder) as source:
        assert list(source.names()) == ["a.weight"]
        assert tuple(source.shape("a.weight")) == tuple(wanted.shape)
        torch.testing.assert_close(source.tensor("a.weight").double(), wanted, rtol=1e-6, atol=1e-7)
        packed = source.packed("a.weight")
        assert packed is not None
        assert packed.kind in FORMATS  # with 8 bits where there are no tiles of their own
        rows, columns = torch.tensor([17, 3, 4, 5, 22]), slice(32, 96)
        cut = packed.cut(rows, columns)
        assert cut is not None
        torch.testing.assert_close(cut.floats().double(), wanted[rows, 32:96], rtol=1e-6, atol=1e-7)
        if packs:
            from lamina_kernels.packed.pack import bytes_of

            room = torch.empty(bytes_of(cut.kind, *cut.shape) + 64, dtype=torch.uint8)
            room = room[-room.data_ptr() % 64 :]
            values = cut.pack(room[: bytes_of(cut.kind, *cut.shape)]).unpack(torch.float32).double()
            torch.testing.assert_close(values, wanted[rows, 32:96], rtol=2e-3, atol=2e-4)  # minima are float16
        source.release("a.weight")


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize(("version", "less"), [("gptq", 1), ("gptq_v2", 0)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq(tmp_path: Path, bits: int, group: int, version: str, less: int, symmetric: bool) -> None:
    made = Made(24, 128, group, bits, symmetric)
    said = GPTQ | {"bits": bits, "group_size": group if group < 128 else -1, "checkpoint_format": version}
    check(write(tmp_path, gptq(made, "a", bits, less), said), made.values, bits == 4 or symmetric)


def test_awq(tmp_path: Path) -> None:
    made = Made(24, 128, 32)
    check(write(tmp_path, awq(made, "a"), AWQ), made.values, True)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("strategy", ["group", "channel"])
def test_compressed_tensors_packed(tmp_path: Path, bits: int, zeros: bool, strategy: str) -> None:
    made = Made(24, 128, 32 if strategy == "group" else 128, bits, not zeros)
    made.scales = made.scales if zeros else made.scales.bfloat16()
    said = compressed("pack-quantized", bits, strategy, not zeros, group_size=32)
    check(write(tmp_path, pack_quantized(made, "a", bits, zeros), said), made.values, bits == 4 or not zeros)


@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_compressed_tensors_of_int8(tmp_path: Path, strategy: str) -> None:
    made = Made(24, 128, 128, 8, True)
    if strategy == "tensor":
        made.scales[:] = made.scales[0].clone()
    tensors = {
        "a.weight": (made.codes - 128).to(torch.int8),
        "a.weight_scale": made.scales if strategy == "channel" else made.scales[0],
    }
    check(write(tmp_path, tensors, compressed("int-quantized", 8, strategy)), made.values, True)


def test_inputs_in_an_order_of_their_own_become_8_bits(tmp_path: Path) -> None:
    """GPTQ's `desc_act`. Of 15 steps of 4 bits half a one is a thirtieth of the range; of 8 bits it is a 254th."""
    made = Made(24, 128, 32)
    made.groups = made.groups[torch.randperm(128, generator=torch.Generator().manual_seed(1))]
    folder = write(tmp_path, gptq(made, "a"), GPTQ | {"desc_act": True})
    with open_checkpoint(folder) as source:
        torch.testing.assert_close(source.tensor("a.weight").double(), made.values, rtol=1e-6, atol=1e-7)
        packed = source.packed("a.weight")
        assert packed is not None
        part = packed.cut(torch.tensor([9, 3]), slice(32, 64))
        assert part is not None
        values = made.values[[9, 3], 32:64]
        torch.testing.assert_close(part.floats().double(), values, rtol=1e-6, atol=1e-7)
        room = torch.empty(1 << 14, dtype=torch.uint8)
        matrix = part.pack(room[-room.data_ptr() % 64 :])
        error = (matrix.unpack(torch.float32) - values).abs()
        assert (error <= values.abs().amax(1, True) / 250).all()


def test_a_model_computes_with_packed_and_unpacked_weights(tmp_path: Path) -> None:
    overrides = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "tie_word_embeddings": False}
    config = ModelConfig.from_dict(TINY | overrides)
    plain, tensors, values = Tensors(config), {}, {}
    for i, name in enumerate(plain.names()):
        tensor = plain.tensor(name)
        if tensor.ndim == 2 and "embed" not in name and "lm_head" not in name:
            made = Made(*tensor.shape, 32, seed=i)
            tensors |= awq(made, name.removesuffix(".weight"))
            values[name] = made.values.float()
        else:
            tensors[name] = values[name] = tensor
    folder = write(tmp_path, tensors, AWQ)
    assert len(fingerprint(folder)) == 32
    with open_checkpoint(folder) as source:
        packed, floats = (
            load_weights(config, source, torch.float32, torch.device("cpu"), packing=packing)
            for packing in (Packing(packed=True), Packing())
        )
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(2))
    for ours, theirs in zip(packed.layers, floats.layers, strict=True):
        expected = theirs.qkv(x)
        assert 1e-5 < (ours.qkv(x) - expected).norm() / expected.norm() < 0.02
    gate = x @ values["model.layers.0.mlp.gate_proj.weight"].T
    gate_up = floats.layers[0].mlps[0].mlp.gate_up(x)  # type: ignore[union-attr]
    torch.testing.assert_close(gate_up[:, :96], gate, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        (GPTQ | {"bits": 3}, "3 bits; supported are 4 and 8"),
        (GPTQ | {"checkpoint_format": "marlin"}, "'marlin'; supported are gptq, gptq_v2"),
        (AWQ | {"version": "gemv"}, "'gemv'; supported is gemm"),
        (
            compressed("float-quantized", 8, "channel"),
            "of type 'int' by 'channel' in 8 bits; float-quantized is supported of float",
        ),
        (compressed("pack-quantized", 4, "block"), "by 'block' in 4 bits; pack-quantized is supported of int"),
        (compressed("pack-quantized", 4, "channel", type="float"), "type 'float'"),
    ],
)
def test_other_ways_are_named(tmp_path: Path, quantization: dict[str, Any], message: str) -> None:
    folder = write(tmp_path, {"a.weight": torch.zeros(1)}, quantization)
    with pytest.raises(UnsupportedModelError, match=message), open_checkpoint(folder):
        pass


@pytest.mark.parametrize(
    ("part", "tensor", "message"),
    [
        ("qweight", torch.zeros(16, 24), "holds torch.float32, expected torch.int32"),
        ("scales", torch.zeros(3, 24), r"scales has shape \[3, 24\], expected \[4, 24\]"),
        ("qzeros", torch.zeros(4, 2, dtype=torch.int32), r"qzeros has shape \[4, 2\], expected \[4, 3\]"),
        ("g_idx", torch.full((128,), 4, dtype=torch.int32), "groups outside of 0 to 3"),
        ("qzeros", None, "lacks a.qzeros"),
    ],
)
def test_parts_that_lie_are_named(tmp_path: Path, part: str, tensor: torch.Tensor | None, message: str) -> None:
    tensors = gptq(Made(24, 128, 32), "a")
    if tensor is None:
        del tensors[f"a.{part}"]
    else:
        tensors[f"a.{part}"] = tensor
    with open_checkpoint(write(tmp_path, tensors, GPTQ)) as source, pytest.raises(ModelFileError, match=message):
        source.tensor("a.weight")
