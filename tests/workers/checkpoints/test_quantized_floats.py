"""Checkpoints in FP8, NVFP4 and MXFP4: tiny ones, written here number by number, against transformers with the numbers
that they stand for. Unpacked, logits differ by 1e-4 at most. Packed, MXFP4 is exact; the others become 8 bits, so
there each number may differ by half a step of its block of 32, and logits as much as these tiles make them."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from dense_attention import DenseAttention
from reference_models import PROMPT, check_against, reference
from safetensors.torch import load_file, save_file

from lamina.models.weight_memory import weight_memory
from lamina_kernels.packed.layout import Format
from lamina_kernels.packed.pack import bytes_of
from lamina_workers.checkpoints.model_checkpoint import open_checkpoint
from lamina_workers.checkpoints.weight_loader import UNPACKED, Packing, packed_kind
from lamina_workers.decoder.model import Decoder
from lamina_workers.errors import LaminaError, ModelFileError, UnsupportedModelError
from lamina_workers.model_config.config import ModelConfig

# Newer transformers would rather have it called `cache`, older ones know only this name.
pytestmark = pytest.mark.filterwarnings("ignore:.past_key_values:FutureWarning")

E4M3 = torch.float8_e4m3fn
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
Parts = dict[str, torch.Tensor]
Written = tuple[Parts, torch.Tensor]
"""What a checkpoint has instead of a weight, by what stands behind its name; and the numbers that it stands for."""

DEEPSEEK = {
    "num_key_value_heads": 4, "kv_lora_rank": 32, "q_lora_rank": 32, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "qk_rope_head_dim": 16, "n_routed_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2,
    "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "num_hidden_layers": 2,
}  # fmt: skip
QWEN = {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_hidden_layers": 2}


def peaks(w: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The largest number of each block, `[..., rows, columns]` of them."""
    *_, n_out, n_in = w.shape
    padded = torch.nn.functional.pad(w.abs(), (0, -n_in % columns, 0, -n_out % rows))
    blocks = padded.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows))
    return blocks.amax((-3, -1))


def spread(scales: torch.Tensor, rows: int, columns: int, shape: torch.Size) -> torch.Tensor:
    """The scale of each number."""
    return scales.repeat_interleave(rows, -2).repeat_interleave(columns, -1)[..., : shape[-2], : shape[-1]]


def fp8(rows: int, columns: int, suffix: str = "_scale_inv", squeezed: bool = False) -> Callable[..., Written]:
    """In blocks; 0: of all rows or columns."""

    def write(w: torch.Tensor) -> Written:
        r, c = rows or w.shape[-2], columns or w.shape[-1]
        scales = (peaks(w, r, c) / 448).bfloat16().float()
        factors = spread(scales, r, c, w.shape)
        codes = (w / factors).clamp(-448, 448).to(E4M3)
        return {"": codes, suffix: scales.squeeze() if squeezed else scales}, codes.float() * factors

    return write


