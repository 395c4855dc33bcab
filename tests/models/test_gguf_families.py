"""A tiny random model of every GGUF architecture, written as llama.cpp's converter does: its logits are those of
transformers."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_attention import DenseAttention
from engine_rig import DEVICE
from gguf_layouts import ARCHITECTURES as LAYOUTS
from gguf_writing import write_gguf
from hybrid_families import FAMILIES as HYBRIDS
from reference_models import check_against, reference
from safetensors.torch import load_file
from typer.testing import CliRunner

from lamina.cli.main import app
from lamina.errors import LaminaError, ModelFileError
from lamina.measure.hardware.reading import Bandwidth
from lamina.models.gguf_architectures import ARCHITECTURES
from lamina.models.gguf_conversion import convert
from lamina.models.gguf_files import GgufFile
from lamina_workers.checkpoints.model_checkpoint import open_checkpoint
from lamina_workers.converted.models import decoder_of as decoder_with
from lamina_workers.converted.models import load_model, model_config
from lamina_workers.decoder.model import Decoder

pytestmark = pytest.mark.filterwarnings("ignore:.past_key_values:FutureWarning")

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 500.0}
LATENT = {"num_key_value_heads": 4, "kv_lora_rank": 32, "q_lora_rank": 24, "qk_nope_head_dim": 12, "v_head_dim": 20}
LATENT |= {"qk_rope_head_dim": 16}
EXPERTS = LATENT | {"n_routed_experts": 8, "moe_intermediate_size": 40, "num_experts_per_tok": 3, "n_group": 4}
EXPERTS |= {"topk_group": 2, "first_k_dense_replace": 1, "routed_scaling_factor": 1.7}
SOME = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
GLM = {"head_dim": 24, "n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
EIGHT = {"num_local_experts": 8, "num_experts_per_tok": 2}
GRANITE = {"attention_multiplier": 0.3, "embedding_multiplier": 3.0, "residual_multiplier": 0.4, "logits_scaling": 5.0}
WINDOW = {"num_hidden_layers": 4, "sliding_window": 9}
GEMMA = {"head_dim": 24, "query_pre_attn_scalar": 24, "tie_word_embeddings": True, "sliding_window": 9}
GEMMA4 = {"head_dim": 16, "global_head_dim": 32, "num_hidden_layers": 4, "sliding_window": 9, "pad_token_id": 0}
GEMMA4 |= {"layer_types": ["sliding_attention", "full_attention"] * 2}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 44}
LONGROPE |= {"short_factor": [1.0 + i / 8 for i in range(8)], "long_factor": [2.0 + i for i in range(8)]}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", WINDOW),
    "mixtral": ("mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen2_moe": ("qwen2_moe", SOME | {"shared_expert_intermediate_size": 56}),
    "qwen3_moe": ("qwen3_moe", SOME | {"head_dim": 24, "norm_topk_prob": True}),
    "gpt_oss": (
        "gpt_oss",
        {
            "head_dim": 24,
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
            "rope_parameters": YARN | {"truncate": False},
        }
        | WINDOW,
    ),
    "gemma2": ("gemma2", GEMMA | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}),
    "gemma4 small": (
        "gemma4_text",
        GEMMA4
        | {"num_kv_shared_layers": 2, "use_double_wide_mlp": True, "hidden_size_per_layer_input": 8}
        | {"vocab_size_per_layer_input": 97, "final_logit_softcapping": 3.0},
    ),
    "gemma4 with experts": (
        "gemma4_text",
        GEMMA4
        | {"attention_k_eq_v": True, "num_global_key_value_heads": 1, "hidden_size_per_layer_input": 0}
        | {"enable_moe_block": True, "num_experts": 5, "top_k_experts": 2, "moe_intermediate_size": 32},
    ),
    "phi3": ("phi3", {"sliding_window": 9}),
    "phi4 mini": ("phi3", {"tie_word_embeddings": True, "sliding_window": None, "rope_parameters": LONGROPE}),
    "granite": ("granite", GRANITE),
    "granite_moe": ("granitemoe", EIGHT | GRANITE),
    "granite_moe shared": ("granitemoeshared", EIGHT | GRANITE | {"shared_intermediate_size": 56}),
    "granite 4 without states": (
        "granitemoehybrid",
        GRANITE | {"layer_types": ["full_attention"] * 3, "num_local_experts": 0, "shared_intermediate_size": 80},
    ),
    "granite 4 of experts without states": (
        "granitemoehybrid",
        EIGHT
        | GRANITE
        | {"layer_types": ["full_attention"] * 3, "shared_intermediate_size": 80, "position_embedding_type": "rope"},
    ),
    "glm4": ("glm4", {"head_dim": 24}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", WINDOW),
    "cohere2": ("cohere2", WINDOW | {"logit_scale": 0.7}),
    "smollm3": ("smollm3", {"num_hidden_layers": 4}),
    "seed_oss": ("seed_oss", {"head_dim": 24, "attention_bias": True}),
    "ernie4_5": ("ernie4_5", {"head_dim": 24}),
    "hunyuan": (
        "hunyuan_v1_dense",
        {"head_dim": 16, "rope_parameters": {"rope_type": "dynamic", "factor": 1.0, "alpha": 50.0}},
    ),
    "deepseek_v2": ("deepseek_v2", EXPERTS | {"topk_method": "group_limited_greedy", "n_shared_experts": 2}),
    "deepseek_v2 lite": (
        "deepseek_v2",
        EXPERTS
        | {"q_lora_rank": None, "n_group": None, "topk_group": None}
        | {"rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}},
    ),
    "deepseek_v3": ("deepseek_v3", EXPERTS | {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}}),
    "deepseek_v32": ("deepseek_v32", EXPERTS | {"index_topk": 9, "index_n_heads": 24, "index_head_dim": 16}),
    "glm_moe_dsa": ("glm_moe_dsa", EXPERTS | {"index_topk": 9, "index_n_heads": 24, "index_head_dim": 16}),
    "glm4_moe": ("glm4_moe", GLM | {"attention_bias": True, "use_qk_norm": True, "routed_scaling_factor": 1.7}),
    "glm4_moe air": ("glm4_moe", GLM | {"n_shared_experts": 2}),
    "minimax_m2": ("minimax_m2", {"head_dim": 24, "num_local_experts": 6, "num_experts_per_tok": 2, "rotary_dim": 12}),
    "minicpm3": ("minicpm3", LATENT | {"v_head_dim": 16, "dim_model_base": 256, "scale_depth": 1.4, "scale_emb": 12}),
    **{name: HYBRIDS[name] for name in HYBRIDS if name not in ("minimax", "falcon_h1")},
    "qwen3_next": ("qwen3_next", {**HYBRIDS["qwen3_next"][1], "mlp_only_layers": []}),
    "falcon_h1": ("falcon_h1", HYBRIDS["falcon_h1"][1] | {"mamba_rms_norm": False}),
}


def converted(
    kind: str, options: dict[str, Any], folder: Path, kinds: dict[str, str] | None = None
) -> tuple[Any, Path]:
    """transformers' model, and the folder that its GGUF becomes. kinds: as in `write_gguf`."""
    model = reference(kind, options)
    model.save_pretrained(folder / "hf")
    weights = load_file(folder / "hf" / "model.safetensors")
    path = write_gguf(folder / "x.gguf", model.config, weights, kinds)
    (folder / "x").mkdir()
    convert(GgufFile(path), folder / "x", str(path), {})
    return model, folder / "x"


