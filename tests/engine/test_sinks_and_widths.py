"""Models with attention sinks, and with values of another width than keys, under an engine: transformers' logits. That
the text is the same wherever keys and values are held is in `test_one_text`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import engine_rig
import pytest
import torch
import transformers
from engine_rig import DEVICE, Rig
from policy_bench import STATIC, TIGHT, under

from lamina_protocols.messages.layers import HolderConfig
from lamina_workers.attention_worker.page_layout import page_layout
from lamina_workers.checkpoints.checkpoint import Checkpoint
from lamina_workers.decoder.graphs import Captured, Tensors, Work
from lamina_workers.decoder.model import Decoder
from lamina_workers.errors import UnsupportedModelError
from lamina_workers.model_config.config import ModelConfig
from lamina_workers.policies.catalogue import POLICIES

Reference = transformers.PreTrainedModel
PROMPT = [(7 * n) % 89 + 3 for n in range(70)]
STEPS = 10
COMMON = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "pad_token_id": None,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
MODELS: dict[str, dict[str, Any]] = {
    "sinks": {"model_type": "gpt_oss", "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 24},
    # With full attention, dense layers and whole rotation MiMo is a Llama with another width of values.
    "narrow values": {
        "model_type": "mimo_v2_flash",
        "v_head_dim": 16,
        "attention_value_scale": None,
        "layer_types": ["full_attention"] * 4,
        "mlp_layer_types": ["dense"] * 4,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}
        },
    },
}
PLACEMENTS: dict[str, dict[str, Any]] = {
    "fused": {},
    "heads on two": {"shard": "heads", "weights": (1, 1)},
    "ranges on two": {"shard": "sequence", "weights": (1, 1)},
}


def made(name: str, folder: Path, **more: Any) -> tuple[Reference, Decoder]:
    """transformers' model, and the same as Lamina loads it."""
    options = {**COMMON, **MODELS[name], **more}
    torch.manual_seed(11)
    config = transformers.AutoConfig.for_model(options.pop("model_type"), **options)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter, x in model.named_parameters():
            if parameter.endswith(("bias", "sinks")):
                x.add_(torch.randn_like(x) + parameter.endswith("sinks"))
    model.save_pretrained(folder)
    if name == "narrow values":
        raw = {**COMMON, "architectures": ["LlamaForCausalLM"], "v_head_dim": 16, "rope_theta": 1e4}
        (folder / "config.json").write_text(json.dumps(raw | {"rms_norm_eps": config.rms_norm_eps}))
    with Checkpoint(folder) as checkpoint:
        return model, Decoder.load(ModelConfig.from_folder(folder), checkpoint, torch.float32, DEVICE)


@pytest.fixture(scope="module", params=MODELS)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Reference, Decoder]:
    return made(request.param, tmp_path_factory.mktemp("model"))


def check(model: Reference, decoder: Decoder, **options: Any) -> None:
    found, expected = logits(model, decoder, **options)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def logits(model: Reference, decoder: Decoder, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a greedy decode of one prompt all logits on the way, and transformers', given the same tokens."""
    seen: list[torch.Tensor] = []

    def recorded(worker: Any, ports: Any) -> Any:
        compute = worker.compute

        def keeping(*arguments: Any) -> Any:
            logits, scores = yield from compute(*arguments)
            seen.append(logits.clone())
            return logits, scores

        worker.compute = keeping
        return worker

    rig = Rig(decoder, max_batch_tokens=16, around=recorded, **options)
    try:
        ((tokens,),) = rig.generate([PROMPT], max_tokens=STEPS, ignore_eos=True)
    finally:
        rig.close()
    with torch.inference_mode():
        expected = model(torch.tensor([PROMPT + tokens[:-1]])).logits[0, len(PROMPT) - 1 :]
    found = torch.cat([computed for computed in seen if len(computed)])
    assert len(found) == STEPS
    return found.cpu(), expected


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_logits_are_those_of_transformers(models: tuple[Reference, Decoder], placement: str) -> None:
    check(*models, **PLACEMENTS[placement])


class Again:
    """Records a graph by keeping the work: a launch does it again, into the tensors that it gave first."""

    def record(self, work: Work) -> tuple[Callable[[], None], Tensors]:
        results = tuple(x.clone() for x in work())

        def launch() -> None:
            for result, x in zip(results, work(), strict=True):
                result.copy_(x)

        return launch, results


def test_logits_stay_where_slices_are_graphs(models: tuple[Reference, Decoder]) -> None:
    model, decoder = models
    check(model, Captured(decoder, Again), **PLACEMENTS["heads on two"])


@pytest.mark.parametrize("shard", ["heads", "sequence"])
def test_int8_keys_and_values_stay_near(
    models: tuple[Reference, Decoder], shard: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = engine_rig.holder_config

    def quantised(decoder: Decoder, *sizes: Any) -> HolderConfig:
        at = plain(decoder, *sizes)
        return HolderConfig(at.layers, at.page_size, "int8", at.kv_memory)

    monkeypatch.setattr(engine_rig, "holder_config", quantised)
    found, expected = logits(*models, shard=shard, weights=(1, 1))
    assert (found - expected).abs().mean() < 0.05 * expected.std()


@pytest.mark.parametrize("placement", ["fused", "ranges on two"])
def test_a_policy_inside_the_models_window(tmp_path: Path, placement: str) -> None:
    """A policy that sees 11 tokens makes of layers that see 24, or all, what a model with such windows is."""
    narrow = {"sliding_window": 11, "layer_types": ["sliding_attention"] * 4}
    model, _ = made("sinks", tmp_path / "narrow", **narrow)
    _, decoder = made("sinks", tmp_path / "wide")
    check(model, under(decoder, "streaming(sink=0, recent=11)"), **PLACEMENTS[placement])


def test_a_width_that_no_page_has_is_named() -> None:
    layers = ModelConfig.from_dict(engine_rig.TINY | {"v_head_dim": 10}).layer_specs()
    with pytest.raises(UnsupportedModelError, match="d_v must be a multiple of 16 from 16 to 512, got 10"):
        page_layout(HolderConfig(layers, 16, "float32", 1))


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_runs(models: tuple[Reference, Decoder], policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for cost in ("CALL", "BYTE"):
        monkeypatch.setattr(f"lamina_workers.policies.retrieval.{cost}", 0)
    answers = []
    for placement in ("fused", "heads on two"):
        rig = Rig(under(models[1], TIGHT[policy]), **PLACEMENTS[placement])
        answers.append(rig.generate([PROMPT * 3], max_tokens=STEPS, ignore_eos=True))
        rig.close()
    assert all(len(tokens) == STEPS for ((tokens,),) in answers)
    assert answers[0] == answers[1] or policy not in STATIC