def halves(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest e2m1 two in a byte, and their numbers."""
    codes = (w.unsqueeze(-1) - E2M1).abs().argmin(-1)
    return (codes[..., ::2] + 16 * codes[..., 1::2]).to(torch.uint8), E2M1[codes]


def nvfp4(divides: bool) -> Callable[..., Written]:
    def write(w: torch.Tensor) -> Written:
        factor = w.abs().max() / (6 * 448)
        scales = (peaks(w, 1, 16) / 6 / factor).to(E4M3)
        factors = spread(scales.float(), 1, 16, w.shape) * factor
        codes, numbers = halves(w / factors)
        names = ("_packed", "_scale", "_global_scale") if divides else ("", "_scale", "_scale_2")
        parts = dict(zip(names, (codes, scales, 1 / factor.view(1) if divides else factor), strict=True))
        return parts | {"/input_scale": torch.ones(1)}, numbers * factors

    return write


def mxfp4(w: torch.Tensor) -> Written:
    powers = peaks(w, 1, 32).log2().floor() - 2
    codes, numbers = halves(w / spread(powers.exp2(), 1, 32, w.shape))
    return {"_packed": codes, "_scale": (powers + 127).to(torch.uint8)}, numbers * spread(powers.exp2(), 1, 32, w.shape)


def compressed(format: str, bits: int, strategy: str, **more: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "float", "strategy": strategy, "symmetric": True} | more
    group = {"targets": ["Linear"], "weights": weights}
    return {"quant_method": "compressed-tensors", "format": format, "config_groups": {"group_0": group}}


FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
MXFP4 = compressed("mxfp4-pack-quantized", 4, "group", group_size=32)
MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], Callable[..., Written]]] = {
    "deepseek": ("deepseek_v3", DEEPSEEK, FP8 | {"weight_block_size": [24, 40]}, fp8(24, 40)),
    "one block": ("deepseek_v3", DEEPSEEK, FP8 | {"weight_block_size": [128, 128]}, fp8(128, 128)),
    "tensor": ("llama", {}, FP8, fp8(0, 0, squeezed=True)),
    "channels": ("glm4", {"head_dim": 16}, compressed("float-quantized", 8, "channel"), fp8(1, 0, "_scale")),
    "blocks": (
        "llama",
        {},
        compressed("float-quantized", 8, "block", block_structure=[16, 32]),
        fp8(16, 32, "_scale"),
    ),
    "fbgemm": ("qwen3", {"head_dim": 16}, {"quant_method": "fbgemm_fp8"}, fp8(1, 0, "_scale")),
    "modelopt": ("llama", {}, MODELOPT | {"quant_algo": "FP8"}, fp8(0, 0, "_scale", True)),
    "nvfp4": ("qwen3_moe", QWEN, MODELOPT, nvfp4(False)),
    "nvfp4-pack": (
        "llama", {}, compressed("nvfp4-pack-quantized", 4, "tensor_group", group_size=16), nvfp4(True)
    ),
    "mxfp4-pack": ("llama", {}, compressed("mxfp4-pack-quantized", 4, "group", group_size=32), mxfp4),
    "stacked": ("qwen3_moe", QWEN, FP8 | {"weight_block_size": [16, 40]}, fp8(16, 40)),
}  # fmt: skip
Made = tuple[transformers.PreTrainedModel, Path, Parts]


def made(case: str, to: Path) -> Made:
    """transformers' model of the numbers that a checkpoint stands for, the checkpoint, and those numbers."""
    kind, options, quantization, write = CASES[case]
    model = reference(kind, options)
    model.save_pretrained(to / "plain")
    values, tensors = load_file(to / "plain" / "model.safetensors"), {}
    for name, tensor in values.items():
        if re.search(r"_proj(_with_mqa)?\.weight$", name):
            parts, values[name] = write(tensor)
            tensors |= {(name + part).replace("weight/", ""): x.contiguous() for part, x in parts.items()}
        else:
            tensors[name] = tensor
    save_file(values, to / "plain" / "model.safetensors", {"format": "pt"})
    if case == "stacked":
        tensors = stacked(tensors)
    tensors["model.layers.0.self_attn.k_scale"] = torch.ones(1)  # of keys, as vLLM would keep them
    folder = to / "quantised"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((to / "plain" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    load = type(model).from_pretrained
    return load(to / "plain", dtype=torch.float32, attn_implementation="eager").eval(), folder, values


def stacked(tensors: Parts) -> Parts:
    """Experts of a layer in one tensor: gate's rows, a whole number of blocks as published, before those of up."""
    for layer in range(2):
        at = f"model.layers.{layer}.mlp.experts"
        for part in ("weight", "weight_scale_inv"):
            maps = [
                torch.stack([tensors.pop(f"{at}.{expert}.{name}_proj.{part}").float() for expert in range(4)])
                for name in ("gate", "up", "down")
            ]
            to = E4M3 if part == "weight" else torch.float32
            suffix = part.removeprefix("weight")
            tensors[f"{at}.gate_up_proj{suffix}"] = torch.cat(maps[:2], 1).to(to)
            tensors[f"{at}.down_proj{suffix}"] = maps[2].to(to)
    return tensors


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return made(request.param, tmp_path_factory.mktemp("model"))


def loaded(folder: Path, packing: Packing = UNPACKED) -> Decoder:
    with open_checkpoint(folder) as source:
        return Decoder.load(ModelConfig.from_folder(folder), source, torch.float32, packing=packing)


def test_a_checkpoint_equals_transformers(case: Made) -> None:
    model, folder, _ = case
    decoder = loaded(folder)
    check_against(model, decoder)
    prompt = torch.arange(3, 14)[None]
    theirs = model.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)[0].tolist()
    sequence, ours = DenseAttention(decoder, PROMPT), prompt[0].tolist()
    with torch.inference_mode():
        while len(ours) < len(theirs):
            ours.append(int(sequence.run(ours[sequence.length :])[-1].argmax()))
    assert ours == theirs


def test_tiles_are_as_near_as_theirs_are(case: Made) -> None:
    """MXFP4 exactly, others within half a step of 8 bits."""
    model, folder, values = case
    packed = 0
    with open_checkpoint(folder) as source:
        for name in source.names():
            if (tensor := source.packed(name)) is None:
                continue
            packed += 1
            wanted = values[name] if name in values else source.tensor(name).flatten(0, 1)
            rows = torch.arange(len(wanted)).roll(5)
            cut = tensor.cut(rows, slice(0, 32))
            assert cut is not None
            torch.testing.assert_close(cut.floats(), wanted[rows, :32], rtol=1e-6, atol=0)
            n_bytes = bytes_of(cut.kind, *cut.shape)
            room = torch.empty(n_bytes + 64, dtype=torch.uint8)
            matrix = cut.pack(room[-room.data_ptr() % 64 :][:n_bytes])
            error = (matrix.unpack(torch.float32) - wanted[rows, :32]).abs()
            if tensor.kind == "FP4":
                assert not error.any()
            else:
                assert matrix.format == Format.U8
                assert (error <= wanted[rows, :32].abs().amax(1, True) / 250).all()
        assert packed
        assert packed_kind(source) in ("FP4", "int8")
    assert "packed" in weight_memory(folder).ways
    prompt = torch.arange(3, 14)
    with torch.inference_mode():
        expected = model(prompt[None]).logits[0]
        found = DenseAttention(loaded(folder, Packing(packed=True)), PROMPT).run(prompt.tolist())
    assert 1e-5 < (found - expected).norm() / expected.norm() < 0.1  # inputs are rounded to 8 bits too


def test_modelopt_may_say_it_in_a_file_of_its_own(tmp_path: Path) -> None:
    _, folder, _ = made("modelopt", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelFileError, match=r"weight holds torch.float8_e4m3fn without scales"):
        loaded(folder)
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    loaded(folder)


def write(folder: Path, tensors: Parts, quantization: dict[str, Any]) -> Path:
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    return folder


def test_scales_may_be_powers_of_two(tmp_path: Path) -> None:
    codes, powers = torch.randn(4, 32).to(E4M3), torch.tensor([[120], [127]], dtype=torch.uint8)
    tensors = {"a.weight": codes, "a.weight_scale_inv": powers.view(torch.float8_e8m0fnu)}
    with open_checkpoint(write(tmp_path, tensors, FP8 | {"weight_block_size": [2, 32]})) as source:
        wanted = codes.float() * torch.tensor([2.0**-7, 2.0**-7, 1.0, 1.0])[:, None]
        assert torch.equal(source.tensor("a.weight"), wanted)


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "hqq"}, "'hqq'; supported are fp8, fbgemm_fp8, mxfp4, compressed-tensors, modelopt, gptq"),
        (FP8 | {"fmt": "e5m2"}, "'e5m2', experts in 'fp8'; supported are e4m3, fp8"),
        (FP8 | {"expert_dtype": "fp4"}, "experts in 'fp4'"),
        (MODELOPT | {"quant_algo": "W4A8_AWQ"}, "'W4A8_AWQ'; supported are FP8, FP8_PER_CHANNEL_PER_TOKEN, FP8_PB_WO"),
        (compressed("mixed-precision", 8, "channel"), "'mixed-precision'; supported are pack-quantized"),
        (compressed("float-quantized", 8, "group"), "by 'group' in 8 bits; .* by tensor or channel or block"),
        (compressed("nvfp4-pack-quantized", 4, "tensor_group", group_size=32), "groups of 32; supported are 16"),
    ],
)
def test_other_ways_are_named(tmp_path: Path, quantization: dict[str, Any], message: str) -> None:
    folder = write(tmp_path, {"a.weight": torch.zeros(1)}, quantization)
    with pytest.raises(UnsupportedModelError, match=message), open_checkpoint(folder):
        pass


