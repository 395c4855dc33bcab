"""Weights that stay packed: the maps of a decoder are those of the file, for every kind, cut and order."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from dense_attention import DenseAttention
from engine_rig import TINY, Tensors
from gguf_layouts import permuted
from gguf_writing import random_blocks, write_gguf
from transformers import AutoModelForCausalLM, GptOssConfig, LlamaConfig, Qwen2Config

from lamina.models.gguf_conversion import convert
from lamina.models.gguf_files import GgufFile
from lamina_kernels.dense.dense import Linear, repacks
from lamina_kernels.packed.matrix import PackedMatrix
from lamina_kernels.packed.pack import bytes_of, can_pack
from lamina_workers.checkpoints.model_checkpoint import open_checkpoint
from lamina_workers.checkpoints.packed_tensors import READABLE, GgmlBlocks
from lamina_workers.checkpoints.weight_loader import Arena, Packing, kept_bytes, packed_kind
from lamina_workers.decoder.decoder_weights import DecoderWeights, load_weights
from lamina_workers.decoder.model import Decoder
from lamina_workers.decoder.shard import WHOLE, Shard, with_ranks
from lamina_workers.errors import ModelFileError
from lamina_workers.model_config.config import ModelConfig

SIZES: dict[str, Any] = {
    "vocab_size": 304,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
PACKED = Packing(packed=True)
OTHERS = ["Q2_K", "IQ4_NL", "IQ4_XS"]
PLAIN = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
KINDS: dict[str, dict[str, str]] = {kind: {f"{name}.weight": kind for name in (
    "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down", "token_embd", "output"
)} for kind in [*PLAIN, "Q4_K", "Q5_K", "Q6_K"]}  # fmt: skip
KINDS["mixed"] = KINDS["Q4_K"] | {"attn_v.weight": "Q6_K", "ffn_down.weight": "Q6_K", "token_embd.weight": "Q8_0"}


def folder_of(tmp_path: Path, kinds: dict[str, str], tied: bool = True, llama: bool = True) -> Path:
    """A tiny model whose matrices are of these kinds."""
    torch.manual_seed(0)
    config = (LlamaConfig if llama else Qwen2Config)(**SIZES, tie_word_embeddings=tied)
    weights = AutoModelForCausalLM.from_config(config).state_dict()
    if tied:
        del weights["lm_head.weight"]
    gguf_file = write_gguf(tmp_path / "x.gguf", config, weights, kinds)
    folder = tmp_path / "x"
    folder.mkdir()
    convert(GgufFile(gguf_file), folder, str(gguf_file), {})
    return folder


Made = Callable[..., Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The folder of each kind, tied or not, made once."""

    @functools.cache
    def make(kind: str, tied: bool = True) -> Path:
        return folder_of(tmp_path_factory.mktemp("model"), KINDS[kind], tied)

    return make


def loaded(
    folder: Path, packing: Packing, shard: Shard = WHOLE, dtype: torch.dtype = torch.float32, **more: Any
) -> DecoderWeights:
    config = with_ranks(ModelConfig.from_folder(folder), shard.ranks)
    with open_checkpoint(folder) as source, torch.inference_mode():
        return load_weights(config, source, dtype, torch.device("cpu"), shard=shard, packing=packing, **more)


def numbers(x: Linear | PackedMatrix | torch.Tensor) -> torch.Tensor:
    """W `[n_out, n_in]`, float32."""
    if isinstance(x, torch.Tensor):
        return x.float()
    if isinstance(x, PackedMatrix):
        return x.unpack(torch.float32)
    return x.float32(torch.eye(x.n_in)).T


def maps(weights: DecoderWeights) -> Iterator[tuple[str, torch.Tensor]]:
    yield "embedding", numbers(weights.embedding)
    yield "head", numbers(weights.head)
    for i, layer in enumerate(weights.layers):
        yield f"{i} qkv", numbers(layer.qkv)
        yield f"{i} output", numbers(layer.output)
        mlp = layer.mlps[0].mlp
        yield f"{i} gate_up", numbers(mlp.gate_up)  # type: ignore[union-attr]
        yield f"{i} down", numbers(mlp.down)  # type: ignore[union-attr]


def check_same(found: DecoderWeights, wanted: DecoderWeights) -> None:
    for (name, ours), (_, theirs) in zip(maps(found), maps(wanted), strict=True):
        # An identity is rounded to int8 exactly but for its scale.
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6, msg=lambda said, name=name: f"{name}: {said}")


