"""What `weights` and `quantize` come to: which weights stay packed, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gguf_writing import tiny, write_gguf
from model_export import export

from lamina.config import EngineConfig
from lamina.errors import InvalidRequest
from lamina.launch.model_files import ModelFiles, load
from lamina.models.resolve import resolve
from lamina_workers.checkpoints.weight_loader import Packing

CPU = (torch.device("cpu"),)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelFiles]:
    """The same tiny model, with packed weights and with floats."""
    folder = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        model = tiny("llama")
        weights = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
        for name, tensor in weights.items():
            if name.endswith("down_proj.weight"):  # the only inputs that are made a multiple of 32
                weights[name] = tensor.new_zeros(48, 96)
            elif "mlp" in name:
                weights[name] = tensor.new_zeros(96, 48)
        model.config.intermediate_size = 96
        path = write_gguf(folder / "tiny.gguf", model.config, weights, {"ffn_down.weight": "Q4_0"})
        packed = resolve(path)
        plain = export(packed, folder / "plain")
        config = EngineConfig()
        return {"packed": load(packed, config, None), "floats": load(plain, config, None)}


@pytest.mark.parametrize(
    ("which", "options", "dtype", "wanted"),
    [
        ("packed", {}, torch.bfloat16, Packing(packed=True)),
        ("packed", {"weights": "packed"}, torch.float32, Packing(packed=True)),
        ("packed", {}, torch.float16, Packing()),
        ("packed", {"weights": "bfloat16"}, torch.bfloat16, Packing()),
        ("floats", {}, torch.bfloat16, Packing()),
        ("floats", {"quantize": "int4"}, torch.bfloat16, Packing(quantize="int4")),
    ],
)
def test_what_stays_packed(
    files: dict[str, ModelFiles], which: str, options: dict[str, Any], dtype: torch.dtype, wanted: Packing
) -> None:
    assert files[which].packing(EngineConfig(**options), CPU, dtype) == wanted


@pytest.mark.parametrize(
    ("which", "options", "device", "message"),
    [
        ("floats", {"weights": "packed"}, "cpu", "weights is 'packed', but the checkpoint has floats"),
        ("packed", {"weights": "packed"}, "cuda:0", "no kernels for packed weights on cuda:0"),
        ("packed", {"quantize": "int8"}, "cpu", "quantize is 'int8', but the weights are packed already, as Q4_0"),
        ("floats", {"quantize": "int8"}, "cuda:0", "quantize is 'int8', but there are no kernels"),
    ],
)
def test_what_is_not_possible_is_refused(
    files: dict[str, ModelFiles], which: str, options: dict[str, Any], device: str, message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        files[which].packing(EngineConfig(**options), (torch.device(device),), torch.bfloat16)


def test_a_gpu_gets_unpacked_weights(files: dict[str, ModelFiles]) -> None:
    assert files["packed"].packing(EngineConfig(), (torch.device("cuda:0"),), torch.bfloat16) == Packing()


def test_unpacked_weights_set_the_dtype() -> None:
    assert EngineConfig(weights="float32").dtype == "float32"
    assert EngineConfig(weights="bfloat16", dtype="bfloat16").dtype == "bfloat16"
    with pytest.raises(InvalidRequest, match="weights is 'float32' and dtype 'bfloat16'"):
        EngineConfig(weights="float32", dtype="bfloat16")
    with pytest.raises(InvalidRequest, match="weights is 'float32' and quantize 'int4'"):
        EngineConfig(weights="float32", quantize="int4")
    with pytest.raises(InvalidRequest, match="weights is 'int4'; allowed are auto, packed, bfloat16, float32"):
        EngineConfig(weights="int4")
    with pytest.raises(InvalidRequest, match="quantize is 'int3'; allowed are int4, int8, None"):
        EngineConfig(quantize="int3")