@pytest.mark.parametrize("size", [[0, 128], [128], "128", [128, True], [128, 1 << 21]])
def test_sizes_of_blocks_that_lie_are_named(tmp_path: Path, size: Any) -> None:
    folder = write(tmp_path, {"a.weight": torch.zeros(1)}, FP8 | {"weight_block_size": size})
    with pytest.raises(ModelFileError, match="weight_block_size is"), open_checkpoint(folder):
        pass


NAN = torch.tensor([[float("nan")], [1.0]])
LIES: dict[str, tuple[dict[str, Any], Parts, str]] = {
    "no scales": (FP8, {"_scale_inv": torch.empty(0)}, "a.weight holds torch.float8_e4m3fn without scales"),
    "NaN": (FP8, {"_scale_inv": NAN}, "a.weight_scale_inv has scales that are not finite"),
    "infinite": (FP8, {"_scale_inv": 1 / torch.tensor([[0.0], [1.0]])}, "scales that are not finite"),
    "shape": (FP8, {"_scale_inv": torch.ones(1, 2)}, r"has shape \[1, 2\], expected \[2, 1\]"),
    "integers": (FP8, {"_scale_inv": torch.ones(2, 1, dtype=torch.int32)}, "holds torch.int32, expected floats"),
    "no fp8": (FP8, {"": torch.zeros(4, 32)}, "a.weight holds torch.float32, expected torch.float8_e4m3fn"),
    "dimensions": (FP8, {"": torch.zeros(4).to(E4M3)}, r"has shape \[4\], expected 2 or 3 dimensions"),
    "nothing": (FP8, {"": torch.zeros(0, 32).to(E4M3)}, r"has shape \[0, 32\], expected 2 or 3 dimensions above 0"),
    "NaN in e4m3": (MODELOPT, {"_scale": torch.full((4, 2), torch.nan).to(E4M3)}, "scales that are not finite"),
    "few scales": (MODELOPT, {"_scale": torch.ones(4, 1).to(E4M3)}, r"has shape \[4, 1\], expected \[4, 2\]"),
    "no factor": (MODELOPT, {"_scale_2": torch.empty(0)}, "lacks a.weight_scale_2"),
    "factors": (MODELOPT, {"_scale_2": torch.ones(2)}, "must be one number above 0"),
    "factor of 0": (MODELOPT, {"_scale_2": torch.zeros(1)}, "must be one number above 0"),
    "NaN power": (MXFP4, {"_scale": torch.full((4, 1), 255, dtype=torch.uint8)}, "scales that are no numbers"),
    "few powers": (MXFP4, {"_scale": torch.ones(3, 1, dtype=torch.uint8)}, r"has shape \[3, 1\], expected \[4, 1\]"),
    "no powers": (MXFP4, {"_scale": torch.empty(0)}, "has no tensor 'a.weight'"),
    "no codes": (MXFP4, {"_packed": torch.zeros(4, 16)}, "holds torch.float32, expected torch.uint8"),
    "part of a block": (MXFP4, {"_packed": torch.zeros(4, 24, dtype=torch.uint8)}, "48 inputs; .* multiples of 32"),
}


