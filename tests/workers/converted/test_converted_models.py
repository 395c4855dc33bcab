"""Models that Lamina has no class for, against transformers, through a real attention worker."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from evaluate import tiny_models
from safetensors.torch import load_file, save_file

from lamina.errors import InvalidRequest
from lamina.launch.model_files import rescaled
from lamina_workers.checkpoints.checkpoint import Checkpoint
from lamina_workers.converted.config import converted_config
from lamina_workers.converted.decoder import ConvertedDecoder, packed_of, unpacked
from lamina_workers.converted.modeling import converting
from lamina_workers.converted.models import decoder_of, for_ranks, load_model, model_config
from lamina_workers.converted.weights import cut_live
from lamina_workers.decoder.logprobs import PromptTokens
from lamina_workers.decoder.model import Batch, KeyValueReady
from lamina_workers.decoder.prompt_scores import PromptScorer
from lamina_workers.errors import ModelFileError, RanksError, UnsupportedModelError

FAMILIES: dict[str, dict[str, Any]] = {
    "gemma2": {"sliding_window": 9, "head_dim": 32},
    "gemma3_text": {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gpt2": {},
    "gpt_neox": {"rotary_pct": 0.5},
    "starcoder2": {"sliding_window": 11},
    "cohere2": {"sliding_window": 9},
    "olmo2": {},
    "glm4": {"head_dim": 16},
    "phi3": {},
    "granite": {"attention_multiplier": 0.2, "residual_multiplier": 0.5},
    "stablelm": {"use_qkv_bias": True},
    "exaone4": {"sliding_window": 8},
    "ernie4_5": {"head_dim": 16},
    "opt": {},
    "qwen2_moe": {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "gpt_oss": {"sliding_window": 9, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    "minicpm3": {"num_key_value_heads": 4},
}
"""Windows, soft caps, sinks, partial RoPE, learned positions, parallel blocks, experts, d_k that is not d_v."""


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(level)


@pytest.mark.parametrize("family", FAMILIES)
def test_family_equals_transformers(family: str, tmp_path: Path) -> None:
    """Also of families that Lamina has a class for."""
    model = tiny_models.make(family, tmp_path, **FAMILIES[family])
    decoder = tiny_models.load(tmp_path, converts=True)
    assert isinstance(decoder, ConvertedDecoder)
    assert decoder.in_slices
    assert tiny_models.difference(model, tmp_path, decoder) < 1e-4
    if family in ("gpt2", "qwen2_moe"):
        assert tiny_models.difference(model, tmp_path, decoder.as_module()) < 1e-4


def test_only_the_residual_stream_lives_across_attention(tmp_path: Path) -> None:
    tiny_models.make("stablelm", tmp_path)
    live = cut_live(model_config(tmp_path), torch.float32)
    assert live == ((), *[("64 x float32",)] * 3)


def finished(forward: Any, answer: torch.Tensor, events: list[KeyValueReady] | None = None) -> torch.Tensor:
    """The logits, where attention always yields `answer`."""
    try:
        event = next(forward)
        while True:
            if isinstance(event, KeyValueReady) and events is not None:
                events.append(event)
            event = forward.send(answer if isinstance(event, KeyValueReady) else None)
    except StopIteration as end:
        logits: torch.Tensor = end.value
        return logits


@pytest.mark.parametrize("family", ["gpt2", "phi3", "gemma2"])
def test_a_run_begins_behind_any_attention(family: str, tmp_path: Path) -> None:
    tiny_models.make(family, tmp_path)
    decoder = tiny_models.load(tmp_path, converts=True)
    spec = decoder.config.layer_specs()[0]
    answer = torch.randn(5, spec.heads * spec.d_v, generator=torch.Generator().manual_seed(1))
    for sampled in ([], [4], [3, 0, 3]):
        batch = Batch(torch.arange(5) * 7 % 97, torch.arange(5), torch.tensor(sampled, dtype=torch.int64))
        with torch.inference_mode():
            events: list[KeyValueReady] = []
            logits = finished(decoder.forward(batch), answer, events)
            assert logits.shape == (len(sampled), 97)
            for event in events:
                assert event.hidden is not None
                again = finished(decoder.forward(batch, event.hidden.clone(), event.layer, answer), answer)
                torch.testing.assert_close(again, logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("in_slices", [True, False])
def test_prompts_are_scored(in_slices: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lamina_workers.decoder.prompt_scores._BLOCK", 97 * 3)  # three rows at a time
    tiny_models.make("gpt2", tmp_path)
    decoder = tiny_models.load(tmp_path, converts=True)
    decoder = decoder if in_slices else decoder.as_module()
    spec = decoder.config.layer_specs()[0]
    answer = torch.randn(5, spec.heads * spec.d_v, generator=torch.Generator().manual_seed(1))
    scorer = PromptScorer([PromptTokens(0, 7, 4, (5, 6, 7, 8), 2)], 97, torch.device("cpu"))
    ids, positions = torch.arange(5) * 7 % 97, torch.arange(5)
    with torch.inference_mode():
        whole = finished(decoder.forward(Batch(ids, positions, positions)), answer).log_softmax(-1)
        logits = finished(decoder.forward(Batch(ids, positions, torch.tensor([4]), scorer=scorer)), answer)
    torch.testing.assert_close(logits.log_softmax(-1), whole[4:], rtol=0, atol=1e-5)
    (scores,) = scorer.scores
    assert scores.start == 7
    assert [report.chosen for report in scores.logprobs] == pytest.approx(
        [float(whole[at, target]) for at, target in enumerate((5, 6, 7, 8))], abs=1e-5
    )
    assert [report.top[0][0] for report in scores.logprobs] == whole[:4].argmax(-1).tolist()


def test_what_lives_across_a_cut_comes_back_as_it_was() -> None:
    from lamina_workers.converted.cuts import Live
    from lamina_workers.converted.recording import Ref, Size

    tokens = Size(1, 0)
    parts = [Live(Ref(1), torch.bfloat16, (1, tokens, 6), 1, 6), Live(Ref(2), torch.float32, (1, 3, tokens, 2), 2, 6)]
    live = [torch.randn(1, 5, 6).bfloat16(), torch.randn(1, 3, 5, 2)]
    packed = packed_of(parts, live, torch.zeros(5))
    assert packed.shape == (5, 6 * 2 + 6 * 4)
    for found, expected in zip(unpacked(parts, packed), live, strict=True):
        assert torch.equal(found, expected)


def changed(folder: Path, **values: Any) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **values}))


def test_a_config_that_promises_endless_layers_is_refused_at_once(tmp_path: Path) -> None:
    tiny_models.make("stablelm", tmp_path)
    changed(tmp_path, num_hidden_layers=10**9, layer_types=None)
    since = time.monotonic()
    with pytest.raises(ModelFileError, match="num_hidden_layers is 1000000000"):
        model_config(tmp_path)
    assert time.monotonic() - since < 60


def test_remote_code_is_named_and_not_run(tmp_path: Path) -> None:
    (tmp_path / "modeling_own.py").write_text("raise SystemExit('this must not run')")
    own = {"AutoConfig": "modeling_own.Config", "AutoModelForCausalLM": "modeling_own.Model"}
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": own})
    )
    with pytest.raises(UnsupportedModelError, match="its code is remote, which is never run"):
        model_config(tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [("missing", "lacks model.layers.2.mlp.up_proj.weight"), ("extra", "has unexpected model.layers.9.own.weight")],
)
def test_a_checkpoint_must_have_each_tensor(change: str, says: str, tmp_path: Path) -> None:
    tiny_models.make("stablelm", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    if change == "missing":
        del tensors["model.layers.2.mlp.up_proj.weight"]
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.9.own.weight"] = torch.zeros(9000)
    if change == "missing":
        del tensors["model.layers.9.own.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelFileError, match=says):
        tiny_models.load(tmp_path)


def test_a_model_with_positions_of_its_own_is_refused(tmp_path: Path) -> None:
    """Those of RoBERTa begin behind the padding's."""
    tiny_models.make("roberta", tmp_path)
    with pytest.raises(UnsupportedModelError, match="counts positions in a way of its own"):
        tiny_models.load(tmp_path)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("diffllama", "more than one attention in a layer"),
        ("bert", "not causal"),
        ("mamba", "keep a state"),
        ("bloom", "without transformers' attention interface"),
        ("bart", "an encoder and a decoder"),
        ("bamba", "keep a state"),
    ],
)
def test_what_cannot_run_is_refused_by_name(kind: str, says: str, tmp_path: Path) -> None:
    tiny_models.write_config(kind, tmp_path, is_decoder=False)
    with pytest.raises(UnsupportedModelError, match=says):
        model_config(tmp_path)


