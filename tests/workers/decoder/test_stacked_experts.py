"""Checkpoints that keep all experts of a layer in one tensor, as floats and in MXFP4, against transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from reference_models import check_against, reference
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from lamina_kernels.packed.matrix import PackedMatrix
from lamina_workers.checkpoints.model_checkpoint import open_checkpoint
from lamina_workers.checkpoints.packed_tensors import Mxfp4
from lamina_workers.checkpoints.weight_loader import Packing, packed_kind
from lamina_workers.decoder.decoder_weights import load_weights
from lamina_workers.decoder.model import Decoder
from lamina_workers.decoder.moe import Experts
from lamina_workers.errors import ModelFileError, UnsupportedModelError
from lamina_workers.model_config.config import ModelConfig

# Newer transformers would rather have it called `cache`, older ones know only this name.
pytestmark = pytest.mark.filterwarnings("ignore:.past_key_values:FutureWarning")

OPTIONS = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 9}
MXFP4 = {"quantization_config": {"quant_method": "mxfp4"}}


def random_mxfp4(n: int, blocks: int, experts: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(n)
    numbers = torch.randint(0, 256, (experts, n, blocks, 16), generator=draw, dtype=torch.uint8)
    return numbers, torch.randint(121, 126, (experts, n, blocks), generator=draw, dtype=torch.uint8)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, Path]:
    """transformers' model with experts that MXFP4 has exactly, and the same as it is published."""
    model = reference("gpt_oss", OPTIONS)
    folder = tmp_path_factory.mktemp("mxfp4")
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    parameters = dict(model.named_parameters())
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, n_in, n_out = tensors.pop(name).shape
        blocks, scales = random_mxfp4(n_out, n_in // 32, experts)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        with torch.no_grad():
            parameters[name].copy_(convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | MXFP4))
    return model, folder


def test_mxfp4_is_read_as_transformers_reads_it() -> None:
    blocks = torch.arange(256, dtype=torch.uint8).repeat(4, 1).view(4, 16, 16)
    scales = torch.arange(0, 64, dtype=torch.uint8).view(4, 16) + 95
    expected = convert_moe_packed_tensors(blocks[None], scales[None], dtype=torch.float32)[0].T
    assert torch.equal(Mxfp4("a", blocks.flatten(1), scales).floats(), expected)
    every_scale = torch.arange(0, 256, dtype=torch.uint8)[:, None]
    codes = torch.full((256, 16), 0x33, dtype=torch.uint8)
    lowest = Mxfp4("a", codes[:255], every_scale[:255]).floats()
    assert torch.equal(lowest[:, 0].double(), 1.5 * 2.0 ** (torch.arange(255).double() - 127))
    with pytest.raises(ModelFileError, match="tensor a has scales that are no numbers"):
        Mxfp4("a", codes, every_scale).floats()


def test_mxfp4_of_experts_stays_packed_and_exact(published: tuple[object, Path]) -> None:
    """float16 has all scales that weights have."""
    model, folder = published
    with open_checkpoint(folder) as source:
        assert packed_kind(source) == "FP4"
        config, packing = ModelConfig.from_folder(folder), Packing(packed=True)
        weights = load_weights(config, source, torch.float32, torch.device("cpu"), packing=packing)
    for layer, mixer in enumerate(weights.layers):
        theirs = model.model.layers[layer].mlp.experts  # type: ignore[attr-defined]
        experts = mixer.mlps[0].mlp
        assert isinstance(experts, Experts)
        for number, expert in enumerate(experts._experts):
            gate_up = theirs.gate_up_proj[number].T
            wanted = torch.cat((gate_up[::2], gate_up[1::2])), theirs.down_proj[number].T
            for linear, numbers in zip((expert.gate_up, expert.down), wanted, strict=True):
                assert linear.few_rows is not None
                (matrix,), _ = linear.few_rows
                assert isinstance(matrix, PackedMatrix)
                assert torch.equal(matrix.unpack(torch.float32), numbers)


def test_a_checkpoint_in_mxfp4_equals_transformers(published: tuple[object, Path]) -> None:
    model, folder = published
    with open_checkpoint(folder) as checkpoint:
        decoder = Decoder.load(ModelConfig.from_folder(folder), checkpoint, torch.float32)
    check_against(model, decoder)


def spoilt(folder: Path, to: Path, change: str) -> Path:
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.experts.down_proj_scales"
    if change == "missing":
        del tensors[name]
    elif change == "shape":
        tensors[name] = tensors[name][:, :-1].contiguous()
    else:
        tensors[name] = tensors[name].float()
    save_file(tensors, to / "model.safetensors")
    (to / "config.json").write_bytes((folder / "config.json").read_bytes())
    return to


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", "lacks model.layers.1.mlp.experts.down_proj"),
        ("shape", r"down_proj_scales has shape \[4, 63, 3\], expected \[4, 64, 3\]"),
        ("dtype", "down_proj_scales holds torch.float32, expected torch.uint8"),
    ],
)
def test_a_spoilt_checkpoint_is_named(
    published: tuple[object, Path], tmp_path: Path, change: str, message: str
) -> None:
    folder = spoilt(published[1], tmp_path, change)
    with open_checkpoint(folder) as checkpoint, pytest.raises(ModelFileError, match=message):
        Decoder.load(ModelConfig.from_folder(folder), checkpoint, torch.float32)


def test_other_ways_to_keep_experts_are_refused(published: tuple[object, Path]) -> None:
    raw = json.loads((published[1] / "config.json").read_text())
    with pytest.raises(UnsupportedModelError, match="quant_method 'gptq' is not supported; supported: 'mxfp4'"):
        ModelConfig.from_dict(raw | {"quantization_config": {"quant_method": "gptq"}})
    with pytest.raises(ModelFileError, match="hidden_size 72 and 96, of an expert, must be multiples of 32"):
        ModelConfig.from_dict(raw | {"hidden_size": 72})