@pytest.mark.parametrize("lie", LIES)
def test_parts_that_lie_are_named(tmp_path: Path, lie: str) -> None:
    quantization, changed, message = LIES[lie]
    if quantization is FP8:
        quantization = FP8 | {"weight_block_size": [2, 32]}
        parts = {"": torch.randn(4, 32).to(E4M3), "_scale_inv": torch.ones(2, 1)}
    elif quantization is MXFP4:
        parts = mxfp4(torch.randn(4, 32))[0]
    else:
        parts = nvfp4(False)(torch.randn(4, 32))[0]
        del parts["/input_scale"]
    parts = {f"a.weight{part}": x for part, x in (parts | changed).items() if x.shape != (0,)}
    folder = write(tmp_path, parts, quantization)
    with pytest.raises(ModelFileError, match=message), open_checkpoint(folder) as source:
        source.tensor("a.weight")


def test_numbers_that_are_none_are_not_packed(tmp_path: Path) -> None:
    codes = torch.ones(4, 32)
    codes[2, 5] = torch.nan
    folder = write(tmp_path, {"a.weight": codes.to(E4M3), "a.weight_scale_inv": torch.ones(())}, FP8)
    with open_checkpoint(folder) as source:
        tensor = source.packed("a.weight")
        assert tensor is not None
        with pytest.raises(ValueError, match="row 2 is not finite"):
            tensor.pack(torch.empty(1 << 16, dtype=torch.uint8)[64:])