def test_limits_of_converted_models_have_errors(tmp_path: Path) -> None:
    tiny_models.make("stablelm", tmp_path)
    config = model_config(tmp_path)
    with pytest.raises(RanksError, match="is converted, so it runs on 1 rank; 2 were asked for"):
        for_ranks(config, 2)
    with pytest.raises(InvalidRequest, match="rope_scaling"):
        rescaled(config, {"rope_type": "linear", "factor": 2.0})


def test_what_the_model_asks_of_other_files_is_dropped(tmp_path: Path) -> None:
    model = tiny_models.make("stablelm", tmp_path)
    changed(
        tmp_path,
        _attn_implementation="kernels-community/flash-attn",
        attn_implementation="kernels-community/flash-attn",
        auto_map={"AutoModelForCausalLM": "org/name--modeling_own.Model"},
        transformers_weights="other.safetensors",
    )
    assert tiny_models.difference(model, tmp_path, tiny_models.load(tmp_path)) < 1e-4


def test_a_model_type_that_is_no_text_is_not_looked_up(tmp_path: Path) -> None:
    """A list was looked up in a set: a TypeError."""
    tiny_models.make("llama", tmp_path)
    changed(tmp_path, model_type=["llama"])
    assert model_config(tmp_path).architecture == "LlamaForCausalLM"