def is_packed(linear: Linear, folder: Path) -> bool:
    """Whether a map is rounded as packed ones are: its activations become int8."""
    x = torch.full((1, linear.n_in), 1.0)
    x[0, 0] = 1e-4  # beside 1 it is rounded to nothing
    without = x.clone()
    without[0, 0] = 0
    return torch.equal(linear.float32(x), linear.float32(without))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False])
def test_packed_maps_are_those_of_the_file(made: Made, kind: str, tied: bool) -> None:
    folder = made(kind, tied)
    found = loaded(folder, PACKED)
    assert isinstance(found.embedding, PackedMatrix)
    assert is_packed(found.head, folder)
    assert is_packed(found.layers[1].qkv, folder)
    check_same(found, loaded(folder, Packing()))
    with open_checkpoint(folder) as source:
        file = GgufFile(folder.parent / "x.gguf")
        for ours, theirs in (("self_attn.q_proj", "attn_q"), ("self_attn.v_proj", "attn_v"), ("mlp.up_proj", "ffn_up")):
            wanted = np.concatenate(list(file.rows(f"blk.1.{theirs}.weight")))
            tensor = source.tensor(f"model.layers.1.{ours}.weight").numpy()
            tensor = permuted(tensor, 4) if theirs == "attn_q" else tensor
            np.testing.assert_allclose(tensor, wanted, rtol=1e-6, atol=1e-7)