WAYS: dict[str, tuple[dict[str, Any], Callable[..., Written]]] = {
    "fp8": (FP8 | {"weight_block_size": [2, 32]}, fp8(2, 32)),
    "nvfp4": (MODELOPT, nvfp4(False)),
    "mxfp4": (MXFP4, mxfp4),
}


def written(folder: Path, way: str) -> Path:
    """A checkpoint of two weights; its file."""
    quantization, write_weight = WAYS[way]
    names = {f"{name}.weight{part}": x for name in "ab" for part, x in write_weight(torch.randn(4, 64))[0].items()}
    write(folder, {name.replace("weight/", ""): x.contiguous() for name, x in names.items()}, quantization)
    return folder / "model.safetensors"


@pytest.mark.fault("F26")
@pytest.mark.parametrize("keeps", [0, 7, 200, -1])
@pytest.mark.parametrize("way", WAYS)
def test_files_that_are_cut_off_are_named(tmp_path: Path, way: str, keeps: int) -> None:
    file = written(tmp_path, way)
    file.write_bytes(file.read_bytes()[:keeps])
    with pytest.raises(ModelFileError, match=r"model.safetensors (has|is truncated)"), open_checkpoint(tmp_path):
        pass


@pytest.mark.fault("F26")
@pytest.mark.parametrize("way", WAYS)
def test_a_changed_byte_gives_an_error_or_the_shapes_that_the_file_says(tmp_path: Path, way: str) -> None:
    file, draw, outcomes = written(tmp_path, way), random.Random(way), set()
    for changed in (file, tmp_path / "config.json"):
        content = changed.read_bytes()
        header = min(len(content), 8 + int.from_bytes(content[:8], "little"))
        for place in (draw.randrange(header) for _ in range(150)):
            changed.write_bytes(content[:place] + bytes([draw.randrange(256)]) + content[place + 1 :])
            try:
                with open_checkpoint(tmp_path) as source:
                    for name in source.names():
                        assert tuple(source.tensor(name).shape) == tuple(source.shape(name))
                outcomes.add("read")
            except LaminaError:
                outcomes.add("refused")
        changed.write_bytes(content)
    assert outcomes == {"read", "refused"}