@pytest.mark.parametrize("kind", ["stablelm", "olmoe", "minimax_m2"])
def test_a_checkpoint_in_fp8_is_unpacked(kind: str, tmp_path: Path) -> None:
    model = tiny_models.make(kind, tmp_path)
    values, tensors = load_file(tmp_path / "model.safetensors"), {}
    for name, tensor in values.items():
        tensors[name] = tensor
        if name.endswith(("proj.weight", "w1.weight", "w2.weight", "w3.weight")):
            tensors[name] = (tensor * 1000).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = torch.full((1, 1), 1e-3)
            values[name] = tensors[name].float() * 1e-3
    assert len(tensors) > len(values) + 8
    save_file(values, tmp_path / "model.safetensors", {"format": "pt"})
    model = type(model).from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager").eval()
    save_file(tensors, tmp_path / "model.safetensors")
    changed(tmp_path, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    assert tiny_models.difference(model, tmp_path, tiny_models.load(tmp_path)) < 1e-4


def test_a_checkpoint_quantized_in_an_unknown_way_is_refused(tmp_path: Path) -> None:
    tiny_models.make("stablelm", tmp_path)
    changed(tmp_path, quantization_config={"quant_method": "hqq"})
    with pytest.raises(UnsupportedModelError, match="quantised by 'hqq'; supported are fp8"):
        model_config(tmp_path)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_slices_that_are_spans_compute_what_the_slices_compute(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16, where the machine has spans; elsewhere both are slices."""
    tiny_models.make(kind, tmp_path, head_dim=32, intermediate_size=96, vocab_size=96)
    native = model_config(tmp_path)
    config = converted_config(json.loads((tmp_path / "config.json").read_text()))
    answer = torch.randn(5, native.num_attention_heads * 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    batch = Batch(torch.arange(5) * 7 % 96, torch.arange(5), torch.tensor([4, 0]))
    found = []
    for spans in (True, False):
        with Checkpoint(tmp_path) as checkpoint, torch.inference_mode():
            if not spans:
                monkeypatch.setattr("lamina_kernels.compile.programs.can_run", lambda: False)
            decoder = decoder_of(config, load_model(config, checkpoint, torch.bfloat16, torch.device("cpu")))
            assert isinstance(decoder, ConvertedDecoder)
            assert decoder.in_slices
            found.append(finished(decoder.forward(batch), answer))
    with Checkpoint(tmp_path) as checkpoint, torch.inference_mode():
        decoder = decoder_of(native, load_model(native, checkpoint, torch.bfloat16, torch.device("cpu")))
        found.append(finished(decoder.forward(batch), answer))
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, rtol=0, atol=0.05 * float(found[0].std()))


def test_a_conversion_that_never_ends_is_ended() -> None:
    since = time.monotonic()

    def endless() -> None:
        x = torch.zeros(1)
        with converting("cutting", 1.0):
            while time.monotonic() - since < 60:
                x = x + 1

    with pytest.raises(UnsupportedModelError, match="cutting the model takes longer than 1 seconds"):
        endless()
    assert time.monotonic() - since < 60
