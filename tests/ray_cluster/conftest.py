"""A real cluster for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from gguf_writing import SIZES, write_gguf
from ray_nodes import Namespaces, cluster, join
from transformers import AutoModelForCausalLM, LlamaConfig

from lamina.models.gguf_conversion import convert
from lamina.models.gguf_files import GgufFile


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Namespaces]:
    """A cluster: the head for the model and one attention worker, the other node for one more."""
    with cluster(tmp_path_factory.mktemp("ray"), {"lamina_model": 1, "lamina_attention": 1}) as made:
        join(made, """{"lamina_attention": 1}""")
        yield made


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random llama as a folder."""
    folder = tmp_path_factory.mktemp("model")
    sizes = SIZES | {"hidden_size": 96, "head_dim": 16, "max_position_embeddings": 4096}
    config = LlamaConfig(**sizes, tie_word_embeddings=True)
    torch.manual_seed(0)
    weights = AutoModelForCausalLM.from_config(config).state_dict()
    del weights["lm_head.weight"]
    gguf = write_gguf(folder / "tiny.gguf", config, {name: torch.randn_like(w) * 0.3 for name, w in weights.items()})
    convert(GgufFile(gguf), folder, gguf.name, {})
    return folder