def test_logits_are_close_to_those_of_unpacked_weights(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, KINDS["mixed"], llama=False)
    config, found = ModelConfig.from_folder(folder), []
    tokens = torch.randint(304, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    for packing in (PACKED, Packing()):
        with torch.inference_mode():
            sequence = DenseAttention(Decoder(config, loaded(folder, packing)), len(tokens))
            found.append(torch.cat([sequence.run(tokens[:37]), *(sequence.run([token]) for token in tokens[37:])]))
    packed, unpacked = found
    assert not torch.equal(packed, unpacked)
    assert (packed - unpacked).norm() < 0.03 * unpacked.norm()


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0", "Q4_K", "mixed"])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("tied", [True, False])
def test_ranks_have_the_parts_of_unpacked_weights(made: Made, kind: str, split: bool, tied: bool) -> None:
    """K kinds cannot be cut at 128 of 256 inputs: what is not packed is unpacked, and the same."""
    folder = made(kind, tied)
    for rank in (0, 1):
        shard = Shard(rank, 2)
        found = loaded(folder, PACKED, shard, split_embedding=split)
        check_same(found, loaded(folder, Packing(), shard, split_embedding=split))
        assert is_packed(found.layers[0].qkv, folder)
        assert is_packed(found.layers[0].output, folder) == (kind in PLAIN)


def test_a_cut_inside_of_a_block_is_said_once(made: Made, caplog: pytest.LogCaptureFixture) -> None:
    loaded(made("Q4_K"), PACKED, Shard(0, 2))
    (said,) = [record.message for record in caplog.records if "unpacked" in record.message]
    assert "Q4_K" in said
    assert "o_proj" in said


def test_what_cannot_be_packed_is_unpacked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kinds = dict(KINDS["Q4_0"])
    del kinds["ffn_up.weight"]
    folder = folder_of(tmp_path, kinds)
    with caplog.at_level("INFO", "lamina"):
        found = loaded(folder, PACKED)
    assert not is_packed(found.layers[0].mlps[0].mlp.gate_up, folder)  # type: ignore[union-attr]
    assert is_packed(found.layers[0].output, folder)
    assert "unpacked, 1.0 MiB as torch.float32 instead of 0.1" in caplog.text  # the gate beside it
    check_same(found, loaded(folder, Packing()))


@pytest.mark.parametrize(("kind", "exact"), [("MXFP4", True), ("Q3_K", True), *((k, False) for k in OTHERS)])
def test_kinds_that_kernels_lack_become_ones_that_they_have(tmp_path: Path, kind: str, exact: bool) -> None:
    """As they are where another kind has the same numbers, else rounded to 8 bits."""
    blocks = GgmlBlocks(kind, (torch.from_numpy(random_blocks(kind, 48, 512)),), 512)
    rows, code = torch.arange(40, 8, -1), gguf.GGMLQuantizationType[kind]
    part = blocks.cut(rows, slice(256, 512))
    assert part is not None
    wanted = torch.from_numpy(gguf.quants.dequantize(blocks.raw[0].numpy(), code))[rows, 256:]
    assert can_pack(part.kind, *part.shape)
    matrix = part.pack(torch.empty(bytes_of(part.kind, *part.shape), dtype=torch.uint8)).unpack(torch.float32)
    if exact:
        assert torch.equal(part.floats(), wanted)
        assert torch.equal(matrix, wanted)
    else:
        torch.testing.assert_close(part.floats(), wanted)
        largest = wanted.view(len(rows), -1, 32).abs().amax(-1).repeat_interleave(32, 1)
        assert ((matrix - wanted).abs() <= largest * 0.005).all()


@pytest.mark.parametrize(
    ("stored", "width", "kind", "error"),
    [
        ("Q4_K", 128, "Q4_1", 0.001),
        ("Q5_K", 32, "Q5_1", 0.001),
        ("Q8_0", 64, "Q8_0", 0.0),
        ("MXFP4", 64, "FP4", 0.0),
        ("Q6_K", 128, "int8", 0.005),
        ("Q4_K", 16, "int8", 0.005),
    ],
)
def test_columns_in_another_order(stored: str, width: int, kind: str, error: float) -> None:
    """Whole blocks are moved; of what has none, 8 bits are made."""
    raw = torch.from_numpy(random_blocks(stored, 32, 512))
    order = torch.arange(512).view(2, -1, width).transpose(0, 1).flatten()
    blocks, plain = GgmlBlocks(stored, (raw,), 512, columns=order), GgmlBlocks(stored, (raw,), 512).floats()
    part = blocks.cut(torch.arange(16, 32), slice(128, 384))
    assert part is not None
    assert part.kind == kind
    assert torch.equal(part.floats(), plain[16:, order[128:384]])
    matrix = part.pack(torch.empty(bytes_of(kind, 16, 256), dtype=torch.uint8)).unpack(torch.float32)
    assert (matrix - part.floats()).abs().max() <= error * plain.abs().max()


def test_stacked_experts_stay_packed_one_by_one(tmp_path: Path) -> None:
    """In MXFP4, as gpt-oss has them: each expert is some rows of the file's tensor."""
    sizes = SIZES | {"num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 64, "sliding_window": 16}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(GptOssConfig(**sizes, tie_word_embeddings=False))
    kinds = {f"ffn_{part}_exps.weight": "MXFP4" for part in ("gate", "up", "down")}
    path = write_gguf(tmp_path / "x.gguf", model.config, model.state_dict(), kinds)
    (tmp_path / "x").mkdir()
    convert(GgufFile(path), tmp_path / "x", str(path), {})
    weights = loaded(tmp_path / "x", PACKED)
    experts = weights.layers[1].mlps[0].mlp._experts  # type: ignore[union-attr]
    file = GgufFile(path)
    for part, of in (("gate", slice(512)), ("up", slice(512, None))):
        wanted = torch.from_numpy(np.concatenate(list(file.rows(f"blk.1.ffn_{part}_exps.weight")))).view(3, 512, 256)
        for number, expert in enumerate(experts):
            torch.testing.assert_close(numbers(expert.gate_up)[of], wanted[number], rtol=1e-4, atol=1e-6)
            assert is_packed(expert.gate_up, tmp_path)


def test_infinite_scales_name_tensor_and_row(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, KINDS["Q8_0"])
    path = tmp_path / "x.gguf"
    tensor = GgufFile(path).tensors["blk.1.ffn_down.weight"]
    content = bytearray(path.read_bytes())
    content[tensor.offset + 3 * tensor.nbytes // tensor.shape[0] :][:2] = b"\0\x7c"
    at = tensor.offset + 3 * tensor.nbytes // tensor.shape[0]
    content[at : at + 2] = b"\0\x7c"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=r"model\.layers\.1\.mlp\.down_proj\.weight cannot be packed: row 3"):
        loaded(folder, PACKED)


@pytest.mark.parametrize(("kind", "most"), [("int8", 0.01), ("int4", 0.12)])
@pytest.mark.parametrize("tied", [True, False])
def test_floats_are_quantised_while_they_are_loaded(kind: str, most: float, tied: bool) -> None:
    overrides = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "tie_word_embeddings": tied}
    config = ModelConfig.from_dict(TINY | overrides)
    source = Tensors(config)
    found, wanted = (
        load_weights(config, source, torch.float32, torch.device("cpu"), packing=packing)
        for packing in (Packing(quantize=kind), Packing())
    )
    assert isinstance(found.embedding, PackedMatrix)
    for (name, ours), (_, theirs) in zip(maps(found), maps(wanted), strict=True):
        error = float((ours - theirs).norm() / theirs.norm())
        assert 1e-4 < error < (0.01 if name in ("embedding", "head") else most), (name, error)


def test_routers_are_not_quantised() -> None:
    overrides = {"architectures": ["MixtralForCausalLM"], "num_local_experts": 5, "num_experts_per_tok": 2}
    config = ModelConfig.from_dict(TINY | overrides | {"hidden_size": 64, "head_dim": 16, "intermediate_size": 64})
    source = Tensors(config)
    weights = load_weights(config, source, torch.float32, torch.device("cpu"), packing=Packing(quantize="int4"))
    experts = weights.layers[0].mlps[0].mlp
    (router,) = [name for name in source.names() if name.endswith("layers.0.block_sparse_moe.gate.weight")]
    torch.testing.assert_close(numbers(experts._router.scores), source.tensor(router))  # type: ignore[union-attr]


@pytest.mark.skipif(repacks(torch.empty(64, 64, dtype=torch.bfloat16)), reason="oneDNN repacks weights on this CPU")
def test_matrices_that_are_not_repacked_lie_in_one_block() -> None:
    """None did: whether they are was asked of a matrix with strides of zero, which no kernel takes as it is."""
    config = ModelConfig.from_dict(TINY | {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16})
    weights = load_weights(config, Tensors(config), torch.bfloat16, torch.device("cpu"))
    linears = [linear for layer in weights.layers for linear in (layer.qkv, layer.output)]
    assert len({linear._weight.untyped_storage().data_ptr() for linear in linears}) == 1


@pytest.mark.parametrize("kind", ["Q4_0", "Q6_K", "mixed", "Q3_K", "IQ4_XS", "MXFP4"])
@pytest.mark.parametrize("tied", [True, False])
def test_what_is_counted_before_is_what_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, tied: bool
) -> None:
    folder = folder_of(tmp_path, KINDS.get(kind, dict.fromkeys(KINDS["Q4_0"], kind)), tied)
    take, taken = Arena.take, 0

    def count(arena: Arena, n_bytes: int) -> torch.Tensor:
        nonlocal taken
        taken += n_bytes
        return take(arena, n_bytes)

    monkeypatch.setattr(Arena, "take", count)
    loaded(folder, PACKED)
    with open_checkpoint(folder) as source:
        assert taken == kept_bytes(source, torch.float32, PACKED)