def decoder_of(folder: Path) -> Decoder:
    config = model_config(folder)
    with open_checkpoint(folder) as source:
        return decoder_with(config, load_model(config, source, torch.float32, torch.device(DEVICE)))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gguf_file_gives_logits_and_text_of_transformers(family: str, tmp_path: Path) -> None:
    model, folder = converted(*FAMILIES[family], tmp_path)
    decoder = decoder_of(folder)
    check_against(model, decoder)
    prompt = torch.randint(3, 97, (1, 19), generator=torch.Generator().manual_seed(2))
    wanted = model.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)[0].tolist()
    sequence, tokens = DenseAttention(decoder, 19), prompt[0].tolist()
    with torch.inference_mode():
        for _ in range(8):
            tokens.append(int(sequence.run(tokens[sequence.length :])[-1].argmax()))
    assert tokens == wanted


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_is_shown_with_what_it_takes(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Floats of 32 bits in the file, 16 or 32 in memory. A head for further tokens, which drafts may use, counts."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(Bandwidth, "__init__", lambda *_: None)  # to measure it takes a second
    monkeypatch.setattr(Bandwidth, "settled", lambda _: 1e10)
    model, _ = converted(*FAMILIES[family], tmp_path)
    shown = CliRunner().invoke(app, ["models", "show", str(tmp_path / "x.gguf"), "--json"])
    facts = json.loads(shown.stdout)
    of_model = {id(x): x.numel() for x in (*model.parameters(), *model.state_dict(keep_vars=True).values())}
    head = facts["parameters"] - sum(of_model.values())
    assert (head > 0) if family.startswith("glm4_moe") else (head == 0)
    assert facts["weight_kinds"] == {"F32": facts["weight_bytes"]} == {"F32": 4 * facts["parameters"]}
    assert facts["resident_bytes"] in (facts["weight_memory"]["bfloat16"], facts["weight_memory"]["float32"])
    assert facts["weight_memory"]["bfloat16"] >= 2 * facts["parameters"]
    assert (facts["fits"], facts["layers"]) == (True, model.config.num_hidden_layers)
    native = not family.startswith("gemma4")
    assert (facts["runs"], "kv_bytes_per_token" in facts) == ("native" if native else "converted", native)


PARTS = (
    "attn_q",
    "attn_k",
    "attn_qkv",
    "attn_gate",
    "ssm_in",
    "ssm_out",
    "ffn_up_exps",
    "ffn_gate_shexp",
    "ffn_up_shexp",
)


@pytest.mark.parametrize("family", ["llama with biases", "qwen3_next", "qwen3_5", "qwen3_5_moe", "granite 4"])
def test_what_is_packed_is_what_is_unpacked(family: str, tmp_path: Path) -> None:
    """Rows in another order, of several tensors, or of all experts'; columns in another order."""
    kinds = {f".{part}.weight": "Q8_0" for part in PARTS}
    _, folder = converted(*FAMILIES[family], tmp_path, kinds)
    packed = 0
    with open_checkpoint(folder) as source:
        for name in source.names():
            if (matrix := source.packed(name)) is not None:
                packed += 1
                assert matrix.shape == tuple(source.shape(name))
                assert torch.equal(matrix.floats(), source.tensor(name)), name
                rows = torch.arange(len(matrix.floats()) - 1, -1, -2)
                part = matrix.cut(rows, slice(32, 64))
                assert part is not None
                assert torch.equal(part.floats(), source.tensor(name)[rows, 32:64])
    assert packed >= 6


def test_packed_experts_of_a_converted_model_are_unpacked(tmp_path: Path) -> None:
    _, folder = converted(*FAMILIES["gemma4 with experts"], tmp_path, {"_exps.weight": "Q8_0", "attn_q.weight": "Q8_0"})
    with open_checkpoint(folder) as source:
        stacked = [name for name in source.names() if source.packed(name) is not None and "experts" in name]
        assert len(stacked) == 8
        for name in stacked:
            assert torch.equal(source.packed(name).floats().view(source.shape(name)), source.tensor(name))
    sequence = DenseAttention(decoder_of(folder), 19)
    with torch.inference_mode():
        assert torch.isfinite(sequence.run(list(range(19)))).all()


@pytest.mark.fault("F26")
@pytest.mark.parametrize(
    "family", ["gemma4 small", "gpt_oss", "deepseek_v3", "qwen3_5_moe", "granite 4", "falcon_h1", "phi4 mini"]
)
def test_a_changed_header_gives_an_error_or_tensors_inside_the_file(family: str, tmp_path: Path) -> None:
    """And so does the beginning of a file."""
    converted(*FAMILIES[family], tmp_path)
    content, header = (tmp_path / "x.gguf").read_bytes(), GgufFile(tmp_path / "x.gguf").header
    draw = random.Random(family)
    # Names and vocabulary are most of a header; numbers of metadata and of tensors stand before and behind them.
    places = [draw.randrange(header) for _ in range(60)] + [draw.randrange(1200) for _ in range(60)]
    changed = [content[:at] + bytes([draw.randrange(256)]) + content[at + 1 :] for at in places]
    changed += [content[: draw.randrange(len(content))] for _ in range(10)]
    outcomes = set()
    for number, lie in enumerate(changed):
        path, out = tmp_path / f"{number}.gguf", tmp_path / str(number)
        path.write_bytes(lie)
        out.mkdir()
        try:
            convert(GgufFile(path), out, str(path), {})
            with open_checkpoint(out) as source:
                for name in source.names():
                    assert tuple(source.tensor(name).shape) == tuple(source.shape(name))
            outcomes.add("read")
        except LaminaError:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


def test_more_experts_than_any_model_has_are_refused(tmp_path: Path) -> None:
    _, folder = converted(*FAMILIES["qwen3_moe"], tmp_path)
    file = GgufFile(folder.with_suffix(".gguf"))
    file.metadata.update({"qwen3moe.expert_count": 4096, "qwen3moe.block_count": 1024})
    with pytest.raises(ModelFileError, match="4096 experts in each of 1024 layers; allowed are 65536"):
        convert(file, tmp_path / "out", "x", {})


def test_every_architecture_is_met() -> None:
    met = {LAYOUTS.get(kind, kind) for kind, _ in FAMILIES.values()} | {"qwen2", "qwen3", "gemma3"}
    met |= {"mistral", "mixtral", "olmo3", "deepseek3", "nemotron_h_moe"}  # which have another's name
    assert met == set(ARCHITECTURES)