@pytest.mark.fault("F26")
@pytest.mark.parametrize("kind", [kind for kind in READABLE if kind not in KINDS])
def test_a_file_of_another_kind_that_is_cut_off_or_has_no_scale_is_refused(tmp_path: Path, kind: str) -> None:
    folder, file = folder_of(tmp_path, {"ffn_down.weight": kind}), tmp_path / "x.gguf"
    content, tensor = file.read_bytes(), GgufFile(file).tensors["blk.1.ffn_down.weight"]
    for size in (100, GgufFile(file).header, tensor.offset, tensor.offset + tensor.nbytes - 1):
        file.write_bytes(content[:size])
        with pytest.raises(ModelFileError, match=r"passes the end at|is it truncated\?"):
            GgufFile(file)
        with pytest.raises(ModelFileError, match=f"has {size} bytes and is not the file"):
            loaded(folder, PACKED)
    block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
    at = tensor.offset + 7 * block + {"Q2_K": block - 4, "Q3_K": block - 2}.get(kind, 0)
    for scale in (b"\xff",) if kind == "MXFP4" else (b"\0\x7e", b"\0\xfc"):
        file.write_bytes(content[:at] + scale + content[at + len(scale) :])
        for packing in (PACKED, Packing()):
            with pytest.raises(ModelFileError, match=r"layers.1.mlp.down_proj.weight cannot be .*not finite"):
                loaded(folder, packing)


def test_packed_bytes_are_counted(made: Made) -> None:
    folder = made("Q4_0")
    with open_checkpoint(folder) as source:
        packed, floats = (kept_bytes(source, torch.bfloat16, packing) for packing in (PACKED, Packing()))
        assert packed_kind(source) == "Q4_0"
    assert 0.25 < packed / floats < 0.35
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q4_0] == (32, 18)
